"""The loss around models: layer by layer, in planes, to second order, and from where runs part (arXiv:2406.16300)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament import train
from lineament._base.errors import InputError
from lineament.weights.evaluate import Bound, Loss, Scorer, between, parameters_of, prediction_loss

Point = Mapping[str, Tensor]


def module_of(name: str) -> str:
    """Return the name of the module that holds a tensor: the usual block."""
    return name.rpartition(".")[0]


def blocks_of(model: nn.Module, block: Callable[[str], str] = module_of) -> dict[str, list[str]]:
    """Group the tensors of a model by block, in the model's order."""
    found: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        found.setdefault(block(name), []).append(name)
    for name, _ in model.named_buffers():
        if block(name) in found:
            found[block(name)].append(name)
    return found


def layerwise(
    model: nn.Module, a: Point, b: Point, batches: Iterable[Any], *, loss: Loss | None = None, t: float = 0.5,
    block: Callable[[str], str] = module_of, cumulative: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Mix one block at a time into a and return how much the loss exceeds the line between the two full models.

    `B_l = L(a with block l at (1-t) a_l + t b_l) - [(1-t) L(a) + t L(b)]` (Adilova et al. 2024, arXiv:2307.06966).

    Args:
        block: tensor name -> block name. cumulative: mix all blocks up to each one.
    """
    batches = list(batches)
    scorer = Scorer(model, loss)
    ends = [scorer.at(point, batches)["loss"][0] for point in (a, b)]
    line = (1 - t) * ends[0] + t * ends[1]
    mixed, found, state = between([a, b], [1 - t, t]), {}, dict(a)
    for name, members in blocks_of(model, block).items():
        state = {**(state if cumulative else dict(a)), **{member: mixed[member] for member in members}}
        found[name] = scorer.at(state, batches)["loss"][0] - line
    return found


@dataclass(frozen=True)
class SecondOrder:
    """A barrier estimated from the ends: value, its quadratic part alone, and per block where asked."""

    barrier: float
    quadratic: float
    blocks: Mapping[str, float]


def second_order(
    model: nn.Module, a: Point, b: Point, batches: Iterable[Any], *, loss: Loss | None = None, t: float = 0.5,
    block: Callable[[str], str] | None = None,
) -> SecondOrder:  # fmt: skip
    """Estimate the barrier at t from gradients and Hessian-vector products at the two ends.

    `t(1-t) (g_a - g_b).mu + t(1-t)/2 [t mu'H_a mu + (1-t) mu'H_b mu]` with mu = b - a; exact for a quadratic loss. Per
    block, expanding at a: `t g_a.mu_l + t^2/2 mu_l'H_a mu_l + t (L(a) - L(b))`.

    Args:
        batches: the full data; each is differentiated twice on its own and the results are averaged.
        block: tensor name -> block name, for the estimate per block (one product each).
    """
    batches = list(batches)
    x, y = parameters_of(model, a), parameters_of(model, b)
    mu = {name: y[name] - w for name, w in x.items()}
    groups = {} if block is None else {
        n: [m for m in of if m in mu] for n, of in blocks_of(model, block).items()
    }  # fmt: skip
    directions = [mu] + [{name: mu[name] for name in of} for of in groups.values()]
    low, first, curved = _curvature(model, a, x, directions, batches, loss)
    high, second, bowed = _curvature(model, b, y, directions[:1], batches, loss)
    quadratic = t * (1 - t) / 2 * (t * curved[0] + (1 - t) * bowed[0])
    each = {
        name: t * first[i] + t * t / 2 * curved[i] + t * (low - high) for i, name in enumerate(groups, 1)
    }  # fmt: skip
    return SecondOrder(t * (1 - t) * (first[0] - second[0]) + quadratic, quadratic, each)


def _curvature(
    model: nn.Module, point: Point, weights: dict[str, Tensor], directions: list[dict[str, Tensor]],
    batches: list[Any], loss: Loss | None,
) -> tuple[float, list[float], list[float]]:  # fmt: skip
    """Return the loss, and g.v and v'Hv for each direction, averaged over batches."""
    held = copy.deepcopy(model).eval()
    fixed = {name: point[name] for name, _ in held.named_buffers() if name in point}
    total, slopes, curves = 0.0, [0.0] * len(directions), [0.0] * len(directions)
    for batch in batches:
        w = {name: x.detach().requires_grad_() for name, x in weights.items()}
        value, _ = (loss or prediction_loss)(Bound(held, {**fixed, **w}), batch)
        gradient = dict(zip(w, torch.autograd.grad(value, list(w.values()), create_graph=True), strict=True))
        total += float(value.detach()) / len(batches)
        for i, v in enumerate(directions):
            slope = sum(((gradient[name] * x).sum() for name, x in v.items()), torch.zeros(()))
            product = torch.autograd.grad(slope, [w[name] for name in v], retain_graph=True, allow_unused=True)
            slopes[i] += float(slope.detach()) / len(batches)
            curves[i] += sum(
                float((h * x).sum()) for h, x in zip(product, v.values(), strict=True) if h is not None
            ) / len(batches)  # fmt: skip
    return total, slopes, curves


@dataclass(frozen=True)
class Plane:
    """The loss on a plane through three points: x and y in weight space, the loss (a row per y), the points."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    loss: tuple[tuple[float, ...], ...]
    points: tuple[tuple[float, float], ...]

    def figure(self) -> bytes:
        """Draw the plane as a heat map."""
        from lineament.report import heatmap

        return heatmap(self.loss, xlabel="towards a", ylabel="towards b", title="loss")


def plane(
    model: nn.Module, origin: Point, a: Point, b: Point, batches: Iterable[Any], *, loss: Loss | None = None,
    size: int = 25, margin: float = 0.2,
) -> Plane:  # fmt: skip
    """Evaluate the loss on the plane through three points, u = a - origin and v = b - origin made orthogonal.

    Buffers are the origin's.

    Raises:
        InputError: the points lie on one line.
    """
    batches, scorer = list(batches), Scorer(model, loss)
    o, p, q = (parameters_of(model, point) for point in (origin, a, b))
    u, v = ({name: w[name] - o[name] for name in o} for w in (p, q))
    along = _dot(u, u) ** 0.5
    share = _dot(u, v) / along**2 if along else math.nan
    v = {name: x - share * u[name] for name, x in v.items()}
    up = _dot(v, v) ** 0.5
    if not up > 1e-6 * along:
        raise InputError("the three points lie on one line, which spans no plane; measure it with weights.path")
    places = ((0.0, 0.0), (along, 0.0), (share * along, up))
    lows, highs = ([pick(p[i] for p in places) for i in (0, 1)] for pick in (min, max))
    axes = [
        torch.linspace(low - margin * (high - low), high + margin * (high - low), size, dtype=torch.float64).tolist()
        for low, high in zip(lows, highs, strict=True)
    ]
    rows = []
    for y in axes[1]:
        row = []
        for x in axes[0]:
            state = {name: w + x / along * u[name] + y / up * v[name] for name, w in o.items()}
            row.append(scorer.at({**origin, **state}, batches)["loss"][0])
        rows.append(tuple(row))
    return Plane(tuple(axes[0]), tuple(axes[1]), tuple(rows), places)


def _dot(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
    return math.fsum(float((w.double() * y[name].double()).sum()) for name, w in x.items())


@dataclass(frozen=True)
class Fork:
    """Two runs that share their beginning: where they part, and where they end."""

    parting: dict[str, Tensor]
    a: dict[str, Tensor]
    b: dict[str, Tensor]


def fork(
    model: nn.Module, order: Callable[[int], Callable[[int], Any]], config: train.FitConfig, *, shared: int,
    loss: Loss | None = None, seeds: tuple[int, int] = (1, 2), seed: int = 0,
) -> Fork:  # fmt: skip
    """Train a model for some steps, then two copies of it with the data in different orders (Frankle et al. 2020).

    Args:
        model: where the run begins; not changed. It must compute the same in train mode and eval mode, or be in the
            mode it shall train in.
        order: seed -> (step -> batch).
        config: of the two runs after the fork; the shared part has its `shared` steps and else the same settings.
    """
    from dataclasses import replace

    loss = loss or prediction_loss
    common = copy.deepcopy(model)
    if shared:
        train.fit(common, order(seed), loss, replace(config, steps=shared), description="shared")
    ends = []
    for each in seeds:
        run = copy.deepcopy(common)
        train.fit(run, order(each), loss, config, description=f"run {each}")
        ends.append(copy.deepcopy(run.state_dict()))
    return Fork(copy.deepcopy(common.state_dict()), ends[0], ends[1])


@dataclass(frozen=True)
class Geometry:
    """How two points lie as seen from a third: distances from it, the angle there in degrees, their distance."""

    radii: tuple[float, float]
    angle: float
    distance: float


def geometry(model: nn.Module, origin: Point, a: Point, b: Point) -> Geometry:
    """Measure two points from a third, over parameters only; the angle is NaN where one of them is the third."""
    o, p, q = (parameters_of(model, point) for point in (origin, a, b))
    u, v = ({name: w[name] - x for name, x in o.items()} for w in (p, q))
    radii = (_dot(u, u) ** 0.5, _dot(v, v) ** 0.5)
    cosine = _dot(u, v) / (radii[0] * radii[1]) if radii[0] and radii[1] else math.nan
    angle = math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) if math.isfinite(cosine) else math.nan
    gap = {name: x - q[name] for name, x in p.items()}
    return Geometry(radii, angle, _dot(gap, gap) ** 0.5)
