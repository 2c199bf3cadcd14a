"""Estimates of patching on the embedded model: how many prompts it solves, and correlation with patching beside cost.

python benchmarks/circuits.py --prompts 8 --head-prompts 2 --steps 3
python benchmarks/circuits.py --quick
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from lineament.explain import agreement
from lineament.explain.circuit_page import _single, batch, solved
from lineament.models import load_teacher
from lineament.report import machine
from lineament.tasks.prompt_pairs import TASKS, encode


def main() -> None:
    """Print the share of prompts solved, then a row per kind of place as it is found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--task", default="ioi", choices=list(TASKS))
    parser.add_argument("--asked", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--head-prompts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="of integrated gradients")
    parser.add_argument("--kinds", nargs="*", default=["residual", "mlp", "attention", "head"])
    parser.add_argument("--methods", nargs="*", default=["attribution", "relp", "integrated-gradients"])
    parser.add_argument(
        "--positions", nargs="*", type=int, help="the places looked at, all if left out; -1 is the last"
    )
    parser.add_argument("--quick", action="store_true", help="one prompt of eight, attribution of the residual stream")
    parser.add_argument("--json", type=Path, help="write the rows and the machine's description here")
    given = parser.parse_args()
    if given.quick:
        given.asked, given.prompts, given.kinds, given.methods = 8, 1, ["residual"], ["attribution"]
    torch.set_num_threads(1)
    model, tokenizer = load_teacher(given.model)
    pairs = TASKS[given.task](given.asked, fits=lambda word: _single(tokenizer, word))
    encoded = encode(tokenizer, pairs)
    right, first = solved(model, encoded)
    share = {"asked": given.asked, "solved": int(right.sum()), "likeliest": int(first.sum())}
    result: dict[str, Any] = {"machine": machine(), "model": given.model, "task": given.task, **share, "rows": []}
    print(json.dumps(share), flush=True)
    length = encoded.last[right].mode().values  # of one length, so that no place stands behind a prompt's end
    chosen = (right & (encoded.last == length)).nonzero().flatten().tolist()
    for kind in given.kinds:
        rows = chosen[: given.head_prompts if kind == "head" else given.prompts]
        clean, corrupt, metric = batch(encoded.rows(rows))
        between = metric.between(model, clean, corrupt)
        options = {
            "steps": given.steps,
            "rows": 48,
            "positions": given.positions,
            "said": lambda x: print(x, flush=True),
        }
        found = agreement(model, clean, corrupt, between, kinds=[kind], methods=given.methods, **options)[0]
        result["rows"].append(found | {"prompts": len(rows), "tokens": int(length) + 1})
        print(json.dumps(result["rows"][-1]), flush=True)
        if given.json:
            given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
