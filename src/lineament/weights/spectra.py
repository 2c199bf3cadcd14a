"""Merges in singular values: what tasks share and where their updates collide."""

from collections.abc import Sequence

import torch
from torch import Tensor


def tsv(tensors: Sequence[Tensor], base: Tensor, *, weight: Sequence[float], scale: float) -> Tensor:
    """Task singular vectors (Gargiulo et al. 2025, arXiv 2412.00081): decorrelate the leading directions of all tasks.

    Each of n task matrices keeps 1/n of its singular triples; the gathered left and right vectors are replaced by the
    nearest orthonormal ones (Procrustes). Tensors that are no matrices are averaged.
    """
    deltas = _deltas(tensors, base, weight)
    if base.dim() != 2:
        return base + scale * sum(deltas) / len(deltas)
    kept = max(1, min(base.shape) // len(deltas))
    triples = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = _orthonormal(torch.cat([u[:, :kept] for u, _, _ in triples], 1))
    right = _orthonormal(torch.cat([v[:kept] for _, _, v in triples], 0).T)
    values = torch.cat([s[:kept] for _, s, _ in triples])
    return torch.addmm(base.float(), left * values, right.T, alpha=scale)


def iso_c(tensors: Sequence[Tensor], base: Tensor, *, weight: Sequence[float], scale: float) -> Tensor:
    """Isotropic merging in the common subspace (Marczak et al. 2025, arXiv 2502.04959).

    The sum of the task matrices keeps its singular vectors; every singular value becomes their mean. Tensors that are
    no matrices are averaged.
    """
    deltas = _deltas(tensors, base, weight)
    total = sum(deltas)
    if base.dim() != 2:
        return base + scale * total / len(deltas)
    u, s, v = torch.linalg.svd(total, full_matrices=False)
    return torch.addmm(base.float(), u, v, alpha=scale * float(s.mean()))


def _deltas(tensors: Sequence[Tensor], base: Tensor, weight: Sequence[float]) -> list[Tensor]:
    return [(x.float() - base).mul_(w) for x, w in zip(tensors, weight, strict=True)]


def _orthonormal(x: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (or rows, where there are more columns than rows)."""
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return u @ v
