# pyright: reportArgumentType=false, reportCallIssue=false
"""The delta rule by Triton kernels, forward and backward, with no decay, one per head, or one per key channel.

Per chunk: solve L [W | X] = [b e^G K | b V] with L = I + StrictTril(b K K^T e^(G_i - G_j)) by forward substitution in
full precision (DeltaNet section 3); then the chunk writes U = X - W S and goes on as decayed attention of U.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lineament.ops.recurrence import triton_decayed
from lineament.ops.recurrence.triton_kernels import pairs, pairs_gradients, product, put, tile


@triton.jit
def solve_kernel(
    k, v, beta, clock, inverse, w, x, chunks, K: tl.constexpr, V: tl.constexpr, KG: tl.constexpr, C: tl.constexpr,
    BV: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a chunk of a row: the inverse of L row by row, and W and X from it."""
    c = tl.program_id(0) % chunks
    n = (tl.program_id(0) // chunks).to(tl.int64)
    row = n * chunks * C + c * C
    k_c = tile(k, row, C, 0, K, K, DT)
    G = tile(clock, row, C, 0, KG, KG, tl.float64)
    b = tile(beta, row, C, 0, 1, 1, DT)
    L = b * pairs(k_c, k_c, G, C, KG, True, DT, "ieee")
    i = tl.arange(0, C)
    inv = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(DT)
    for step in range(1, C):
        line = tl.sum(tl.where(i[:, None] == step, L, 0.0), axis=0)  # row `step` of L
        solved = tl.sum(line[:, None] * inv, axis=0)
        inv -= tl.where(i[:, None] == step, solved[None, :], 0.0)
    put(inverse, inv, row, C, 0, C, C)
    put(w, product(inv, b * tl.exp(G.to(DT)) * k_c, DT, PRECISION), row, C, 0, K, K)
    for e in range(0, V, BV):
        put(x, product(inv, b * tile(v, row, C, e, BV, V, DT), DT, PRECISION), row, C, e, BV, V)


@triton.jit
def solve_backward_kernel(
    k, v, beta, clock, inverse, w, x, grad_w, grad_x, grad_k, grad_v, grad_beta, grad_clock, chunks, K: tl.constexpr,
    V: tl.constexpr, KG: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients through the solve; those of k and G are added to what the other kernels left there."""
    c = tl.program_id(0) % chunks
    n = (tl.program_id(0) // chunks).to(tl.int64)
    row = n * chunks * C + c * C
    k_c = tile(k, row, C, 0, K, K, DT)
    G = tile(clock, row, C, 0, KG, KG, tl.float64)
    b = tile(beta, row, C, 0, 1, 1, DT)
    inv = tl.trans(tile(inverse, row, C, 0, C, C, DT))
    dy = product(inv, tile(grad_w, row, C, 0, K, K, DT), DT, PRECISION)
    right = dy * tl.exp(G.to(DT))
    P = product(dy, tl.trans(tile(w, row, C, 0, K, K, DT)), DT, PRECISION)
    db = tl.sum(right * k_c, axis=1)
    for e in range(0, V, BV):
        dz = product(inv, tile(grad_x, row, C, e, BV, V, DT), DT, PRECISION)
        P += product(dz, tl.trans(tile(x, row, C, e, BV, V, DT)), DT, PRECISION)
        db += tl.sum(dz * tile(v, row, C, e, BV, V, DT), axis=1)
        put(grad_v, b * dz, row, C, e, BV, V)
    i = tl.arange(0, C)
    P = tl.where(i[:, None] > i[None, :], -P, 0.0)  # gradient of L
    db += tl.sum(P * pairs(k_c, k_c, G, C, KG, True, DT, PRECISION), axis=1)
    put(grad_beta, db[:, None], row, C, 0, 1, 1)
    later, earlier = pairs_gradients(P * b, k_c, k_c, G, C, KG, True, DT, PRECISION)
    later += b * right
    put(grad_k, tile(grad_k, row, C, 0, K, K, DT) + later + earlier, row, C, 0, K, K)
    dG = k_c * (later - earlier)
    if KG == 1:
        dG = tl.sum(dG, axis=1)[:, None]
    put(grad_clock, tile(grad_clock, row, C, 0, KG, KG, tl.float64) + dG, row, C, 0, KG, KG)


class Delta(torch.autograd.Function):
    """Keeps its inputs, the solved chunks and the state before each."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, clock: Tensor, state: Tensor, constants: dict
    ) -> tuple:
        N, T, K = k.shape
        V, C = v.shape[-1], constants["C"]
        inverse, w, x = (state.new_empty(N, T, width) for width in (C, K, V))
        solve_kernel[(N * (T // C),)](k, v, beta, clock, inverse, w, x, T // C, **constants)
        o, final, states, u = triton_decayed.forward(q, k, x, w, clock, state, constants)
        ctx.save_for_backward(q, k, v, beta, clock, inverse, w, x, states, u)
        ctx.constants = constants
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor, grad_final: Tensor) -> tuple:
        q, k, v, beta, clock, inverse, w, x, states, u = ctx.saved_tensors
        dq, dk, dx, dw, dclock, dstate = triton_decayed.backward(
            q, k, u, w, clock, states, ctx.constants, grad_o, grad_final
        )
        dv, dbeta = torch.empty_like(dx), torch.empty_like(beta)
        chunks = k.shape[1] // ctx.constants["C"]
        solve_backward_kernel[(k.shape[0] * chunks,)](
            k, v, beta, clock, inverse, w, x, dw, dx, dk, dv, dbeta, dclock, chunks, **ctx.constants
        )
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbeta, dclock, dstate, None


def run(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the delta rule; the protocol of the package's docstring."""
    x = triton_decayed.lay_out(q, k, v, beta, log_decay, state, chunk_size)
    o, final = Delta.apply(x.q, x.k, x.v, x.beta, x.clock, x.state, x.constants)
    return triton_decayed.cut(o, final, q, v, state)
