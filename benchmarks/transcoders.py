r"""Transcoders of SmolLM2 at size: trained on one cache, and scored in the model; the numbers of docs/transcoders.md.

    python benchmarks/transcoders.py --out dictionaries --json benchmarks/results/transcoders.json
    python benchmarks/transcoders.py --quick

An interrupted run goes on where it was: what is cached and trained is not made again.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lineament import io
from lineament.explain.dictionaries.reading import evaluate_by_name, train_by_name
from lineament.report import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, help="folder of the cache and the dictionaries; a passing one if left out")
    parser.add_argument("--data", nargs="+", default=["wiki-sample", "docs"])
    parser.add_argument("--layers", nargs="+", type=int, default=[10, 15, 20])
    parser.add_argument("--autoencoders", nargs="*", type=int, default=[10], help="layers that get one beside it")
    parser.add_argument("--tokens", type=int, default=1_015_808, help="cached at most")
    parser.add_argument("--skip", action="store_true", help="transcoders with an affine path beside the features")
    parser.add_argument("--features", type=int, default=4608)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--scored", type=int, default=8192, help="held-out tokens of wiki-sample")
    parser.add_argument(
        "--k", nargs="*", type=int, default=[8, 16, 64], help="kept at evaluation, beside 32: the curve"
    )
    parser.add_argument("--quick", action="store_true", help="one layer, 2,048 tokens, 64 features")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.quick:
        asked.layers, asked.autoencoders, asked.tokens, asked.features, asked.batch = [10], [10], 2048, 64, 256
        asked.scored, asked.k = 512, [8]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        asked.out = asked.out or Path(folder)
        result = measured(asked)
    print(json.dumps(result, indent=1))
    if asked.json:
        io.write_text(asked.json, json.dumps(result, indent=1) + "\n")


def measured(asked: argparse.Namespace) -> dict[str, Any]:
    """Train what is not there, and score every layer's dictionaries beside mean, zero and the best affine map."""
    began, rows, speed = time.process_time(), [], 0.0
    for kind, layers in (("transcoder", asked.layers), ("autoencoder", asked.autoencoders)):
        if layers:
            found = train_by_name(
                asked.model, asked.out, layers=layers, kinds=[kind], texts=asked.data, tokens=asked.tokens,
                features=asked.features, skip=asked.skip, epochs=asked.epochs, said=tell,
                training={"batch": asked.batch, "lr": asked.lr},
            )  # fmt: skip
            rows, tokens = rows + found.rows, found.tokens
            speed = max(speed, found.captured_per_second)
    scores = {}
    for layer in asked.layers:
        kinds = ["transcoder", *(["autoencoder"] if layer in asked.autoencoders else [])]
        folders = [str(asked.out / f"{kind}-{layer}") for kind in kinds]
        scores[layer] = evaluate_by_name(
            asked.model, folders, tokens=asked.scored, ks=asked.k, activations=str(asked.out / "activations"), said=tell
        ).rows()  # fmt: skip
    settings = {name: str(value) for name, value in vars(asked).items() if name not in ("out", "json", "quick")}
    return {
        "machine": machine(), "settings": settings, "cached tokens": tokens, "captured tokens/s": speed,
        "trained": rows, "scores": scores, "cpu seconds": time.process_time() - began,
    }  # fmt: skip


def tell(what: str, done: int, total: int) -> None:
    if done == total or done % 25 == 0:
        print(f"{time.process_time():.0f} s: {what} {done}/{total}", flush=True)


if __name__ == "__main__":
    main()
