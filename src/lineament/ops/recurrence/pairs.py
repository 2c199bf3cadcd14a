"""Decayed products inside a chunk, their gradients, and what a chunk's decay does to the state.

N rows (batch x state heads), C tokens of a chunk, r query rows per token, K key width. With G the inclusive sums of
log decays since the chunk began:

    read    e^{G_i}          what a token sees of the state before the chunk
    write   e^{G_C - G_j}    what is left of a token's write at the end of the chunk
    last    e^{G_C}          what is left of the state before the chunk
    pairs   sum_d x_id k_jd e^{G_id - G_jd}, j <= i

Every exponent is a sum of log decays over a segment (or a difference of float64 sums), so it is <= 0 and keeps its
digits however extreme the gates are; e^{-G} is never formed, and nothing depends on later tokens.
One object serves one chunk after another; buffers are overwritten by the next `load`.
"""

import torch
from torch import Tensor

from lineament.ops.recurrence.layout import below, blocks, load


class NoDecay:
    """log_decay is None: plain products under the causal mask."""

    read = write = last = None

    def __init__(self, count: int, size: int, rows: int, width: int, like: Tensor):
        self.rows, self.size = rows, size

    def load(self, start: int, stop: int) -> None:
        """Nothing to load."""

    def pairs(self, x: Tensor, k: Tensor, out: Tensor, rows: int, strict: bool) -> Tensor:
        """Write the decayed products of x [N, C * rows, K] with k [N, C, K], masked, into out [N, C * rows, C]."""
        torch.bmm(x, k.mT, out=out)
        return self.mask(out, rows, strict)

    def mask(self, pairs: Tensor, rows: int, strict: bool) -> Tensor:
        """Zero, in place, the pairs of a token with later ones (and with itself if strict)."""
        N, _, C = pairs.shape
        if rows == 1:
            return pairs.tril_(-1 if strict else 0)
        pairs.view(N, C, rows, C).transpose(1, 2).tril_(-1 if strict else 0)
        return pairs

    def pairs_backward(self, grad: Tensor, x: Tensor, k: Tensor, dx: Tensor, dk: Tensor, rows: int) -> None:
        """Add to dx and dk the gradient of `pairs`; grad [N, C * rows, C] is masked already and may be overwritten."""
        dx.baddbmm_(grad, k)
        dk.baddbmm_(grad.mT, x)

    def take_own(self, grad: Tensor, rows: int) -> Tensor | None:
        """Take the gradient of a token's product with itself out of grad: [N, C, rows, 1], or None where it may stay.

        No decay is in that product. Left in, its share in the gradient of the decay would only cancel up to rounding.
        """
        return None

    def grad_log_decay(self, dgate: Tensor) -> Tensor:
        raise AssertionError("there is no log decay to differentiate")


class HeadDecay(NoDecay):
    """log_decay [B, T, Hs]: one matrix of weights e^{G_i - G_j} for all channels."""

    def __init__(self, count: int, size: int, rows: int, width: int, like: Tensor, tiles: Tensor):
        super().__init__(count, size, rows, width, like)
        self.tiles = tiles  # log_decay as [B, Hs, 1, T, 1, 1]
        self.gate = like.new_empty(count, size, 1, dtype=torch.float64)
        self.weight = like.new_empty(count, size, size)
        self.dtype = like.dtype

    def load(self, start: int, stop: int) -> None:
        total = load(self.gate, self.tiles, start, stop).cumsum_(1)  # [N, C, 1]
        torch.sub(total, total.mT, out=self.weight)
        self.weight.tril_().exp_().tril_()  # masked before exp; the second mask turns e^0 into 0
        self.read = total.exp().to(self.dtype)
        self.write = (total[:, -1:] - total).exp().to(self.dtype)
        self.last = self.read[:, -1:]

    def pairs(self, x: Tensor, k: Tensor, out: Tensor, rows: int, strict: bool) -> Tensor:
        torch.bmm(x, k.mT, out=out)
        self._weigh(out, rows)
        if strict:
            out.diagonal(dim1=1, dim2=2).zero_()
        return out

    def mask(self, pairs: Tensor, rows: int, strict: bool) -> Tensor:
        """Zero the diagonal if strict; what is above it meets weights of 0 or is never read."""
        if strict:
            pairs.diagonal(dim1=1, dim2=2).zero_()
        return pairs

    def pairs_backward(self, grad: Tensor, x: Tensor, k: Tensor, dx: Tensor, dk: Tensor, rows: int) -> None:
        super().pairs_backward(self._weigh(grad, rows), x, k, dx, dk, rows)

    def take_own(self, grad: Tensor, rows: int) -> Tensor | None:
        N, C = grad.shape[0], grad.shape[2]
        diagonal = grad.view(N, C, rows, C).diagonal(dim1=1, dim2=3)  # [N, rows, C]
        own = diagonal.transpose(1, 2).unsqueeze(-1).clone()
        diagonal.zero_()
        return own

    def _weigh(self, pairs: Tensor, rows: int) -> Tensor:
        N, _, C = pairs.shape
        pairs.view(N, C, rows, C).mul_(self.weight[:, :, None])
        return pairs

    def grad_log_decay(self, dgate: Tensor) -> Tensor:
        """Turn gradients of G, per channel [N, C, K], into those of log_decay [N, C, 1]: sums over later tokens."""
        total = dgate.sum(2, keepdim=True, dtype=torch.float64)
        return total.flip(1).cumsum_(1).flip(1)


class ChannelDecay(HeadDecay):
    """log_decay [B, T, Hs, K]: the strictly lower triangle as blocks of halves of 1, 2, 4, .. C / 2 tokens.

    In the block of halves I (later) and J (earlier), e^{G_i - G_j} is e^{from the border to i} e^{from j to the
    border}: two factors <= 1 that belong to one token each, so the block is one matmul. `factors[half]` [N, C, K] holds
    the first in second halves and the other in first halves.
    """

    def __init__(self, count: int, size: int, rows: int, width: int, like: Tensor, tiles: Tensor):
        NoDecay.__init__(self, count, size, rows, width, like)
        self.tiles = tiles  # log_decay as [B, Hs, 1, T, 1, K]
        self.since = like.new_empty(count, size, width)  # sums from the start of a token's block to the token
        self.until = like.new_empty(count, size, width)  # sums behind the token to the end of its block
        self.read, self.write = torch.empty_like(self.since), torch.empty_like(self.since)
        halves = [1 << level for level in range(size.bit_length() - 1)]
        self.factors = {half: torch.empty_like(self.since) for half in halves}
        self.later = {}
        for tall in {1, rows}:
            for half in halves:
                self.later[half, tall] = like.new_empty(count * size // (2 * half), half * tall, width)
        self.earlier = {half: like.new_empty(count * size // (2 * half), half, width) for half in halves}

    def load(self, start: int, stop: int) -> None:
        load(self.since, self.tiles, start, stop)
        self.until.zero_()
        for half, factor in self.factors.items():
            since, until, factor = (blocks(x, half) for x in (self.since, self.until, factor))
            if half == 1:
                factor[:, :, 0].fill_(1.0)
            else:
                torch.exp(until[:, :, 0], out=factor[:, :, 0])
            torch.exp(since[:, :, 1], out=factor[:, :, 1])
            until[:, :, 0] += since[:, :, 1, -1:]
            since[:, :, 1] += since[:, :, 0, -1:]
        torch.exp(self.since, out=self.read)
        torch.exp(self.until, out=self.write)
        self.last = self.read[:, -1:].mT  # [N, K, 1]

    def pairs(self, x: Tensor, k: Tensor, out: Tensor, rows: int, strict: bool) -> Tensor:
        N, C, _ = k.shape
        out.zero_()
        for half in self.factors:
            later, earlier = self._sides(x, k, half, rows)
            block = torch.bmm(later, earlier.mT).view(N, -1, half * rows, half)
            below(out, half, rows).copy_(block.movedim(1, -1))
        if not strict:
            own = torch.linalg.vecdot(x.view(N, C, rows, -1), k[:, :, None])
            out.view(N, C, rows, C).diagonal(dim1=1, dim2=3).copy_(own.transpose(1, 2))
        return out

    def pairs_backward(self, grad: Tensor, x: Tensor, k: Tensor, dx: Tensor, dk: Tensor, rows: int) -> None:
        N, _, K = k.shape
        for half, factor in self.factors.items():
            later, earlier = self._sides(x, k, half, rows)
            block = below(grad, half, rows).movedim(-1, 1).reshape(-1, half * rows, half)
            first, second = blocks(factor, half).unbind(2)
            into = blocks(dx, half, rows)[:, :, 1].view(N, -1, half, rows, K)
            into.addcmul_(torch.bmm(block, earlier).view_as(into), second[:, :, :, None])
            into = blocks(dk, half)[:, :, 0]
            into.addcmul_(torch.bmm(block.mT, later).view_as(into), first)

    def _sides(self, x: Tensor, k: Tensor, half: int, rows: int) -> tuple[Tensor, Tensor]:
        N, _, K = k.shape
        first, second = blocks(self.factors[half], half).unbind(2)
        later, earlier = self.later[half, rows], self.earlier[half]
        source = blocks(x, half, rows)[:, :, 1].view(N, -1, half, rows, K)
        torch.mul(source, second[:, :, :, None], out=later.view_as(source))
        torch.mul(blocks(k, half)[:, :, 0], first, out=earlier.view_as(first))
        return later, earlier

    def grad_log_decay(self, dgate: Tensor) -> Tensor:
        """Turn gradients of G [N, C, K], in place, into those of log_decay: sums over later tokens, by segments."""
        for half in self.factors:
            block = blocks(dgate, half)
            block[:, :, 0] += block[:, :, 1, :1]
        return dgate


def make_pairs(
    log_decay: Tensor | None, tiles: Tensor | None, count: int, size: int, rows: int, width: int, like: Tensor
) -> NoDecay:
    """Return the object for None, [B, T, Hs] or [B, T, Hs, K] log decays (`tiles`: their tiled view)."""
    if log_decay is None or tiles is None:
        return NoDecay(count, size, rows, width, like)
    kind = HeadDecay if log_decay.dim() == 3 else ChannelDecay
    return kind(count, size, rows, width, like, tiles)
