"""How chunks of [B, T, H, W] tensors get into [P * B * Hs, C * r, W] work buffers and back.

B batch, T tokens, Hs state heads, r query heads that read one state, s state heads that share one row head, P chunks of
C tokens, W width. Rows of a buffer are token-major (row i * r + j is head j of token i), so that blocks of tokens are
contiguous.
"""

from torch import Tensor


def tiled(x: Tensor, heads: int) -> Tensor:
    """View x [B, T, H, W] as [B, Hx, s, T, r, W] with Hx * s = `heads` and Hx * r = H (s is an expanded axis)."""
    B, T, H, W = x.shape
    rows = max(1, H // heads)
    x = x.unflatten(2, (H // rows, rows)).permute(0, 2, 1, 3, 4).unsqueeze(2)
    return x.expand(B, H // rows, heads * rows // H, T, rows, W)


class Tiles:
    """A buffer [P * B * Hs, C * r, W] for P chunks of C tokens, tied to a tiled tensor it is copied from or to."""

    def __init__(self, buffer: Tensor, x: Tensor, count: int):
        B, Hx, s, _, r, W = x.shape
        self.buffer, self.x, self.count = buffer, x, count
        parts = buffer.view(count, B, Hx, s, -1, r, W)  # P B Hx s C r W
        self.size = parts.shape[4]
        self.parts = parts.movedim(0, 3)  # B Hx s P C r W
        self.shared = s > 1

    def load(self, start: int, stop: int) -> Tensor:
        """Fill the buffer with tokens start..stop and zeros behind them, and return it."""
        source = self.x[:, :, :, start:stop]
        if stop - start == self.count * self.size:
            self.parts.copy_(source.unflatten(3, (self.count, self.size)))
            return self.buffer
        self.buffer.zero_()
        for p, piece in enumerate(source.split(self.size, dim=3)):
            self.parts[:, :, :, p, : piece.shape[3]].copy_(piece)
        return self.buffer

    def store(self, start: int, stop: int) -> None:
        """Write the buffer to tokens start..stop; heads that share a row are summed."""
        parts = self.parts.sum(2) if self.shared else self.parts[:, :, 0]  # B Hx P C r W
        target = self.x[:, :, 0, start:stop]
        if stop - start == self.count * self.size:
            target.unflatten(2, (self.count, self.size)).copy_(parts)
            return
        for p, piece in enumerate(target.split(self.size, dim=2)):
            piece.copy_(parts[:, :, p, : piece.shape[2]])


def cuts(length: int, size: int) -> list[tuple[int, int]]:
    """Return the (start, stop) of every piece of `size` tokens.

    Example:
        >>> cuts(5, 2)
        [(0, 2), (2, 4), (4, 5)]
    """
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def room_for(tokens: int, size: int) -> tuple[int, int]:
    """Return (number of chunks, tokens of each) for a panel: a panel shorter than a chunk gets the next power of two.

    Example:
        >>> room_for(64, 32), room_for(33, 32), room_for(5, 32)
        ((2, 32), (2, 32), (1, 8))
    """
    if tokens < size:
        return 1, 1 << (tokens - 1).bit_length()
    return -(-tokens // size), size
