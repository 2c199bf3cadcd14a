# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
"""The delta rule by Triton kernels, forward and backward, with no decay, one per head, or one per key channel.

Per chunk: solve L [W | X] = [b e^G K | b V] with L = I + StrictTril(b K K^T e^(G_i - G_j)) (DeltaNet section 3); then
the chunk writes U = X - W S and goes on as decayed attention of U.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lineament.ops.recurrence import triton_decayed
from lineament.ops.recurrence.triton_decayed import contiguous, pairs_backward, shared
from lineament.ops.recurrence.triton_launch import clock_of, constants, gates_gradient, launch, stored_pairs
from lineament.ops.recurrence.triton_tiles import clock_tile, pairs, product, put, tile, tile_pairs, weights


@triton.jit
def unit_inverse(L, C: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):
    """Return (I + L)^-1 for L [C, C] strictly lower triangular.

    The blocks of 16 on the diagonal D by substitution, all at once. Then with N = D^-1 (L - D's part), whose powers end
    after C / 16 blocks: (I + N)^-1 = (I - N) (I + N^2) (I + N^4) ...: few enough factors that nothing cancels.
    """
    B: tl.constexpr = C // 16
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    same = i // 16 == j // 16
    diagonal = tl.sum(tl.reshape(tl.where(same, L, 0.0), (B, 16, B, 16)), axis=2)
    a = tl.arange(0, 16)[None, :, None]
    inv = tl.where(a == tl.arange(0, 16)[None, None, :], 1.0, 0.0).to(DT) + tl.zeros((B, 16, 16), DT)
    for step in range(1, 16):
        line = tl.sum(tl.where(a == step, diagonal, 0.0), axis=1)  # [B, 16], row `step` of every block
        solved = tl.sum(line[:, :, None] * inv, axis=1)
        inv -= tl.where(a == step, solved[:, None, :], 0.0)
    wide = tl.reshape(tl.broadcast_to(inv[:, :, None, :], (B, 16, B, 16)), (C, C))
    wide = tl.where(same, wide, 0.0)
    if B > 1:
        N = tl.dot(wide, tl.where(same, 0.0, L), input_precision=PRECISION, out_dtype=DT)
        eye = tl.where(i == j, 1.0, 0.0).to(DT)
        whole = eye - N
        if B > 2:
            N = tl.dot(N, N, input_precision=PRECISION, out_dtype=DT)
            whole = tl.dot(whole, eye + N, input_precision=PRECISION, out_dtype=DT)
        if B > 4:
            N = tl.dot(N, N, input_precision=PRECISION, out_dtype=DT)
            whole = tl.dot(whole, eye + N, input_precision=PRECISION, out_dtype=DT)
        wide = tl.dot(whole, wide, input_precision=PRECISION, out_dtype=DT)
    return wide


@triton.jit
def solve_kernel(
    k, v, beta, clock, stored, inverse, w, x, T, Hk: tl.constexpr, Hv: tl.constexpr, Hs: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, OT: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a chunk of a state: the inverse of L, and W and X from it."""
    chunks = tl.cdiv(T, C)
    n, row = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks * C
    b, h = n // Hs, n % Hs
    strength = tile(beta, b, h, Hs, 1, row, T, C, 0, 1).to(DT)
    G = 0.0
    if GATE == 1:
        G = clock_tile(clock, b, h, Hs, 1, row, T, C, 0, 1)
    if GATE == 2:
        L = strength * tile_pairs(stored, b, h, Hs, row, T, C).to(DT)
    else:
        k_c = tile(k, b, h * Hk // Hs, Hk, K, row, T, C, 0, KP)
        L = strength * pairs(k_c, k_c, G, C, GATE, True, OT, DT, PRECISION)
    inv = unit_inverse(L, C, DT, PRECISION)
    put(inverse, inv, b, h, Hs, C, row, T, C, 0, C)
    inv = inv * tl.trans(strength)
    for e in range(0, V, BV):
        values = tile(v, b, h * Hv // Hs, Hv, V, row, T, C, e, BV)
        put(x, product(inv, values, OT, DT, PRECISION), b, h, Hs, V, row, T, C, e, BV)
    k_c = tile(k, b, h * Hk // Hs, Hk, K, row, T, C, 0, KP)  # (again: it would take registers while L is solved)
    if GATE == 1:
        inv = inv * tl.trans(tl.exp(G.to(DT)))
    if GATE == 2:
        k_c = k_c * tl.exp(clock_tile(clock, b, h, Hs, K, row, T, C, 0, KP).to(DT))
    put(w, product(inv, k_c, OT, DT, PRECISION), b, h, Hs, K, row, T, C, 0, KP)


@triton.jit
def solve_backward_kernel(
    k, v, beta, clock, stored, inverse, w, x, grad_w, grad_x, grad_k, grad_v, grad_beta, grad_stored, grad_clock, T,
    Hk: tl.constexpr, Hv: tl.constexpr, Hs: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr,
    VP: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, OT: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients through the solve; those of k and G are added to what the other kernels left there."""
    chunks = tl.cdiv(T, C)
    n, row = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks * C
    b, h = n // Hs, n % Hs
    k_c = tile(k, b, h * Hk // Hs, Hk, K, row, T, C, 0, KP)
    strength = tile(beta, b, h, Hs, 1, row, T, C, 0, 1).to(DT)
    inv = tl.trans(tile_pairs(inverse, b, h, Hs, row, T, C))
    dy = product(inv, tile(grad_w, b, h, Hs, K, row, T, C, 0, KP), OT, DT, PRECISION)
    P = product(dy, tl.trans(tile(w, b, h, Hs, K, row, T, C, 0, KP)), OT, DT, PRECISION)
    G = 0.0
    if GATE == 1:
        G = clock_tile(clock, b, h, Hs, 1, row, T, C, 0, 1)
        dy = dy * tl.exp(G.to(DT))
    if GATE == 2:
        dy = dy * tl.exp(clock_tile(clock, b, h, Hs, K, row, T, C, 0, KP).to(DT))
    of_k = tl.sum(dy * k_c, axis=1)
    of_v = tl.zeros((C,), DT)
    for e in range(0, V, BV):
        dz = product(inv, tile(grad_x, b, h, Hs, V, row, T, C, e, BV), OT, DT, PRECISION)
        P += product(dz, tl.trans(tile(x, b, h, Hs, V, row, T, C, e, BV)), OT, DT, PRECISION)
        of_v += tl.sum(dz * tile(v, b, h * Hv // Hs, Hv, V, row, T, C, e, BV), axis=1)
        put(grad_v, strength * dz, b, h, Hs, V, row, T, C, e, BV)
    i = tl.arange(0, C)
    P = tl.where(i[:, None] > i[None, :], -P, 0.0)  # gradient of L
    dk = strength * dy
    if GATE == 2:
        A = tile_pairs(stored, b, h, Hs, row, T, C).to(DT)
        put(grad_stored, P * strength, b, h, Hs, C, row, T, C, 0, C)
    else:
        decay = weights(G, C, GATE, True, DT)
        A = product(k_c, tl.trans(k_c), OT, DT, PRECISION) * decay
        inner = P * strength * decay
        dk += product(inner, k_c, OT, DT, PRECISION)
        dk += product(tl.trans(inner.to(OT)), k_c, OT, DT, PRECISION)
    P *= A
    put(grad_beta, (of_k + of_v + tl.sum(P, axis=1))[:, None], b, h, Hs, 1, row, T, C, 0, 1)
    put(grad_k, tile(grad_k, b, h, Hs, K, row, T, C, 0, KP).to(DT) + dk, b, h, Hs, K, row, T, C, 0, KP)
    if GATE == 1:
        dG = tile(grad_clock, b, h, Hs, 1, row, T, C, 0, 1).to(DT) + strength * of_k[:, None]
        P *= strength
        dG += (tl.sum(P, axis=1) - tl.sum(P, axis=0))[:, None]  # k by its two gradients through the pairs
        put(grad_clock, dG, b, h, Hs, 1, row, T, C, 0, 1)
    if GATE == 2:
        dG = tile(grad_clock, b, h, Hs, K, row, T, C, 0, KP).to(DT) + k_c * dk
        put(grad_clock, dG, b, h, Hs, K, row, T, C, 0, KP)


class Delta(torch.autograd.Function):
    """Keeps its inputs, the clock, the solved chunks and the state before each."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor,
        c: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        B, T = q.shape[:2]
        clock = clock_of(log_decay, c)
        between = stored_pairs(k, k, clock, c, strict=True)
        inverse, w, x = (state.new_empty(B, T, c["Hs"], n, dtype=c["dtype"]) for n in (c["C"], c["K"], c["V"]))
        rows = B * c["Hs"] * triton.cdiv(T, c["C"])
        launch(solve_kernel, rows, c, k, v, beta, clock, between, inverse, w, x, T)
        keep = any(ctx.needs_input_grad)
        o, final, states, u, stored = triton_decayed.forward(q, k, v, x, w, clock, state, c, keep)
        ctx.save_for_backward(q, k, v, beta, clock, between, inverse, w, x, states, u, stored)
        ctx.constants = c
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor, grad_final: Tensor) -> tuple:
        q, k, v, beta, clock, between, inverse, w, x, states, u, stored = ctx.saved_tensors
        c = ctx.constants
        dq, dk, dx, dw, dclock, dstate = triton_decayed.backward(
            q, k, v, u, w, clock, stored, states, grad_o, grad_final, c
        )
        dv, dbeta = torch.empty_like(dx), torch.empty_like(beta)
        between_grad = None if between is None else torch.empty_like(between)
        rows = q.shape[0] * c["Hs"] * triton.cdiv(q.shape[1], c["C"])
        launch(
            solve_backward_kernel, rows, c, k, v, beta, clock, between, inverse, w, x, dw, dx, dk, dv, dbeta,
            between_grad, dclock, q.shape[1],
        )  # fmt: skip
        if between is not None:
            pairs_backward(k, k, clock, between_grad, None, dk, dclock, c, strict=True)
        gate = None if dclock is None else gates_gradient(dclock, c)
        return shared(dq, q), shared(dk, k), shared(dv, v), dbeta, gate, dstate, None


def run(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the delta rule; the protocol of the package's docstring."""
    c = constants(q, k, v, log_decay, state, chunk_size)
    return Delta.apply(*contiguous(q, k, v, beta, log_decay, state), c)
