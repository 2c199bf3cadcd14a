"""Decayed products inside a chunk where every key channel has its own decay (see `pairs.py`).

The strictly lower triangle is cut into blocks of halves of 1, 2, 4, .. C / 2 tokens. In the block of halves I (later)
and J (earlier), e^{G_i - G_j} is e^{from the border to i} e^{from j to the border}: two factors <= 1 that belong to one
token each, so the block is one matmul. Only products of a token with itself are left, and no decay is in these.
"""

import torch
from torch import Tensor

from lineament.ops.recurrence.layout import Tiles
from lineament.ops.recurrence.pairs import Buffers, HeadDecay, NoDecay

SUMMED = 4  # up to blocks of this many tokens, log decays are summed and then exponentiated; beyond, factors multiplied


class Level:
    """Buffers and views for all blocks with halves of `half` tokens; P = N C / (2 half) blocks.

    `factor` [N, C, K] holds e^{from the border to the token} in second halves, e^{from the token to the border} in
    first ones. `later` [P, R, K] are the scaled rows of q and, for the delta rule, of k; `earlier` [P, half, K] the
    columns.
    """

    def __init__(self, at: Buffers, rows: int, half: int):
        k, delta = at["k"], "kk" in at
        N, C, K = k.shape
        self.half, self.rows, self.shape = half, rows, (N, C // (2 * half), 2, half)
        self.factor = torch.empty_like(k)
        self.first, self.second = self.halves(self.factor)
        count, tall = N * C // (2 * half), half * (rows + delta)
        self.later, self.earlier = k.new_empty(count, tall, K), k.new_empty(count, half, K)
        self.products = k.new_empty(count, tall, half)
        self.sources = [
            (self.halves(at["q"])[1], self.part(self.later, 0)),
            (self.halves(k)[0], self.view(self.earlier)),
        ]
        self.blocks = [(self.below(at["qk"]), self.part(self.products, 0))]
        if delta:
            self.sources.append((self.halves(k)[1], self.part(self.later, 1)))
            self.blocks.append((self.below(at["kk"]), self.part(self.products, 1)))
        if "dq" in at:
            self.bind_gradients(at, delta)

    def bind_gradients(self, at: Buffers, delta: bool) -> None:
        """Prepare the views that `backward` needs."""
        self.dlater, self.dearlier = torch.empty_like(self.later), torch.empty_like(self.earlier)
        self.dproducts = torch.empty_like(self.products)
        self.dblocks = [(self.part(self.dproducts, 0), self.below(at["dqk"]))]
        self.targets = [(self.halves(at["dq"])[1], self.part(self.dlater, 0), self.second)]
        if delta:
            self.dblocks.append((self.part(self.dproducts, 1), self.below(at["dkk"])))
            self.targets.append((self.halves(at["dk_row"])[1], self.part(self.dlater, 1), self.second))
        self.targets.append((self.halves(at["dk"])[0], self.view(self.dearlier), self.first))

    def halves(self, x: Tensor) -> tuple[Tensor, ...]:
        """View x [N, C * r, K] as its first and its second halves, [N, C / (2 half), half, r, K] each."""
        return x.view(*self.shape, -1, x.shape[-1]).unbind(2)

    def view(self, x: Tensor) -> Tensor:
        """View x [P, half, W] as [N, C / (2 half), half, 1, W]."""
        return x.view(*self.shape[:2], self.half, 1, -1)

    def part(self, x: Tensor, index: int) -> Tensor:
        """View the rows of q (0) or of k (1) in x [P, R, W] as [N, C / (2 half), half, r or 1, W]."""
        cut = self.half * self.rows
        part = x[:, :cut] if index == 0 else x[:, cut:]
        return part.unflatten(0, self.shape[:2]).unflatten(2, (self.half, -1))

    def below(self, pairs: Tensor) -> Tensor:
        """View the blocks in pairs [N, C * r, C] as [N, C / (2 half), half, r, half]."""
        N, count, _, half = self.shape
        square = pairs.view(N, count, 2, half, -1, count, 2, half)
        return square[:, :, 1, :, :, :, 0].diagonal(dim1=1, dim2=4).movedim(-1, 1)

    def compute(self) -> None:
        """Scale rows and columns and fill the blocks of qk and kk."""
        for (source, target), factor in zip(self.sources, (self.second, self.first, self.second), strict=False):
            torch.mul(source, factor, out=target)
        torch.bmm(self.later, self.earlier.mT, out=self.products)
        for target, source in self.blocks:
            target.copy_(source)

    def backward(self) -> None:
        """Add the share of these blocks to dq, dk and dk_row."""
        for target, source in self.dblocks:
            target.copy_(source)
        torch.bmm(self.dproducts, self.earlier, out=self.dlater)
        torch.bmm(self.dproducts.mT, self.later, out=self.dearlier)
        for target, source, factor in self.targets:
            target.addcmul_(source, factor)


class ChannelDecay(HeadDecay):
    """log_decay [B, T, Hs, K]."""

    def __init__(self, at: Buffers, rows: int, tiles: Tensor, count: int):
        NoDecay.__init__(self, at, rows)
        N, C, K = at["k"].shape
        at["qk"].zero_()  # only what is on and below the diagonal is ever written
        if "kk" in at:
            at["kk"].zero_()
        self.since = torch.empty_like(at["k"])  # sums (factors) from the start of a token's block to the token
        self.until = torch.empty_like(at["k"])  # sums (factors) behind the token to the end of its block
        self.read, self.write = self.since, self.until
        self.tiles = Tiles(self.since, tiles, count)
        self.levels = [Level(at, rows, 1 << i) for i in range(C.bit_length() - 1)]
        self.views = [(*level.halves(self.since), *level.halves(self.until)) for level in self.levels]
        self.queries = at["q"].view(N, C, rows, K)
        self.own = at["qk"].view(N, C, rows, C).diagonal(dim1=1, dim2=3).transpose(1, 2)  # [N, C, r]

    def load(self, start: int, stop: int) -> None:
        self.tiles.load(start, stop)
        self.last = self.since.sum(1).exp()[..., None]  # [N, K, 1]
        self.until.zero_()
        summed = True
        for level, (since_first, since_second, until_first, _) in zip(self.levels, self.views, strict=True):
            if summed and level.half >= SUMMED:
                summed = self._exponentiate()
            level.first.copy_(until_first)
            level.second.copy_(since_second)
            if summed:
                level.factor.exp_()
            join = Tensor.add_ if summed else Tensor.mul_
            join(until_first, since_second[:, :, -1:])
            join(since_second, since_first[:, :, -1:])
        if summed:
            self._exponentiate()

    def _exponentiate(self) -> bool:
        self.since.exp_()
        self.until.exp_()
        return False

    def compute(self) -> None:
        for level in self.levels:
            level.compute()
        self.own.copy_(torch.linalg.vecdot(self.queries, self.at["k"][:, :, None]))

    def backward(self) -> None:
        for level in self.levels:
            level.backward()

    def grad_log_decay(self, dgate: Tensor) -> Tensor:
        """Sum over later tokens, by segments and in place: [N, C, K]."""
        for level in self.levels:
            first, second = level.halves(dgate)
            first += second[:, :, :1]
        return dgate
