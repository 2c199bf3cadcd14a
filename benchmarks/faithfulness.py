"""Are the tokens that an explanation names the ones that count? Flipped most and least relevant first, on real text.

    python benchmarks/faithfulness.py --texts 40 --out flipped.jsonl --json FILE

For each text the model's own next token is explained by every method; then tokens' embeddings are replaced by 0 in ten
equal parts, and the area between the two curves of the token's log probability (least minus most relevant first, mean
over parts; in nats) says how well the order was. "recent" takes the newest tokens first, "random" any. Texts that are
done stand in --out, and the same command goes on after them. Differences to AttnLRP: paired bootstrap over texts.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from lineament import data, explain
from lineament._base.seeds import generator
from lineament.models import load_teacher
from lineament.report import machine
from lineament.report.tables import table

SYSTEM = "attnlrp"
METHODS: dict[str, Any] = {
    SYSTEM: SYSTEM, "gradient x input": "gradient-x-input",
    "integrated gradients, 20 steps": explain.IntegratedGradients(steps=20), "attention rollout": "rollout",
    "recent": None, "random": None,
}  # fmt: skip
STEPS, DRAWS = 10, 2000


class LastLogProbability(nn.Module):
    """A language model that answers with the log probabilities of the token after the last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.model(inputs_embeds=inputs_embeds, logits_to_keep=1).logits[:, -1].log_softmax(-1)


def order_of(method: str, model: nn.Module, ids: Tensor, seed: int) -> Tensor:
    """Return the relevance [B, T] by which tokens are ordered."""
    if METHODS[method] is not None:
        found = explain.relevance(model, {"input_ids": ids}, rules=METHODS[method])
        return found.inputs["input_ids"].detach()
    if method == "recent":
        return torch.arange(ids.shape[1]).expand(ids.shape).float()
    return torch.rand(ids.shape, generator=generator(seed))


def measured(model: nn.Module, ids: Tensor, seed: int) -> list[dict[str, float]]:
    """Return, for each text, the area between its curves by method."""
    answering = LastLogProbability(model)
    x = model.get_input_embeddings()(ids).detach()  # type: ignore[operator]
    with torch.no_grad():
        target = answering(x).argmax(-1)
    rows: list[dict[str, float]] = [{} for _ in ids]
    ends = None
    for method in METHODS:
        order = order_of(method, model, ids, seed)
        spread = order[..., None].expand(x.shape)  # all of a token's coordinates go at once
        curves = explain.flip_curves(answering, x, spread, target=target, steps=STEPS, ends=ends)
        ends, (most, least) = curves[0, [0, -1]], curves
        for row, curves in zip(rows, zip(most.T.tolist(), least.T.tolist(), strict=True), strict=True):
            row[method] = explain.abpc(*curves)
    return rows


def summary(rows: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Return a row per method: its mean area, and how far the system's lies above it, with a 95 % interval."""
    found = []
    draw = torch.randint(len(rows), (DRAWS, len(rows)), generator=generator(0))
    for method in METHODS:
        own = torch.tensor([row[method] for row in rows], dtype=torch.float64)
        lead = torch.tensor([row[SYSTEM] for row in rows], dtype=torch.float64) - own
        low, high = lead[draw].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        ahead = {"attnlrp ahead by": float(lead.mean()), "low": low, "high": high, "beaten": low > 0}
        found.append({"method": method, "area, nats": float(own.mean()), **({} if method == SYSTEM else ahead)})
    return found


def main() -> None:
    """Measure what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="wiki-sample")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--skip", type=int, default=0, help="texts left to another run, a multiple of --batch; join "
                        "the files of --out in order for the whole")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON lines of finished texts, to go on from")
    parser.add_argument("--json", type=Path, help="write the table and the machine's description here")
    given = parser.parse_args()
    model, tokenizer = load_teacher(given.model)
    documents = data.load_text(given.data, split="test")
    ids = data.windows(documents, tokenizer, given.tokens, max_tokens=given.texts * given.tokens)
    done = given.out.read_text(encoding="utf-8").splitlines() if given.out and given.out.exists() else []
    rows = [json.loads(line) for line in done]
    for start in track(range(given.skip + len(rows), len(ids), given.batch), description="texts", disable=None):
        some = measured(model, ids[start : start + given.batch], seed=start)
        rows += some
        if given.out:
            with given.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in some)
    found = summary(rows)
    Console(width=120).print(table(found, title=f"{len(rows)} texts of {given.tokens} tokens"))
    if given.json:
        result = {"machine": machine(), "texts": len(rows), "tokens": given.tokens, "rows": found}
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
