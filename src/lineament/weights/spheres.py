"""Merges along arcs: tensors as directions with lengths."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lineament._base.errors import InputError
from lineament.weights.geometry import combined, dot_product
from lineament.weights.geometry import slerp as arc
from lineament.weights.task_vectors import total_weight


def slerp(tensors: Sequence[Tensor], base: Tensor, *, t: float) -> Tensor:
    """Go from the base to the other model along the arc between them."""
    other = tensors[0].float() if base.dtype != torch.float64 else tensors[0].double()
    return arc(base.to(other.dtype), other, t)


def nuslerp(
    tensors: Sequence[Tensor], base: Tensor | None, *, weight: Sequence[float], nuslerp_flatten: bool,
    nuslerp_row_wise: bool,
) -> Tensor:  # fmt: skip
    """Slerp between two models (their task vectors when there is a base), t from their weights.

    As one vector (`nuslerp_flatten`), or each row of the last axis, or each column (`nuslerp_row_wise`: vectors run
    along the first axis).
    """
    a, b = (x.float().clone() if base is None else x.float() - base for x in tensors)
    total = sum(weight)
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    axis = 0 if nuslerp_row_wise else -1
    x, y = (v.reshape(-1) if nuslerp_flatten else v.transpose(axis, -1) for v in (a, b))
    lengths = (x.norm(dim=-1, keepdim=True) * y.norm(dim=-1, keepdim=True)).clamp_min(1e-14)
    cosine = ((x * y).sum(-1, keepdim=True) / lengths).clamp(-1, 1)
    straight = 1 - cosine.square() <= 1e-16
    angle = torch.where(straight, math.pi / 2, cosine.acos())
    one = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / angle.sin())
    two = torch.where(straight, t, (t * angle).sin() / angle.sin())
    x.mul_(one).add_(y.mul_(two))  # views of a and b
    found = x.view(a.shape) if nuslerp_flatten else a
    return found if base is None else found.add_(base)


def multislerp(
    tensors: Sequence[Tensor], base: Tensor | None, *, weight: Sequence[float], normalize_weights: bool, eps: float
) -> Tensor:
    """Take the direction of the weighted mean of directions, with the mean length (of task vectors, if based).

    The published tangent step, `sum w_i (u_i - <u_i, m> m)` from the unit mean m, is always zero: m is parallel to
    `sum w_i u_i`. So there is nothing to iterate here; `karcher` is the mean along arcs.
    """
    if len(tensors) == 1:
        return tensors[0].float()
    vectors = [x.float() if base is None else x.float() - base for x in tensors]
    total = total_weight(weight) if normalize_weights else 1.0
    weight = [w / total for w in weight]
    lengths = [math.sqrt(dot_product(v, v)) for v in vectors]
    mean = combined(vectors, [w / (length + eps) for w, length in zip(weight, lengths, strict=True)], torch.float32)
    size = math.sqrt(dot_product(mean, mean))
    if size >= eps:
        found = mean.mul_(sum(w * length for w, length in zip(weight, lengths, strict=True)) / size)
    elif len(vectors) == 2 or max(lengths) < eps:  # nothing moved: nothing to average
        found = combined(vectors, weight, torch.float32)
    else:
        raise InputError("the weighted directions cancel, so they have no mean; choose other weights")
    return found if base is None else found.add_(base)


def karcher(tensors: Sequence[Tensor], base: None, *, max_iter: int, tol: float) -> Tensor:
    """Riemannian mean of the directions (Karcher 1977) times the mean length.

    The mean lies in the span of the directions, so it is iterated in coefficients by their Gram matrix: the tensors
    are passed over once for the products and once for the sum.
    """
    vectors = list(tensors)
    n = len(vectors)
    gram = torch.tensor([[dot_product(a, b) for b in vectors] for a in vectors], dtype=torch.float64)
    lengths = gram.diagonal().sqrt()
    used = lengths > tol
    if not used.any():
        return vectors[0].float() * 0
    inverse = torch.where(used, 1 / lengths.clamp_min(1e-300), 0.0)
    cosines = gram * inverse[:, None] * inverse  # of the unit vectors
    share = used.double() / used.sum()
    c, size = share.clone(), float((share @ cosines @ share).sqrt())
    c = c / size if size >= tol else torch.eye(n, dtype=torch.float64)[int(used.nonzero()[0])]
    for _ in range(max_iter):
        dots = (cosines @ c).clamp(-1, 1)
        angle = dots.acos()
        pull = torch.where(used & (angle >= tol), share * angle / angle.sin().clamp_min(1e-300), 0.0)
        step = pull - (pull @ dots) * c
        size = float((step @ cosines @ step).clamp_min(0).sqrt())
        if size < tol:
            break
        c = math.cos(size) * c + math.sin(size) / size * step
        c = c / (c @ cosines @ c).sqrt()
    return combined(vectors, (c * inverse * lengths.mean()).tolist(), torch.float32)
