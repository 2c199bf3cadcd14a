"""The backward pass of blocked windowed attention, and the autograd function around both passes.

A block's gradients are those of one small dense attention and of the state it read and wrote, so the walk goes from
right to left with the gradient of the state in hand and recomputes the weights, run by run.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lineament._base.backends import widest
from lineament.ops.window_blocked import (
    Block,
    Decays,
    Masks,
    State,
    Walk,
    Weights,
    decays,
    forward,
    rows,
    runs,
    scaled,
    split_state,
    spread,
    walk_of,
    weigh,
)
from lineament.ops.window_state import WindowCall, expanded, folded


class Gradients(NamedTuple):
    """Gradients of a call's tensors, in the shape of each and the dtype of the state; `state` is still in two parts."""

    q: Tensor
    k: Tensor
    v: Tensor
    phi_q: Tensor
    phi_k: Tensor
    log_scale: Tensor
    log_decay: Tensor | None
    sink_k: Tensor
    sink_v: Tensor
    state: State


def _empty_gradients(call: WindowCall, grad_far: Tensor) -> Gradients:
    """Nothing but zeros where blocks add up, uninitialised where each block writes its own rows."""

    def zeros(x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=call.far.dtype, device=x.device)

    def own(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=call.far.dtype, device=x.device)

    log_decay = None if call.log_decay is None else torch.zeros_like(call.log_decay)
    return Gradients(
        own(call.q), zeros(call.k), zeros(call.v), own(call.phi_q), zeros(call.phi_k), zeros(call.log_scale),
        log_decay, zeros(call.sink_k), zeros(call.sink_v), split_state(grad_far),
    )  # fmt: skip


class _Shares(NamedTuple):
    """Gradients of one block's numerators and denominators, and of its weights."""

    top: Tensor  # [G, C r, V]
    bottom: Tensor  # [G, C r, 1]
    weights: Tensor  # [G, C r, s' + L]


def backward(
    call: WindowCall, o: Tensor, den: Tensor, states: list[State], after: State, grad: Tensor, grad_far: Tensor
) -> Gradients:
    """Walk the runs from right to left. `after` is the far state behind the last block."""
    walk, masks, out = walk_of(call), Masks(call), _empty_gradients(call, grad_far)
    wide = call.far.dtype
    reads = bool(call.phi_q.shape[-1])
    grad, den, o = (rows(call, x) for x in (grad, den, o))
    for index, b in reversed(list(enumerate(runs(call)))):
        decay = decays(walk, b, masks.waiting(b)) if reads else None
        x = weigh(walk, b, masks, decay, apart=True)
        share = walk.of(grad, b).to(wide) / walk.of(den, b)
        level = (share * walk.of(o, b)).sum(-1, keepdim=True).neg_()
        grad_weights = torch.bmm(share.to(walk.narrow), x.values.mT).to(wide).add_(level)
        shares = _Shares(share, level, grad_weights)
        grad_scale = None
        if reads:
            grad_scale = _far_backward(walk, b, masks, decay, x, shares, states[index], after, out)
            after = State(*(part.unflatten(0, (-1, b.run))[:, 0] for part in states[index]))
        assert x.exact is not None
        grad_weights.mul_(x.exact)
        if call.relative and grad_scale is not None:
            grad_weights.scatter_add_(-1, x.top, grad_scale)
        _exact_backward(walk, b, x, shares, out)
    return out


def _exact_backward(walk: Walk, b: Block, x: Weights, shares: _Shares, out: Gradients) -> None:
    """Gradients through the logits and the values of a run."""
    sinks, narrow, step = walk.call.sink_k.shape[2], walk.narrow, b.stop - b.start
    grad_logits = shares.weights.to(narrow)
    out.q[:, walk.steps(b)] = walk.rows_back(torch.bmm(grad_logits, x.keys))
    for grad, sink_grad, product in (
        (out.k, out.sink_k, torch.bmm(grad_logits.mT, x.q)),
        (out.v, out.sink_v, torch.bmm(x.both.to(narrow).mT, shares.top.to(narrow))),
    ):
        each = product.unflatten(0, (*grad.shape[:2], b.run))
        for i in range(b.run):  # blocks of a run read some keys both
            grad[:, :, b.low + i * step : b.high + i * step] += each[:, :, i, sinks:]
        if sinks:
            sink_grad.add_(each[:, :, :, :sinks].sum(2))


def _far_backward(
    walk: Walk, b: Block, masks: Masks, decay: Decays | None, x: Weights, shares: _Shares, before: State, after: State,
    out: Gradients,
) -> Tensor:  # fmt: skip
    """Gradients through a run's far weights and the states before and after its blocks; returns that of log_scale.

    `out.state` is the gradient of the state behind the run and becomes that of the one before. The gradient of a log
    decay is that of the running sums it is part of, summed over the later steps.
    """
    narrow, sinks, call = walk.narrow, walk.call.sink_k.shape[2], walk.call
    r, here = call.q.shape[2] // call.k.shape[1], walk.steps(b)
    top = shares.top.to(narrow)
    grad_phi = torch.bmm(top, before.sum.mT.to(narrow)).to(call.far.dtype)
    grad_phi.addcmul_(shares.bottom, before.norm.mT)
    read = x.phi
    if decay is not None:
        grad_phi, read = spread(grad_phi, decay.begin, r), spread(read, decay.begin, r)
    added = torch.bmm(read.to(narrow).mT, top).to(grad_phi.dtype), torch.bmm(read.mT.to(grad_phi.dtype), shares.bottom)
    behind, clock = out.state.back_(State(*added), b, decay), None
    if b.left:
        inner = shares.weights[..., sinks : sinks + b.left].unflatten(1, (-1, r))
        inner = (inner * masks.pairs(b, decay)).flatten(1, 2).to(narrow)
        grad_phi += torch.bmm(inner, expanded(walk.keys(call.phi_k, b, b.left), call.outer))
        clock = _leaving_backward(walk, b, decay, torch.bmm(inner.mT, x.phi.to(narrow)), behind, out)
    grad_factors = folded(grad_phi, x.factors.to(grad_phi.dtype), call.outer)
    out.phi_q[:, here] = walk.rows_back(scaled(grad_factors, x.near, call.outer))
    grad_scale = grad_phi.mul_(x.phi).sum(-1, keepdim=True)
    out.log_scale[:, here] = walk.rows_back(grad_scale)[..., 0]
    if decay is not None and out.log_decay is not None:
        sums = grad_scale[..., 0].unflatten(1, (-1, r)).sum(-1).to(widest(grad_scale.device))
        if clock is not None:
            sums[:, b.skip :] -= clock
        for g, first, last in zip(behind, before, after, strict=True):
            later = torch.cat([first.unflatten(0, (-1, b.run))[:, 1:], last[:, None]], 1).flatten(0, 1)
            sums[:, -1] += (g * later).sum((1, 2))
        steps = sums.flip(1).cumsum(1).flip(1).view(*call.far.shape[:2], -1)
        out.log_decay[:, here] = steps.transpose(1, 2)
    return grad_scale


def _leaving_backward(
    walk: Walk, b: Block, decay: Decays | None, grad_phi: Tensor, behind: State, out: Gradients
) -> Tensor | None:
    """Gradients of the keys that leave in a run, given that of phi_k inside it; returns [G, left] for decays."""
    shape, narrow = walk.call.far.shape[:2], walk.narrow
    gone = slice(b.low, b.low + b.run * b.left)  # (of two blocks alike, one's keys leave where the other's end)
    factors, v = (walk.keys(x, b, b.left) for x in (walk.call.phi_k, walk.call.v))
    phi = expanded(factors, walk.call.outer)
    written = phi if decay is None else (phi * decay.end[..., None]).to(narrow)
    grad_sum = behind.sum.to(narrow)
    out.v[:, :, gone] += torch.bmm(written, grad_sum).view(*shape, -1, v.shape[2])
    grad_written = torch.bmm(v, grad_sum.mT) + behind.norm.mT
    if decay is not None:
        grad_written = grad_written * decay.end[..., None]
    grad_phi = grad_phi + grad_written
    grad_factors = folded(grad_phi, factors.to(grad_phi.dtype), walk.call.outer)
    out.phi_k[:, :, gone] += grad_factors.view(*shape, -1, grad_factors.shape[2])
    return None if decay is None else (grad_phi * phi).sum(-1)


class WindowedAttention(torch.autograd.Function):
    """The walk with its own backward: saves the inputs, o, one number a row and one state a block."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        call = WindowCall(*args[:-1], *args[-1])
        keep = any(ctx.needs_input_grad)
        o, den, far, states = forward(call, keep)
        ctx.geometry, ctx.tensors = call[10:], 2 * len(states)
        if keep:
            ctx.save_for_backward(*call[:10], o, den, far, *(part for state in states for part in state))
        return o, far

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_far: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # read once: checkpointing hands them out a single time
        inputs, (o, den, far, *parts) = saved[:10], saved[10:]
        call = WindowCall(*inputs, *ctx.geometry)
        states = [State(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
        *grads, sink_k, sink_v, state = backward(call, o, den, states, split_state(far), grad, grad_far)
        found = (*grads, torch.cat(state, -1).unflatten(0, far.shape[:2]), sink_k, sink_v)
        return (*(g if g is None else g.to(x.dtype) for g, x in zip(found, inputs, strict=True)), None)


def run(call: WindowCall) -> tuple[Tensor, Tensor]:
    """Return o [B, T, Hq, V] and the far state after the last token."""
    return WindowedAttention.apply(*call[:10], call[10:])
