"""A causal depthwise convolution over a few tokens, with a cached tail."""

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.ops.parallel import Part, active, exchange, tied


class ShortConv(nn.Module):
    """`y_t = sum_j w_j x_{t-j}` per channel; starts as the identity tap unless `identity=False`.

    Args:
        channels: C. width: taps. identity: start with 1 on the current token and 0 before it. bias: add b, 0 at first.

    Example:
        >>> y, tail = ShortConv(2, 3)(torch.ones(1, 5, 2))
        >>> bool((y == 1).all()), tail.shape
        (True, torch.Size([1, 2, 2]))
    """

    def __init__(self, channels: int, width: int = 4, *, identity: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.width, self.identity = width, identity
        self.weight = nn.Parameter(torch.empty(width, channels))  # row 0: the current token
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the identity tap, or draw uniform taps."""
        with torch.no_grad():
            if self.identity:
                self.weight.zero_()[0] = 1.0
            else:
                self.weight.uniform_(-(self.width**-0.5), self.width**-0.5)
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, x: Tensor, tail: Tensor | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Filter x [B, T, C].

        Args:
            tail: [N, width - 1, C], the tokens before; zeros if None. N is B, or the documents of cu_seqlens.

        Returns:
            y [B, T, C] and the new tail.
        """
        past, kept = self.width - 1, ()
        part = active()
        if part is not None:
            cu_seqlens, (tail, halo) = part.check_call(x.shape[1], cu_seqlens), _halo(part, x, past, tail)
            kept = (halo,)
        y, tail = self._filtered(x, tail, cu_seqlens)
        return tied(y, *kept) if kept else y, tail

    def _filtered(self, x: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        past = self.width - 1
        if cu_seqlens is not None:
            return self._packed(x, tail, cu_seqlens)
        if tail is None:
            tail = x.new_zeros(x.shape[0], past, x.shape[2])
        full = torch.cat([tail.to(x.dtype), x], dim=1)
        last = full[:, full.shape[1] - past :]
        # a view would keep all of a long prompt in memory until the next token
        return self._taps(full, x.shape[1]), last if x.shape[1] == 1 else last.clone()

    def taps(self) -> Tensor:
        """Return the weights [width, C], row 0 for the current token."""
        return self.weight

    def _taps(self, full: Tensor, length: int) -> Tensor:
        y = self._weighted(full, length)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _weighted(self, full: Tensor, length: int) -> Tensor:
        weight, past = self.taps().to(full.dtype), self.width - 1
        if length == 1:
            return (full * weight.flip(0)).sum(1, keepdim=True)
        y = full[:, past:] * weight[0]
        for j in range(1, self.width):
            y = torch.addcmul(y, full[:, past - j : past - j + length], weight[j])
        return y

    def _packed(self, x: Tensor, tail: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Put every document's tail before it, filter the whole row, and take the documents out again."""
        past, length, N = self.width - 1, x.shape[1], cu_seqlens.shape[0] - 1
        steps = torch.arange(length, device=x.device)
        place = steps + (torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True) + 1) * past
        ends = cu_seqlens[1:] + past * torch.arange(1, N + 1, device=x.device)
        offsets = torch.arange(past, device=x.device)
        full = x.new_zeros(1, length + N * past, x.shape[2])
        if tail is not None:
            heads = cu_seqlens[:-1] + past * torch.arange(N, device=x.device)
            full = full.index_copy(1, (heads[:, None] + offsets).flatten(), tail.to(x.dtype).flatten(0, 1)[None])
        full = full.index_copy(1, place, x)
        y = self._taps(nn.functional.pad(full, (0, 0, past, 0)), full.shape[1]).index_select(1, place)
        new = full[0].index_select(0, (ends[:, None] - past + offsets).flatten())
        return y, new.view(N, past, x.shape[2])


def _halo(part: Part, x: Tensor, past: int, tail: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the tail [rows, past, C] that earlier ranks hold of this rank's first document, and what was fetched."""
    if tail is not None:
        raise InputError("documents begin from nothing under sequence_parallel; leave the convolution's tail out")

    def wants(rank: int) -> list[tuple[int, int]]:
        return [(max(part.document_start(rank), part.starts[rank] - past), part.starts[rank])]

    halo = exchange(part, x, wants, kind="halo")
    first = torch.nn.functional.pad(halo, (0, 0, past - halo.shape[1], 0))
    others = x.new_zeros(len(part.borders) - 2 if part.documents is not None else 0, past, x.shape[2])
    return torch.cat([first, others]), halo
