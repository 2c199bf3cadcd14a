"""What travels between ranks, each one collective forward and one backward.

A collective's backward is itself a collective, so every rank has to run it: `tied` keeps it reachable from a rank's
outputs where their values don't need it (the first rank reads nothing from before it).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lineament.ops.parallel.part import Part, all_gather

Span = tuple[int, int]


def exchange(part: Part, x: Tensor, wants: Callable[[int], Sequence[Span]], *, kind: str) -> Tensor:
    """Fetch tokens that earlier ranks hold.

    Args:
        x: [B, T, C], this rank's tokens.
        wants: rank -> spans (start, stop) of global tokens that this rank asks for, all before its own stretch.
        kind: the line of `part.traffic` that counts the bytes.

    Returns:
        [B, n, C], the tokens of `wants(part.rank)` in order.
    """
    plan = [[t for a, b in wants(rank) for t in _owners(part, a, b)] for rank in range(part.world)]
    mine = part.starts[part.rank]
    send = [(owner_start - mine, owner_stop - mine, rank) for rank, asked in enumerate(plan)
            for owner, owner_start, owner_stop in asked if owner == part.rank]  # fmt: skip
    order = plan[part.rank]  # spans of one rank's stretch, ascending inside each of the wanted spans
    received = sorted(range(len(order)), key=lambda i: (order[i][0], i))
    return _Exchange.apply(x, part, kind, send, [order[i] for i in received], _back(order, received))  # type: ignore


def _owners(part: Part, start: int, stop: int) -> list[tuple[int, int, int]]:
    """Cut a global span where ranks meet: (owner, start, stop)."""
    cuts = [
        (r, max(start, a), min(stop, b)) for r, (a, b) in enumerate(zip(part.starts, part.starts[1:], strict=False))
    ]
    return [(r, a, b) for r, a, b in cuts if a < b]


def _back(order: list[tuple[int, int, int]], received: list[int]) -> list[int]:
    """Return, for each token wanted, its place among the tokens as they arrive (by owner)."""
    place, at = {}, 0
    for i in received:
        place[i] = at
        at += order[i][2] - order[i][1]
    return [place[i] + n for i, (_, a, b) in enumerate(order) for n in range(b - a)]


class _Exchange(torch.autograd.Function):
    """Tokens by one all-to-all; the backward sends the gradients home and adds them up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Part, kind: str, send: list, order: list, back: list) -> Tensor:
        B, T, C = x.shape
        tokens = torch.tensor([t for a, b, _ in send for t in range(a, b)], dtype=torch.int64, device=x.device)
        back_index = torch.tensor(back, dtype=torch.int64, device=x.device)
        sizes_out, sizes_in = [0] * part.world, [0] * part.world
        for a, b, rank in send:
            sizes_out[rank] += b - a
        for owner, a, b in order:
            sizes_in[owner] += b - a
        ctx.part, ctx.kind, ctx.sizes, ctx.shape = part, kind, (sizes_in, sizes_out), (B, T, C)
        ctx.save_for_backward(tokens, back_index)
        rows = _all_to_all(x.transpose(0, 1).index_select(0, tokens), sizes_in, sizes_out, part, kind)
        return rows.index_select(0, back_index).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, back = ctx.saved_tensors
        B, T, C = ctx.shape
        sizes_in, sizes_out = ctx.sizes
        rows = grad.new_zeros(sum(sizes_in), B, C).index_add_(0, back, grad.transpose(0, 1))
        home = _all_to_all(rows, sizes_out, sizes_in, ctx.part, ctx.kind)
        found = grad.new_zeros(T, B, C).index_add_(0, tokens, home)
        return found.transpose(0, 1), None, None, None, None, None


def _all_to_all(rows: Tensor, sizes_in: list[int], sizes_out: list[int], part: Part, kind: str) -> Tensor:
    out = rows.new_empty(sum(sizes_in), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), sizes_in, sizes_out, group=part.group)
    part.traffic[kind] += out.numel() * out.element_size()
    return out


def carried(part: Part, state: Tensor, transition: Tensor) -> Tensor:
    """Return the state that reaches this rank: `sum_{i<rank} M_{rank-1} .. M_{i+1} S_i`, by one all-gather.

    Args:
        state: [R, H, K, V], what this rank's tokens leave behind when they start from nothing.
        transition: M, what they do to a state before them: factors [R, H, K] or matrices [R, H, K, K].
    """
    return _Carry.apply(state, transition, part)  # type: ignore[no-any-return]


def moved_by(transition: Tensor, state: Tensor) -> Tensor:
    """Apply a transition, factors [.., K] or matrices [.., K, K], to a state."""
    return transition[..., None] * state if transition.dim() == 3 else transition @ state


class _Carry(torch.autograd.Function):
    """States and transitions gathered and folded; backward the states' gradients, folded from the other end."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, transition: Tensor, part: Part) -> Tensor:
        wide = transition if transition.dim() == 4 else transition[..., None]
        gathered = _gather(torch.cat([state, wide.to(state.dtype)], dim=-1), part)
        states, moves = gathered.split([state.shape[-1], wide.shape[-1]], dim=-1)
        moves = moves if transition.dim() == 4 else moves[..., 0]
        before = torch.zeros_like(state)
        for rank in range(part.rank):
            before = moved_by(moves[rank], before) + states[rank]
        ctx.part = part
        ctx.save_for_backward(moves, before)
        return before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        moves, before = ctx.saved_tensors
        part: Part = ctx.part
        grads = _gather(grad, part)
        after = torch.zeros_like(grad)  # of the state behind this rank's last token, from all later ranks
        for rank in reversed(range(part.rank + 1, part.world)):
            back = moves[rank].mT if moves.dim() == 5 else moves[rank]
            after = moved_by(back, after) + grads[rank]
        of_move = after @ before.mT if moves.dim() == 5 else (after * before).sum(-1)
        return after, of_move, None


def _gather(x: Tensor, part: Part) -> Tensor:
    """Return every rank's x, [world, ..]."""
    out = x.new_empty(part.world * x.numel())
    all_gather(out, x.contiguous().flatten(), part.group)
    part.traffic["state"] += (part.world - 1) * x.numel() * x.element_size()
    return out.view(part.world, *x.shape)


def summed(part: Part, x: Tensor) -> Tensor:
    """Return the sum of all ranks' x, the same to the bit on every rank (kind "state" of `part.traffic`)."""
    return _Summed.apply(x, part)  # type: ignore[no-any-return]


class _Summed(torch.autograd.Function):
    """Gathered, then added in the order of the ranks; backward the same of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Part) -> Tensor:
        ctx.part = part
        return _gather(x, part).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.part).sum(0), None


def gathered(part: Part, x: Tensor) -> Tensor:
    """Return every rank's x, [world, ..] (kind "state" of `part.traffic`)."""
    return _Gathered.apply(x, part)  # type: ignore[no-any-return]


class _Gathered(torch.autograd.Function):
    """Backward: what all ranks' gradients say of this rank's x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Part) -> Tensor:
        ctx.part = part
        return _gather(x, part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.part)[:, ctx.part.rank].sum(0), None


def only_if(wanted: bool, x: Tensor) -> Tensor:
    """Return x or zeros, in the graph either way: every rank's graph must hold the same collectives."""
    return x if wanted else x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0.0)


def tied(x: Tensor, *others: Tensor) -> Tensor:
    """Return x; the backward of `others` runs whenever that of x does (with gradient 0 from here)."""
    return _Tied.apply(x, *others)  # type: ignore[no-any-return]


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.shapes = [(other.shape, other.dtype, other.device) for other in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes]
        return grad, *zeros
