"""Padding and packing: which tokens of a [B, T] block are real, and where one document ends and the next begins."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lineament._base.errors import InputError
from lineament.ops.parallel import active


@dataclass(frozen=True)
class Rows:
    """The real tokens of a block as documents one after another.

    Attributes:
        batch, length: B and T of the block.
        cu_seqlens: [N + 1] int64, where each document starts among the M real tokens.
        valid: [B, T] bool, or None when every token is real.
        index: [M] int64, flat positions of the real tokens, or None when every token is real.

    Example:
        >>> rows = Rows.make(torch.tensor([[0, 1, 1], [1, 1, 1]]))
        >>> rows.cu_seqlens.tolist(), rows.pack(torch.arange(6).view(2, 3)).tolist()
        ([0, 2, 5], [[1, 2, 3, 4, 5]])
    """

    batch: int
    length: int
    cu_seqlens: Tensor
    valid: Tensor | None = None
    index: Tensor | None = None

    @classmethod
    def make(cls, valid: Tensor | None, starts: Tensor | None = None) -> "Rows":
        """Build from a padding mask and document starts.

        Args:
            valid: [B, T], nonzero for real tokens; None when all are.
            starts: [B, T] bool, true on the first token of every document but a row's first; None for one per row.
        """
        if valid is None and starts is None:
            raise InputError("Rows.make needs a padding mask or document starts")
        like = valid if valid is not None else starts
        assert like is not None
        batch, length = like.shape
        index, begins = None, torch.zeros(batch, length, dtype=torch.int64, device=like.device)
        if starts is not None:
            begins = starts.to(torch.int64).cumsum(1)
        before = begins[:, -1:].cumsum(0) - begins[:, -1:] + torch.arange(batch, device=like.device)[:, None]
        document = (begins + before).flatten()
        total = batch if starts is None else int(document[-1]) + 1
        if valid is not None:
            valid = valid.bool()
            index = valid.flatten().nonzero().flatten()
            document = document[index]
        sizes = torch.bincount(document, minlength=total)
        return cls(batch, length, torch.nn.functional.pad(sizes.cumsum(0), (1, 0)), valid, index)

    @classmethod
    def packed(cls, cu_seqlens: Tensor, length: int) -> "Rows":
        """Build for one row that holds documents back to back."""
        return cls(1, length, cu_seqlens)

    def to(self, device: torch.device | str | int, **_: object) -> "Rows":
        """Return these rows on a device (models spread over several devices call this for their inputs)."""
        if self.cu_seqlens.device == torch.device(device):
            return self
        valid, index = (x if x is None else x.to(device) for x in (self.valid, self.index))
        return Rows(self.batch, self.length, self.cu_seqlens.to(device), valid, index)

    @cached_property
    def bounds(self) -> list[int]:
        """`cu_seqlens` as numbers (one transfer from the device)."""
        return self.cu_seqlens.tolist()

    def pack(self, x: Tensor) -> Tensor:
        """Take the real tokens: [B, T, ...] -> [1, M, ...]."""
        flat = x.flatten(0, 1)
        return (flat if self.index is None else flat.index_select(0, self.index))[None]

    def unpack(self, x: Tensor) -> Tensor:
        """Put them back, zeros elsewhere: [1, M, ...] -> [B, T, ...]."""
        if self.index is None:
            return x.view(self.batch, self.length, *x.shape[2:])
        flat = x.new_zeros(self.batch * self.length, *x.shape[2:]).index_copy(0, self.index, x[0])
        return flat.view(self.batch, self.length, *x.shape[2:])


def positions(length: int, cu_seqlens: Tensor | None, count: Tensor) -> Tensor:
    """Return each token's position in its document.

    Args:
        length: T. cu_seqlens: [N + 1], or None for rows that are one document each.
        count: [B] (or [N]) tokens that came before.

    Returns:
        [B, T], or [1, T] with cu_seqlens; int64.
    """
    steps = torch.arange(length, device=count.device)
    if cu_seqlens is None:
        return count[:, None] + steps
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True)
    return (steps - cu_seqlens[document] + count[document])[None]


def stretch_rows(length: int, device: torch.device) -> Rows | None:
    """Return the documents of this rank's stretch, None where nothing is packed (or spread over ranks)."""
    part = active()
    documents = None if part is None else part.check_call(length, None)
    return None if documents is None else Rows.packed(documents.to(device), length)


def beginnings(rows: int, device: torch.device) -> Tensor:
    """Return the tokens that came before a call without a state, [rows] int64: 0, or what earlier ranks hold."""
    part = active()
    return torch.zeros(rows, dtype=torch.int64, device=device) if part is None else part.counts(rows, device)
