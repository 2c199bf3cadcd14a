"""Symmetries beyond permutations: scalings, signs and rotations of a class, found by measuring the function.

At a jittered copy of the model, the places where a class stands are scaled along one random direction each; exponents
whose joint change of the output vanishes to first order are the scaling symmetries (a ReLU's unit by s, what reads it
by 1/s; a norm's gain against the matrices behind it; queries against keys, values against outputs, the frequencies of
rotary positions included). Signs and rotations are tried where they could hold. Every family is then checked with
elements of full size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.seeds import generator
from lineament.graph import AxisClass
from lineament.weights.blocks import Place, laid_out, places
from lineament.weights.elements import Element, Trees
from lineament.weights.symmetry import ALLOWED, Symmetry, Trial

STEP, DRAWS, NULL, PLACES = 1e-5, 3, 1e-6, 64
Spot = tuple[str, Place]


@dataclass(frozen=True, eq=False)
class Scaling:
    """Multiply a class by factors [outer sizes ..., n] to the power of each place's exponent; signs too."""

    classes: Sequence[AxisClass]
    trees: Trees
    cls: int
    exponents: Mapping[Spot, float]
    factors: Tensor

    def act(self, name: str, x: Tensor) -> Tensor:
        for (other, place), exponent in self.exponents.items():
            if other == name:
                x = x.clone()
                view, kept = laid_out(x, self.trees[name], place, self.classes, self.cls)
                power = self.factors.abs() ** exponent * (self.factors.sign() if exponent % 2 else 1.0)
                view.mul_(power.to(x.dtype).view(*power.shape, *([1] * (view.dim() - kept))))
        return x

    def inverse(self) -> Scaling:
        return Scaling(self.classes, self.trees, self.cls, self.exponents, 1 / self.factors)


@dataclass(frozen=True, eq=False)
class Rotation:
    """Turn a class by an orthogonal matrix [outer sizes ..., n, n], at every place."""

    classes: Sequence[AxisClass]
    trees: Trees
    cls: int
    spots: Sequence[Spot]
    matrix: Tensor

    def act(self, name: str, x: Tensor) -> Tensor:
        for other, place in self.spots:
            if other == name:
                x = x.clone()
                view, kept = laid_out(x, self.trees[name], place, self.classes, self.cls)
                turned = self.matrix.to(x.dtype) @ view.reshape(*view.shape[:kept], -1)
                view.copy_(turned.view(view.shape))
        return x

    def inverse(self) -> Rotation:
        return Rotation(self.classes, self.trees, self.cls, self.spots, self.matrix.mT)


@dataclass(frozen=True)
class Family:
    """A family of symmetries of one class.

    Attributes:
        kind: "scale", "sign" or "rotation".
        cls: the class. exponents: (parameter, place) -> power of the factor there; 1 or -1 for rotations.
        error: the largest change of the output in the check.
    """

    kind: str
    cls: int
    exponents: Mapping[Spot, float]
    symmetry: Symmetry
    error: float = math.nan

    def random(self, seed: int | torch.Generator) -> Element:
        """Draw an element: factors around 1, signs, or a rotation, for every position of the outer classes."""
        draw = seed if isinstance(seed, torch.Generator) else generator(seed)
        group, trees = self.symmetry, self.symmetry.axes.tensors
        shape = [group.classes[o].size for o in group.classes[self.cls].outer] + [group.classes[self.cls].size]
        noise = torch.randn(shape, generator=draw, dtype=torch.float64)
        step: Any
        if self.kind == "rotation":
            square = torch.randn(*shape, shape[-1], generator=draw, dtype=torch.float64)
            step = Rotation(group.classes, trees, self.cls, list(self.exponents), torch.linalg.qr(square).Q)
        else:
            factors = (0.3 * noise).exp() if self.kind == "scale" else torch.where(noise > 0, 1.0, -1.0).double()
            step = Scaling(group.classes, trees, self.cls, self.exponents, factors)
        return Element((step,), group.aliases)


def continuous(
    model: nn.Module, symmetry: Symmetry, *args: Any, classes: Sequence[int] | None = None, **kwargs: Any
) -> list[Family]:
    """Find the scalings, signs and rotations of a model's classes.

    Args:
        model, args, kwargs: as for `symmetry`; two forward passes per place and draw, in float64.
        classes: which to look at; by default all that stand in at most 64 places, frozen ones too (the frequencies of
            rotary positions keep their order, and still queries scale against keys).

    Example:
        >>> from lineament import weights
        >>> mlp = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
        >>> group = weights.symmetry(mlp, torch.zeros(5, 2))
        >>> [(f.kind, sorted(f.exponents.values())) for f in continuous(mlp, group, torch.zeros(5, 2))]
        [('scale', [-1.0, 1.0, 1.0])]
    """
    trial, found = Trial(model, args, kwargs), []
    for cls in range(len(symmetry.classes)) if classes is None else classes:
        spots = [(name, place) for name, trees in symmetry.axes.tensors.items() for place in places(trees, cls)]
        if symmetry.classes[cls].size < 2 or (classes is None and len(spots) > PLACES):
            continue
        scalings = [_family("scale", cls, spots, row, symmetry) for row in _null(trial, symmetry, cls, spots)]
        everywhere = _family("sign", cls, spots, [1.0] * len(spots), symmetry)
        families = [*scalings, *(_family("sign", cls, spots, _row(f, spots), symmetry) for f in scalings), everywhere]
        families.append(_family("rotation", cls, spots, [1.0] * len(spots), symmetry))
        seen = set()
        for family in families:
            mark = (
                family.kind,
                frozenset(spot for spot, e in family.exponents.items() if e % 2 or family.kind == "scale"),
            )
            error = math.inf if mark in seen else trial.error(family.random(0))
            if error <= ALLOWED:
                seen.add(mark)
                found.append(Family(family.kind, cls, family.exponents, symmetry, error))
    return found


def _family(kind: str, cls: int, spots: Sequence[Spot], row: Sequence[float], symmetry: Symmetry) -> Family:
    return Family(kind, cls, {spot: e for spot, e in zip(spots, row, strict=True) if e}, symmetry)


def _row(family: Family, spots: Sequence[Spot]) -> list[float]:
    return [family.exponents.get(spot, 0.0) for spot in spots]


def _null(trial: Trial, symmetry: Symmetry, cls: int, spots: Sequence[Spot]) -> list[list[float]]:
    """Return a basis of the exponents under which the output does not change to first order, whole numbers."""
    rows = []
    for seed in range(DRAWS):
        shape = [symmetry.classes[o].size for o in symmetry.classes[cls].outer] + [symmetry.classes[cls].size]
        direction = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
        columns = [(_moved(trial, symmetry, cls, spot, direction, STEP) -
                    _moved(trial, symmetry, cls, spot, direction, -STEP)) / (2 * STEP) for spot in spots]  # fmt: skip
        rows.append(torch.stack(columns, dim=1))
    jacobian = torch.cat(rows)
    sizes = jacobian.norm(dim=0)
    live = [i for i in range(len(spots)) if float(sizes[i]) > NULL * float(sizes.max())]
    if not live:
        return []
    _, values, right = torch.linalg.svd(jacobian[:, live], full_matrices=True)
    rank = int((values > NULL * values[0]).sum())
    basis = _reduced(right[rank:])
    whole = torch.zeros(len(basis), len(spots), dtype=torch.float64)
    whole[:, live] = basis
    return [[float(round(2 * e) / 2) for e in row] for row in whole.tolist()]


def _moved(trial: Trial, symmetry: Symmetry, cls: int, spot: Spot, direction: Tensor, step: float) -> Tensor:
    scale = Scaling(symmetry.classes, symmetry.axes.tensors, cls, {spot: 1.0}, 1 + step * direction)
    return torch.cat([x.flatten() for x in trial.outputs_at(Element((scale,), symmetry.aliases))])


def _reduced(rows: Tensor) -> Tensor:
    """Bring the rows of a matrix to reduced echelon form."""
    rows, at = rows.clone(), 0
    for column in range(rows.shape[1]):
        if at == len(rows):
            break
        pivot = at + int(rows[at:, column].abs().argmax())
        if float(rows[pivot, column].abs()) < 1e-6:
            continue
        rows[[at, pivot]] = rows[[pivot, at]]
        rows[at] /= rows[at, column].clone()
        others = [i for i in range(len(rows)) if i != at]
        rows[others] -= rows[others, column, None] * rows[at]
        at += 1
    return rows
