r"""Two skills of SmolLM2 by LoRA, merged three ways and one taken out again: the numbers of docs/a-merging-story.md.

    pip install --no-deps botocore        # its texts are read, its code is not run
    python benchmarks/merging_story.py --out story --json benchmarks/results/merging-story.json \
        --picture docs/merging-story.png --page docs/a-merging-story.md

Every model is scored on unseen documents of both kinds, window by window, beside the base. An interrupted run goes on
where it was: adapters that are there are not trained again.
"""

import argparse
import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lineament import data, io, tasks, train, weights
from lineament.models import load_teacher
from lineament.report import curve, machine

KINDS = {"cloud": "cloud-docs", "python": "python-source"}  # manuals of cloud services, and source code
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# in the upper half of the layers: the backward pass ends there, which saves a third of the time
LORA = {"r": 8, "lora_alpha": 16, "target_modules": PROJECTIONS, "layers_to_transform": [*range(15, 30)]}
BEGINNING = 6000  # characters of each document that are used: many documents and little to tokenise
MARKS = ("<!-- what the run printed -->", "<!-- end of the run -->")
SHARED = 0.02  # how near to the base a text's perplexity must come back when its skill is taken out


@cache
def texts(name: str, split: str) -> list[str]:
    return [document[:BEGINNING] for document in data.load_text(name, split=split)]


def batches(tokenizer: Any, names: list[str], asked: argparse.Namespace) -> Any:
    """Return step -> ids [rows of every kind, length]; one kind's rows are the same whether it is alone or not."""
    packed = [data.pack(texts(name, "train"), tokenizer, asked.length, boundaries=False) for name in names]
    draws = [data.batches(one, asked.rows, seed=asked.seed) for one in packed]
    return lambda step: torch.cat([draw(step)["input_ids"] for draw in draws])


def adapter(model: nn.Module, tokenizer: Any, names: list[str], folder: Path, asked: argparse.Namespace) -> Path:
    """Train a LoRA on some texts and save it; the model is as it was afterwards."""
    if folder.is_dir():
        return folder
    print(f"{time.process_time():.0f} s", folder.name, flush=True)
    torch.manual_seed(asked.seed)
    net = get_peft_model(model, LoraConfig(**LORA)).train()
    config = train.FitConfig(steps=asked.steps, lr=asked.lr, warmup=asked.steps // 10, seed=asked.seed)
    draw = batches(tokenizer, names, asked)
    train.fit(net, draw, tasks.next_token_loss, config, out=f"{folder}.run", description=folder.name)
    with io.building_folder(folder) as partial:
        net.save_pretrained(str(partial), save_embedding_layers=False)
    net.unload().eval()
    return folder


def models(base: weights.Point, folders: dict[str, Path]) -> dict[str, weights.Point]:
    """Name -> the point: the parents, the joint one, three merges, and a merge without one of its skills."""
    tuned = {name: weights.Point.open(folder, base=base) for name, folder in folders.items()}
    parents = [tuned[kind] for kind in KINDS]
    added = weights.merge(parents, "task_arithmetic", base=base, weight=1.0)
    return {
        "base": base, **tuned,
        "average": weights.merge(parents, "linear", weight=1.0),
        "task arithmetic": added,
        "ties": weights.merge(parents, "ties", base=base, weight=1.0, density=0.5),
        "task arithmetic - python": added - (tuned["python"] - base),
    }  # fmt: skip


def scored(model: nn.Module, points: dict[str, weights.Point], unseen: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Score every point on every text: perplexity, and its ratio to the base's and the joint one's with intervals."""
    found: dict[str, dict[str, tasks.Perplexity]] = {}
    for name, point in points.items():
        point.load_into(model)
        found[name] = {kind: tasks.perplexity(model, windows, batch_size=4) for kind, windows in unseen.items()}
        told = {kind: round(of.value, 3) for kind, of in found[name].items()}
        print(f"{time.process_time():.0f} s", name, told, flush=True)
    rows = []
    for name, of in found.items():
        row: dict[str, Any] = {"model": name}
        for kind, score in of.items():
            row[f"{kind} perplexity"] = score.value
            row[f"{kind} / base"] = tasks.bootstrap_ratio(score, found["base"][kind])
            row[f"{kind} / joint"] = tasks.bootstrap_ratio(score, found["joint"][kind])
        rows.append(row)
    return rows


def tables(result: dict[str, Any]) -> str:
    """Write the result as Markdown: what stands between the marks of the page."""

    def ratio(of: Any) -> str:
        return "{:.3f} [{:.3f}, {:.3f}]".format(*of)

    heads = [f"{kind}: perplexity | over the base | over the joint LoRA" for kind in KINDS]
    lines = [f"| model | {' | '.join(heads)} |"]
    lines.append("|---" * (1 + 3 * len(KINDS)) + "|")
    for row in result["models"]:
        cells = [
            f"{row[f'{kind} perplexity']:.2f} | {ratio(row[f'{kind} / base'])} | {ratio(row[f'{kind} / joint'])}"
            for kind in KINDS
        ]
        lines.append(f"| {row['model']} | " + " | ".join(cells) + " |")
    barrier = ", ".join(f"{value:+.4f} on {kind} text" for kind, value in result["barrier"].items())
    out = result["taken out"]
    verdict = f"{'within' if out['held'] else 'not within'} {out['within']:.0%} of the base"
    told = [
        f"Scored tokens: {result['scored tokens']}; 95 % intervals by paired bootstrap over the windows.",
        f"The skills stand at {result['angle between the skills, degrees']:.1f} degrees to each other.",
        f"Barrier on the line between the two tunes, in nats per token: {barrier}.",
        f"With its skill subtracted, python text is at {ratio(out['python / base'])} of the base: {verdict}.",
        f"A tune minus its own skill is the base to the bit: {result['a tune minus its own skill is the base']}.",
        f"{result['cpu seconds']:.0f} s of one core ({result['machine']['cpu']}).",
    ]
    return "\n".join([*lines, "", *told])


def written(page: Path, result: dict[str, Any], picture: Path | None) -> None:
    """Put the tables, and the picture that lies beside the page, between the marks of a page."""
    shown = f"\n\n![the loss between the two tunes]({picture.name})" if picture else ""
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    io.write_text(page, f"{before}{MARKS[0]}\n{tables(result)}{shown}\n{MARKS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapters")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=1, help="of each kind of text in a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row and of a scored window")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--windows", type=int, default=6, help="scored of each kind of text")
    parser.add_argument("--points", type=int, default=3, help="places between the two parents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--page", type=Path, help="put the tables into this page, between its marks")
    asked = parser.parse_args()
    began = time.process_time()
    model, tokenizer = load_teacher(asked.model)
    unseen = {
        kind: data.windows(texts(name, "test"), tokenizer, asked.length, max_tokens=asked.windows * asked.length)
        for kind, name in KINDS.items()
    }
    wanted = {**{kind: [name] for kind, name in KINDS.items()}, "joint": list(KINDS.values())}
    folders = {name: adapter(model, tokenizer, names, asked.out / name, asked) for name, names in wanted.items()}
    base = weights.Point.open(asked.model)
    points = models(base, folders)
    angle = (points["cloud"] - base).angle(points["python"] - base)
    rows = scored(model, points, unseen)
    back = rows[-1]["python / base"]
    undone = points["python"] - (points["python"] - base)
    line = weights.path(
        model, points["cloud"], points["python"],
        {kind: windows[: asked.windows // 2].split(1) for kind, windows in unseen.items()},
        loss=tasks.next_token_loss, points=asked.points,
    )  # fmt: skip
    result = {
        "machine": machine(), "settings": {k: str(v) for k, v in vars(asked).items() if v is not None and k not in
                                           ("out", "json", "picture", "page")},
        "lora": LORA, "scored tokens": {kind: windows.numel() for kind, windows in unseen.items()}, "models": rows,
        "angle between the skills, degrees": angle * 180 / torch.pi,
        "taken out": {"python / base": back, "within": SHARED, "held": abs(back[0] - 1) <= SHARED},
        "a tune minus its own skill is the base": all(torch.equal(undone[name], base[name]) for name in base),
        "path": line.rows(), "barrier": {kind: line.rise(split=kind) for kind in unseen},
        "cpu seconds": time.process_time() - began,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if asked.json:
        io.write_json(asked.json, result)
    if asked.picture:
        series = {f"{kind} text": (line.t, *zip(*of["loss"], strict=True)) for kind, of in line.curves.items()}
        drawn = curve(series, xlabel="from the cloud tune (0) to the python tune (1)", ylabel="nats per token")
        io.write_bytes(asked.picture, drawn)
    if asked.page:
        written(asked.page, result, asked.picture)


if __name__ == "__main__":
    main()
