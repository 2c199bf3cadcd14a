"""Scoring a model at given weights: mean loss and further numbers over batches, with their standard errors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError

Loss = Callable[[Any, Any], tuple[Tensor, Mapping[str, float]]]
Numbers = dict[str, tuple[float, float]]
"""Name -> (mean over batches, standard error)."""


def prediction_loss(model: Any, batch: Any) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy and accuracy on (inputs, labels); for a mapping with labels, the loss that the model gives itself.

    Example:
        >>> value, numbers = prediction_loss(lambda x: x, (torch.eye(2) * 9, torch.tensor([0, 1])))
        >>> numbers
        {'accuracy': 1.0}
    """
    if isinstance(batch, Mapping):
        return model(**batch).loss, {}
    x, labels = batch
    logits = model(x)
    logits = logits.logits if hasattr(logits, "logits") else logits
    value = nn.functional.cross_entropy(logits, labels)
    return value, {"accuracy": float((logits.argmax(-1) == labels).double().mean())}


class Bound:
    """A model at other weights, called like the model: gradients reach the weights it was given."""

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        self.model, self.state = model, dict(state)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.model, self.state, args, kwargs)


def parameters_of(model: nn.Module, point: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a point's parameters (not its buffers), each tied one once, in float32 or wider."""
    found = {}
    for name, _ in model.named_parameters():
        if name not in point:
            raise InputError(f"the point has no tensor {name!r}, which {type(model).__name__} needs")
        x = point[name].detach()
        found[name] = x if x.dtype == torch.float64 else x.float()
    return found


def between(points: Iterable[Mapping[str, Tensor]], shares: Iterable[float]) -> dict[str, Tensor]:
    """Return a weighted sum of points, floating tensors in float32 or wider; others are the first point's."""
    points, shares = list(points), list(shares)
    found = {}
    for name, first in points[0].items():
        if not first.is_floating_point():
            found[name] = first
            continue
        wide = torch.promote_types(first.dtype, torch.float32)
        found[name] = sum(share * point[name].detach().to(wide) for share, point in zip(shares, points, strict=True))
    return found


class Scorer:
    """A private copy of a model that is scored at one point after another."""

    def __init__(self, model: nn.Module, loss: Loss | None, reset: Iterable[Any] | None = None) -> None:
        self.model = copy.deepcopy(model).eval()
        self.loss, self.reset = loss or prediction_loss, None if reset is None else list(reset)

    def at(self, point: Mapping[str, Tensor], batches: Iterable[Any]) -> Numbers:
        """Return the mean and the standard error of each number at a point."""
        self.move(point)
        return score(self.model, batches, self.loss)

    def move(self, point: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            kept = self.model.state_dict()  # tied names stand there several times, and tables not at all
            held = dict(self.model.named_parameters())
            for name, tensor in {**held, **{n: x for n, x in self.model.named_buffers() if n in kept}}.items():
                if name not in point:
                    raise InputError(f"a point has no tensor {name!r}, which {type(self.model).__name__} needs")
                tensor.copy_(point[name])
        if self.reset is not None:
            from lineament.weights.repair import reset_batch_norm

            reset_batch_norm(self.model, self.reset)


def score(model: Any, batches: Iterable[Any], loss: Loss | None = None) -> Numbers:
    """Return the mean and the standard error over batches of the loss and of the numbers beside it."""
    seen: dict[str, list[float]] = {}
    with torch.no_grad():
        for batch in batches:
            value, numbers = (loss or prediction_loss)(model, batch)
            for name, number in {"loss": float(value), **numbers}.items():
                seen.setdefault(name, []).append(float(number))
    if not seen:
        raise InputError("there are no batches to score on")
    found = {}
    for name, values in seen.items():
        x = torch.tensor(values, dtype=torch.float64)
        found[name] = (float(x.mean()), float(x.std() / len(x) ** 0.5) if len(x) > 1 else 0.0)
    return found
