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
        self.size, self.base = size, min(BASE, size)
        self.inverse = like.new_zeros(count, size, size)
        self.eye = torch.eye(self.base, dtype=like.dtype, device=like.device)
        self.parts = {}
        half = self.base
        while half < size:
            shape = (count * (size // (2 * half)), half, half)
            self.parts[half] = tuple(like.new_empty(shape) for _ in range(4))
            half *= 2

    def __call__(self, lower: Tensor) -> Tensor:
        """Return (I + tril(lower, -1))^-1 for lower [N, C, C]; what is on and above the diagonal is ignored."""
        N, C, base = lower.shape[0], self.size, self.base
        if C == 1:
            return self.inverse.fill_(1.0)
        small = lower.view(N, C // base, base, C // base, base).diagonal(dim1=1, dim2=3).movedim(-1, 1)
        solved = torch.linalg.solve_triangular(small, self.eye, upper=False, unitriangular=True)
        self._diagonal(base).copy_(solved)
        for half, (left, right, cross, out) in self.parts.items():
            shape = (N, -1, half, half)
            block = self._diagonal(2 * half)
            right.view(shape).copy_(block[:, :, :half, :half])
            left.view(shape).copy_(block[:, :, half:, half:])
            source = lower.view(N, C // (2 * half), 2 * half, C // (2 * half), 2 * half).diagonal(dim1=1, dim2=3)
            cross.view(shape).copy_(source.movedim(-1, 1)[:, :, half:, :half])
            torch.bmm(left, cross, out=out)
            torch.bmm(out, right, out=cross)
            torch.neg(cross.view(shape), out=block[:, :, half:, :half])
        return self.inverse

    def _diagonal(self, size: int) -> Tensor:
        """View the diagonal blocks of the inverse, [N, C / size, size, size]."""
        count = self.size // size
        square = self.inverse.view(-1, count, size, count, size)
        return square.diagonal(dim1=1, dim2=3).movedim(-1, 1)
