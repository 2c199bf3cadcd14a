"""Merges that know the data: Fisher weights and input Gram matrices, and how both are measured on a model."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.graph import capture
from lineament.weights.point import Point
from lineament.weights.task_vectors import linear

Loss = Callable[[nn.Module, Any], Tensor]


def fisher_merge(
    tensors: Sequence[Tensor], base: None, *, weight: Sequence[float], floor: float, statistics: Sequence[Tensor | None]
) -> Tensor:
    """`sum w_i F_i x_i / sum w_i F_i` entry by entry (Matena and Raffel 2022, arXiv 2111.09832).

    `floor` is added to every F, so that entries nobody uses are averaged. Without statistics: the plain average.
    """
    if any(f is None for f in statistics):
        return linear(tensors, None, weight=weight, normalize=True)
    above, below = torch.zeros(tensors[0].shape), torch.zeros(tensors[0].shape)
    for x, f, w in zip(tensors, statistics, weight, strict=True):
        assert f is not None
        share = (f.float() + floor).mul_(w)
        above.addcmul_(share, x.float())
        below.add_(share)
    return above.div_(below)


def regmean_merge(
    tensors: Sequence[Tensor], base: None, *, weight: Sequence[float], shrink: float,
    statistics: Sequence[Tensor | None],
) -> Tensor:  # fmt: skip
    """`(sum w_i W_i G_i) (sum w_i G_i)^-1`, the least squares fit to all models' outputs (Jin et al. 2023, 2212.09849).

    Off-diagonal entries of each Gram matrix G_i are multiplied by `shrink` first. Tensors without a Gram matrix are
    averaged.
    """
    if any(g is None for g in statistics):
        return linear(tensors, None, weight=weight, normalize=True)
    above = below = torch.zeros((), dtype=torch.float64)
    mean = linear(tensors, None, weight=weight, normalize=True).double()
    for x, g, w in zip(tensors, statistics, weight, strict=True):
        assert g is not None
        gram = g.double()
        gram = gram * shrink + torch.diag(gram.diagonal() * (1 - shrink))
        above, below = above + w * (x.double() @ gram), below + w * gram
    ridge = (below.diagonal().mean() * 1e-9).clamp_min(1e-30)  # inputs that were never seen keep the average
    below = below + torch.eye(len(below), dtype=below.dtype) * ridge
    return torch.linalg.solve(below, above + ridge * mean, left=False).float()


def fisher(model: nn.Module, batches: Iterable[Any], loss: Loss) -> Point:
    """Measure the diagonal of the empirical Fisher information: the mean over batches of squared gradients.

    Args:
        model: in the mode it shall be measured in.
        batches: of one example each for the definition's own numbers; larger ones square a mean of gradients.
        loss: (model, batch) -> negative log-likelihood.

    Returns:
        A point with the names of the parameters.
    """
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    parameters, count = dict(model.named_parameters()), 0
    for batch in batches:
        with torch.enable_grad():
            grads = torch.autograd.grad(loss(model, batch), list(parameters.values()), allow_unused=True)
        for name, grad in zip(total, grads, strict=True):
            if grad is not None:
                total[name].addcmul_(grad.float(), grad.float())
        count += 1
    if not count:
        raise InputError("there are no batches to measure on; give at least one")
    return Point.open({name: x.div_(count) for name, x in total.items()}, copy=False)


def grams(model: nn.Module, batches: Iterable[Any], run: Callable[[nn.Module, Any], Any]) -> Point:
    """Measure the Gram matrices `X^T X / rows` of what every linear layer receives.

    Args:
        run: (model, batch) -> anything; the forward pass.

    Returns:
        A point: weight's name -> [I, I].
    """
    total: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    for batch in batches:
        with torch.no_grad(), capture(model, nn.Linear, inputs=True, outputs=False) as seen:
            run(model, batch)
        for name in seen:
            for args, kwargs in seen.inputs(name):
                x = (args[0] if args else kwargs["input"]).float().flatten(0, -2)
                key = f"{name}.weight" if name else "weight"
                total[key] = total[key].addmm_(x.T, x) if key in total else x.T @ x
                rows[key] = rows.get(key, 0) + len(x)
    if not total:
        raise InputError("no linear layer received anything; give at least one batch")
    return Point.open({name: x / rows[name] for name, x in total.items()}, copy=False)
