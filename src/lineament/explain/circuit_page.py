"""A circuit to read: a model and a task by name in, the circuit, its curve, a table of estimates and pictures out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lineament import io
from lineament._base.errors import InputError
from lineament.explain.circuit import Circuit, circuit, evaluate_circuit, node_order
from lineament.explain.effects import agreement
from lineament.explain.metrics import LogitDifference
from lineament.explain.places import run
from lineament.models import find_model, load_teacher
from lineament.report import Picture, Section, Tiles, curve, heatmap, network, page, table
from lineament.tasks.prompt_pairs import TASKS, Encoded, Pair, encode, one_token, read_pairs

DRAWN = 60
"""Edges a picture shows, the strongest; more would hide each other."""


@dataclass(frozen=True, kw_only=True)
class CircuitReport:
    """A circuit with what is around it.

    Attributes:
        model, task: their names. example: the first pair of prompts.
        solved, asked: prompts that the model solves, of how many.
        first: how many of the solved ones have the answer as the likeliest token of all.
        held_out: faithfulness and completeness on solved prompts that the circuit was not found on; None without any.
        agreement: rows of `explain.agreement`, if asked for.
        wanted: the faithfulness asked for.
    """

    model: str
    task: str
    example: Pair
    solved: int
    asked: int
    first: int
    circuit: Circuit
    held_out: dict[str, float] | None
    agreement: Sequence[dict[str, Any]] = ()
    wanted: float = 0.0

    @property
    def reached(self) -> bool:
        """Whether the circuit is as faithful as was asked."""
        return self.circuit.faithfulness >= self.wanted

    def to_json(self) -> dict[str, Any]:
        """Return everything but pictures, for `json.dumps`."""
        example = {"clean": self.example.clean, "corrupt": self.example.corrupt, "answer": list(self.example.answer),
                   "distractor": list(self.example.distractor)}  # fmt: skip
        return {"model": self.model, "task": self.task, "example": example, "solved": self.solved, "asked": self.asked,
                "answer is first": self.first, "circuit": self.circuit.to_json(), "held out": self.held_out,
                "agreement": list(self.agreement)}  # fmt: skip

    def tables(self) -> list[Any]:
        """Return rich tables: the curve, the strongest parts, the agreement."""
        c = self.circuit
        strongest = [{c.level: name, "lost without it": score} for name, score in list(c.parts.items())[:15]]
        title = (
            f"{len(c.parts)} of {c.total} {c.level}s, faithfulness {c.faithfulness:.2f}, completeness "
            f"{c.completeness:.2f}; {self.solved} of {self.asked} prompts solved"
        )
        found = [table(c.curve_rows(), title=title), table(strongest, title=f"the strongest {c.level}s, by {c.method}")]
        if self.held_out:
            found.append(table([self.held_out], title="on prompts it was not found on"))
        return found + ([table(self.agreement, title="correlation with patching, seconds")] if self.agreement else [])

    def png(self, *, dark: bool = False) -> bytes:
        """Draw the circuit: a network of edges, or a map of heads and MLPs."""
        c = self.circuit
        title = f"{self.task}: {len(c.parts)} of {c.total} {c.level}s, faithfulness {c.faithfulness:.2f}"
        return _map(c, title, dark) if c.level == "node" else _network(c, title, dark)

    def curve_png(self, *, dark: bool = False) -> bytes:
        """Draw faithfulness and completeness by size."""
        rows = self.circuit.curve
        sizes = [row["share"] * 100 for row in rows]
        series = {name: (sizes, [row[name] for row in rows]) for name in ("faithfulness", "completeness")}
        return curve(series, xlabel=f"{self.circuit.level}s kept (%)", ylabel="share of the task", log="x",
                     levels={"whole model": 1.0}, dark=dark)  # fmt: skip

    def write_png(self, path: str | Path) -> Path:
        """Write the picture of the circuit."""
        return io.write_bytes(path, self.png())

    def write_html(self, path: str | Path) -> Path:
        """Write a page: numbers, the picture, the curve, the parts, the agreement."""
        c = self.circuit
        tiles = {f"{c.level}s": (len(c.parts), f"of {c.total}"), "faithfulness": c.faithfulness,
                 "completeness": c.completeness, "prompts solved": (self.solved, f"of {self.asked}")}  # fmt: skip
        if self.held_out:
            tiles["held out"] = (self.held_out["faithfulness"], "faithfulness on other prompts")
        about = (
            f"{self.example.clean!r} goes on with {self.example.answer[0]!r}, and {self.example.corrupt!r} with "
            f"{self.example.distractor[0]!r}. The {c.level}s were scored by {c.method} on {c.prompts} prompts; all "
            f"others take their value from {_elsewhere(c.ablation)}."
        )
        drawn = f" The {DRAWN} strongest edges are drawn." if c.level == "edge" and len(c.parts) > DRAWN else ""
        into = " What goes into an attention layer is drawn to each head that hands it on." if c.level == "edge" else ""
        caption = "Blue helps the answer, vermilion works against it; the wider, the more." + into + drawn
        alt = f"The circuit: {', '.join(c.nodes[:40])}"
        sections = [
            Section("The circuit", [Tiles(tiles), about, Picture(self.png(), alt, caption, self.png(dark=True))]),
            Section("How faithful it is", [
                Picture(self.curve_png(), "Faithfulness and completeness by size", "", self.curve_png(dark=True)),
                c.curve_rows()]),
            Section(f"The strongest {c.level}s", [
                [{c.level: name, "lost without it": score} for name, score in list(c.parts.items())[:40]]]),
        ]  # fmt: skip
        if self.agreement:
            sections.append(Section("Estimates beside patching", [list(self.agreement)]))
        return page(f"How {self.model} does {self.task}", sections, path)


def circuit_of(
    model: str,
    task: str,
    *,
    prompts: int = 100,
    seed: int = 0,
    held_out: float = 0.25,
    compare: Sequence[str] = (),
    compare_prompts: int = 8,
    rows: int = 24,
    faithful: float = 0.85,
    said: Callable[[str, int, int], None] | None = None,
    work: str | Path | None = None,
    **options: Any,
) -> CircuitReport:
    """Find the circuit of a task in a language model by name.

    Args:
        model: as for `models.load_teacher`.
        task: "ioi", "greater-than", or a task file (`tasks.prompt_pairs.read_pairs`).
        prompts: how many pairs a generator gives. seed: of its draws.
        held_out: the share of solved prompts that the circuit is only evaluated on.
        compare: kinds of places of `effects.KINDS` to compare estimates with patching on. compare_prompts: on how many.
        rows, faithful, options: of `circuit`; 24 short prompts a sweep take about 2 GB at 135M.
        said: called with (what, done, all).
        work: a folder for what is finished, where the same call goes on after a kill; gone in the end, None keeps none.

    Raises:
        InputError: no such task or model, prompts that can't be paired, fewer than two that the model solves, or a
            folder with other work.
    """
    if prompts < 2 or not 0 <= held_out < 1:
        raise InputError(f"{prompts} prompts, {held_out} of them held out; expected 2 or more, and a share below 1")
    pairs = None if task in TASKS else read_pairs(task)
    net, tokenizer = load_teacher(model)
    if pairs is None:
        pairs = TASKS[task](prompts, seed=seed, fits=lambda word: one_token(tokenizer, word))
    encoded = encode(tokenizer, pairs)
    how = {"faithful": faithful, "rows": rows, **options}
    asked = {"model": io.stamp(find_model(model)), "prompts": io.digest_of(*vars(encoded).values()), **how}
    asked |= {"held out": held_out, "compare": list(compare), "compare prompts": compare_prompts}
    with io.kept_parts(work, asked) as parts:
        right, first = (
            torch.tensor(x) for x in parts.value("solved", lambda: [x.tolist() for x in solved(net, encoded)])
        )
        chosen = right.nonzero().flatten().tolist()
        if len(chosen) < 2:
            solves = f"{model} solves {len(chosen)} of {len(pairs)} prompts of {task}"
            raise InputError(f"{solves}; a circuit needs at least 2 that it solves: ask for more, or an easier task")
        count = max(1, round(len(chosen) * (1 - held_out)))
        found = circuit(net, *batch(encoded.rows(chosen[:count])), said=said, parts=parts, **how)
        others = batch(encoded.rows(chosen[count:])) if chosen[count:] else None
        judged = others and parts.value("held out", lambda: evaluate_circuit(net, *others, found, rows=rows))
        beside = compared(net, encoded.rows(chosen[:compare_prompts]), compare, said, parts) if compare else []
    return CircuitReport(
        model=model, task=Path(task).stem, example=pairs[chosen[0]], solved=len(chosen), asked=len(pairs),
        first=int(first.sum()), circuit=found, held_out=judged, agreement=beside,
        wanted=0.0 if options.get("size") else faithful,
    )  # fmt: skip


def batch(pairs: Encoded) -> tuple[dict[str, Any], dict[str, Any], LogitDifference]:
    """Return clean and corrupt inputs and the metric; logits are computed only where answers are read."""
    read, at = torch.unique(pairs.last, return_inverse=True)
    metric = LogitDifference(pairs.answer, pairs.distractor, at)
    clean, corrupt = ({"input_ids": ids, "logits_to_keep": read} for ids in (pairs.clean, pairs.corrupt))
    return clean, corrupt, metric


def solved(model: nn.Module, pairs: Encoded, *, rows: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which prompts a model solves [B]: clean ones with the answer ahead of the distractor, corrupt ones not.

    The second result [B]: an answer is the likeliest token of all.
    """
    right, first = [], []
    for i in range(0, len(pairs.last), rows):
        part = pairs.rows(range(i, min(i + rows, len(pairs.last))))
        clean, corrupt, metric = batch(part)
        with torch.no_grad():
            output = run(model, clean)
            right.append((metric(output) > 0) & (metric(run(model, corrupt)) < metric(output)))
        assert metric.at is not None
        best = output.logits[torch.arange(len(part.last)), metric.at].argmax(-1)
        first.append((best[:, None] == part.answer).any(1))
    return torch.cat(right), torch.cat(first)


def compared(
    model: nn.Module,
    pairs: Encoded,
    kinds: Sequence[str],
    said: Callable[[str, int, int], None] | None = None,
    parts: io.Parts | None = None,
) -> list[dict[str, Any]]:
    """Compare estimates with patching on a task, as shares of the way from the corrupt prompt to the clean one."""
    clean, corrupt, metric = batch(pairs)
    tick = (lambda text: said(text, 1, 1)) if said else None
    between = metric.between(model, clean, corrupt)
    return agreement(model, clean, corrupt, between, kinds=kinds, rows=128, said=tick, parts=parts)


def _elsewhere(ablation: str) -> str:
    return {"resample": "the corrupt prompt", "mean": "the mean over prompts", "zero": "nowhere: zero"}[ablation]


def _network(c: Circuit, title: str, dark: bool) -> bytes:
    strongest = dict(list(c.parts.items())[:DRAWN])
    ends = {tuple(name.split("->")): score for name, score in strongest.items()}
    writers = sorted({pair[0] for pair in ends}, key=node_order)
    edges: dict[tuple[str, str], float] = {}
    for (writer, reader), score in ends.items():  # a reading attention layer is drawn as its heads that write
        heads = [name for name in writers if name.startswith(f"{reader}.")] or [reader]
        edges |= {(writer, head): score for head in heads}
    names = sorted({name for pair in edges for name in pair} - {"logits"}, key=node_order)
    ranks: dict[tuple[int, int], list[str]] = {}
    for name in names:
        ranks.setdefault(node_order(name)[:2], []).append(name)
    mlps = [name for name in names if name.startswith("m")]
    return network([*ranks.values(), ["logits"]], edges, aside=mlps, title=title, dark=dark)


def _map(c: Circuit, title: str, dark: bool) -> bytes:
    places = {name: node_order(name) for name in c.parts}
    layers = 1 + max(layer for layer, _, _ in places.values())
    heads = 1 + max((head for _, kind, head in places.values() if kind == 0), default=0)
    grid = [[float("nan")] * (heads + 1) for _ in range(layers)]
    for name, (layer, kind, head) in places.items():
        grid[layer][heads if kind else head] = abs(c.parts[name])
    columns = [*(f"h{head}" for head in range(heads)), "mlp"]
    return heatmap(grid, xlabel="head", ylabel="layer", title=title, unit="lost without it (absolute)",
                   column_names=columns, dark=dark)  # fmt: skip
