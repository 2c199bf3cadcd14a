"""Put pairs of a decoder's layers side by side, tune them shortly, and time a decoded token.

    python benchmarks/shallow.py --json benchmarks/results/shallow.json
    python benchmarks/shallow.py --quick                               # to try it out

Pairs are the cheapest ones on one part of the text (`--candidates` limits them), tuned on a second against the model's
own predictions, and scored on a third.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from lineament import data
from lineament._base.seeds import generator
from lineament.models import load_teacher, widen
from lineament.report import machine
from lineament.tasks import bootstrap_ratio, decode_speed, perplexity, prefill_speed
from lineament.weights import shallow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="wiki-sample")
    parser.add_argument("--pairs", type=int, nargs="+", default=[4])
    parser.add_argument("--candidates", type=int, nargs=2, default=[3, 28], help="first and last layer")
    parser.add_argument("--given", help="pairs by their first layers, 14,17,...: nothing is searched")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=2, help="windows of 256 tokens in a step")
    parser.add_argument("--tokens", type=int, default=2048, help="of each part that is scored")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--out", type=Path, help="folder for checkpoints and the tuned models")
    parser.add_argument("--quick", action="store_true", help="one given pair, two steps, 512 tokens")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.quick:
        asked.given, asked.steps, asked.tokens = asked.given or "14", 2, 512
    model, tokenizer = load_teacher(asked.model)
    model.requires_grad_(False)
    place, test = (windows(tokenizer, asked.text, split, asked.tokens) for split in ("place", "test"))
    rows = windows(tokenizer, asked.text, "train", None)
    first, last = asked.candidates
    found: dict[str, Any] = {"machine": machine(), "model": asked.model, "rows": []}
    if asked.given:
        chosen = [[(i, i + 1) for i in map(int, asked.given.split(","))]]
    else:
        costs = shallow.pair_costs(model, place[:4], [(i, i + 1) for i in range(first, last)])
        found["costs"] = {str(pair): cost for pair, cost in costs.items()}
        chosen = [shallow.cheapest(costs, count) for count in asked.pairs]
    whole = perplexity(model, test, batch_size=4)
    for groups in chosen:
        wide = widen(model, groups)
        row: dict[str, Any] = {"pairs": groups, "layers": len(wide.model.layers), "perplexity": whole.value}
        row["ratio untuned"] = bootstrap_ratio(perplexity(wide, test, batch_size=4), whole)
        kept = None if asked.out is None else asked.out / f"{len(groups)}-pairs"
        shallow.distilled(
            wide, model, lambda step: rows[torch.randint(len(rows), (asked.rows,), generator=generator(step))],
            steps=asked.steps, out=kept and kept / "tune",
        )  # fmt: skip
        row["steps"], row["tokens tuned on"] = asked.steps, asked.steps * asked.rows * rows.shape[1]
        row["ratio tuned"] = bootstrap_ratio(perplexity(wide, test, batch_size=4), whole)
        pair = {"deep": model, "wide": wide}
        decode = decode_speed(pair, asked.context, tokens=24, static=False)
        prefill = prefill_speed(pair, asked.context)
        for what, times in (("decode", decode), ("prefill", prefill)):
            row[f"{what}, deep ms"], row[f"{what}, wide ms"] = (1e3 * times[k].median for k in ("deep", "wide"))
            row[f"{what}, deep / wide"] = times["deep"].median / times["wide"].median
        found["rows"].append(row)
        print(json.dumps(row, indent=2), flush=True)
        if kept is not None:
            wide.save_pretrained(kept / "model")
            tokenizer.save_pretrained(kept / "model")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")


def windows(tokenizer: Any, text: str, split: str, tokens: int | None) -> torch.Tensor:
    """Cut a part of a text into windows of 256 tokens."""
    return data.windows(data.load_text(text, split=split), tokenizer, 256, max_tokens=tokens)


if __name__ == "__main__":
    main()
