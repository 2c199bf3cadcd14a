"""Bringing models onto each other: the element of the group that lines one model up with another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lineament._base.errors import InputError, unknown
from lineament._base.seeds import generator
from lineament.weights.ascent import GAIN, SWEEPS, Ascent
from lineament.weights.elements import Element, Permutation, check_shape
from lineament.weights.symmetry import Symmetry

METHODS = ("weights", "activations", "straight-through")
Points = Sequence[Mapping[str, Tensor]]


def match(
    points: Points, symmetry: Symmetry, *, method: str = "weights", inputs: Any = None, loss: Any = None,
    restarts: int = 3, seed: int = 0, without: Callable[[str], bool] | None = None,
) -> list[Element]:  # fmt: skip
    """Find for every model the group element that brings it onto the others.

    Two models: the first stays and the second is brought onto it. More: each in turn is brought onto the mean of the
    others until no distance falls ("weights"), or all are brought onto the first (the other methods).

    Args:
        points: state dicts or Points of one architecture.
        symmetry: of that architecture.
        method: "weights" (least distance), "activations" (largest correlation of hidden activations on `inputs`), or
            "straight-through" (least loss at the midpoint, by gradients; Ainsworth et al. 2023, section 3.3).
        inputs: for "activations": batches, each the tuple of tensors of one call, of the shapes of the example call
            that `symmetry` got. For "straight-through": step -> batch.
        loss: for "straight-through": (model, batch) -> (scalar, numbers); cross entropy if None. The model is the
            traced graph, so batches have the traced shapes; `straight_through` itself takes a module.
        restarts: random orders of visiting; the best result is kept.
        seed: of the orders.
        without: names for which it is true are left out of the distance ("weights").

    Returns:
        One element per point; `element.apply(point)` moves it. The first one's is the identity for two points.

    Raises:
        InputError: fewer than two points, another architecture, an unknown method, NaN.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if len(points) < 2:
        raise InputError(f"match got {len(points)} model; expected at least two")
    if method == "straight-through":
        from lineament.weights.straight_through import straight_through

        first = points[0]
        rest = [straight_through(first, b, symmetry, inputs, loss, seed=seed) for b in points[1:]]
        return [symmetry.identity(), *rest]
    if method == "activations":
        from lineament.weights.activations import activations

        if inputs is None:
            raise InputError("method 'activations' needs inputs: batches of the example call's shapes")
        batches = list(inputs)
        trees, sides = {}, []
        for point in points:
            trees, tensors = activations(point, symmetry, batches)
            sides.append(tensors)
        return [symmetry.identity()] + [
            _element(symmetry, _best(symmetry, trees, sides[0], side, restarts, seed)) for side in sides[1:]
        ]
    sides = [_tensors(point, symmetry, without) for point in points]
    trees = {name: symmetry.axes.tensors[name] for name in sides[0]}
    if len(points) == 2:
        found = _best(symmetry, trees, sides[0], sides[1], restarts, seed)
        return [symmetry.identity(), _element(symmetry, found)]
    return _many(symmetry, trees, sides, restarts, seed)


def _element(symmetry: Symmetry, found: Permutation) -> Element:
    return symmetry.element({cls: found.perms.get(cls, symmetry.still(cls)) for cls in symmetry.free})


def _tensors(
    point: Mapping[str, Tensor], symmetry: Symmetry, without: Callable[[str], bool] | None
) -> dict[str, Tensor]:
    """Read the parameters that the group moves, in float32. Running statistics are none: they would drown the rest."""
    found = {}
    for name in symmetry.axes.traced.parameters:
        trees = symmetry.axes.tensors[name]
        if name not in point:
            raise InputError(f"a model has no tensor {name!r}; the symmetry group was derived for one that has")
        x = point[name].detach()
        check_shape(name, x, trees)
        if not torch.isfinite(x).all():
            raise InputError(f"{name!r} holds NaN or infinity")
        if without is None or not without(name):
            found[name] = x.float() if x.dtype != torch.float64 else x
    return found


def _best(
    symmetry: Symmetry, trees: Mapping[str, Any], a: Mapping[str, Tensor], b: Mapping[str, Tensor], restarts: int,
    seed: int,
) -> Permutation:  # fmt: skip
    """Ascend from several beginnings and keep the best: the first grows from what is anchored."""
    draw, best, most = generator(seed), None, 0.0
    for restart in range(max(1, restarts)):
        ascent = Ascent(symmetry.classes, trees, a, b)
        if restart == 0:
            ascent.grow(draw)
        for _ in range(SWEEPS):
            order = [ascent.units[i] for i in torch.randperm(len(ascent.units), generator=draw).tolist()]
            if not ascent.sweep(order):
                break
        reached = ascent.objective
        if best is None or reached > most + GAIN * abs(most):
            best, most = ascent.total, reached
        if ascent.equal:
            break  # nothing is left to gain
    assert best is not None
    return best


def _many(
    symmetry: Symmetry, trees: Mapping[str, Any], sides: Sequence[dict[str, Tensor]], restarts: int, seed: int
) -> list[Element]:
    """Bring each model onto the mean of the others, in random order, until no distance falls."""
    draw = generator(seed)
    totals = [Permutation(symmetry.classes, trees, {}) for _ in sides]
    current = [dict(side) for side in sides]
    for sweep in range(SWEEPS):
        fell = False
        for i in torch.randperm(len(sides), generator=draw).tolist():
            others = [side for j, side in enumerate(current) if j != i]
            mean = {name: torch.stack([side[name] for side in others]).mean(0) for name in trees}
            before = _distance(mean, current[i])
            step = _best(symmetry, trees, mean, current[i], restarts if sweep == 0 else 1, seed + i)
            moved = {name: step.act(name, x) for name, x in current[i].items()}
            if _distance(mean, moved) < before * (1 - 1e-9):
                current[i], totals[i], fell = moved, totals[i].then(step), True
        if not fell:
            break
    return [_element(symmetry, total) for total in totals]


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return sum(float((x - b[name]).square().sum()) for name, x in a.items()) ** 0.5
