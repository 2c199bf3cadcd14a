"""How good an explanation is: infidelity, sensitivity, and what flipping the inputs it names does to the output.

Sources: Yeh et al. 2019 (infidelity, sensitivity); Samek et al. 2017 (flipping, most and least relevant first).
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament._base.seeds import generator
from lineament.explain.methods import points
from lineament.explain.relevance import Relevance, named, relevance
from lineament.explain.targets import Target


def infidelity(
    model: nn.Module, inputs: Mapping[str, Any] | Tensor, found: Relevance, *, target: Target = None,
    samples: int = 32, noise: float = 0.1, seed: int = 0,
) -> float:  # fmt: skip
    """Return E (I . phi - (f(x) - f(x - I)))^2 over Gaussian I, phi = R / x the relevance per unit of input.

    Args:
        found: relevances of floating-point inputs. noise: standard deviation of I.

    Example:
        >>> model, x = nn.Linear(3, 1).double(), torch.ones(1, 3, dtype=torch.double)
        >>> infidelity(model, x, relevance(model, x)) < 1e-12
        True
    """
    at = points(model, named(model, inputs), target)
    random, total = generator(seed), 0.0
    with torch.no_grad():
        whole = at.score(at.values)
        for _ in range(samples):
            moved = {k: torch.randn(x.shape, generator=random).to(x) * noise for k, x in at.values.items()}
            said = torch.zeros_like(whole)
            for name, step in moved.items():
                x, R = at.values[name], found.features.get(name, found.inputs[name])
                said += (step * torch.where(x == 0, 0.0, R / x)).flatten(1).sum(1)
            did = whole - at.score({k: x - moved[k] for k, x in at.values.items()})
            total += float((said - did).square().mean())
    return total / samples


def sensitivity(
    model: nn.Module, inputs: Mapping[str, Any] | Tensor, *, target: Target = None, rules: Any = "auto",
    radius: float = 0.02, samples: int = 10, seed: int = 0,
) -> float:  # fmt: skip
    """Return max |R(x + d) - R(x)| / |R(x)| over d uniform in a box of `radius`.

    Raises:
        InputError: no floating-point input (token numbers can't be nudged).
    """
    given = named(model, inputs)
    floats = [k for k, x in given.items() if isinstance(x, Tensor) and x.is_floating_point() and "mask" not in k]
    if not floats:
        raise InputError("sensitivity nudges floating-point inputs; pass inputs_embeds instead of token numbers")
    random, worst = generator(seed), 0.0
    at = points(model, given, target)
    fixed = target if callable(target) or target is not None else at.places[-1]
    base = relevance(model, given, target=fixed, rules=rules).inputs
    size = float(sum(x.square().sum() for x in base.values())) ** 0.5
    for _ in range(samples):
        nudged = {k: given[k] + radius * (2 * torch.rand(given[k].shape, generator=random).to(given[k]) - 1)
                  for k in floats}  # fmt: skip
        other = relevance(model, {**given, **nudged}, target=fixed, rules=rules).inputs
        away = float(sum((other[k] - base[k]).square().sum() for k in base)) ** 0.5
        worst = max(worst, away / max(size, 1e-30))
    return worst


def flipping(
    model: nn.Module, inputs: Mapping[str, Any] | Tensor, order: Tensor, *, target: Target = None, steps: int = 16,
    baseline: Any = 0.0,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Replace the inputs by a baseline step by step, the most relevant first and the least relevant first.

    Args:
        order: relevance per part: [B, T] for tokens, [B, Y, X] for images, [B, ...] otherwise.
        steps: into how many equal parts the inputs are flipped.
        baseline: a number, or a tensor like the input.

    Returns:
        The mean output after 0, 1, ... steps, most relevant first (MoRF), and least relevant first (LeRF). The area
        between them (`abpc`) is large where the relevances name what counts.
    """
    most, least = flip_curves(model, inputs, order, target=target, steps=steps, baseline=baseline).mean(2).tolist()
    return most, least


def flip_curves(
    model: nn.Module, inputs: Mapping[str, Any] | Tensor, order: Tensor, *, target: Target = None, steps: int = 16,
    baseline: Any = 0.0, ends: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return what `flipping` averages, [2, steps + 1, B]: a curve per row, for intervals over rows.

    All orders begin and end alike: curves of one give the `ends` [2, B] of the next, `curves[0, [0, -1]]`.
    """
    at = points(model, named(model, inputs), target)
    if len(at.values) != 1:
        raise InputError(f"flipping takes one input; the model has {', '.join(at.values)}")
    ((name, x),) = at.values.items()
    nothing = torch.as_tensor(baseline).to(x).expand_as(x)
    flat = order.flatten(1)
    curves = []

    def score(rank: Tensor, step: int) -> Tensor:
        gone = rank < round(step * flat.shape[1] / steps)
        gone = gone[:, None] if x.dim() == 4 and gone.dim() == 3 else gone
        gone = gone[..., None] if name in at.tokens else gone
        return at.score({name: torch.where(gone, nothing, x)})

    with torch.no_grad():
        for descending in (True, False):
            rank = flat.argsort(dim=1, descending=descending, stable=True).argsort(dim=1).reshape(order.shape)
            ends = torch.stack([score(rank, step) for step in (0, steps)]) if ends is None else ends
            curves.append(torch.stack([ends[0], *(score(rank, step) for step in range(1, steps)), ends[1]]))
    return torch.stack(curves)


def abpc(most: list[float], least: list[float]) -> float:
    """Return the area between the two curves of `flipping`, by the trapezoid rule over shares 0 to 1.

    Example:
        >>> abpc([1.0, 0.0, 0.0], [1.0, 1.0, 0.0])
        0.5
    """
    gaps = [b - a for a, b in zip(most, least, strict=True)]
    return sum((a + b) / 2 for a, b in pairwise(gaps)) / (len(gaps) - 1)
