"""Paths between models: straight, in pieces, bent; the loss along them, and how high it rises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lineament import train
from lineament._base.errors import InputError
from lineament.weights.evaluate import Bound, Loss, Scorer, between, parameters_of, prediction_loss, score
from lineament.weights.repair import NORMS, repairing

Split = Mapping[str, Mapping[str, tuple[tuple[float, float], ...]]]
Point = Mapping[str, Tensor]


@dataclass(frozen=True)
class Path:
    """What was measured along a path.

    Attributes:
        t: where, from 0 to 1.
        curves: data set -> number ("loss", "accuracy", ...) -> (mean, standard error) at each t.
    """

    t: tuple[float, ...]
    curves: Split

    @property
    def barrier(self) -> float:
        """The largest rise of the loss above the straight line between the ends, on the first data set."""
        return self.rise()

    def values(self, number: str = "loss", split: str | None = None) -> list[float]:
        """Return the means of one number along the path."""
        curves = self.curves[split or next(iter(self.curves))]
        if number not in curves:
            raise InputError(f"the path has no number {number!r}; it has {', '.join(curves)}")
        return [mean for mean, _ in curves[number]]

    def rise(self, number: str = "loss", split: str | None = None) -> float:
        """Return `max_t [L(t) - ((1 - t) L(0) + t L(1))]`; for an accuracy the largest fall below that line.

        NaN where a loss on the way is NaN: no barrier can be told then.

        Example:
            >>> Path((0.0, 0.5, 1.0), {"test": {"loss": ((1.0, 0.0), (4.0, 0.0), (3.0, 0.0))}}).rise()
            2.0
        """
        return max(self._excess(number, split), key=_height)

    def peak(self, number: str = "loss", split: str | None = None) -> float:
        """Return where the rise is largest."""
        excess = self._excess(number, split)
        return self.t[max(range(len(excess)), key=lambda i: _height(excess[i]))]

    def _excess(self, number: str, split: str | None) -> list[float]:
        y = self.values(number, split)
        sign = -1.0 if number == "accuracy" else 1.0
        return [sign * (v - (1 - t) * y[0] - t * y[-1]) for t, v in zip(self.t, y, strict=True)]

    def rows(self) -> list[dict[str, float]]:
        """Return one mapping per t, for tables and JSON."""
        flat = [(f"{split} {name}", values) for split, of in self.curves.items() for name, values in of.items()]
        return [{"t": t, **{name: values[i][0] for name, values in flat}} for i, t in enumerate(self.t)]

    def figure(self, number: str = "loss") -> bytes:
        """Draw the curves with error bars, the ends and the middle included, as SVG or PNG bytes."""
        from lineament.report import curve

        series = {
            split: (list(self.t), [m for m, _ in of[number]], [e for _, e in of[number]])
            for split, of in self.curves.items()
            if number in of
        }
        return curve(series, xlabel="from a (0) to b (1)", ylabel=number)


def path(
    model: nn.Module, a: Point, b: Point, batches: Any, *, loss: Loss | None = None, through: Sequence[Point] = (),
    bend: Point | None = None, points: int = 11, reset: Iterable[Any] | None = None,
) -> Path:  # fmt: skip
    """Measure a model along a path between two points.

    Args:
        model: the architecture; not changed.
        a, b: state dicts or Points.
        batches: a list of batches, or {"train": [...], "test": [...]}; the first data set gives `.barrier`.
        loss: (model, batch) -> (scalar, numbers); cross entropy and accuracy if None, see `prediction_loss`.
        through: points on the way: a path in pieces.
        bend: the control point of a quadratic Bezier curve (see `bent`), instead of straight lines.
        points: places on each piece, ends included.
        reset: training batches from which batch-norm statistics are taken anew at every place; without it a net with
            batch norm shows a barrier that is mostly stale statistics. A net without batch norm gets `repair` there
            instead (straight paths only).

    Raises:
        InputError: fewer than three points, both `through` and `bend`, no batches.

    Example:
        >>> net = nn.Linear(1, 2)
        >>> data = [(torch.ones(4, 1), torch.zeros(4, dtype=torch.long))]
        >>> path(net, net.state_dict(), net.state_dict(), data).barrier < 1e-6
        True
    """
    if points < 3:
        raise InputError(f"points is {points}; a barrier needs at least three places")
    if through and bend is not None:
        raise InputError("give through or bend, not both")
    splits = dict(batches) if isinstance(batches, Mapping) else {"data": batches}
    splits = {name: list(of) for name, of in splits.items()}
    reset = None if reset is None else list(reset)
    mended = reset is not None and not any(isinstance(module, NORMS) for module in model.modules())
    if mended and (through or bend is not None):
        raise InputError("REPAIR of nets without batch norm is for straight paths: leave out reset, through or bend")
    scorer = Scorer(model, loss, None if mended else reset)
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in splits}
    places = list(_places(a, b, through, bend, points))
    merged = repairing(model, a, b, reset) if mended and reset else None
    for t, parts, shares in places:
        scorer.move(between(parts, shares) if merged is None else merged(t))
        for split, of in splits.items():
            for name, pair in score(scorer.model, of, scorer.loss).items():
                curves[split].setdefault(name, []).append(pair)
    kept = {split: {name: tuple(pairs) for name, pairs in of.items()} for split, of in curves.items()}
    return Path(tuple(t for t, _, _ in places), kept)


def _places(a: Point, b: Point, through: Sequence[Point], bend: Point | None, points: int) -> Iterable[Any]:
    if bend is not None:
        for i in range(points):
            t = i / (points - 1)
            yield t, [a, bend, b], bezier(t)
        return
    stops = [a, *through, b]
    for piece, (left, right) in enumerate(pairwise(stops)):
        for i in range(int(piece > 0), points):
            t = i / (points - 1)
            yield (piece + t) / (len(stops) - 1), [left, right], [1 - t, t]


def _height(excess: float) -> float:
    """Put NaN above all numbers: it must not pass for a low barrier."""
    return math.inf if math.isnan(excess) else excess


def bezier(t: float) -> list[float]:
    """Return the shares of the ends and of the control point in a quadratic Bezier curve: (a, control, b)."""
    return [(1 - t) ** 2, 2 * t * (1 - t), t**2]


def bent(
    model: nn.Module, a: Point, b: Point, batches: Callable[[int], Any], config: train.FitConfig, *,
    loss: Loss | None = None, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Train the control point of a Bezier curve between two points so that the loss stays low all along it.

    Each step draws t uniformly and descends the loss at that place (Garipov et al. 2018, arXiv:1802.10026).

    Args:
        batches: step -> batch. config: of `train.fit`.

    Returns:
        The control point, for `path(..., bend=...)`; buffers are the mean of the ends'.
    """
    start = between([a, b], [0.5, 0.5])
    ends = [parameters_of(model, point) for point in (a, b)]
    control = Weights({name: start[name] for name in ends[0]})
    buffers = {name: start[name] for name, _ in model.named_buffers() if name in start}
    draw = torch.Generator().manual_seed(seed)

    def along(held: Any, batch: Any) -> tuple[Tensor, Mapping[str, float]]:
        shares = bezier(float(torch.rand((), generator=draw)))
        state = {
            name: shares[0] * ends[0][name] + shares[1] * w + shares[2] * ends[1][name]
            for name, w in control.named().items()
        }
        return (loss or prediction_loss)(Bound(model, {**buffers, **state}), batch)

    train.fit(control, batches, along, config, description="bend")
    return {**start, **{name: w.detach() for name, w in control.named().items()}}


class Weights(nn.Module):
    """A point as something that can be trained; parameter names may hold dots."""

    def __init__(self, point: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = list(point)
        self.tensors = nn.ParameterList(point[name].detach().clone() for name in self.names)

    def named(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.tensors, strict=True))
