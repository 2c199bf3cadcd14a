# pyright: reportArgumentType=false, reportCallIssue=false
"""Decayed attention by Triton kernels, forward and backward (formulas: `triton_kernels`).

Where all inputs are bfloat16, products take bfloat16 and add up in float32, in chunks of 64 tokens. Other inputs go in
chunks of 32 with float32 products: at full precision ("ieee"), or in TF32 where an input is half-precision, which
carries more digits than it does.

A state's walk over the chunks is one program for a block of channels. Where there are enough of them to fill the card,
the walk gives the outputs too; else it only keeps the states, and another launch reads all chunks at once.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from lineament.ops.recurrence.triton_channel import pairs_backward_kernel
from lineament.ops.recurrence.triton_kernels import (
    inputs_backward_kernel,
    outputs_kernel,
    own_writes_backward_kernel,
    states_backward_kernel,
    states_kernel,
)
from lineament.ops.recurrence.triton_launch import (
    clock_of,
    constants,
    gates_gradient,
    launch,
    processors,
    stored_pairs,
)

FILLS = 0.75  # programs a multiprocessor from which on a walk also gives the outputs


def run(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, *, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Run decayed attention; the protocol of the package's docstring."""
    c = constants(q, k, v, log_decay, state, chunk_size)
    return Decayed.apply(*contiguous(q, k, v, log_decay, state), c)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def forward(
    q: Tensor, k: Tensor, v: Tensor, u: Tensor, w: Tensor | None, clock: Tensor | None, state: Tensor,
    c: dict[str, Any], keep: bool,
) -> tuple:  # fmt: skip
    """Return o, the last state, the states before the chunks, what was written (u if no w), and the stored pairs.

    u is v, or X of the delta rule. The states are None unless `keep` asks for them, for a backward pass.
    """
    B, T = q.shape[:2]
    chunks, delta = triton.cdiv(T, c["C"]), w is not None
    c = c | {"Hu": u.shape[2], "DELTA": delta}
    stored = stored_pairs(q, k, clock, c, strict=False)
    out = not few(q, c)
    save = keep or not out
    final, o = torch.empty_like(state), v.new_empty(B, T, c["Hs"] * c["R"], c["V"])
    states = state.new_empty(B, c["Hs"], chunks, c["K"], c["V"], dtype=c["dtype"]) if save else None
    writes = state.new_empty(B, T, c["Hs"], c["V"], dtype=c["dtype"]) if save and delta else u
    variant = "saved" if delta and keep else ""
    launch(
        states_kernel, B * c["Hs"], c, q, k, u, w, clock, stored, state, states, writes, o, final, T,
        variant=variant if out else "few", SAVE=save, OUT=out,
    )  # fmt: skip
    if not out:
        rows = B * c["Hs"] * c["R"] * chunks
        launch(outputs_kernel, rows, c, q, k, writes, clock, stored, states, o, T)
    return o, final, states, writes, stored


def backward(
    q: Tensor, k: Tensor, v: Tensor, u: Tensor, w: Tensor | None, clock: Tensor | None, stored: Tensor | None,
    states: Tensor, grad_o: Tensor, grad_final: Tensor, c: dict[str, Any],
) -> tuple:  # fmt: skip
    """Gradients of q, k, u, w, clock and the first state, heads not yet shared; those of w and clock may be None."""
    B, T = q.shape[:2]
    Hs, R, N, delta, wide = c["Hs"], c["R"], B * c["Hs"], w is not None, grad_final.dtype
    c = c | {"Hu": u.shape[2], "DELTA": delta}
    grad_o, grad_final = grad_o.contiguous(), grad_final.contiguous()
    rows = N * triton.cdiv(T, c["C"])
    grad_states, grad_start = torch.empty_like(states), torch.empty_like(grad_final)
    later = c["GATE"] == 2  # other kernels add to these
    grad_q = q.new_empty(B, T, Hs * R, c["K"], dtype=wide if later or c["Hq"] < Hs * R else q.dtype)
    grad_k = k.new_empty(B, T, Hs, c["K"], dtype=wide if later or delta or c["Hk"] < Hs else k.dtype)
    grad_u = v.new_empty(B, T, Hs, c["V"], dtype=c["dtype"] if delta else wide if c["Hv"] < Hs else v.dtype)
    grad_w = None if w is None else torch.empty_like(w)
    grad_clock = None if clock is None else torch.empty_like(clock, dtype=wide)
    grad_stored = None if stored is None else torch.empty_like(stored)
    if delta:
        launch(own_writes_backward_kernel, rows, c, q, k, clock, stored, grad_o, grad_u, T)
    launch(
        states_backward_kernel, N, c, q, k, w, clock, grad_o, grad_final, grad_states, grad_u, grad_start, T,
        variant="few" if few(q, c) else "",
    )  # fmt: skip
    launch(
        inputs_backward_kernel, rows, c, q, k, u, clock, stored, states, grad_o, grad_states, grad_u, grad_q, grad_k,
        grad_w, grad_stored, grad_clock, T,
    )  # fmt: skip
    if later:
        pairs_backward(q, k, clock, grad_stored, grad_q, grad_k, grad_clock, c, strict=False)
    return grad_q, grad_k, grad_u, grad_w, grad_clock, grad_start


def few(q: Tensor, c: dict[str, Any]) -> bool:
    """Say whether the walks, one program a state and a block of 64 values, would leave much of the card idle."""
    return q.shape[0] * c["Hs"] * c["VP"] < 64 * FILLS * processors(q)


def pairs_backward(
    x: Tensor, k: Tensor, clock: Tensor | None, grad_stored: Tensor | None, grad_x: Tensor | None, grad_k: Tensor,
    grad_clock: Tensor | None, c: dict[str, Any], *, strict: bool,
) -> None:  # fmt: skip
    """Add the pairs' part to the gradients of x, k and the clock (decays per channel)."""
    B, T, Hx, _ = x.shape
    c = c | {"Hx": Hx, "R": 1 if strict else c["R"], "STRICT": strict}
    rows = B * c["Hs"] * triton.cdiv(T, c["C"])
    launch(pairs_backward_kernel, rows, c, x, k, clock, grad_stored, grad_x, grad_k, grad_clock, T)


def shared(grad: Tensor, like: Tensor) -> Tensor:
    """Sum the gradients of heads that share one of `like` [B, T, H, W], in its dtype."""
    return grad.unflatten(2, (like.shape[2], -1)).sum(3).to(like.dtype) if grad.shape != like.shape else grad.to(like)


class Decayed(torch.autograd.Function):
    """Keeps its inputs, the clock, and the state before each chunk."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, c: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        clock = clock_of(log_decay, c)
        keep = any(ctx.needs_input_grad)
        o, final, states, _, stored = forward(q, k, v, v, None, clock, state, c, keep)
        ctx.save_for_backward(q, k, v, clock, stored, states)
        ctx.constants = c
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor, grad_final: Tensor) -> tuple:
        q, k, v, clock, stored, states = ctx.saved_tensors
        c = ctx.constants
        dq, dk, dv, _, dclock, dstate = backward(q, k, v, v, None, clock, stored, states, grad_o, grad_final, c)
        gate = None if dclock is None else gates_gradient(dclock, c)
        return shared(dq, q), shared(dk, k), shared(dv, v), gate, dstate, None
