"""Circuits of features by name: a model, a task and folders of dictionaries in, a table, a picture and a page out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lineament._base.errors import InputError
from lineament.explain.circuit_page import CircuitReport, batch, solved
from lineament.explain.dictionaries.activations import Said
from lineament.explain.dictionaries.feature_circuits import evaluate_feature_circuit, feature_circuit, feature_picture
from lineament.explain.dictionaries.hooks import Placed
from lineament.explain.dictionaries.reading import load_placed
from lineament.explain.dictionaries.weights import direct_tokens
from lineament.report import Picture, Section, Tiles, page, table
from lineament.tasks.prompt_pairs import TASKS, encode, one_token, read_pairs

LISTED = 40  # features with words, the strongest


@dataclass(frozen=True, kw_only=True)
class FeatureReport(CircuitReport):
    """A circuit of features.

    Attributes:
        speaks_for: feature -> the tokens its decoder raises most, straight through the last norm.
    """

    speaks_for: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return everything but pictures, for `json.dumps`."""
        return super().to_json() | {"speaks for": {name: list(words) for name, words in self.speaks_for.items()}}

    def rows(self) -> list[dict[str, Any]]:
        """Return the strongest features, with what each costs and speaks for."""
        parts = list(self.circuit.parts.items())[:LISTED]
        return [{"feature": name, "lost without it": score, "speaks for": ", ".join(map(repr, words)) or "-"}
                for name, score in parts for words in [self.speaks_for.get(name, ())]]  # fmt: skip

    def tables(self) -> list[Any]:
        """Return rich tables: the curve, the strongest features, other prompts."""
        first, _, *others = super().tables()
        return [first, table(self.rows()[:15], title=f"the strongest features, by {self.circuit.method}"), *others]

    def png(self, *, dark: bool = False) -> bytes:
        """Draw the features, layer by layer."""
        return feature_picture(self.circuit, dark=dark)

    def write_html(self, path: str | Path) -> Path:
        """Write a page: numbers, the picture, the curve, the features."""
        c, pair = self.circuit, self.example
        tiles = {"features": (len(c.parts), f"of {c.total} that differ"), "faithfulness": c.faithfulness,
                 "completeness": c.completeness, "prompts solved": (self.solved, f"of {self.asked}")}  # fmt: skip
        if self.held_out:
            tiles["held out"] = (self.held_out["faithfulness"], "faithfulness on other prompts")
        about = (
            f"{pair.clean!r} goes on with {pair.answer[0]!r}, and {pair.corrupt!r} with {pair.distractor[0]!r}. "
            "Attention and MLPs without a dictionary run as in the clean prompt; features outside the circuit take "
            "their value from the corrupt one. So shares are of what these layers' MLPs do directly, here "
            f"{c.whole - c.nothing:.2f} of {c.whole:.2f} logits between answer and distractor."
        )
        caption = "t10.57: feature 57 of layer 10; e10: what its dictionary leaves unexplained. Blue helps the answer."
        alt = f"The features: {', '.join(list(c.parts)[:LISTED])}"
        curve = Picture(self.curve_png(), "Faithfulness and completeness by size", "", self.curve_png(dark=True))
        sections = [
            Section("The features", [Tiles(tiles), about, Picture(self.png(), alt, caption, self.png(dark=True))]),
            Section("How faithful they are", [curve, c.curve_rows()]),
            Section("The strongest features", [self.rows()]),
        ]
        return page(f"Features of {self.model} that do {self.task}", sections, path)


def feature_circuit_by_name(
    model: str,
    folders: Sequence[str],
    task: str,
    *,
    prompts: int = 20,
    seed: int = 0,
    held_out: float = 0.25,
    faithful: float = 0.85,
    words: int = 4,
    said: Said | None = None,
    **options: Any,
) -> FeatureReport:
    """Find the features that do a task in a language model by name.

    Args:
        model: as for `models.load_teacher`. folders: of dictionaries, one per layer.
        task: "ioi", "greater-than", or a task file (`tasks.prompt_pairs.read_pairs`).
        prompts: how many pairs a generator gives. seed: of its draws.
        held_out: the share of solved prompts that the features are only evaluated on.
        words: tokens said of each feature. faithful, options: of `feature_circuit`. said: called with progress.

    Raises:
        InputError: no such task, model or dictionary, prompts that can't be paired, or none that the model solves.
    """
    if prompts < 1 or not 0 <= held_out < 1:
        raise InputError(f"{prompts} prompts, {held_out} of them held out; expected 1 or more, and a share below 1")
    pairs = None if task in TASKS else read_pairs(task)
    net, tokenizer, at = load_placed(model, folders)
    pairs = pairs or TASKS[task](prompts, seed=seed, fits=lambda word: one_token(tokenizer, word))
    encoded, dictionaries = encode(tokenizer, pairs), list(at.values())
    right, first = solved(net, encoded)
    chosen = right.nonzero().flatten().tolist()
    if not chosen:
        raise InputError(f"{model} solves none of {len(pairs)} prompts of {task}; there is nothing to explain")
    count = max(1, round(len(chosen) * (1 - held_out)))
    given, others = (batch(encoded.rows(rows)) if rows else None for rows in (chosen[:count], chosen[count:]))
    assert given is not None
    found = feature_circuit(net, *given, dictionaries, faithful=faithful, said=said, **options)
    return FeatureReport(
        model=model, task=Path(task).stem, example=pairs[chosen[0]], solved=len(chosen), asked=len(pairs),
        first=int(first.sum()), circuit=found, wanted=0.0 if options.get("size") else faithful,
        held_out=evaluate_feature_circuit(net, *others, dictionaries, found) if others else None,
        speaks_for=_speaks_for(net, tokenizer, dictionaries, list(found.parts)[:LISTED], words),
    )  # fmt: skip


def _speaks_for(
    model: nn.Module, tokenizer: Any, dictionaries: Sequence[Placed], names: Sequence[str], count: int
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for each in dictionaries:
        own = [name for name in names if name.startswith(f"{each.name}.")]
        if own:
            logits = direct_tokens(model, each, [int(name.rpartition(".")[2]) for name in own])
            best = logits.topk(min(count, logits.shape[1])).indices.tolist()
            found |= {name: [tokenizer.decode([i]) for i in row] for name, row in zip(own, best, strict=True)}
    return found
