r"""Four LoRAs of SmolLM2 in one model: a coefficient per block and LoRA, learned (aTLAS), beside the best single one.

    pip install --no-deps botocore        # its texts are read, its code is not run
    python benchmarks/composing.py --out story --json benchmarks/results/composing.json

The LoRAs are those of merging_story.py and two more, trained in the same way on the `train` part of their texts.
Coefficients are fitted, and the single one is chosen, on the `place` part of all four; what is reported are windows of
the `test` part. An interrupted run does not train again what is there.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineament import data, io, tasks, train, weights
from lineament.models import load_teacher
from lineament.report import machine
from lineament.weights import compose
from merging_story import adapter, texts

KINDS = {"cloud": "cloud-docs", "python": "python-source", "wiki": "wiki-sample", "docs": "docs"}
GRID = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4)  # of the single coefficient
RATE, DECAY = 0.1, 0.1  # of the learned ones, from zero on, as in the paper


def cut(tokenizer: Any, split: str, count: int, length: int) -> dict[str, Tensor]:
    """Return the first windows of every kind, [count, length]."""
    rows = {}
    for kind, name in KINDS.items():
        rows[kind] = data.windows(texts(name, split), tokenizer, length, max_tokens=count * length)
        if len(rows[kind]) < count:
            raise SystemExit(f"{name} has {len(rows[kind])} windows of {length} tokens in {split}; wanted {count}")
    return rows


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def learned(composed: compose.Composed, fits: dict[str, Tensor], asked: argparse.Namespace) -> None:
    """Fit the coefficients from zero: a step sees one window of every kind."""
    nn.init.zeros_(composed.coefficients)

    def draw(step: int) -> Tensor:
        return torch.stack([rows[step % len(rows)] for rows in fits.values()])

    config = train.FitConfig(steps=asked.steps, lr=RATE, schedule="constant", weight_decay=DECAY, seed=asked.seed)
    train.fit(composed, draw, lambda m, batch: (loss(m, batch), {}), config, description="compose")


def point_of(base: weights.Point, composed: compose.Composed) -> weights.Point:
    """Return base plus the task vectors as the coefficients stand, apart from the model they were fitted on."""
    table = composed.coefficients.detach().clone()
    for i, vector in enumerate(composed.vectors):
        numbers = dict(zip(composed.blocks, table[i, :, 0].tolist(), strict=True))
        base = base + vector.scale(lambda name, numbers=numbers: numbers.get(name, 0.0))
    return base


def scored(model: nn.Module, points: dict[str, weights.Point], unseen: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Score every point on every kind, and on all of them together beside the best single coefficient."""
    found = {}
    for name, point in points.items():
        point.load_into(model)
        found[name] = {kind: tasks.perplexity(model, rows, batch_size=4) for kind, rows in unseen.items()}
        found[name]["all"] = tasks.Perplexity(
            torch.cat([of.per_window for of in found[name].values()]), next(iter(found[name].values())).scored
        )
        print(
            f"{time.process_time():.0f} s", name, {k: round(of.value, 3) for k, of in found[name].items()}, flush=True
        )
    return [
        {"model": name, **{k: score.value for k, score in of.items()},
         "all / single": tasks.bootstrap_ratio(of["all"], found["single"]["all"]),
         **{f"{k} / base": tasks.bootstrap_ratio(score, found["base"][k]) for k, score in of.items()}}
        for name, of in found.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapters")
    parser.add_argument("--steps", type=int, default=16, help="of fitting the coefficients")
    parser.add_argument("--lora-steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the LoRAs")
    parser.add_argument("--fits", type=int, default=8, help="windows of each kind for fitting")
    parser.add_argument("--windows", type=int, default=6, help="scored of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    began = time.process_time()
    model, tokenizer = load_teacher(asked.model)
    unseen = cut(tokenizer, "test", asked.windows, asked.length)
    fits = cut(tokenizer, "place", asked.fits, asked.length)
    how = argparse.Namespace(**{**vars(asked), "steps": asked.lora_steps})
    folders = {kind: adapter(model, tokenizer, [name], asked.out / kind, how) for kind, name in KINDS.items()}
    base = weights.Point.open(asked.model)
    vectors = [weights.Point.open(folder, base=base, lora="product") for folder in folders.values()]
    composed = compose.Composed(model, vectors)
    alpha = compose.best_scalar(composed, lambda m: -sum(float(loss(m, rows)) for rows in fits.values()), grid=GRID)
    points = {"base": base, "single": point_of(base, composed)}
    print(f"{time.process_time():.0f} s", "best single coefficient", alpha, flush=True)
    learned(composed, fits, asked)
    points["learned"] = point_of(base, composed)
    rows = scored(load_teacher(asked.model)[0], points, unseen)
    ratio = rows[-1]["all / single"]
    by_vector = composed.coefficients.detach()[:, :, 0]
    result = {
        "machine": machine(), "settings": {k: v for k, v in vars(asked).items() if k not in ("out", "json")},
        "rate": RATE, "decay": DECAY, "blocks": len(composed.blocks), "coefficients": by_vector.numel(),
        "grid": GRID, "best single coefficient": alpha, "models": rows,
        "coefficients by LoRA": {
            kind: {"mean": float(x.mean()), "least": float(x.min()), "most": float(x.max())}
            for kind, x in zip(KINDS, by_vector, strict=True)
        },
        "learned over single, all text": ratio, "learned is better beyond its interval": ratio[2] < 1.0,
        "cpu seconds": time.process_time() - began,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if asked.json:
        io.write_json(asked.json, result)


if __name__ == "__main__":
    main()
