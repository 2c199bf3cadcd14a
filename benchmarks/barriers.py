"""Barriers between nets trained apart, before and after matching and REPAIR: MLP, ResNet20's size, a small Llama.

Three pairs of each kind share nothing but the data: 10,000 images of Fashion-MNIST for the MLPs, 4,000 at half the
size (2 x 2 means, 14 x 14) for the ResNets, the characters of Python's reference for the Llamas (4 layers, with biases,
which REPAIR moves). An interrupted run goes on where it was: nets and rows are kept under --out.

    python benchmarks/barriers.py --out barriers --json benchmarks/results/barriers.json
"""

import argparse
import json
import statistics
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lineament import data, io, models, tasks, train, weights
from lineament._base.seeds import generator, seeded
from lineament.report import machine

KINDS = ("MLP", "ResNet", "Llama")
ARMS = ("before", "matched", "repaired", BOTH := "matched and repaired")
SEED, WIDTH, PAIRS = 5000, 128, 3
SIZES = {  # images (windows of the Llama) to learn from, epochs, test images, images for REPAIR, orders of matching
    "MLP": (10_000, 15, 2_000, 1_000, 3), "ResNet": (4_000, 8, 600, 600, 10), "Llama": (2_800, 2, 64, 64, 3),
}  # fmt: skip
SMALL = {"MLP": (320, 1, 60, 60, 1), "ResNet": (128, 1, 60, 60, 1), "Llama": (32, 1, 8, 8, 1)}
LENGTH, NONE = 128, 1e-3  # characters of a window; a barrier below NONE is none
RULES = {  # fixed before the first run, from the specification; the Llama has no rule there: (at least, at most)
    "MLP: barrier before / after matching, worst pair": (5.0, 1e9),
    "MLP: distance after / before, worst pair": (0.65, 1.0),
    "MLP: R(0.3) after, worst pair": (0.3, 1.0),
    "MLP: R(0.3) - R(0) after, worst pair": (0.0, 1.0),
    "ResNet: matching and REPAIR / REPAIR alone, worst pair": (0.0, 1.0),
    "ResNet: the same, of means": (0.0, 0.7),
    "ResNet: matching and REPAIR / before, of means": (0.0, 0.6),
    "Llama: barrier after / before matching, worst pair": (0.0, 1.0),
}


@cache
def images(kind: str, quick: bool) -> list[data.Images]:
    """Return the images to learn from and the test images of a kind, standardised."""
    learn, _, test, *_ = (SMALL if quick else SIZES)[kind]
    parts = [data.load_images("fashion-mnist", split=s)[:n] for s, n in (("train", learn), ("test", test))]
    if kind == "ResNet":
        parts = [data.Images(nn.functional.avg_pool2d(x.pixels, 2), x.labels, x.classes) for x in parts]
    return data.normalized(parts)


@cache
def text() -> tasks.Characters:
    return tasks.characters("python-topics", length=LENGTH)


def built(kind: str, quick: bool) -> nn.Module:
    if kind == "ResNet":
        return models.ResidualClassifier()
    if kind == "MLP":
        size = images(kind, quick)[0].pixels[0].numel()
        return models.dense_classifier((size, WIDTH, WIDTH, WIDTH, 10))
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=text().vocab, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH, attention_bias=True, mlp_bias=True, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def learned(kind: str, seed: int, quick: bool, folder: Path) -> nn.Module:
    """Train a net from its own beginning in its own order, or read the one that was kept."""
    with seeded(seed):
        net = built(kind, quick)
    file = folder / f"{kind}-{seed}.safetensors"
    if file.exists():
        net.load_state_dict(dict(io.open_weights(file)))
        return net.eval()
    count, epochs, *_ = (SMALL if quick else SIZES)[kind]
    size = {"MLP": 32, "ResNet": 64, "Llama": 16}[kind]
    steps = epochs * count // size
    how: dict[str, Any] = {
        "MLP": {"lr": 1e-3, "schedule": "constant"}, "ResNet": {"lr": 4e-3, "warmup": 3 * steps // 10},
        "Llama": {"lr": 3e-3, "warmup": steps // 10},
    }[kind]  # fmt: skip
    if kind == "Llama":
        rows = text().train[:count]

        def draw(step: int) -> Any:
            return rows[torch.randint(len(rows), (size,), generator=generator(seed * 100_003 + step))]
    else:
        draw = data.image_batches(images(kind, quick)[0], size, seed=seed)
    config = train.FitConfig(steps=steps, seed=seed, betas=(0.9, 0.999), log_every=steps, **how)
    train.fit(net.train(), draw, loss_of(kind), config, description=file.stem)
    io.save_tensors(net.state_dict(), file)
    return net.eval()


def loss_of(kind: str) -> Any:
    return tasks.next_token_loss if kind == "Llama" else weights.prediction_loss


def scored(kind: str, quick: bool) -> tuple[list[Any], list[Any]]:
    """Return the test batches, and the batches of training data for REPAIR."""
    learn, _, test, mend, _ = (SMALL if quick else SIZES)[kind]
    if kind == "Llama":
        return list(text().test[:test].split(32)), list(text().train[:mend].split(32))
    parts = images(kind, quick)
    rows = [(parts[1], test), (parts[0], min(mend, learn))]
    cut = [[(x.pixels[i : i + 200], x.labels[i : i + 200]) for i in range(0, n, 200)] for x, n in rows]
    return cut[0], cut[1]


def pair(kind: str, i: int, quick: bool, folder: Path) -> dict[str, Any]:
    """Train two nets and measure the line between them, or read what was measured."""
    file = folder / f"{kind}-pair-{i}.json"
    if file.exists():
        return io.read_json(file)
    began, start = time.process_time(), SEED + 100 * KINDS.index(kind) + 2 * i
    a, b = (learned(kind, seed, quick, folder) for seed in (start, start + 1))
    trained = time.process_time() - began
    test, mend = scored(kind, quick)
    orders = (SMALL if quick else SIZES)[kind][-1]
    states = [{name: x.detach() for name, x in net.state_dict().items()} for net in (a, b)]
    found = weights.compared(a, *states, {"test": test}, mend=mend, restarts=orders, seed=i, loss=loss_of(kind))
    ends = next(iter(found.paths.values())).curves["test"]
    row = {
        "kind": kind, "pair": i, "seeds": [start, start + 1], "loss barrier": found.row(),
        "ends": {number: [values[0][0], values[-1][0]] for number, values in ends.items()},
        "distance after / before": found.after.distance / found.before.distance,
        "R(0), before and after": [found.before.score, found.after.score],
        "R(0.3), before and after": [found.before.leading, found.after.leading],
        "curves": {arm: path.rows() for arm, path in found.paths.items()},
        "cpu seconds": {"training": trained, "all": time.process_time() - began},
    }  # fmt: skip
    if "accuracy" in ends:
        row["accuracy barrier"] = found.row("accuracy")
    io.write_json(file, row)
    return row


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold the rows against the rules; of a kind without rows nothing is said."""
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}

    def loss(kind: str, arm: str) -> list[float]:
        return [row["loss barrier"][arm] for row in of[kind]]

    def ratios(kind: str, above: str, below: str) -> list[float]:
        return [x / max(y, NONE) for x, y in zip(loss(kind, above), loss(kind, below), strict=True)]

    def means(above: str, below: str) -> float:
        return sum(loss("ResNet", above)) / max(sum(loss("ResNet", below)), NONE)

    leading = [(row["R(0.3), before and after"][1], row["R(0), before and after"][1]) for row in of["MLP"]]
    values = [
        partial(min, ratios("MLP", "before", "matched")),
        partial(min, [row["distance after / before"] for row in of["MLP"]]), partial(min, [x for x, _ in leading]),
        partial(min, [x - y for x, y in leading]), partial(max, ratios("ResNet", BOTH, "repaired")),
        partial(means, BOTH, "repaired"), partial(means, BOTH, "before"),
        partial(max, ratios("Llama", "matched", "before")),
    ]  # fmt: skip
    found = []
    for (rule, (least, most)), value in zip(RULES.items(), values, strict=True):
        if of[rule.split(":")[0]]:
            found.append({"rule": rule, "wanted": [least, most], "found": value(), "held": least <= value() <= most})
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Write the rows as Markdown."""
    lines = ["| nets | number | ends | before | matched | REPAIR alone | matched and REPAIR |", "|---" * 7 + "|"]
    for row in rows:
        for number in ("loss", "accuracy"):
            if f"{number} barrier" not in row:
                continue
            cells = " | ".join(f"{row[f'{number} barrier'][arm]:.3f}" for arm in ARMS)
            ends = ", ".join(f"{x:.3f}" for x in row["ends"][number])
            lines.append(f"| {row['kind']} {row['pair'] + 1} | {number} | {ends} | {cells} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the nets and the rows")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    folder = asked.out / ("quick" if asked.quick else "full")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(1 if asked.quick else PAIRS):
        for kind in asked.kinds:
            rows.append(pair(kind, i, asked.quick, folder))
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "curves"}), flush=True)
    rows.sort(key=lambda row: (KINDS.index(row["kind"]), row["pair"]))
    verdict = judged(rows)
    print(table(rows), *(json.dumps(one) for one in verdict), sep="\n")
    if asked.json:
        spent = statistics.fsum(row["cpu seconds"]["all"] for row in rows)
        io.write_json(asked.json, {
            "machine": machine(), "sizes": SMALL if asked.quick else SIZES, "rules": verdict, "cpu seconds": spent,
            "rows": rows,
        })  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
