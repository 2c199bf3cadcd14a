"""How chunks of [B, T, H, W] tensors get into [B * Hs, C * r, W] work buffers and back.

B batch, T tokens, Hs state heads, r query heads that read one state, s state heads that share one row head, C chunk,
W width. Rows of a buffer are token-major (row i * r + j is head j of token i), so that blocks of tokens are contiguous.
"""

import torch
from torch import Tensor


def tiled(x: Tensor, heads: int) -> Tensor:
    """View x [B, T, H, W] as [B, Hx, s, T, r, W] with Hx * s = `heads` and Hx * r = H (s is an expanded axis)."""
    B, T, H, W = x.shape
    rows = max(1, H // heads)
    x = x.unflatten(2, (H // rows, rows)).permute(0, 2, 1, 3, 4).unsqueeze(2)
    return x.expand(B, H // rows, heads * rows // H, T, rows, W)


def load(buffer: Tensor, x: Tensor, start: int, stop: int) -> Tensor:
    """Copy tokens start..stop of a tiled tensor into a buffer [B * Hs, C * r, W], zeros behind them, and return it."""
    B, Hx, s, _, r, W = x.shape
    target = buffer.view(B, Hx, s, -1, r, W)
    size = stop - start
    target[:, :, :, :size].copy_(x[:, :, :, start:stop])
    if size < target.shape[3]:
        target[:, :, :, size:].zero_()
    return buffer


def store(x: Tensor, buffer: Tensor, start: int, stop: int) -> None:
    """Write a buffer into tokens start..stop of a tiled tensor; heads that share a row are summed."""
    B, Hx, s, _, r, W = x.shape
    source = buffer.view(B, Hx, s, -1, r, W)[:, :, :, : stop - start]
    x[:, :, 0, start:stop].copy_(source[:, :, 0] if s == 1 else source.sum(2))


def chunks(length: int, size: int) -> list[tuple[int, int]]:
    """Return the (start, stop) of every chunk.

    Example:
        >>> chunks(5, 2)
        [(0, 2), (2, 4), (4, 5)]
    """
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def room_for(tokens: int, size: int) -> int:
    """Return the buffer length for a chunk of `tokens`: the chunk size, or for a short one the next power of two."""
    return size if tokens == size else 1 << (tokens - 1).bit_length()


def blocks(x: Tensor, half: int, rows: int = 1) -> Tensor:
    """View x [N, C * rows, W] as its blocks of two halves, [N, C / (2 half), 2, half * rows, W]."""
    return x.view(x.shape[0], -1, 2, half * rows, x.shape[-1])


def below(pairs: Tensor, half: int, rows: int = 1) -> Tensor:
    """View, in pairs [N, C * rows, C], second halves against first halves: [N, half * rows, half, C / (2 half)]."""
    N, _, C = pairs.shape
    count = C // (2 * half)
    square = pairs.view(N, count, 2, half * rows, count, 2, half)
    return square[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3)


def zeros_like_tiled(x: Tensor, heads: int, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Allocate a tensor with x's shape and dtype, and return it with its tiled view."""
    new = torch.empty(x.shape, dtype=(x if like is None else like).dtype, device=x.device)
    return new, tiled(new, heads)
