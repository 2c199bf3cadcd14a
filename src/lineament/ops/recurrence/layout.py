"""How chunks of [B, T, H, W] tensors get into [B * Hs, C * r, W] work buffers and back.

B batch, T tokens, Hs state heads, r query heads that read one state, s state heads that share one row head, C chunk,
W width. Rows of a buffer are token-major (row i * r + j is head j of token i), so that blocks of tokens are contiguous.
"""

from torch import Tensor


def tiled(x: Tensor, heads: int) -> Tensor:
    """View x [B, T, H, W] as [B, Hx, s, T, r, W] with Hx * s = `heads` and Hx * r = H (s is an expanded axis)."""
    B, T, H, W = x.shape
    rows = max(1, H // heads)
    x = x.unflatten(2, (H // rows, rows)).permute(0, 2, 1, 3, 4).unsqueeze(2)
    return x.expand(B, H // rows, heads * rows // H, T, rows, W)


class Loader:
    """Copies tokens of a tiled tensor into one buffer [B * Hs, C * r, W], again and again."""

    def __init__(self, buffer: Tensor, x: Tensor):
        B, Hx, s, _, r, W = x.shape
        self.buffer, self.x = buffer, x
        self.target = buffer.view(B, Hx, s, -1, r, W)
        self.size = self.target.shape[3]

    def __call__(self, start: int, stop: int) -> Tensor:
        """Fill the buffer with tokens start..stop and zeros behind them, and return it."""
        source = self.x[:, :, :, start:stop]
        if stop - start == self.size:
            self.target.copy_(source)
        else:
            self.target[:, :, :, : stop - start].copy_(source)
            self.target[:, :, :, stop - start :].zero_()
        return self.buffer


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
