"""Windowed attention walked in blocks of queries: memory O(T w), one pass forward and one backward.

A block of C queries reads one run of w + C keys. Query i and key j of that run are C + w apart at most, so the corner
j <= i holds the keys that left the window during the block and the rest its exact part: two kinds of weights, one
matrix, one product with the values. Keys gone before the block are in the far state S [F, V + 1], whose last column is
the normaliser. Blocks that look alike are taken in runs: the same operators, called less often. The backward pass
recomputes each run from the inputs, o, and the states at the blocks' edges.

Matrix products run in the inputs' dtype where that is bfloat16; logits, weights, sums and states in float32 or wider.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lineament._base.backends import widest
from lineament.ops.window_reference import common_scale
from lineament.ops.window_state import WindowCall, expanded

BLOCK = 64  # queries a block on a CPU: three heads of 64 x 192 logits stay in the second-level cache
BITS = 1 / math.log(2)  # logits are taken in base 2: torch's exp2 is four times as fast as its exp on a CPU
RUN = 16  # most blocks of a run times heads: their logits, 2 MB, still stay in a cache
BLOCK_DEVICE = 256  # on a GPU, where a launch costs more than the extra logits


class Block(NamedTuple):
    """Queries [start, stop) and the keys [low, high) they read; the first `left` of those leave during the block.

    A run of blocks: the first one, and how many of the same shape stand side by side. G is then G times their number.
    """

    start: int
    stop: int
    low: int
    high: int
    left: int
    skip: int  # steps of the block before the first of those keys leaves
    run: int = 1


class Walk(NamedTuple):
    """A call seen block by block, heads in front: G = B Hk groups; r query heads share a group, side by side."""

    call: WindowCall
    narrow: torch.dtype  # of matrix products
    q: Tensor  # [G, T r, K]
    phi: Tensor  # [G, T r, F']
    log_scale: Tensor  # [G, T r, 1], in base 2

    def here(self, b: "Block") -> slice:
        """The rows of all blocks of the run."""
        r, steps = self.call.q.shape[2] // self.call.k.shape[1], self.steps(b)
        return slice(steps.start * r, steps.stop * r)

    def of(self, x: Tensor, b: "Block") -> Tensor:
        """[G, T r, X] -> [G, C r, X], the block's rows."""
        x = x[:, self.here(b)]
        return x if b.run == 1 else x.unflatten(1, (b.run, -1)).flatten(0, 1)

    def steps(self, b: "Block") -> slice:
        """The queries of all blocks of the run."""
        return slice(b.start, b.start + b.run * (b.stop - b.start))

    def rows_back(self, x: Tensor) -> Tensor:
        """[G, C r, X], or that of a whole run, -> [B, C, Hq, X], not contiguous."""
        B, Hk = self.call.k.shape[:2]
        x = x.reshape(B * Hk, -1, x.shape[2])
        r = self.call.q.shape[2] // Hk
        return x.view(B, Hk, x.shape[1] // r, r, x.shape[2]).transpose(1, 2).flatten(2, 3)

    def keys(self, x: Tensor, b: "Block", length: int, sinks: Tensor | None = None) -> Tensor:
        """[B, Hk, L, X] -> [G, s' + length, X], the first keys that a block reads, in the dtype of the products."""
        step = b.stop - b.start
        x = x[:, :, b.low : b.low + (b.run - 1) * step + length].unfold(2, length, step).mT
        if sinks is not None:
            x = torch.cat([sinks[:, :, None].expand(-1, -1, b.run, -1, -1), x], 3)
        return x.flatten(0, 2).to(self.narrow)


def walk_of(call: WindowCall) -> Walk:
    narrow = torch.bfloat16 if call.q.dtype == torch.bfloat16 else call.far.dtype
    q, phi, log_scale = (rows(call, x) for x in (call.q, call.phi_q, call.log_scale[..., None]))
    return Walk(call, narrow, q.to(narrow), phi, log_scale.to(call.far.dtype) * BITS)


def rows(call: WindowCall, x: Tensor) -> Tensor:
    """[B, T, Hq, X] -> [G, T r, X], so that a block's rows stand together."""
    x = x.unflatten(2, (call.k.shape[1], -1)).transpose(1, 2)
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3], x.shape[4])


def block_size(device: torch.device) -> int:
    return BLOCK if device.type == "cpu" else BLOCK_DEVICE


def blocks(call: WindowCall) -> Iterator[Block]:
    size = block_size(call.q.device)
    T, P, w = call.q.shape[1], call.prefix, call.window
    first = call.sinks - (call.count - P)  # index of the first key that is no sink
    for start in range(0, T, size):
        stop = min(start + size, T)
        oldest = P + start - w  # the key that leaves when the block's first query reads
        low = min(max(oldest, first, 0), P + stop)
        yield Block(start, stop, low, P + stop, max(0, P + stop - w - low), low - oldest)


def runs(call: WindowCall) -> Iterator[Block]:
    """Join blocks that differ in their place alone."""
    early = max(0, call.sinks - call.count)  # before that some queries see fewer sinks
    most = max(1, RUN // (call.k.shape[0] * call.k.shape[1])) if call.q.device.type == "cpu" else 1
    held: Block | None = None
    for b in blocks(call):
        if held is not None:
            step = held.stop - held.start
            moved = held._replace(**{n: getattr(held, n) + held.run * step for n in ("start", "stop", "low", "high")})
            if held.run < most and held.start >= early and moved._replace(run=1) == b:
                held = held._replace(run=held.run + 1)
                continue
            yield held
        held = b
    if held is not None:
        yield held


class Masks:
    """Which weights of a block are exact and which are far: the same for all blocks but the first and the last few."""

    def __init__(self, call: WindowCall) -> None:
        self.call, self.exact, self.far, self.ones = call, {}, {}, {}

    def hidden(self, b: Block) -> Tensor:
        """[C, 1, s' + L], -inf where a key is outside the exact set of a query, else 0."""
        call, sinks = self.call, self.call.sink_k.shape[2]
        early = max(0, sinks - call.count - b.start)
        key = (b.stop - b.start, b.high - b.low, b.skip, early)
        if key not in self.exact:
            device = call.q.device
            i = torch.arange(b.stop - b.start, device=device)[:, None]
            age = i + call.window - b.skip - torch.arange(b.high - b.low, device=device)  # of a key, in tokens
            sink = torch.arange(sinks, device=device) > i + call.count + b.start
            hide = torch.cat([sink, (age < 0) | (age >= call.window)], dim=1)
            bias = torch.zeros(hide.shape, dtype=call.far.dtype, device=device)
            self.exact[key] = bias.masked_fill_(hide, -torch.inf)[:, None]
        return self.exact[key]

    def waiting(self, b: Block) -> Tensor:
        """[C, left], True where a key has not left the window yet when a query of the block reads."""
        key = (b.stop - b.start, b.left, b.skip)
        if key not in self.far:
            i = torch.arange(b.stop - b.start, device=self.call.q.device)[:, None]
            self.far[key] = torch.arange(b.left, device=i.device) + b.skip > i
        return self.far[key]

    def pairs(self, b: Block, decay: "Decays | None") -> Tensor:
        """[G or 1, C, 1, left], what a far weight inside the block is multiplied by: its decay, 0 or 1 without one."""
        if decay is not None:
            return decay.pair[:, :, None]
        key = (b.stop - b.start, b.left, b.skip)
        if key not in self.ones:
            self.ones[key] = (~self.waiting(b)).to(self.call.far.dtype)[None, :, None]
        return self.ones[key]


class Decays(NamedTuple):
    """Factors e^(sums of log decay) of one block, all <= 1; the sums are taken in float64 and subtracted before exp."""

    pair: Tensor  # [G, C, left] from the step a key left to the step a query reads, 0 where it has not left
    begin: Tensor  # [G, C] from the block's start to a query
    end: Tensor  # [G, left] from the step a key left to the block's end
    whole: Tensor  # [G]


def decays(walk: Walk, b: Block, waiting: Tensor) -> Decays | None:
    log_decay, wide = walk.call.log_decay, walk.call.far.dtype
    if log_decay is None:
        return None
    logs = log_decay[:, walk.steps(b)].transpose(1, 2).reshape(-1, b.stop - b.start)
    clock = logs.to(widest(logs.device)).cumsum(1)
    entered = clock[:, b.skip : b.skip + b.left]
    pair = (clock[:, :, None] - entered[:, None]).masked_fill_(waiting, -torch.inf)
    last = clock[:, -1]
    return Decays(*(x.exp().to(wide) for x in (pair, clock, last[:, None] - entered, last)))


class Weights(NamedTuple):
    """One block's weights before division: `both` = exact + far, [G, C r, s' + L]."""

    both: Tensor
    exact: Tensor | None  # kept apart for the backward pass only
    q: Tensor  # [G, C r, K]
    phi: Tensor  # [G, C r, F], phi_q e^(lambda - c); products multiplied out
    factors: Tensor  # [G, C r, F'], the same as it came
    near: Tensor  # [G, C r, 1], e^(lambda - c)
    top: Tensor  # [G, C r, 1], which exact logit is the largest; only in the backward pass of the relative form
    keys: Tensor  # [G, s' + L, K]
    values: Tensor  # [G, s' + L, V]


def weigh(walk: Walk, b: Block, masks: Masks, decay: Decays | None, apart: bool) -> Weights:
    """Compute the weights of block b on the keys it reads, those in the far state excepted."""
    call, wide, sinks = walk.call, walk.call.far.dtype, walk.call.sink_k.shape[2]
    r = call.q.shape[2] // call.k.shape[1]
    first = (call.sink_k, call.sink_v) if sinks else (None, None)
    keys, values = (walk.keys(x, b, b.high - b.low, s) for x, s in zip((call.k, call.v), first, strict=True))
    q = walk.of(walk.q, b)
    logits = torch.bmm(q, keys.mT).to(wide)
    steps = logits.unflatten(1, (-1, r))
    torch.add(masks.hidden(b), steps, alpha=BITS, out=steps)
    top, where = logits.max(-1, keepdim=True) if apart and call.relative else (logits.amax(-1, keepdim=True),) * 2
    log_scale = walk.of(walk.log_scale, b)
    lift, near = common_scale(top, log_scale + top if call.relative else log_scale, torch.exp2)
    both = logits.sub_(top + lift).exp2_()
    exact = both.clone() if apart and b.left else both if apart else None
    phi = factors = scaled(walk.of(walk.phi, b), near, call.outer)
    if b.left and phi.shape[-1]:
        phi_k = walk.keys(call.phi_k, b, b.left)
        far = products(phi.to(walk.narrow), phi_k, call.outer).unflatten(1, (-1, r))
        shown = both[..., sinks : sinks + b.left].unflatten(1, (-1, r))
        shown.addcmul_(far.to(wide), masks.pairs(b, decay))
    return Weights(both, exact, q, expanded(phi, call.outer), factors, near, where, keys, values)


class State(NamedTuple):
    """The far state in two parts, which keeps the widths of the products round; moved on in place."""

    sum: Tensor  # [G, F, V]
    norm: Tensor  # [G, F, 1]

    def passed_(self, walk: Walk, b: Block, decay: Decays | None) -> "State":
        """Return the states before each block of a run, [G, F, ..], and move this one on behind the run."""
        found = []
        for own, new in zip(self, self._written(walk, b, decay), strict=True):
            each = torch.cat([own[:, None], new], 1)
            for i in range(b.run):
                _add_kept(each[:, i + 1], each[:, i], decay, b, i)
            own.copy_(each[:, -1])
            found.append(each[:, :-1].flatten(0, 1))
        return State(*found)

    def back_(self, added: "State", b: Block, decay: Decays | None) -> "State":
        """The same for gradients, from right to left: return those of the states behind each block."""
        found = []
        for own, new in zip(self, added, strict=True):
            each = torch.cat([new.unflatten(0, (-1, b.run)), own[:, None]], 1)
            for i in reversed(range(b.run)):
                _add_kept(each[:, i], each[:, i + 1], decay, b, i)
            own.copy_(each[:, 0])
            found.append(each[:, 1:].flatten(0, 1))
        return State(*found)

    def _written(self, walk: Walk, b: Block, decay: Decays | None) -> "State":
        """Return what the keys that leave the window in each block add to the state behind it, [G, run, F, ..]."""
        if not b.left:
            return State(*(x.new_zeros(len(x), b.run, *x.shape[1:]) for x in self))
        phi, v = (walk.keys(x, b, b.left) for x in (walk.call.phi_k, walk.call.v))
        phi = expanded(phi, walk.call.outer)
        if decay is not None:
            phi = (phi * decay.end[..., None]).to(phi.dtype)
        parts = torch.bmm(phi.mT, v).to(self.sum.dtype), phi.sum(1, dtype=self.norm.dtype)[..., None]
        return State(*(x.unflatten(0, (-1, b.run)) for x in parts))


def _add_kept(to: Tensor, state: Tensor, decay: Decays | None, b: Block, i: int) -> None:
    """Add to `to` what block i of a run leaves of a state, or of its gradient."""
    if decay is None:
        to.add_(state)
    else:
        to.addcmul_(state, decay.whole.unflatten(0, (-1, b.run))[:, i, None, None])


def split_state(far: Tensor) -> State:
    """[B, Hk, F, V + 1] -> two copies with heads in front."""
    far = far.flatten(0, 1)
    return State(*(x.clone(memory_format=torch.contiguous_format) for x in (far[..., :-1], far[..., -1:])))


def forward(call: WindowCall, keep: bool) -> tuple[Tensor, Tensor, Tensor, list[State]]:
    """Return o [B, T, Hq, V], denominators [B, T, Hq, 1], the last far state, and of each run those before blocks."""
    walk, masks, states = walk_of(call), Masks(call), []
    wide, r = call.far.dtype, call.q.shape[2] // call.k.shape[1]
    o = call.far.new_empty(*walk.q.shape[:2], call.v.shape[-1])
    den = call.far.new_empty(*walk.q.shape[:2], 1)
    state = split_state(call.far)
    reads = bool(call.phi_q.shape[-1])
    for b in runs(call):
        decay = decays(walk, b, masks.waiting(b)) if reads else None
        x = weigh(walk, b, masks, decay, apart=False)
        total = x.both.sum(-1, keepdim=True)
        out = torch.bmm(x.both.to(walk.narrow), x.values).to(wide)
        if reads:
            phi = x.phi if decay is None else spread(x.phi, decay.begin, r)
            before = state.passed_(walk, b, decay)
            if walk.narrow == wide:
                out.baddbmm_(phi, before.sum)
            else:
                out.add_(torch.bmm(phi.to(walk.narrow), before.sum.to(walk.narrow)))
            total.add_(torch.bmm(phi.to(wide), before.norm))
            if keep:
                states.append(before)
        o[:, walk.here(b)] = out.div_(total).view(len(o), -1, out.shape[2])
        den[:, walk.here(b)] = total.view(len(o), -1, 1)
    far = torch.cat(state, dim=-1).unflatten(0, call.far.shape[:2])
    return walk.rows_back(o).to(call.v.dtype), walk.rows_back(den), far, states


def scaled(phi: Tensor, near: Tensor, outer: int) -> Tensor:
    """Multiply features [G, C r, F'] by a number per row; of a product one factor."""
    if not outer:
        return phi * near
    return torch.cat([phi[..., :outer] * near, phi[..., outer:].to(near.dtype)], dim=-1)


def products(a: Tensor, b: Tensor, outer: int) -> Tensor:
    """Return phi_q . phi_k for all pairs, [G, rows of a, rows of b]; factors are never multiplied out."""
    if not outer:
        return torch.bmm(a, b.mT)
    first = torch.bmm(a[..., :outer], b[..., :outer].mT)
    return first.mul_(torch.bmm(a[..., outer:], b[..., outer:].mT))


def spread(x: Tensor, factor: Tensor, r: int) -> Tensor:
    """Multiply rows [G, C r, X] by a factor per step [G, C]."""
    return (x.unflatten(1, (-1, r)) * factor[..., None, None]).flatten(1, 2)
