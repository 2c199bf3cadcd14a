"""Windowed attention walked in blocks of queries: memory O(T w), one pass forward and one backward.

A block of C queries reads one run of w + C keys. Query i and key j of that run are C + w apart at most, so the corner
j <= i holds the keys that left the window during the block and the rest its exact part: two kinds of weights, one
matrix, one product with the values. Keys gone before the block are in the far state S [F, V + 1], whose last column is
the normaliser. The backward pass recomputes each block from the inputs, o, and the states at the block's edges.

Matrix products run in the inputs' dtype where that is bfloat16; logits, weights, sums and states in float32 or wider.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lineament.ops.window_reference import common_scale
from lineament.ops.window_state import WindowCall

BLOCK = 64  # queries a block on a CPU: three heads of 64 x 192 logits stay in the second-level cache
BLOCK_DEVICE = 256  # on a GPU, where a launch costs more than the extra logits


class Block(NamedTuple):
    """Queries [start, stop) and the keys [low, high) they read; the first `left` of those leave during the block."""

    start: int
    stop: int
    low: int
    high: int
    left: int
    skip: int  # steps of the block before the first of those keys leaves


class Walk(NamedTuple):
    """A call with heads in front: G = B Hk groups, R = T r rows (r query heads a step, side by side)."""

    q: Tensor  # [G, R, K]
    k: Tensor  # [G, L, K]
    v1: Tensor  # [G, L, V + 1], a one behind each value
    phi_q: Tensor  # [G, R, F]
    phi_k: Tensor  # [G, L, F]
    log_scale: Tensor  # [G, R, 1]
    log_decay: Tensor | None  # [G, T] float64
    sink_k: Tensor  # [G, s', K]
    sink_v1: Tensor  # [G, s', V + 1]


def blocks(call: WindowCall) -> Iterator[Block]:
    size = BLOCK if call.q.device.type == "cpu" else BLOCK_DEVICE
    T, P, w = call.q.shape[1], call.prefix, call.window
    first = call.sinks - (call.count - P)  # index of the first key that is no sink
    for start in range(0, T, size):
        stop = min(start + size, T)
        oldest = P + start - w  # the key that leaves when the block's first query reads
        low = min(max(oldest, first, 0), P + stop)
        yield Block(start, stop, low, P + stop, max(0, P + stop - w - low), low - oldest)


def lay_out(call: WindowCall) -> Walk:
    """Copy a call's tensors into the layout the blocks are slices of."""
    G = call.k.shape[0] * call.k.shape[1]
    R = call.q.shape[0] * call.q.shape[1] * call.q.shape[2] // G
    wide = call.far.dtype
    narrow = torch.bfloat16 if call.q.dtype == torch.bfloat16 else wide

    def rows(x: Tensor, dtype: torch.dtype) -> Tensor:  # [B, T, Hq, X] -> [G, T r, X]
        return x.unflatten(2, (call.k.shape[1], -1)).transpose(1, 2).to(dtype).reshape(G, R, x.shape[-1])

    def keys(x: Tensor) -> Tensor:
        return x.to(narrow).reshape(G, *x.shape[2:])

    def with_one(x: Tensor) -> Tensor:
        padded = x.new_ones(G, x.shape[2], x.shape[3] + 1, dtype=narrow)
        padded[..., :-1].unflatten(0, x.shape[:2]).copy_(x)
        return padded

    decay = call.log_decay
    return Walk(
        q=rows(call.q, narrow),
        k=keys(call.k),
        v1=with_one(call.v),
        phi_q=rows(call.phi_q, narrow),
        phi_k=keys(call.phi_k),
        log_scale=rows(call.log_scale[..., None], wide),
        log_decay=None if decay is None else decay.transpose(1, 2).reshape(G, -1).double(),
        sink_k=keys(call.sink_k),
        sink_v1=with_one(call.sink_v),
    )


class Masks:
    """Which weights of a block are exact and which are far: the same for all blocks but the first and the last few."""

    def __init__(self, call: WindowCall) -> None:
        self.call, self.exact, self.far = call, {}, {}

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


class Decays(NamedTuple):
    """Factors e^(sums of log decay) of one block, all <= 1; the sums are taken in float64 and subtracted before exp."""

    pair: Tensor  # [G, C, left] from the step a key left to the step a query reads, 0 where it has not left
    begin: Tensor  # [G, C] from the block's start to a query
    end: Tensor  # [G, left] from the step a key left to the block's end
    whole: Tensor  # [G]


def decays(walk: Walk, b: Block, waiting: Tensor, wide: torch.dtype) -> Decays | None:
    if walk.log_decay is None:
        return None
    clock = walk.log_decay[:, b.start : b.stop].cumsum(1)
    entered = clock[:, b.skip : b.skip + b.left]
    pair = (clock[:, :, None] - entered[:, None]).masked_fill_(waiting, -torch.inf)
    last = clock[:, -1]
    return Decays(*(x.exp().to(wide) for x in (pair, clock, last[:, None] - entered, last)))


class Weights(NamedTuple):
    """One block's weights before division: `both` = exact + far, [G, C r, s' + L]."""

    both: Tensor
    exact: Tensor | None  # kept apart for the backward pass only
    phi: Tensor  # [G, C r, F], phi_q e^(lambda - c)
    near: Tensor  # [G, C r, 1], e^(lambda - c)
    top: Tensor  # [G, C r, 1] largest exact logit (its index in the backward pass of the relative form)
    keys: Tensor  # [G, s' + L, K]
    v1: Tensor  # [G, s' + L, V + 1]


def weigh(walk: Walk, b: Block, masks: Masks, decay: Decays | None, relative: bool, apart: bool) -> Weights:
    """Compute the weights of block b on the keys it reads, those in the far state excepted."""
    G, r = walk.q.shape[0], walk.q.shape[1] // masks.call.q.shape[1]
    C, wide = b.stop - b.start, walk.log_scale.dtype
    here = slice(b.start * r, b.stop * r)
    keys, v1 = walk.k[:, b.low : b.high], walk.v1[:, b.low : b.high]
    sinks = walk.sink_k.shape[1]
    if sinks:
        keys, v1 = torch.cat([walk.sink_k, keys], 1), torch.cat([walk.sink_v1, v1], 1)
    logits = torch.bmm(walk.q[:, here], keys.mT).to(wide)
    logits.view(G, C, r, -1).add_(masks.hidden(b))
    top, where = logits.max(-1, keepdim=True) if apart and relative else (logits.amax(-1, keepdim=True), None)
    log_scale = walk.log_scale[:, here] + top if relative else walk.log_scale[:, here]
    lift, near = common_scale(top, log_scale)
    both = logits.sub_(top.add_(lift)).exp_()
    exact = both.clone() if apart else None
    phi = walk.phi_q[:, here] * near
    if b.left:
        far = torch.bmm(phi.to(walk.phi_k.dtype), walk.phi_k[:, b.low : b.low + b.left].mT).view(G, C, r, b.left)
        shown = both.view(G, C, r, -1)[..., sinks : sinks + b.left]
        if decay is None:
            shown.add_(far.masked_fill_(masks.waiting(b)[:, None], 0))
        else:
            shown.addcmul_(far.to(wide), decay.pair[:, :, None])
    return Weights(both, exact, phi, near, top if where is None else where, keys, v1)


def forward(walk: Walk, call: WindowCall, keep: bool) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return o [G, R, V], the denominators [G, R, 1], the last far state and, to keep, the state before each block."""
    narrow, wide = walk.q.dtype, call.far.dtype
    r, V = walk.q.shape[1] // call.q.shape[1], walk.v1.shape[2] - 1
    o = walk.q.new_empty(*walk.q.shape[:2], V)
    den = walk.log_scale.new_empty(walk.log_scale.shape)
    S, masks, states = call.far.flatten(0, 1).clone(), Masks(call), []
    reads = bool(call.phi_q.shape[-1])
    for b in blocks(call):
        here = slice(b.start * r, b.stop * r)
        decay = decays(walk, b, masks.waiting(b), wide) if reads else None
        x = weigh(walk, b, masks, decay, call.relative, apart=False)
        total = x.both.sum(-1, keepdim=True)
        out = torch.bmm(x.both.to(narrow), x.v1[..., :V]).to(wide)
        if reads:
            phi = x.phi if decay is None else spread(x.phi, decay.begin, r)
            far = torch.bmm(phi.to(narrow), S.to(narrow))
            out.add_(far[..., :V])
            total.add_(far[..., V:])
            if keep:
                states.append(S.clone())
            _push_(S, walk, b, decay)
        o[:, here] = out.div_(total)
        den[:, here] = total
    return o, den, S, states


def _push_(S: Tensor, walk: Walk, b: Block, decay: Decays | None) -> None:
    """Move the state over a block: decay it, and write the keys that left the window."""
    if decay is not None:
        S.mul_(decay.whole[:, None, None])
    if not b.left:
        return
    phi, v1 = walk.phi_k[:, b.low : b.low + b.left], walk.v1[:, b.low : b.low + b.left]
    if decay is not None:
        phi = (phi * decay.end[..., None]).to(phi.dtype)
    if S.dtype == phi.dtype:
        S.baddbmm_(phi.mT, v1)
    else:
        S.add_(torch.bmm(phi.mT, v1))


def spread(x: Tensor, factor: Tensor, r: int) -> Tensor:
    """Multiply rows [G, C r, X] by a factor per step [G, C]."""
    return (x.unflatten(1, (-1, r)) * factor[..., None, None]).flatten(1, 2)
