"""The part of a decoder that does a task: edges or nodes chosen by their effects, judged by running what is left.

Everything outside the circuit takes the value it has elsewhere: in the corrupt run (resample), on average, or zero.
With m the metric of such a run, faithfulness is (m(circuit) - m(nothing)) / (m(whole) - m(nothing)), and completeness
the same of what remains when the circuit is taken out: near 0 if nothing of the task happens elsewhere
(Wang et al. 2022; Marks et al. 2024).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError, unknown
from lineament.explain.edges import edge_scores, moved_edges, reader_slopes
from lineament.explain.effects import METHODS, rows_of
from lineament.explain.moved import ABLATIONS, How, Metric, ablated, moved
from lineament.explain.places import Grid, check_aligned, run
from lineament.explain.recording import check_mode
from lineament.explain.relevance import named
from lineament.explain.wiring import Wiring, rewired, wiring, without
from lineament.io import Parts

LEVELS = ("edge", "node")
SHARES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Sizes along the curve, as shares of all edges or nodes."""


@dataclass(frozen=True, kw_only=True)
class Circuit:
    """A part of a model, and how well it does alone.

    Attributes:
        level: what was chosen, "edge", "node" or "feature".
        parts: name -> how much of the metric is lost when it alone is ablated (estimated or exact), the largest first.
        total: how many edges or nodes the model has.
        method, ablation: how they were scored, what the others are set to.
        faithfulness, completeness: of this circuit.
        whole, nothing: the metric's mean over prompts with nothing and with everything ablated.
        curve: by size: size, share, faithfulness, completeness, seconds.
        prompts: how many it was found on. seconds: scoring and evaluation.
    """

    level: str
    parts: dict[str, float]
    total: int
    method: str
    ablation: str
    faithfulness: float
    completeness: float
    whole: float
    nothing: float
    curve: Sequence[Mapping[str, float]] = ()
    prompts: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def nodes(self) -> list[str]:
        """The nodes, in the order of the model: a head or MLP of an edge counts once."""
        names = {node for part in self.parts for node in part.split("->")} - {"logits"}
        names -= {name for name in names if any(other.startswith(f"{name}.") for other in names)}
        return sorted(names, key=node_order)

    def curve_rows(self) -> list[dict[str, Any]]:
        """Return the curve for a table, without seconds."""
        return [{f"{self.level}s": row["size"], "share": row["share"], "faithfulness": row["faithfulness"],
                 "completeness": row["completeness"]} for row in self.curve]  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return a value for `json.dumps`."""
        return asdict(self) | {"nodes": self.nodes}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Circuit":
        """Read what `to_json` gave.

        Raises:
            InputError: it is no circuit.
        """
        known = {each.name for each in fields(cls)}
        missing = known - set(value) if isinstance(value, Mapping) else known
        if missing:
            raise InputError(f"this is no circuit: it has no {sorted(missing)[0]!r}")
        return cls(**{name: value[name] for name in known})


@dataclass(frozen=True)
class _Task:
    """A model with the pairs of prompts, cut into batches."""

    model: nn.Module
    at: Wiring
    level: str
    ablation: str
    batches: list[tuple[Mapping[str, Any], Mapping[str, Any], Metric, dict[str, Tensor]]]
    """Clean and corrupt prompts, metric, and what is outside the circuit."""

    @property
    def names(self) -> list[str]:
        if self.level == "edge":
            return [self.at.edge(*edge) for edge in self.at.edges()]
        return [writer.name for writer in self.at.writers[1:]]

    def outside(self, clean: Any, corrupt: Any) -> dict[str, Tensor]:
        """Return what the places of writers are set to outside the circuit."""
        if self.ablation == "resample":
            return self.at.values(self.model, corrupt)
        return ablated(self.at.values(self.model, clean), {}, self.ablation)

    def measure(self, off: Sequence[str]) -> float:
        """Return the mean metric of the clean run with some edges or nodes ablated."""
        gone, total, count = set(off), 0.0, 0
        for clean, _, metric, ablation in self.batches:
            with torch.no_grad(), self._cut(ablation, gone):
                found = metric(run(self.model, clean))
            total, count = total + float(found.sum(dtype=torch.float64)), count + found.numel()
        return total / count

    def _cut(self, ablation: Mapping[str, Tensor], gone: set[str]) -> Any:
        if self.level == "node":
            off = torch.tensor([writer.name in gone for writer in self.at.writers])
            return without(self.model, self.at, ablation, off)
        cut = torch.zeros_like(self.at.allowed)
        for reader, writer in self.at.edges():
            cut[reader, writer] = self.at.edge(reader, writer) in gone
        return rewired(self.model, self.at, ablation, cut)

    def scores(self, how: How, parts: Parts) -> tuple[dict[str, float], float]:
        """Return by how much the metric falls, on average, with each edge or node ablated alone, and seconds."""
        score = self._edge_scores if self.level == "edge" else self._node_scores

        def sums(clean: Any, corrupt: Any, metric: Metric, new: Any) -> dict[str, float]:
            found = score(clean, corrupt, metric, new, how)
            return {name: -float(x.sum(dtype=torch.float64)) for name, x in found.items()}

        found = [parts.value(f"scores-{at}", timed(sums, *batch)) for at, batch in enumerate(self.batches)]
        total = {name: sum(each["found"][name] for each in found) / self.prompts for name in self.names}
        return total, sum(each["seconds"] for each in found)

    @property
    def prompts(self) -> int:
        return sum(_rows(batch[0]) for batch in self.batches)

    def _edge_scores(self, clean: Any, corrupt: Any, metric: Metric, new: Any, how: How) -> dict[str, Tensor]:
        if how.method == "patch":
            return moved_edges(self.model, clean, corrupt, metric, ["*->*"], self.ablation, how)
        old = self.at.values(self.model, clean)
        slopes = reader_slopes(self.model, clean, metric, self.at, how, other=corrupt)
        return edge_scores(self.at, old, new, slopes, self.at.edges(), how.grid)

    def _node_scores(self, clean: Any, corrupt: Any, metric: Metric, new: Any, how: How) -> dict[str, Tensor]:
        old, found = self.at.values(self.model, clean), {}
        for heads in (True, False):
            places = {self.at.sites[g]: g for g in self.at.groups if g != "embed" and (g in self.at.maps) == heads}
            grid = Grid(("head",), self.at.heads) if heads else Grid(("component",))
            part = How(how.method, grid, how.rows, how.steps, how.tick)
            values = [{site: x[group] for site, group in places.items()} for x in (old, new)]
            for site, scores in (moved(self.model, clean, *values, metric, part) if places else {}).items():
                columns = scores.unbind(1) if heads else [scores]
                writers = self.at.groups[places[site]]
                found |= {self.at.writers[w].name: x for w, x in zip(writers, columns, strict=True)}
        return found


def circuit(
    model: nn.Module,
    clean: Mapping[str, Any] | Tensor,
    corrupt: Mapping[str, Any] | Tensor,
    metric: Metric,
    *,
    level: str = "edge",
    method: str = "relp",
    ablation: str = "resample",
    size: int | None = None,
    faithful: float = 0.85,
    shares: Sequence[float] = SHARES,
    steps: int = 10,
    rows: int = 64,
    said: Callable[[str, int, int], None] | None = None,
    parts: Parts | None = None,
) -> Circuit:
    """Find the edges or nodes of a decoder that do a task, and measure how well they do it alone.

    Edges (or heads and MLPs) are scored by what ablating each costs the clean run; the largest by absolute score are
    kept, but for those that nothing reaches or that lead nowhere.

    Args:
        model: a decoder whose residual stream is known (`wiring`), in eval mode; it comes back as it was.
        clean, corrupt: prompts of the same shapes; the task is done on the clean ones.
        metric: high when the task is done, a number per row; `LogitDifference` lets batches pass in parts.
        level: "edge" or "node".
        method: of scoring: "relp", "relp-ah", "attribution", "integrated-gradients", "direct", or "patch", exact.
        ablation: what is outside is set to: "resample" (the corrupt run), "mean" over rows, "zero".
        size: how many to keep before dead ends are dropped; if None, the smallest size of the curve that is as
            faithful as wanted.
        faithful: what is wanted. shares: sizes of the curve, as shares of all edges or nodes.
        steps: of integrated gradients. rows: of a pass.
        said: called with (what, done, all). parts: where scores by batch and the curve by size are kept.

    Raises:
        InputError: prompts of unequal shapes, an unknown level, method or ablation, a size out of range, or a task that
            ablating everything does not change.
    """
    task = _checked(model, clean, corrupt, metric, level, method, ablation, rows)
    say, parts = said or (lambda what, done, total: None), parts or Parts()
    names = task.names
    if size is not None and not 0 < size <= len(names):
        raise InputError(f"size is {size}; the model has {len(names)} {level}s")
    say("scoring", 0, 1)
    scores, seconds = task.scores(How(method, Grid(("component",)), max(rows, 512), steps), parts)
    say("scoring", 1, 1)
    about = {"level": level, "method": method, "ablation": ablation}
    return choose(task, about, scores, seconds, size=size, faithful=faithful, shares=shares, say=say, kept_in=parts)


def choose(
    task: Any, about: Mapping[str, str], scores: Mapping[str, float], seconds: float, *, size: int | None,
    faithful: float, shares: Sequence[float], say: Callable[[str, int, int], None], kept_in: Parts,
) -> Circuit:  # fmt: skip
    """Measure the highest scores at every size and return the circuit of the size that is wanted.

    Args:
        task: model and prompts, with `names` of its parts, `measure` of a run without some, and `prompts`.
        about: the circuit's level, method and ablation. seconds: that scoring took.
        size, faithful, shares, say, kept_in: as for `circuit`.
    """
    names = sorted(task.names, key=lambda name: -abs(scores[name]))
    sizes = sorted({max(1, round(share * len(names))) for share in shares} | ({size} if size else set()))
    kept = {count: alive(names[:count]) if about["level"] == "edge" else names[:count] for count in sizes}
    ends = kept_in.value("ends", timed(_ends_of, task))
    curve = _curve_of(task, kept, tuple(ends["found"]), say, kept_in)
    wanted = [row for row in curve if (row["asked"] == size if size else row["faithfulness"] >= faithful)]
    chosen = (wanted or curve[-1:])[0]
    return Circuit(
        **about, parts={name: scores[name] for name in kept[chosen["asked"]]}, total=len(names),
        faithfulness=chosen["faithfulness"], completeness=chosen["completeness"],
        whole=ends["found"][0], nothing=ends["found"][1], curve=curve, prompts=task.prompts,
        seconds={"scoring": seconds, "evaluation": ends["seconds"] + sum(row["seconds"] for row in curve)},
    )  # fmt: skip


def evaluate_circuit(
    model: nn.Module,
    clean: Mapping[str, Any] | Tensor,
    corrupt: Mapping[str, Any] | Tensor,
    metric: Metric,
    found: Circuit,
    *,
    rows: int = 64,
) -> dict[str, float]:
    """Measure a circuit on other prompts: {"faithfulness", "completeness", "whole", "nothing"}.

    Raises:
        InputError: the model has not the circuit's edges or nodes.
    """
    task = _checked(model, clean, corrupt, metric, found.level, found.method, found.ablation, rows)
    known = set(task.names)
    strange = [name for name in found.parts if name not in known]
    if strange:
        raise InputError(f"the model has no {found.level} {strange[0]!r}; is the circuit of another model?")
    return evaluate(task, found)


def evaluate(task: Any, found: Circuit) -> dict[str, float]:
    """Measure a circuit on the prompts of a task."""
    ends = _ends_of(task)
    return _judged(task, list(found.parts), ends) | {"whole": ends[0], "nothing": ends[1]}


def alive(edges: Sequence[str]) -> list[str]:
    """Return the edges on ways from the embedding to the logits; the others can hand nothing on.

    Example:
        >>> alive(["embed->m0", "m0->logits", "a0.h1->logits", "embed->m1"])
        ['embed->m0', 'm0->logits']
    """
    pairs = [(edge, *edge.split("->")) for edge in edges]
    while True:
        heard = {reader for _, _, reader in pairs} | {"embed"}
        hearing = {writer.partition(".")[0] for _, writer, _ in pairs} | {"logits"}
        left = [pair for pair in pairs if pair[1].partition(".")[0] in heard and pair[2] in hearing]
        if len(left) == len(pairs):
            return [edge for edge, _, _ in left]
        pairs = left


def _ends_of(task: Any) -> tuple[float, float]:
    """Return the metric with nothing and with everything ablated."""
    ends = task.measure([]), task.measure(task.names)
    if abs(ends[0] - ends[1]) < 1e-9:
        raise InputError("ablating everything doesn't change the metric, so there is no task to find a circuit of")
    return ends


def _curve_of(
    task: Any, kept: Mapping[int, Sequence[str]], ends: tuple[float, float], say: Callable[[str, int, int], None],
    kept_in: Parts,
) -> list[dict[str, Any]]:  # fmt: skip
    curve = []
    for index, (count, parts) in enumerate(kept.items()):
        say("evaluating", index, len(kept))
        found = kept_in.value(f"size-{count}", timed(_judged, task, parts, ends))
        row = {"asked": count, "size": len(parts), "share": len(parts) / len(task.names), "seconds": found["seconds"]}
        curve.append(row | found["found"])
    say("evaluating", len(kept), len(kept))
    return curve


def timed(work: Callable[..., Any], *given: Any) -> Callable[[], dict[str, Any]]:
    """Return a function that does the work: {"found": what it gave, "seconds": of wall clock}."""

    def make() -> dict[str, Any]:
        began = time.perf_counter()
        return {"found": work(*given), "seconds": time.perf_counter() - began}

    return make


def _judged(task: Any, kept: Sequence[str], ends: tuple[float, float]) -> dict[str, float]:
    rest = list(set(task.names) - set(kept))
    shares = [(task.measure(off) - ends[1]) / (ends[0] - ends[1]) for off in (rest, kept)]
    return dict(zip(("faithfulness", "completeness"), shares, strict=True))


def _checked(
    model: nn.Module, clean: Any, corrupt: Any, metric: Metric, level: str, method: str, ablation: str, rows: int
) -> _Task:
    methods = [name for name in METHODS if name not in ABLATIONS]
    for kind, chosen, known in zip(
        ("level", "method", "ablation"), (level, method, ablation), (LEVELS, methods, ABLATIONS), strict=True
    ):
        if chosen not in known:
            raise unknown(kind, chosen, known)
    if method == "integrated-gradients" and ablation != "resample" and level == "edge":
        raise InputError("integrated gradients of edges lead to the corrupt run; take ablation='resample'")
    check_mode(model)
    given = named(model, clean), named(model, corrupt)
    check_aligned(*given)
    count, cut = _rows(given[0]), getattr(metric, "rows", None)
    step = count if cut is None or ablation == "mean" else rows
    task = _Task(model, wiring(model), level, ablation, [])
    for i in range(0, count, step):
        one, other = (rows_of(inputs, i, i + step) for inputs in given)
        task.batches.append((one, other, cut(i, i + step) if cut else metric, task.outside(one, other)))
    return task


def _rows(inputs: Mapping[str, Any]) -> int:
    return next(len(x) for x in inputs.values() if isinstance(x, Tensor) and x.dim())


def node_order(name: str) -> tuple[int, int, int]:
    """Sort nodes as they come in the model: embed, a0.h0, ..., m0, a1.h0, ...; features of m0 as t0.5."""
    if name == "embed":
        return (-1, 0, 0)
    layer, _, part = name[1:].partition(".")
    return (int(layer), "amtse".index(name[0]), int(part.lstrip("h") or 0))
