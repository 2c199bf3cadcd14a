"""Positions as a Toeplitz matrix of exponentials, along every axis of a grid: TPE and MD-TPE (arXiv:2405.21022)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from lineament._base.errors import InputError
from lineament.nn.state import widened
from lineament.ops.scan import elementwise_scan


class ToeplitzEncoding(nn.Module):
    """`y_i = c_h sum_j sigma(w_h)^|i - j| x_j` per head along each axis, summed over the axes, then a norm and W_o.

    `c_h = q_h . k_h` of two learned vectors, apart for every axis. Linear in the number of tokens (two scans an axis).

    Args:
        width: D. heads: H, which divides D. axes: of the grid. causal: only j <= i (one scan an axis).
        add: return x + the encoding; False for the encoding in x's place, as published.

    Example:
        >>> encode = ToeplitzEncoding(8, 2, axes=2)
        >>> encode(torch.randn(3, 4, 5, 8)).shape
        torch.Size([3, 4, 5, 8])
    """

    def __init__(self, width: int, heads: int, *, axes: int = 1, causal: bool = False, add: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise InputError(f"width={width} and heads={heads}; heads must divide the width")
        self.heads, self.axes, self.causal, self.add = heads, axes, causal, add
        self.query = nn.Parameter(torch.empty(axes, heads, width // heads))
        self.key = nn.Parameter(torch.empty(axes, heads, width // heads))
        self.rate = nn.Parameter(torch.empty(axes, heads))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw vectors and rates from N(0, 1)."""
        for p in (self.query, self.key, self.rate):
            nn.init.normal_(p)

    def sums(self, x: Tensor) -> Tensor:
        """Return the sum over the axes for x [B, .., D] with `axes` grid axes, before norm and projection."""
        total = torch.zeros_like(x)
        for axis in range(self.axes):
            lines = x.movedim(1 + axis, -2)
            part = lines.flatten(0, -3).unflatten(-1, (self.heads, -1))  # [rows, tokens, H, D / H]
            log_decay = logsigmoid(widened(self.rate[axis]))[:, None]
            seen, _ = elementwise_scan(part, log_decay)
            if not self.causal:
                seen = seen + elementwise_scan(part.flip(1), log_decay)[0].flip(1) - part
            scale = (widened(self.query[axis]) * widened(self.key[axis])).sum(-1)[:, None].to(x.dtype)
            total = total + (scale * seen).flatten(2).view(lines.shape).movedim(-2, 1 + axis)
        return total

    def forward(self, x: Tensor) -> Tensor:
        """Encode x [B, T, D], [B, Y, X, D], ... with as many grid axes as `axes`."""
        if x.dim() != self.axes + 2:
            raise InputError(f"x has shape {list(x.shape)}; expected a batch, {self.axes} grid axes and channels")
        y = self.o_proj(self.norm(self.sums(x)))
        return x + y if self.add else y
