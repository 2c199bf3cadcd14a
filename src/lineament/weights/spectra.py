"""Merges in singular values: what tasks share and where their updates collide."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def tsv(tensors: Sequence[Tensor], base: Tensor, *, weight: Sequence[float], scale: float) -> Tensor:
    """Task singular vectors (Gargiulo et al. 2025, arXiv 2412.00081): decorrelate the leading directions of all tasks.

    Each of n task matrices keeps 1/n of its singular triples; the gathered left and right vectors are replaced by the
    nearest orthonormal ones (Procrustes). Tensors that are no matrices are averaged.
    """
    if base.dim() != 2:
        return base + scale * _total(tensors, base, weight) / len(tensors)
    kept = max(1, min(base.shape) // len(tensors))
    triples = [_leading(delta, kept) for delta in _deltas(tensors, base, weight)]
    left = _orthonormal(torch.cat([u for u, _, _ in triples], 1))
    right = _orthonormal(torch.cat([v for _, _, v in triples], 0).T)
    values = torch.cat([s for _, s, _ in triples])
    return torch.addmm(base.float(), left * values, right.T, alpha=scale)


def iso_c(tensors: Sequence[Tensor], base: Tensor, *, weight: Sequence[float], scale: float) -> Tensor:
    """Isotropic merging in the common subspace (Marczak et al. 2025, arXiv 2502.04959).

    The sum of the task matrices keeps its singular vectors; every singular value becomes their mean. Tensors that are
    no matrices are averaged.
    """
    total = _total(tensors, base, weight)
    if base.dim() != 2:
        return base + scale * total / len(tensors)
    u, s, v = torch.linalg.svd(total, full_matrices=False)
    return torch.addmm(base.float(), u, v, alpha=scale * float(s.mean()))


def _deltas(tensors: Sequence[Tensor], base: Tensor, weight: Sequence[float]) -> Iterator[Tensor]:
    """Read the task matrices one by one: no two need to be in memory."""
    return ((x.float() - base).mul_(w) for x, w in zip(tensors, weight, strict=True))


def _total(tensors: Sequence[Tensor], base: Tensor, weight: Sequence[float]) -> Tensor:
    total = torch.zeros_like(base, dtype=torch.float32)
    for delta in _deltas(tensors, base, weight):
        total.add_(delta)
    return total


def _leading(delta: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triples, copied so that the rest of the factors is freed."""
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :kept].clone(), s[:kept], v[:kept].clone()


def _orthonormal(x: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (or rows, where there are more columns than rows)."""
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return u @ v
