"""Estimates of patching on the embedded model: how many prompts it solves, and correlation with patching beside cost.

    python benchmarks/circuits.py --asked 100 --prompts 100 --head-prompts 20 --steps 10 --work begun --json FILE
    python benchmarks/circuits.py --quick

Prompts of one length run together. Correlations are over all prompts, layers and positions; RelP's lead over
attribution patching has a 95 % interval over prompts drawn again. Scores that are done stand in --work, by kind of
place, method and batch, and the same command goes on after them; another command adds to them.
"""

import argparse
import hashlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineament import explain, io
from lineament._base.seeds import generator
from lineament.explain.circuit_page import batch, solved
from lineament.explain.effects import sites_of
from lineament.models import load_teacher
from lineament.report import machine
from lineament.tasks.prompt_pairs import TASKS, Encoded, encode, one_token

BATCH, ROWS, DRAWS = 24, 48, 2000
"""Prompts in a batch, rows of a forward pass, draws of prompts for an interval."""


def batches(encoded: Encoded, chosen: Sequence[int]) -> list[list[int]]:
    """Return prompts in batches of one length, lengths in turns: no place stands behind a prompt's end."""
    lengths: dict[int, list[int]] = {}
    for row in chosen:
        lengths.setdefault(int(encoded.last[row]), []).append(row)
    parts = [(at, rows[at : at + BATCH]) for rows in lengths.values() for at in range(0, len(rows), BATCH)]
    return [rows for _, rows in sorted(parts, key=lambda part: part[0])]


def scores(model: Any, encoded: Encoded, rows: list[int], kind: str, method: str, **options: Any) -> dict[str, Tensor]:
    """Return the effects of all places of a kind on some prompts, side by side [B, cells], and CPU seconds."""
    clean, corrupt, metric = batch(encoded.rows(rows))
    sites, by = sites_of(model, kind)
    between, began = metric.between(model, clean, corrupt), time.process_time()
    found = explain.effects(model, clean, corrupt, between, sites, method=method, by=by, rows=ROWS, **options)
    seconds = torch.tensor(time.process_time() - began, dtype=torch.float64)
    return {"scores": torch.cat([x.flatten(1) for x in found.scores.values()], 1), "seconds": seconds}


def sums(x: Mapping[int, Tensor], y: Mapping[int, Tensor]) -> Tensor:
    """Return, for each prompt of x, what its correlation with y is made of [B, 6]."""
    rows = []
    for prompt, a in x.items():
        a, b = a.double(), y[prompt].double()
        rows.append(torch.stack([torch.ones_like(a), a, b, a * a, b * b, a * b]).sum(-1))
    return torch.stack(rows)


def pearson(found: Tensor) -> Tensor:
    """Return the correlation from sums [..., 6]."""
    n, x, y, xx, yy, xy = found.unbind(-1)
    return (n * xy - x * y) / ((n * xx - x * x) * (n * yy - y * y)).sqrt()


def row_of(
    kind: str, found: Mapping[str, dict[int, Tensor]], seconds: Mapping[tuple[str, str], float]
) -> dict[str, Any]:
    """Return a kind's correlations with patching by method, and CPU seconds a prompt."""
    truth = found["patch"]
    row: dict[str, Any] = {"places": kind, "prompts": len(truth), "scores": sum(x.numel() for x in truth.values())}
    made = {name: sums(x, truth) for name, x in found.items() if name != "patch"}
    for name, x in made.items():
        row |= {name: float(pearson(x.sum(0)))} | ({f"{name}, prompts": len(x)} if len(x) < len(truth) else {})
    if {"relp", "attribution"} <= set(made):
        draw = torch.randint(len(truth), (DRAWS, len(truth)), generator=generator(0))
        leads = pearson(made["relp"][draw].sum(1)) - pearson(made["attribution"][draw].sum(1))
        low, high = leads.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        row |= {"relp ahead by": row["relp"] - row["attribution"], "low": low, "high": high}
    return row | {f"{name}, CPU s a prompt": seconds[kind, name] / len(x) for name, x in found.items()}


def main() -> None:
    """Print the share of prompts solved, what is found batch by batch, and a row per kind of place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--task", default="ioi", choices=list(TASKS))
    parser.add_argument("--asked", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--head-prompts", type=int, default=20)
    parser.add_argument("--path-prompts", type=int, help="the first so many for integrated gradients; all if left out")
    parser.add_argument("--steps", type=int, default=10, help="of integrated gradients")
    parser.add_argument("--kinds", nargs="*", default=["residual", "mlp", "head", "attention"])
    parser.add_argument("--methods", nargs="*", default=["attribution", "relp", "integrated-gradients"])
    parser.add_argument("--positions", nargs="*", type=int, help="the places looked at, all if left out; -1: the last")
    parser.add_argument("--quick", action="store_true", help="one prompt of eight, attribution of the residual stream")
    parser.add_argument("--work", type=Path, help="folder of finished scores, to go on from")
    parser.add_argument("--json", type=Path, help="write the rows and the machine's description here")
    given = parser.parse_args()
    if given.quick:
        given.asked, given.prompts, given.kinds, given.methods = 8, 1, ["residual"], ["attribution"]
    torch.set_num_threads(1)
    model, tokenizer = load_teacher(given.model)
    pairs = TASKS[given.task](given.asked, fits=lambda word: one_token(tokenizer, word))
    encoded, parts = encode(tokenizer, pairs), io.Parts(given.work)
    right, first = parts.value(
        f"solved-{given.task}-{given.asked}", lambda: [x.tolist() for x in solved(model, encoded)]
    )
    share = {"asked": given.asked, "solved": sum(right), "likeliest": sum(first)}
    result: dict[str, Any] = {"machine": machine(), "model": given.model, "task": given.task, **share, "rows": []}
    print(json.dumps(share), flush=True)
    options = {"steps": given.steps, "positions": given.positions}
    solves = [row for row, yes in enumerate(right) if yes][: given.prompts]
    found: dict[str, dict[str, dict[int, Tensor]]] = {kind: {} for kind in given.kinds}
    seconds: dict[tuple[str, str], float] = {}
    for several in batches(encoded, solves):
        for kind, method in itertools.product(given.kinds, ("patch", *given.methods)):
            path = method == "integrated-gradients"
            most = given.head_prompts if kind == "head" else given.path_prompts if path else None
            rows = [row for row in several if row in solves[:most]]
            if not rows:
                continue
            about = [given.model, given.task, given.asked, options if path else given.positions, rows]
            name = f"{kind}-{method}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]}"
            made = parts.tensors(name, lambda r=rows, m=method, k=kind: scores(model, encoded, r, k, m, **options))
            found[kind].setdefault(method, {}).update(zip(rows, made["scores"], strict=True))
            seconds[kind, method] = seconds.get((kind, method), 0.0) + float(made["seconds"])
            print(f"{kind}: {method} of {len(found[kind][method])} prompts, {seconds[kind, method]:.1f} s", flush=True)
        result["rows"] = [row_of(kind, found[kind], seconds) for kind in given.kinds if found[kind]]
        if given.json:
            io.write_json(given.json, result, indent=1)
    for row in result["rows"]:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
