"""Decayed products inside a chunk, their gradients, and what a chunk's decay does to the state.

N rows (chunks x batch x state heads), C tokens of a chunk, r query rows per token, K key width. With G the
inclusive sums of log decays since the chunk began:

    read    e^{G_i}          what a token sees of the state before the chunk
    write   e^{G_C - G_j}    what is left of a token's write at the end of the chunk
    last    e^{G_C}          what is left of the state before the chunk
    qk, kk  sum_d x_id k_jd e^{G_id - G_jd} for j <= i (kk: j < i), x = q or k

Every exponent is a sum of log decays over a segment (or a difference of float64 sums), so it is <= 0 and keeps its
digits however extreme the gates are; e^{-G} is never formed, and nothing depends on later tokens.
One object serves one panel of chunks after another on the same buffers `at` (q, k, qk, for the delta rule kk, and in
the backward dq, dk, dk_row, dqk, dkk); `load` overwrites what it held.
"""

import torch
from torch import Tensor

from lineament._base.backends import widest
from lineament.ops.recurrence.layout import Tiles

Buffers = dict[str, Tensor]


class NoDecay:
    """log_decay is None: plain products under the causal mask."""

    read = write = last = None

    def __init__(self, at: Buffers, rows: int):
        self.at, self.rows = at, rows

    def load(self, start: int, stop: int) -> None:
        """Nothing to load."""

    def compute(self) -> None:
        """Fill qk [N, C * r, C] and, if there, kk [N, C, C] from q [N, C * r, K] and k [N, C, K]."""
        at = self.at
        self.mask(torch.bmm(at["q"], at["k"].mT, out=at["qk"]), strict=False)
        if "kk" in at:
            self.mask(torch.bmm(at["k"], at["k"].mT, out=at["kk"]), strict=True)

    def mask(self, pairs: Tensor, *, strict: bool) -> Tensor:
        """Zero, in place, the pairs of a token with later ones (and with itself if strict)."""
        return _heads_first(pairs).tril_(-1 if strict else 0)

    def take_own(self) -> Tensor | None:
        """Take the gradient of q_i k_i out of dqk: [N, C, r, 1], or None where it may stay.

        No decay is in that product. Left in, its share in the gradient of the decay would only cancel up to rounding.
        """
        return None

    def backward(self) -> None:
        """Add to dq, dk and dk_row the gradients from (masked) dqk and dkk, which may be overwritten."""
        at = self.at
        at["dq"].baddbmm_(at["dqk"], at["k"])
        at["dk"].baddbmm_(at["dqk"].mT, at["q"])
        if "dkk" in at:
            at["dk_row"].baddbmm_(at["dkk"], at["k"])
            at["dk"].baddbmm_(at["dkk"].mT, at["k"])

    def grad_log_decay(self, dgate: Tensor) -> Tensor:
        """Turn the gradient of G [N, C, K] into that of log_decay."""
        raise AssertionError("there is no log decay to differentiate")


class HeadDecay(NoDecay):
    """log_decay [B, T, Hs]: one matrix of weights e^{G_i - G_j} for all channels."""

    def __init__(self, at: Buffers, rows: int, tiles: Tensor, count: int):
        super().__init__(at, rows)
        N, C, _ = at["k"].shape
        self.weight = at["k"].new_empty(N, C, C)
        self.tiles = Tiles(at["k"].new_empty(N, C, 1, dtype=widest(at["k"].device)), tiles, count)

    def load(self, start: int, stop: int) -> None:
        total = self.tiles.load(start, stop).cumsum_(1)  # [N, C, 1]
        torch.sub(total, total.mT, out=self.weight)
        self.weight.tril_().exp_().tril_()  # masked before exp; the second mask turns e^0 into 0
        self.read = total.exp().to(self.weight.dtype)
        self.write = (total[:, -1:] - total).exp_().to(self.weight.dtype)
        self.last = self.read[:, -1:]

    def compute(self) -> None:
        at = self.at
        self._weigh(torch.bmm(at["q"], at["k"].mT, out=at["qk"]))
        if "kk" in at:
            self.mask(self._weigh(torch.bmm(at["k"], at["k"].mT, out=at["kk"])), strict=True)

    def mask(self, pairs: Tensor, *, strict: bool) -> Tensor:
        """Zero the diagonal if strict; what is above it meets weights of 0 or is never read."""
        if strict:
            pairs.diagonal(dim1=1, dim2=2).zero_()
        return pairs

    def take_own(self) -> Tensor | None:
        diagonal = _heads_first(self.at["dqk"]).diagonal(dim1=-2, dim2=-1)  # [N, (r,) C]
        own = diagonal.clone() if diagonal.dim() == 3 else diagonal[:, None].clone()
        diagonal.zero_()
        return own.mT.unsqueeze(-1)

    def backward(self) -> None:
        self._weigh(self.at["dqk"])
        if "dkk" in self.at:
            self._weigh(self.at["dkk"])
        super().backward()

    def _weigh(self, pairs: Tensor) -> Tensor:
        N, rows, C = pairs.shape
        pairs.view(N, C, rows // C, C).mul_(self.weight[:, :, None])
        return pairs

    def grad_log_decay(self, dgate: Tensor) -> Tensor:
        """Sum over channels and later tokens: [N, C, 1]."""
        total = dgate.sum(2, keepdim=True).to(widest(dgate.device))
        return total.flip(1).cumsum_(1).flip(1)


def make_pairs(log_decay: Tensor | None, tiles: Tensor | None, at: Buffers, rows: int, count: int) -> NoDecay:
    """Return the object for None, [B, T, Hs] or [B, T, Hs, K] log decays (`tiles`: tiled; `count` chunks)."""
    if log_decay is None or tiles is None:
        return NoDecay(at, rows)
    if log_decay.dim() == 3:
        return HeadDecay(at, rows, tiles, count)
    from lineament.ops.recurrence.pairs_channel import ChannelDecay

    return ChannelDecay(at, rows, tiles, count)


def _heads_first(pairs: Tensor) -> Tensor:
    """View pairs [N, C * r, C] as [N, C, C] or [N, r, C, C]."""
    N, rows, C = pairs.shape
    return pairs if rows == C else pairs.view(N, C, rows // C, C).transpose(1, 2)
