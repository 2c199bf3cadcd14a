"""Windowed attention as one operator of the graph, for torch.compile and torch.export for any number of tokens.

The walk is a loop over blocks that a tracer would unroll; here it sees an operator with known shapes and a known rule
for gradients instead. Eager calls skip this file: an autograd function costs less than a registered operator.
"""

from typing import Any

import torch
from torch import Tensor

from lineament.ops.window_backward import backward
from lineament.ops.window_blocked import State, block_size, forward, runs, split_state
from lineament.ops.window_state import WindowCall

Ten = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("lineament::windowed_attention", mutates_args=())
def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, log_scale: Tensor, log_decay: Tensor | None,
    far: Tensor, sink_k: Tensor, sink_v: Tensor, window: int, sinks: int, count: int, relative: bool,
    outer: int,
) -> Five:  # fmt: skip
    """The tensors of a `WindowCall` -> o, denominators, the last state, and the states before the blocks, flat.

    (As one axis, since a tracer would else ask whether there is just one block; run by run.)
    """
    call = WindowCall(
        q, k, v, phi_q, phi_k, log_scale, log_decay, far, sink_k, sink_v, window, sinks, count, relative,
        outer,
    )  # fmt: skip
    *found, states = forward(call, keep=True)
    o, den, last = (x.contiguous() for x in found)  # as the fake operator promises
    if not states:
        empty = far.new_empty(0)
        return o, den, last, empty, empty.clone()
    return o, den, last, torch.cat([s.sum for s in states]).flatten(), torch.cat([s.norm for s in states]).flatten()


@windowed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, log_scale: Tensor, log_decay: Tensor | None,
      far: Tensor, sink_k: Tensor, sink_v: Tensor, window: int, sinks: int, count: int, relative: bool,
      outer: int) -> Five:  # fmt: skip
    B, T, Hq, _ = q.shape
    V, F, G = v.shape[-1], far.shape[2], far.shape[0] * far.shape[1]
    size = block_size(q.device)
    edges = (T + size - 1) // size
    o, den = v.new_empty(B, T, Hq, V), far.new_empty(B, T, Hq, 1)
    if not F:
        return o, den, far.new_empty(far.shape), far.new_empty(0), far.new_empty(0)
    return o, den, far.new_empty(far.shape), far.new_empty(edges * G * F * V), far.new_empty(edges * G * F)


@torch.library.custom_op("lineament::windowed_attention_backward", mutates_args=())
def windowed_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, log_scale: Tensor, log_decay: Tensor | None,
    far: Tensor, sink_k: Tensor, sink_v: Tensor, window: int, sinks: int, count: int, relative: bool, outer: int,
    o: Tensor, den: Tensor, last: Tensor, sums: Tensor, norms: Tensor, grad: Tensor, grad_far: Tensor,
) -> Ten:  # fmt: skip
    """Gradients of the ten tensors; that of a missing log_decay is empty."""
    call = WindowCall(
        q, k, v, phi_q, phi_k, log_scale, log_decay, far, sink_k, sink_v, window, sinks, count, relative,
        outer,
    )  # fmt: skip
    sizes = [far.shape[0] * far.shape[1] * b.run for b in runs(call)] if sums.numel() else []
    parts = (
        x.view(-1, far.shape[2], width).split(sizes) if sizes else () for x, width in ((sums, v.shape[-1]), (norms, 1))
    )
    states = [State(*pair) for pair in zip(*parts, strict=True)]
    g = backward(call, o, den, states, split_state(last), grad, grad_far)
    state = torch.cat(g.state, -1).unflatten(0, far.shape[:2])
    found = (*g[:6], far.new_empty(0) if g.log_decay is None else g.log_decay, state, g.sink_k, g.sink_v)
    like = (q, k, v, phi_q, phi_k, log_scale, found[6] if log_decay is None else log_decay, far, sink_k, sink_v)
    cast = [x.to(y.dtype).contiguous() for x, y in zip(found, like, strict=True)]
    return (cast[0], cast[1], cast[2], cast[3], cast[4], cast[5], cast[6], cast[7], cast[8], cast[9])


@windowed_attention_backward.register_fake
def _(*args: Any) -> Ten:
    made = [args[7].new_empty(0) if x is None else x.new_empty(x.shape) for x in args[:10]]
    return (made[0], made[1], made[2], made[3], made[4], made[5], made[6], made[7], made[8], made[9])


def _keep(ctx: Any, inputs: tuple, output: Five) -> None:
    ctx.save_for_backward(*inputs[:10], *output)
    ctx.geometry = inputs[10:]


def _rule(ctx: Any, grad: Tensor, _den: Any, grad_far: Tensor, *_states: Any) -> tuple:
    inputs, outputs = ctx.saved_tensors[:10], ctx.saved_tensors[10:]
    grads: list[Any] = list(windowed_attention_backward(*inputs, *ctx.geometry, *outputs, grad, grad_far))
    if inputs[6] is None:
        grads[6] = None
    return (*grads, None, None, None, None, None)


windowed_attention.register_autograd(_rule, setup_context=_keep)


def run(call: WindowCall) -> tuple[Tensor, Tensor]:
    """Return o [B, T, Hq, V] and the far state after the last token."""
    o, _, far, _, _ = windowed_attention(*call)
    return o, far
