"""What the neurons of a language model do on text: how many are silent, what they are for, and what skipping buys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineament import data as texts
from lineament import io
from lineament._base.errors import InputError, unknown
from lineament.models import load_teacher
from lineament.nn.selective import WAYS
from lineament.report import Picture, Rows, Section, Tiles, curve, heatmap, page
from lineament.tasks import Perplexity, bootstrap_ratio, decode_speed, perplexity
from lineament.weights import neurons
from lineament.weights.experts import layer_inputs, selective_model

LENGTH, SPOKEN, PLACES = 256, 64, 24  # tokens of a window; of an instance of a function; instances of a function
TEXTS = ("wiki-sample", "python-topics", "docs")
CURVE = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8)
SHARES = (0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7)


@dataclass
class Study:
    """What was measured of a model's neurons.

    Attributes:
        activity: per layer. curve: perplexity ratio against the share an oracle silences. functions: per text, its best
            and mean score and what taking out its best 5 % does to each text. skipping: per way and share, the ratio
            where it was chosen, and for the chosen share the ratio on unseen text with its interval, and the speed.
        limit: the largest ratio allowed. chosen: the row of `skipping` with the fastest model within it, if any.
    """

    model: str
    limit: float
    activity: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    functions: list[dict[str, Any]] = field(default_factory=list)
    skipping: list[dict[str, Any]] = field(default_factory=list)
    chosen: dict[str, Any] | None = None

    def write_html(self, path: str | Path) -> Path:
        """Write a one-file report."""
        sections: list[Any] = []
        if self.chosen:
            share, gain = self.chosen["silent"], self.chosen.get("decode speed / dense")
            tiles = {"neurons skipped": f"{share:.0%}", "perplexity / dense": f"{self.chosen['ratio, unseen']:.3f}"}
            tiles |= {"decode speed / dense": f"{gain:.2f}"} if gain else {}
            sections.append(Section("At a glance", [Tiles(tiles)]))
        series = {"oracle": self.curve}
        series |= {by: [r for r in self.skipping if r["by"] == by] for by in WAYS}
        drawn = curve(
            {n: ([r["silent"] for r in rows], [r["ratio"] for r in rows]) for n, rows in series.items() if rows},
            xlabel="share of neurons silent", ylabel="perplexity / dense", levels={"limit": self.limit},
        )  # fmt: skip
        said = "perplexity relative to the dense model against the share of neurons that stay silent"
        sections.append(Section("How many can stay silent", [Picture(drawn, said), Rows(self.skipping)]))
        if self.functions:
            names = [row["text"] for row in self.functions]
            grid = [[row[f"perplexity of {g}"] for g in names] for row in self.functions]
            seen = heatmap(grid, xlabel="text scored", ylabel="text whose neurons are out", unit="rise of perplexity")
            told = Picture(
                seen, f"rise of perplexity when the best neurons of a text are out; texts: {', '.join(names)}"
            )
            sections.append(Section("What neurons are for", [told, Rows(self.functions)]))
        sections.append(Section("Layer by layer", [Rows(self.activity)]))
        return page(f"Neurons of {self.model}", sections, path)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(vars(self))


def study(
    name: str, *, text: str | Path = "wiki-sample", kinds: Sequence[str] = TEXTS, tokens: int = 2048,
    limit: float = 1.1, by: Sequence[str] = WAYS, shares: Sequence[float] = SHARES, speed: bool = True,
    out: str | Path | None = None, say: Callable[[str], None] = lambda line: None,
) -> Study:  # fmt: skip
    """Measure a language model's neurons, and how many a token may skip within a limit of perplexity.

    Shares are chosen on one part of the text ("place") and reported on another ("test"); thresholds are set on a third.

    Args:
        name: a model as `models.find_model` takes it: Llama, Mistral or Qwen2. text: a name of `data.NAMES`, a file, a
            folder. kinds: texts as functions of neurons; fewer than two for none. tokens: of every part.
        limit: largest perplexity over the dense model's. by: ways to tell who speaks, see `nn.SelectiveConfig`.
        shares: to try, ascending. speed: time decoding too. out: a new folder for the fastest model within the limit.
        say: called with a line now and then.

    Raises:
        InputError: no such model or text, another family, a limit of 1 or less, no way or share, too little text.
    """
    if limit <= 1 or not shares or any(not 0 < s < 1 for s in shares) or not by:
        raise InputError(f"limit {limit} with shares {list(shares)}; expected above 1, and shares between 0 and 1")
    for way in by:
        if way not in WAYS:
            raise unknown("way to tell who speaks", way, WAYS)
    model, tokenizer = load_teacher(name)
    model.requires_grad_(False)
    known, place, test = (_windows(tokenizer, text, split, LENGTH, tokens) for split in texts.SPLITS)
    found = Study(str(name), limit)
    scored = [{"input_ids": w, "labels": w, "use_cache": False} for w in place.split(4)]
    say("how evenly neurons speak")
    found.activity = neurons.activity(model, neurons.OUTPUTS, [{"input_ids": w} for w in place[:4].split(4)])
    found.curve = neurons.sparsity_curve(model, neurons.OUTPUTS, scored, CURVE)
    if len(kinds) > 1:
        say("what neurons are for")
        found.functions = functions(model, tokenizer, kinds)
    whole = {"place": perplexity(model, place, batch_size=4), "test": perplexity(model, test, batch_size=4)}
    models: dict[str, nn.Module] = {}
    for way in by:
        say(f"skipping by {way}")
        rows, best = _skipping(model, way, shares, limit, known, {"place": place, "test": test}, whole)
        found.skipping += rows
        if best is not None:
            models[way] = best
    if speed and models:
        say("decode speed")
        _timed(found, {"dense": model, **models})
    chosen = [row for row in found.skipping if "ratio, unseen" in row]
    if chosen:
        found.chosen = max(chosen, key=lambda row: (row.get("decode speed / dense", 0.0), row["silent"]))
        if out is not None:
            _save(models[found.chosen["by"]], tokenizer, out, found)
    return found


def _windows(tokenizer: Any, text: str | Path, split: str, length: int, tokens: int) -> Tensor:
    return texts.windows(texts.load_text(text, split=split), tokenizer, length, max_tokens=tokens)


def functions(model: nn.Module, tokenizer: Any, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Score neurons for kinds of text, and take out the best 5 % for each (good at all kinds counts against)."""
    spoken = {k: _windows(tokenizer, k, "train", SPOKEN, SPOKEN * PLACES) for k in kinds}
    unseen = {k: _windows(tokenizer, k, "test", LENGTH, 4 * LENGTH) for k in kinds}
    scores = neurons.function_scores(
        model, neurons.OUTPUTS, {k: [{"input_ids": w} for w in own.split(1)] for k, own in spoken.items()}
    )
    special = {layer: neurons.specificity(own) for layer, own in scores.items()}
    hurt = neurons.damage(
        model, special, {k: [{"input_ids": w, "labels": w, "use_cache": False}] for k, w in unseen.items()}
    )
    return [
        {
            "text": f, "chance": 1 / len(kinds),
            "best score, mean of layers": sum(float(own[f].max()) for own in scores.values()) / len(scores),
            "mean score": sum(float(own[f].mean()) for own in scores.values()) / len(scores),
            **{f"perplexity of {g}": float(torch.tensor(hurt[f][g]).exp() - 1) for g in kinds},
        } for f in kinds
    ]  # fmt: skip


def _skipping(
    model: nn.Module, way: str, shares: Sequence[float], limit: float, known: Tensor, parts: Mapping[str, Tensor],
    whole: Mapping[str, Perplexity],
) -> tuple[list[dict[str, Any]], nn.Module | None]:  # fmt: skip
    """Try shares in ascending order until the limit is passed; return the rows and the model at the last one within."""
    made = selective_model(model, known, 0.0, by=way)
    names = [f"model.layers.{i}.mlp" for i in range(made.config.num_hidden_layers)]
    seen = layer_inputs(model, names, known)  # of the dense model: layers are not adapted to each other's gaps

    def at(share: float) -> float:
        silent = [made.get_submodule(n).calibrate_(seen[n], share) for n in names]
        return sum(silent) / len(silent)

    rows: list[dict[str, Any]] = []
    for share in sorted(shares):
        silent = at(share)
        ratio = bootstrap_ratio(perplexity(made, parts["place"], batch_size=4), whole["place"])[0]
        rows.append({"by": way, "silent": silent, "ratio": ratio})
        if ratio > limit:
            break
    within = [row for row in rows if row["ratio"] <= limit]
    if not within:
        return rows, None
    at(within[-1]["silent"])
    value, low, high = bootstrap_ratio(perplexity(made, parts["test"], batch_size=4), whole["test"])
    within[-1].update({"ratio, unseen": value, "low": low, "high": high})
    return rows, made


def _timed(found: Study, models: Mapping[str, nn.Module]) -> None:
    times = decode_speed(models, LENGTH, tokens=24, static=False)
    for row in found.skipping:
        if "ratio, unseen" in row:
            row["decode speed / dense"] = times["dense"].median / times[row["by"]].median
            row["ms / token"], row["dense ms / token"] = (1e3 * times[k].median for k in (row["by"], "dense"))


def _save(model: Any, tokenizer: Any, out: str | Path, found: Study) -> None:
    with io.building_folder(Path(out)) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        io.write_json(partial / "bricks.json", found.to_json())
