# pyright: reportArgumentType=false, reportCallIssue=false
"""Decayed attention by Triton kernels, forward and backward (formulas: `triton_kernels`).

Products of float32 inputs are taken at full precision ("ieee"), of half-precision inputs in TF32, which carries more
digits than they do. One launch for all states, one for all outputs; the backward pass mirrors them. Chunks of 32 and
no software pipelining keep every kernel under 64 KB of shared memory, so that they fit on small GPUs too.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lineament.ops.recurrence.triton_kernels import (
    inputs_backward_kernel,
    outputs_kernel,
    states_backward_kernel,
    states_kernel,
)

CHUNK, CHUNK_CHANNEL = 32, 16  # per channel, decays are taken pair by pair: C x C x K numbers must fit in registers
LEAST = 16  # the narrowest matrix product Triton compiles


class Layout(NamedTuple):
    """The inputs as the kernels want them, and the constants they are compiled for."""

    q: Tensor  # [N, R, T', K']
    k: Tensor  # [N, T', K']
    v: Tensor  # [N, T', V']
    clock: Tensor  # [N, T', 1 or K'] float64, log decay summed from each chunk's start
    state: Tensor  # [N, K', V']
    beta: Tensor | None  # [N, T']
    constants: dict[str, Any]


def run(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, *, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Run decayed attention; the protocol of the package's docstring."""
    x = lay_out(q, k, v, None, log_decay, state, chunk_size)
    o, final = Decayed.apply(x.q, x.k, x.v, x.clock, x.state, x.constants)
    return cut(o, final, q, v, state)


def lay_out(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, state: Tensor,
    chunk_size: int | None,
) -> Layout:  # fmt: skip
    """Put heads in front, repeat shared ones, pad tokens to whole chunks and widths to powers of two.

    Padded tokens have k = 0, beta = 0 and no decay, so they leave the state. Plain operators: autograd sums the
    gradients of shared heads and takes the running sums back.
    """
    B, Hs, K, V = state.shape
    wide_K, wide_V = (max(LEAST, triton.next_power_of_2(n)) for n in (K, V))
    channels = log_decay is not None and log_decay.dim() == 4
    largest = CHUNK_CHANNEL if channels else CHUNK
    C = max(LEAST, min(chunk_size or largest, largest))
    more = -q.shape[1] % C

    def padded(x: Tensor, width: int) -> Tensor:  # [B, T, H, W] -> [B, H, T', width]
        return torch.nn.functional.pad(x.transpose(1, 2), (0, width - x.shape[-1], 0, more))

    def rows(x: Tensor, width: int) -> Tensor:
        x = padded(x, width).repeat_interleave(max(1, Hs // x.shape[2]), 1)
        return x.unflatten(1, (Hs, -1)).flatten(0, 1).contiguous()

    clock = torch.zeros(B * Hs, q.shape[1] + more, 1, dtype=torch.float64, device=q.device)
    if log_decay is not None:
        gates = padded(log_decay if channels else log_decay[..., None], wide_K if channels else 1)
        clock = gates.double().unflatten(2, (-1, C)).cumsum(3).flatten(2, 3).flatten(0, 1).contiguous()
    narrow = any(x.dtype in (torch.bfloat16, torch.float16) for x in (q, k, v))
    constants = {
        "K": wide_K, "V": wide_V, "KG": clock.shape[-1], "C": C, "BV": min(32, wide_V),
        "DT": tl.float64 if state.dtype == torch.float64 else tl.float32, "num_stages": 1,
        "PRECISION": "tf32" if narrow else "ieee",
    }  # fmt: skip
    strength = None if beta is None else padded(beta[..., None], 1).flatten(0, 1)[..., 0].contiguous()
    start = torch.nn.functional.pad(state, (0, wide_V - V, 0, wide_K - K)).flatten(0, 1).contiguous()
    keys, values = (rows(x, width)[:, 0] for x, width in ((k, wide_K), (v, wide_V)))
    return Layout(rows(q, wide_K), keys, values, clock, start, strength, constants)


def cut(o: Tensor, final: Tensor, q: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Undo the layout: o [N, R, T', V'] -> [B, T, Ho, V] in v's dtype, state [N, K', V'] -> [B, Hs, K, V]."""
    B, Hs, K, V = state.shape
    o = o[:, :, : q.shape[1], :V].unflatten(0, (B, Hs)).flatten(1, 2).transpose(1, 2)
    return o.to(v.dtype), final[:, :K, :V].unflatten(0, (B, Hs))


def forward(q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, clock: Tensor, state: Tensor, constants: dict) -> tuple:
    """Launch both passes; returns o, the last state, the states before the chunks, and what was written (v if no w)."""
    N, R, T, K = q.shape
    V, C, BV = constants["V"], constants["C"], constants["BV"]
    states = state.new_empty(N, T // C, K, V)
    final, o = torch.empty_like(state), state.new_empty(N, R, T, V)
    u = v if w is None else state.new_empty(N, T, V)
    states_kernel[(N, V // BV)](
        k, v, k if w is None else w, clock, state, states, u, final, T // C, DELTA=w is not None, **constants
    )
    outputs_kernel[(N * R * (T // C), V // BV)](q, k, u, clock, states, o, T // C, R=R, **constants)
    return o, final, states, u


def backward(
    q: Tensor, k: Tensor, u: Tensor, w: Tensor | None, clock: Tensor, states: Tensor, constants: dict, grad_o: Tensor,
    grad_final: Tensor,
) -> tuple:  # fmt: skip
    """Gradients of q, k, u, w (None without), clock and the first state, all in the state's dtype but the clock's."""
    N, R, T, V = *q.shape[:3], constants["V"]
    chunks, delta = T // constants["C"], w is not None
    grad_o, grad_final = grad_o.contiguous(), grad_final.contiguous()
    grad_states, grad_start = torch.empty_like(states), torch.empty_like(grad_final)
    grad_u, grad_q, grad_k = (states.new_empty(shape) for shape in ((N, T, V), q.shape, k.shape))
    grad_w = states.new_empty(k.shape) if delta else grad_k
    grad_clock = torch.empty_like(clock)
    states_backward_kernel[(N, V // constants["BV"])](
        q, k, w if delta else k, clock, grad_o, grad_final, grad_states, grad_u, grad_start, chunks, R=R, DELTA=delta,
        **constants,
    )  # fmt: skip
    inputs_backward_kernel[(N * chunks,)](
        q, k, u, clock, states, grad_o, grad_states, grad_u, grad_q, grad_k, grad_w, grad_clock, chunks, R=R,
        DELTA=delta, **constants,
    )  # fmt: skip
    return grad_q, grad_k, grad_u, grad_w if delta else None, grad_clock, grad_start


class Decayed(torch.autograd.Function):
    """Keeps its inputs and the state before each chunk."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, clock: Tensor, state: Tensor, constants: dict) -> tuple:
        o, final, states, _ = forward(q, k, v, None, clock, state, constants)
        ctx.save_for_backward(q, k, v, clock, states)
        ctx.constants = constants
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor, grad_final: Tensor) -> tuple:
        q, k, v, clock, states = ctx.saved_tensors
        dq, dk, dv, _, dclock, dstate = backward(q, k, v, None, clock, states, ctx.constants, grad_o, grad_final)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dclock, dstate, None
