"""Matching by gradients: the permutation that makes the midpoint good (Ainsworth et al. 2023, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lineament import train
from lineament._base.errors import InputError
from lineament.weights.ascent import SWEEPS, Ascent
from lineament.weights.elements import Element, Permutation
from lineament.weights.evaluate import Bound, Loss, prediction_loss
from lineament.weights.path import Weights
from lineament.weights.symmetry import Symmetry

RECIPE = train.FitConfig(steps=1500, lr=1e-2, schedule="constant", optimizer="sgd", betas=(0.9, 0.999), clip=None)


def straight_through(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], symmetry: Symmetry, batches: Callable[[int], Any] | None,
    loss: Loss | None, *, model: Any = None, config: train.FitConfig = RECIPE, seed: int = 0,
) -> Element:  # fmt: skip
    """Descend the loss at the midpoint of a and the permuted b, through the permutation as if it were the identity.

    Free weights w start at a. Each step P is the match of b with w (warm-started), the midpoint is
    `a / 2 + (P b + w - stopgrad(w)) / 2`, and w moves by SGD; the P of the least batch loss is kept.

    Args:
        batches: step -> batch of training data. loss: (model, batch) -> (scalar, numbers).
        model: the architecture; where None, the group's traced graph is called (batches of the traced shapes).
        config: of the descent; the default is the recipe for small MLPs.
    """
    if batches is None:
        raise InputError("method 'straight-through' needs inputs: a function step -> batch")
    names = symmetry.axes.traced.parameters
    trees = {name: symmetry.axes.tensors[name] for name in names if name in symmetry.axes.tensors}
    ends = [{name: point[name].detach().float() for name in names} for point in (a, b)]
    fixed = {name: a[name].detach() for name in symmetry.axes.traced.buffers if name in a}
    free = Weights(ends[0])
    state: dict[str, Any] = {"at": None, "best": Permutation(symmetry.classes, trees, {}), "loss": math.inf}
    draw = torch.Generator().manual_seed(seed)

    def midpoint(held: Any, batch: Any) -> tuple[Tensor, Mapping[str, float]]:
        w = free.named()
        ascent = Ascent(symmetry.classes, trees, {name: x.detach() for name, x in w.items()}, ends[1], state["at"])
        for _ in range(SWEEPS):
            order = [ascent.units[i] for i in torch.randperm(len(ascent.units), generator=draw).tolist()]
            if not ascent.sweep(order):
                break
        state["at"] = ascent.total
        moved = {name: ascent.total.act(name, x) for name, x in ends[1].items()}
        m = {name: 0.5 * ends[0][name] + 0.5 * (moved[name] + x - x.detach()) for name, x in w.items()}
        target = Bound(model, {**fixed, **m}) if model is not None else _Graph(symmetry, {**fixed, **m})
        value, numbers = (loss or prediction_loss)(target, batch)
        if float(value) < state["loss"]:
            state["loss"], state["best"] = float(value), ascent.total
        return value, numbers

    train.fit(free, batches, midpoint, config, description="match")
    best = state["best"]
    return symmetry.element({cls: best.perms.get(cls, symmetry.still(cls)) for cls in symmetry.free})


class _Graph:
    """The traced graph at other weights, called with tensors of the traced shapes."""

    def __init__(self, symmetry: Symmetry, state: Mapping[str, Tensor]) -> None:
        self.traced, self.state = symmetry.axes.traced, state

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.traced.run(self.state, inputs)[0]
