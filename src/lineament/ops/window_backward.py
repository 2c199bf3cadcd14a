"""The backward pass of blocked windowed attention, and the autograd function around both passes.

A block's gradients are those of one small dense attention and of the state it read and wrote, so the walk goes from
right to left with the gradient of the state in hand and recomputes each block's weights.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lineament.ops.window_blocked import (
    Block,
    Decays,
    Masks,
    Walk,
    Weights,
    blocks,
    decays,
    forward,
    lay_out,
    spread,
    weigh,
)
from lineament.ops.window_state import WindowCall


class Gradients(NamedTuple):
    """Gradients in the layout of `Walk`, in the dtype of the state."""

    q: Tensor
    k: Tensor
    v: Tensor
    phi_q: Tensor
    phi_k: Tensor
    log_scale: Tensor
    log_decay: Tensor | None
    sink_k: Tensor
    sink_v: Tensor
    state: Tensor


def backward(walk: Walk, call: WindowCall, o: Tensor, den: Tensor, states: list[Tensor], final: Tensor, grad: Tensor,
             grad_final: Tensor) -> Gradients:  # fmt: skip
    """Walk the blocks from right to left; a block's gradients are those of one small dense attention and the state."""
    wide, r = call.far.dtype, walk.q.shape[1] // call.q.shape[1]

    def zeros(x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=wide, device=x.device)

    out = Gradients(
        zeros(walk.q), zeros(walk.k), zeros(walk.v1[..., :-1]), zeros(walk.phi_q), zeros(walk.phi_k),
        zeros(walk.log_scale), None if walk.log_decay is None else torch.zeros_like(walk.log_decay),
        zeros(walk.sink_k), zeros(walk.sink_v1[..., :-1]), grad_final.flatten(0, 1).clone(),
    )  # fmt: skip
    masks = Masks(call)
    after = final.flatten(0, 1)
    reads = bool(call.phi_q.shape[-1])
    for index, b in reversed(list(enumerate(blocks(call)))):
        here = slice(b.start * r, b.stop * r)
        share = grad[:, here].to(wide) / den[:, here]
        level = (share * o[:, here]).sum(-1, keepdim=True)
        share1 = torch.cat([share, -level], dim=-1)  # gradient of the numerator and of the denominator
        decay = decays(walk, b, masks.waiting(b), wide) if reads else None
        x = weigh(walk, b, masks, decay, call.relative, apart=True)
        grad_weights = torch.bmm(share1.to(walk.q.dtype), x.v1.mT).to(wide)
        if reads:
            before = states[index]
            _far_backward(walk, b, masks, decay, x, share1, grad_weights, before, after, out, r)
            after = before
        grad_logits = x.exact.mul_(grad_weights)
        if call.relative and reads:
            grad_logits.scatter_add_(-1, x.top, out.log_scale[:, here])
        _exact_backward(walk, b, x, grad_logits.to(walk.q.dtype), share, here, out)
    return out


def _exact_backward(
    walk: Walk, b: Block, x: Weights, grad_logits: Tensor, share: Tensor, here: slice, out: Gradients
) -> None:
    """Gradients through the logits and the values of one block."""
    sinks = walk.sink_k.shape[1]
    out.q[:, here] = torch.bmm(grad_logits, x.keys)
    grad_k = torch.bmm(grad_logits.mT, walk.q[:, here])
    grad_v = torch.bmm(x.both.to(walk.q.dtype).mT, share.to(walk.q.dtype))
    out.k[:, b.low : b.high] += grad_k[:, sinks:]
    out.v[:, b.low : b.high] += grad_v[:, sinks:]
    if sinks:
        out.sink_k.add_(grad_k[:, :sinks])
        out.sink_v.add_(grad_v[:, :sinks])


def _far_backward(
    walk: Walk, b: Block, masks: Masks, decay: Decays | None, x: Weights, share1: Tensor, grad_weights: Tensor,
    before: Tensor, after: Tensor, out: Gradients, r: int,
) -> None:  # fmt: skip
    """Gradients through the far weights of one block and through the state before and after it.

    `before` and `after` are that state, `out.state` is the gradient of the one after and becomes that of the one
    before. The gradient of a log decay is that of the running sum it is part of, summed over the later steps.
    """
    narrow, sinks = walk.q.dtype, walk.sink_k.shape[1]
    here, gone = slice(b.start * r, b.stop * r), slice(b.low, b.low + b.left)
    grad_state, phi_k, v1 = out.state, walk.phi_k[:, gone], walk.v1[:, gone]
    from_state = torch.bmm(share1.to(narrow), before.mT.to(narrow)).to(grad_state.dtype)
    grad_phi = from_state if decay is None else spread(from_state, decay.begin, r)
    read = x.phi if decay is None else spread(x.phi, decay.begin, r)
    column = None
    if b.left:
        pairs = grad_weights[..., sinks : sinks + b.left].unflatten(1, (-1, r))
        if decay is None:
            pairs = pairs.masked_fill(masks.waiting(b)[:, None], 0).flatten(1, 2).to(narrow)
        else:
            pairs = (pairs * decay.pair[:, :, None]).flatten(1, 2).to(narrow)
        grad_phi = grad_phi + torch.bmm(pairs, phi_k)
        grad_inside = torch.bmm(pairs.mT, x.phi.to(narrow)).to(grad_state.dtype)
        written = phi_k if decay is None else (phi_k * decay.end[..., None]).to(narrow)
        grad_written = torch.bmm(v1, grad_state.mT.to(narrow)).to(grad_state.dtype)
        if decay is not None:
            grad_written = grad_written * decay.end[..., None]
        out.v[:, gone] += torch.bmm(written, grad_state[..., :-1].to(narrow))
        column = ((grad_inside + grad_written) * phi_k).sum(-1)
        out.phi_k[:, gone] += grad_inside + grad_written
    out.phi_q[:, here] = grad_phi * x.near
    out.log_scale[:, here] = (grad_phi * x.phi).sum(-1, keepdim=True)
    if decay is not None and out.log_decay is not None:
        clock = out.log_scale[:, here, 0].unflatten(1, (-1, r)).sum(-1).double()
        if column is not None:
            clock[:, b.skip :] -= column
        clock[:, -1] += (grad_state * after).sum((1, 2))
        out.log_decay[:, b.start : b.stop] = clock.flip(1).cumsum(1).flip(1)
        grad_state.mul_(decay.whole[:, None, None])
    grad_state.add_(torch.bmm(read.to(narrow).mT, share1.to(narrow)))


class WindowedAttention(torch.autograd.Function):
    """The walk with its own backward: saves the inputs, o, one number a row and one state a block."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        call = WindowCall(*args[:-1], *args[-1])
        keep = any(ctx.needs_input_grad)
        o, den, S, states = forward(lay_out(call), call, keep)
        B, T, heads, _ = call.q.shape
        o = o.unflatten(0, (B, -1)).unflatten(2, (T, -1)).transpose(1, 2).reshape(B, T, heads, o.shape[-1])
        S = S.unflatten(0, (B, -1))
        ctx.geometry = call[10:]
        if keep:
            edge = torch.stack(states) if states else S.new_empty(0)
            ctx.save_for_backward(*call[:10], o, den, edge, S)
        return o.to(call.v.dtype), S

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_far: Tensor) -> tuple[Any, ...]:
        *inputs, o, den, edge, final = ctx.saved_tensors
        call = WindowCall(*inputs, *ctx.geometry)

        def rows(x: Tensor) -> Tensor:
            return x.unflatten(2, (call.k.shape[1], -1)).transpose(1, 2).reshape(*den.shape[:2], x.shape[-1])

        g = backward(lay_out(call), call, rows(o), den, list(edge), final, rows(grad), grad_far)

        def as_query(x: Tensor, like: Tensor) -> Tensor:
            B, T, heads = call.q.shape[:3]
            x = x.unflatten(0, (B, -1)).unflatten(2, (T, -1)).transpose(1, 2)
            return x.reshape(B, T, heads, x.shape[-1]).to(like.dtype)

        def as_key(x: Tensor, like: Tensor) -> Tensor:
            return x.unflatten(0, like.shape[:2]).to(like.dtype)

        log_decay = None
        if g.log_decay is not None and call.log_decay is not None:
            log_decay = as_key(g.log_decay, call.far).transpose(1, 2).to(call.log_decay.dtype)
        return (
            as_query(g.q, call.q), as_key(g.k, call.k), as_key(g.v, call.v), as_query(g.phi_q, call.phi_q),
            as_key(g.phi_k, call.phi_k), as_query(g.log_scale, call.log_scale)[..., 0], log_decay,
            as_key(g.state, call.far), as_key(g.sink_k, call.sink_k), as_key(g.sink_v, call.sink_v), None,
        )  # fmt: skip


def run(call: WindowCall) -> tuple[Tensor, Tensor]:
    """Return o [B, T, Hq, V] and the far state after the last token."""
    return WindowedAttention.apply(*call[:10], call[10:])
