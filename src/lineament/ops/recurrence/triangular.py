"""The inverse of unit lower triangular matrices, batched."""

import torch
from torch import Tensor

BASE = 8  # blocks of this size are solved directly; larger ones are joined from halves by matmuls


class UnitLowerInverse:
    """Invert many matrices I + L of one size, L strictly lower triangular, in preallocated buffers.

    Joins `[[A, 0], [L21, B]]^-1 = [[A^-1, 0], [-B^-1 L21 A^-1, B^-1]]` from blocks of 8 up, which is a forward
    substitution by blocks; the product form of the Neumann series would lose digits when L is large.
    """

    def __init__(self, count: int, size: int, like: Tensor):
        self.base = min(BASE, size)
        self.inverse, self.lower = like.new_zeros(count, size, size), like.new_empty(count, size, size)
        self.eye = torch.eye(self.base, dtype=like.dtype, device=like.device)
        self.small = (_blocks(self.lower, self.base), _blocks(self.inverse, self.base))
        self.joins = []
        half = self.base
        while half < size:
            old, new = _blocks(self.inverse, 2 * half), _blocks(self.lower, 2 * half)
            shape = (*old.shape[:2], half, half)
            buffers = [like.new_empty(shape).flatten(0, 1) for _ in range(4)]
            sources = (old[:, :, half:, half:], new[:, :, half:, :half], old[:, :, :half, :half])
            views = [buffer.view(shape) for buffer in buffers]
            self.joins.append((list(zip(views, sources, strict=False)), buffers, views[3], old[:, :, half:, :half]))
            half *= 2

    def __call__(self, strictly_lower: Tensor, scale: Tensor) -> Tensor:
        """Return (I + Diag(scale) L)^-1 for L [N, C, C], zero on and above the diagonal, and scale [N, C, 1]."""
        torch.mul(strictly_lower, scale, out=self.lower)
        source, target = self.small
        target.copy_(torch.linalg.solve_triangular(source, self.eye, upper=False, unitriangular=True))
        for gather, (left, cross, right, out), result, place in self.joins:
            for view, block in gather:
                view.copy_(block)
            torch.bmm(left, cross, out=out)
            torch.bmm(out, right, out=cross)
            torch.neg(cross.view_as(result), out=place)
        return self.inverse


def _blocks(x: Tensor, size: int) -> Tensor:
    """View the diagonal blocks of x [N, C, C], [N, C / size, size, size]."""
    count = x.shape[1] // size
    return x.view(-1, count, size, count, size).diagonal(dim1=1, dim2=3).movedim(-1, 1)
