"""The features of a model that do a task: a `Circuit` of features, scored by effects and judged by running the rest.

At each dictionary's place y = sum_i z_i d_i + what is left; z_i and the rest ("e10") are nodes, and outside the circuit
they take the value they have in the corrupt run (Marks et al. 2024, arXiv:2403.19647).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError, unknown
from lineament.explain.circuit import SHARES, Circuit, choose, evaluate
from lineament.explain.dictionaries.hooks import Placed, check_layers
from lineament.explain.effects import rows_of
from lineament.explain.moved import SLOPES, Metric, swept
from lineament.explain.places import check_aligned, replaced, run, values_at
from lineament.explain.relevance import named
from lineament.io import Parts
from lineament.report import network

DRAWN = 24  # features of a layer that a picture shows


@dataclass(frozen=True)
class _Held:
    """What a dictionary's place holds in one run: features [B, T, F], and the rest [B, T, D]."""

    z: Tensor
    rest: Tensor


@dataclass(frozen=True)
class _Task:
    """A model with pairs of prompts; as `circuit`'s own task, its nodes being features."""

    model: nn.Module
    dictionaries: Sequence[Placed]
    batches: list[tuple[Mapping[str, Any], Metric, dict[str, _Held], dict[str, _Held]]]
    """Clean prompts, metric, what places hold in the clean and in the corrupt run."""
    names: list[str]

    def measure(self, off: Sequence[str]) -> float:
        """Return the mean metric of the clean run with some features ablated."""
        gone, total, count = set(off), 0.0, 0
        for clean, metric, _, corrupt in self.batches:
            with torch.no_grad(), ExitStack() as hooks:
                for each in self.dictionaries:
                    self._cut(hooks, each, corrupt[each.name], gone)
                found = metric(run(self.model, clean))
            total, count = total + float(found.sum(dtype=torch.float64)), count + found.numel()
        return total / count

    def _cut(self, hooks: ExitStack, each: Placed, corrupt: _Held, gone: set[str]) -> None:
        """Let ablated features of a place, and its rest, take their value of the corrupt run."""
        prefix, d, read = f"{each.name}.", each.dictionary, {}
        off = torch.tensor([int(name.removeprefix(prefix)) for name in gone if name.startswith(prefix)]).long()

        def change(y: Tensor) -> Tensor:
            x = read.pop(0) if each.reads != each.writes else y
            z = d.encode(x)
            new = y - ((z - corrupt.z)[..., off] @ d.W_dec[off]).to(y)
            return new - (y - d(x) - corrupt.rest).to(y) if f"e{each.layer}" in gone else new

        if each.reads != each.writes:
            hooks.enter_context(replaced(self.model, each.reads, lambda x: read.update({0: x}) or x))
        hooks.enter_context(replaced(self.model, each.writes, change))

    def scores(self, method: str) -> dict[str, float]:
        """Return by how much the metric falls, as estimated, with each feature ablated alone."""
        total = dict.fromkeys(self.names, 0.0)
        for clean, metric, old, new in self.batches:
            slopes = swept(self.model, clean, metric, [each.writes for each in self.dictionaries], SLOPES[method])
            for each in self.dictionaries:
                if each.writes not in slopes:
                    continue
                slope, a, b = slopes[each.writes].to(new[each.name].rest), old[each.name], new[each.name]
                found = ((a.z - b.z) * (slope @ each.dictionary.W_dec.detach().T)).sum((0, 1), dtype=torch.float64)
                for name in self.names:
                    if name.startswith(f"{each.name}."):
                        total[name] += float(found[int(name.rpartition(".")[2])])
                total[f"e{each.layer}"] += float(((a.rest - b.rest) * slope).sum(dtype=torch.float64))
        return {name: x / self.prompts for name, x in total.items()}

    @property
    def prompts(self) -> int:
        return sum(len(next(iter(old.values())).z) for _, _, old, _ in self.batches)


def feature_circuit(
    model: nn.Module,
    clean: Mapping[str, Any] | Tensor,
    corrupt: Mapping[str, Any] | Tensor,
    metric: Metric,
    dictionaries: Sequence[Placed],
    *,
    method: str = "relp",
    size: int | None = None,
    faithful: float = 0.85,
    shares: Sequence[float] = SHARES,
    rows: int = 16,
    said: Callable[[str, int, int], None] | None = None,
) -> Circuit:
    """Find the features that do a task, and measure how well they do it alone.

    All that is no feature (attention, other MLPs) runs as in the clean run. Scores are summed over positions.

    Args:
        model: a decoder in eval mode; it comes back as it was.
        clean, corrupt, metric, size, faithful, shares, said: as for `explain.circuit`.
        dictionaries: transcoders or autoencoders by `placed`, one per layer.
        method: of scoring: "relp", "relp-ah" or "attribution".
        rows: of a pass.

    Returns:
        A `Circuit` of level "feature": "t10.57" (of a transcoder), "s10.57" (an autoencoder), "e10" (the rest).

    Raises:
        InputError: as for `explain.circuit`, or two dictionaries for one layer.
    """
    if method not in SLOPES:
        raise unknown("method", method, SLOPES)
    check_layers(dictionaries)
    say, began = said or (lambda what, done, total: None), time.perf_counter()
    task = _task(model, named(model, clean), named(model, corrupt), metric, dictionaries, rows)
    if size is not None and not 0 < size <= len(task.names):
        raise InputError(f"size is {size}; the prompts have {len(task.names)} features and rests")
    scores = task.scores(method)
    about = {"level": "feature", "method": method, "ablation": "resample"}
    return choose(
        task, about, scores, time.perf_counter() - began, size=size, faithful=faithful, shares=shares, say=say,
        kept_in=Parts(),
    )  # fmt: skip


def evaluate_feature_circuit(
    model: nn.Module,
    clean: Mapping[str, Any] | Tensor,
    corrupt: Mapping[str, Any] | Tensor,
    metric: Metric,
    dictionaries: Sequence[Placed],
    found: Circuit,
    *,
    rows: int = 16,
) -> dict[str, float]:
    """Measure a circuit of features on other prompts: {"faithfulness", "completeness", "whole", "nothing"}.

    Features of the circuit that these prompts don't move count for nothing.

    Raises:
        InputError: a circuit of a layer that has no dictionary here, or of another level.
    """
    check_layers(dictionaries)
    layers = {each.name for each in dictionaries} | {f"e{each.layer}" for each in dictionaries}
    strange = [name for name in found.parts if name.partition(".")[0] not in layers]
    if strange:
        raise InputError(f"no dictionary here has {strange[0]!r}; is the circuit of others?")
    task = _task(model, named(model, clean), named(model, corrupt), metric, dictionaries, rows)
    return evaluate(task, found)


def _task(
    model: nn.Module, clean: Mapping[str, Any], corrupt: Mapping[str, Any], metric: Metric,
    dictionaries: Sequence[Placed], rows: int,
) -> _Task:  # fmt: skip
    check_aligned(clean, corrupt)
    cut: Any = getattr(metric, "rows", None)
    count = next(len(x) for x in clean.values() if isinstance(x, Tensor) and x.dim())
    step = rows if cut else count
    task = _Task(model, dictionaries, [], [])
    moved: dict[str, None] = {}
    for i in range(0, count, step):
        one, other = (rows_of(inputs, i, i + step) for inputs in (clean, corrupt))
        old, new = (_held(model, inputs, dictionaries) for inputs in (one, other))
        task.batches.append((one, cut(i, i + step) if cut else metric, old, new))
        for each in dictionaries:
            differs = (old[each.name].z != new[each.name].z).flatten(0, -2).any(0).nonzero().flatten().tolist()
            moved |= dict.fromkeys([*(f"{each.name}.{feature}" for feature in differs), f"e{each.layer}"])
    task.names.extend(moved)
    return task


@torch.no_grad()
def _held(model: nn.Module, inputs: Mapping[str, Any], dictionaries: Sequence[Placed]) -> dict[str, _Held]:
    values = values_at(model, inputs, [place for each in dictionaries for place in (each.reads, each.writes)])
    found = {}
    for each in dictionaries:
        x, y = values[each.reads], values[each.writes]
        found[each.name] = _Held(each.dictionary.encode(x), y - each.dictionary(x).to(y))
    return found


def feature_picture(found: Circuit, *, dark: bool = False) -> bytes:
    """Draw a circuit of features, layer by layer, with what each does for the metric.

    Raises:
        InputError: a circuit of another level.
    """
    if found.level != "feature":
        raise InputError(f"this is a circuit of {found.level}s; `explain.circuit_page` draws those")
    shown: dict[str, list[str]] = {}
    for name in found.parts:
        layer = shown.setdefault(name.partition(".")[0].lstrip("tse"), [])
        if len(layer) < DRAWN:
            layer.append(name)
    ranks = [
        part[i : i + 8] for _, part in sorted(shown.items(), key=lambda p: int(p[0])) for i in range(0, len(part), 8)
    ]
    title = f"{len(found.parts)} of {found.total} features, faithfulness {found.faithfulness:.2f}"
    edges = {(name, "metric"): found.parts[name] for part in ranks for name in part}
    return network([*ranks, ["metric"]], edges, title=title, dark=dark)
