# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
"""Triton kernels that the decayed and the delta family share: states, outputs, and their gradients.

A chunk of C tokens with clock G (`triton_tiles`), writes U and the state S before it:
`O = (Q e^G) S + A U`, A = Tril(Q K^T e^(G_i - G_j)); `S <- e^(G_last) S + (K e^(G_last - G))^T U`. For the delta rule
U = X - W S (`triton_delta` solves for W and X), else U = V. With a decay per key channel A comes from memory
(`triton_channel`), else it is formed where it is needed.

Every tensor of tokens is [B, T, H, W] as the user gave it, contiguous. Hs states; R query heads read one.
Names: `n` a state, `c` a chunk, `i` tokens of the chunk, `d` key channels, `e` value channels. KP is K rounded up to a
power of two.
"""

import triton
import triton.language as tl

from lineament.ops.recurrence.triton_tiles import (
    clock_tile,
    pairs,
    product,
    put,
    put_state,
    state_tile,
    tile,
    tile_pairs,
    weights,
)


@triton.jit
def output_tile(
    Q, K_c, U, S, G, stored, b, h, H: tl.constexpr, row, T, C: tl.constexpr, GATE: tl.constexpr, OT: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return [C, BV] of O."""
    if GATE == 2:  # noqa: SIM108 (a kernel's branches are compiled one at a time)
        A = tile_pairs(stored, b, h, H, row, T, C)
    else:
        A = pairs(Q, K_c, G, C, GATE, False, OT, DT, PRECISION)
    if GATE == 2:
        Q = Q * tl.exp(G.to(DT))
    O = product(Q, S, OT, DT, PRECISION)  # noqa: E741
    if GATE == 1:  # (a row of Q S: cheaper than a row of Q, which the product takes as it lies in memory)
        O = O * tl.exp(G.to(DT))  # noqa: E741
    return O + product(A, U, OT, DT, PRECISION)


@triton.jit
def states_kernel(
    q, k, v, w, clock, stored, start, states, writes, o, final, T, Hq: tl.constexpr, Hk: tl.constexpr,
    Hu: tl.constexpr, Hs: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr, SAVE: tl.constexpr, OUT: tl.constexpr,
    OT: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From left to right, a block of key and value channels of one state.

    SAVE keeps the state before each chunk and (DELTA) what it writes, OUT gives its outputs. DELTA and OUT take all
    key channels (BK = KP).
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    e, d, n = tl.program_id(0) % blocks * BV, tl.program_id(1) * BK, (tl.program_id(0) // blocks).to(tl.int64)
    b, h = n // Hs, n % Hs
    chunks = tl.cdiv(T, C)
    S = state_tile(start, n, K, V, d, BK, e, BV).to(DT)
    for c in range(chunks):
        row = c * C
        if SAVE:
            put_state(states, S, n * chunks + c, K, V, d, BK, e, BV)
        U = tile(v, b, h * Hu // Hs, Hu, V, row, T, C, e, BV)
        if DELTA:
            U = U.to(DT) - product(tile(w, b, h, Hs, K, row, T, C, 0, BK), S, OT, DT, PRECISION)
            if SAVE:
                put(writes, U, b, h, Hs, V, row, T, C, e, BV)
        K_c = tile(k, b, h * Hk // Hs, Hk, K, row, T, C, d, BK)
        G = 0.0
        if GATE == 1:
            G = clock_tile(clock, b, h, Hs, 1, row, T, C, 0, 1)
        if GATE == 2:
            G = clock_tile(clock, b, h, Hs, K, row, T, C, d, BK)
        if OUT:
            for r in range(R):
                head = h * R + r
                Q = tile(q, b, head * Hq // (Hs * R), Hq, K, row, T, C, 0, BK)
                O = output_tile(Q, K_c, U, S, G, stored, b, head, Hs * R, row, T, C, GATE, OT, DT, PRECISION)  # noqa: E741
                put(o, O, b, head, Hs * R, V, row, T, C, e, BV)
        if GATE == 1:
            last = clock_tile(clock, b, h, Hs, 1, row + C - 1, T, 1, 0, 1)
            S = S * tl.exp(last.to(DT))
            U = U * tl.exp((last - G).to(DT))
        if GATE == 2:
            last = clock_tile(clock, b, h, Hs, K, row + C - 1, T, 1, d, BK)
            S = S * tl.trans(tl.exp(last.to(DT)))
            K_c = (K_c * tl.exp((last - G).to(DT))).to(OT)
        S += product(tl.trans(K_c), U, OT, DT, PRECISION)
    put_state(final, S, n, K, V, d, BK, e, BV)


@triton.jit
def outputs_kernel(
    q, k, u, clock, stored, states, o, T, Hq: tl.constexpr, Hk: tl.constexpr, Hu: tl.constexpr, Hs: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, OT: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a chunk of a query head and a block of value channels."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    chunks = tl.cdiv(T, C)
    e, c = tl.program_id(0) % blocks * BV, tl.program_id(0) // blocks % chunks
    n = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    b, head = n // (Hs * R), n % (Hs * R)
    h, row = head // R, c * C
    G = 0.0
    if GATE == 1:
        G = clock_tile(clock, b, h, Hs, 1, row, T, C, 0, 1)
    if GATE == 2:
        G = clock_tile(clock, b, h, Hs, K, row, T, C, 0, KP)
    Q = tile(q, b, head * Hq // (Hs * R), Hq, K, row, T, C, 0, KP)
    K_c = tile(k, b, h * Hk // Hs, Hk, K, row, T, C, 0, KP)
    U = tile(u, b, h * Hu // Hs, Hu, V, row, T, C, e, BV)
    S = state_tile(states, (b * Hs + h) * chunks + c, K, V, 0, KP, e, BV)
    O = output_tile(Q, K_c, U, S, G, stored, b, head, Hs * R, row, T, C, GATE, OT, DT, PRECISION)  # noqa: E741
    put(o, O, b, head, Hs * R, V, row, T, C, e, BV)


@triton.jit
def writes_gradient(
    q, k, clock, stored, grad_o, G, K_c, b, h, row, T, e, Hq: tl.constexpr, Hs: tl.constexpr, R: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    OT: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return [C, BV]: A^T dO, summed over the query heads, the part of dU that a chunk's own outputs send back."""
    grad = tl.zeros((C, BV), DT)
    for r in range(R):
        head = h * R + r
        if GATE == 2:
            A = tile_pairs(stored, b, head, Hs * R, row, T, C)
        else:
            Q = tile(q, b, head * Hq // (Hs * R), Hq, K, row, T, C, 0, KP)
            A = pairs(Q, K_c, G, C, GATE, False, OT, DT, PRECISION)
        grad_out = tile(grad_o, b, head, Hs * R, V, row, T, C, e, BV)
        grad += product(tl.trans(A.to(OT)), grad_out, OT, DT, PRECISION)
    return grad


@triton.jit
def own_writes_backward_kernel(
    q, k, clock, stored, grad_o, grad_u, T, Hq: tl.constexpr, Hk: tl.constexpr, Hs: tl.constexpr, R: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    OT: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a chunk of a state and a block of value channels (delta rule, before the walk from right to left)."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    chunks = tl.cdiv(T, C)
    e, c = tl.program_id(0) % blocks * BV, tl.program_id(0) // blocks % chunks
    n = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    b, h, row = n // Hs, n % Hs, c * C
    G = 0.0
    if GATE == 1:
        G = clock_tile(clock, b, h, Hs, 1, row, T, C, 0, 1)
    K_c = tile(k, b, h * Hk // Hs, Hk, K, row, T, C, 0, KP)
    grad = writes_gradient(
        q, k, clock, stored, grad_o, G, K_c, b, h, row, T, e, Hq, Hs, R, K, V, KP, C, BV, GATE, OT, DT, PRECISION
    )
    put(grad_u, grad, b, h, Hs, V, row, T, C, e, BV)


@triton.jit
def states_backward_kernel(
    q, k, w, clock, grad_o, grad_final, grad_states, grad_u, grad_start, T, Hq: tl.constexpr, Hk: tl.constexpr,
    Hs: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr, OT: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """From right to left: keep the gradient of the state behind each chunk, and (delta) finish that of its writes."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    e, d, n = tl.program_id(0) % blocks * BV, tl.program_id(1) * BK, (tl.program_id(0) // blocks).to(tl.int64)
    b, h = n // Hs, n % Hs
    chunks = tl.cdiv(T, C)
    D = state_tile(grad_final, n, K, V, d, BK, e, BV).to(DT)
    for back in range(chunks):
        c = chunks - 1 - back
        row = c * C
        put_state(grad_states, D, n * chunks + c, K, V, d, BK, e, BV)
        if GATE == 1:
            G = clock_tile(clock, b, h, Hs, 1, row, T, C, 0, 1)
            last = clock_tile(clock, b, h, Hs, 1, row + C - 1, T, 1, 0, 1)
        if GATE == 2:
            G = clock_tile(clock, b, h, Hs, K, row, T, C, d, BK)
            last = clock_tile(clock, b, h, Hs, K, row + C - 1, T, 1, d, BK)
        if DELTA:
            K_c = tile(k, b, h * Hk // Hs, Hk, K, row, T, C, 0, BK)
            if GATE == 2:
                K_c = K_c * tl.exp((last - G).to(DT))
            grad = product(K_c, D, OT, DT, PRECISION)
            if GATE == 1:
                grad = grad * tl.exp((last - G).to(DT))
            grad += tile(grad_u, b, h, Hs, V, row, T, C, e, BV)
            put(grad_u, grad, b, h, Hs, V, row, T, C, e, BV)
        if GATE == 1:
            D = D * tl.exp(last.to(DT))
        if GATE == 2:
            D = D * tl.trans(tl.exp(last.to(DT)))
        for r in range(R):
            head = h * R + r
            Q = tile(q, b, head * Hq // (Hs * R), Hq, K, row, T, C, d, BK)
            grad_out = tile(grad_o, b, head, Hs * R, V, row, T, C, e, BV)
            if GATE == 1:
                grad_out = grad_out * tl.exp(G.to(DT))
            if GATE == 2:
                Q = (Q * tl.exp(G.to(DT))).to(OT)
            D += product(tl.trans(Q), grad_out, OT, DT, PRECISION)
        if DELTA:
            D -= product(tl.trans(tile(w, b, h, Hs, K, row, T, C, 0, BK)), grad, OT, DT, PRECISION)
    put_state(grad_start, D, n, K, V, d, BK, e, BV)


@triton.jit
def inputs_backward_kernel(
    q, k, u, clock, stored, states, grad_o, grad_states, grad_u, grad_q, grad_k, grad_w, grad_stored, grad_clock, T,
    Hq: tl.constexpr, Hk: tl.constexpr, Hu: tl.constexpr, Hs: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    DELTA: tl.constexpr, OT: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a chunk of a state: gradients of q, k, w (delta) or v, and of G, which is q dq - k dk by channels.

    With a decay per channel the pairs' part is left to `triton_channel`: their gradient goes to grad_stored.
    """
    chunks = tl.cdiv(T, C)
    n = (tl.program_id(0) // chunks).to(tl.int64)
    b, h, c = n // Hs, n % Hs, tl.program_id(0) % chunks
    row = c * C
    K_c = tile(k, b, h * Hk // Hs, Hk, K, row, T, C, 0, KP)
    G = 0.0
    left = K_c
    if GATE == 1:
        G = clock_tile(clock, b, h, Hs, 1, row, T, C, 0, 1)
        last = clock_tile(clock, b, h, Hs, 1, row + C - 1, T, 1, 0, 1)
    if GATE == 2:
        G = clock_tile(clock, b, h, Hs, K, row, T, C, 0, KP)
        last = clock_tile(clock, b, h, Hs, K, row + C - 1, T, 1, 0, KP)
    if GATE == 2:
        left = (K_c * tl.exp((last - G).to(DT))).to(OT)
    dk = tl.zeros((C, KP), DT)
    dw = tl.zeros((C, KP), DT)
    kept = tl.zeros((KP,), DT)
    for e in range(0, V, BV):
        D = state_tile(grad_states, n * chunks + c, K, V, 0, KP, e, BV)
        dk += product(tile(u, b, h * Hu // Hs, Hu, V, row, T, C, e, BV), tl.trans(D), OT, DT, PRECISION)
        if GATE != 0 or DELTA:
            S = state_tile(states, n * chunks + c, K, V, 0, KP, e, BV)
        if GATE != 0:
            kept += tl.sum(S.to(DT) * D.to(DT), axis=1)
        if DELTA:
            dw -= product(tile(grad_u, b, h, Hs, V, row, T, C, e, BV), tl.trans(S), OT, DT, PRECISION)
        else:
            grad = product(left, D, OT, DT, PRECISION)
            if GATE == 1:
                grad = grad * tl.exp((last - G).to(DT))
            grad += writes_gradient(
                q, k, clock, stored, grad_o, G, K_c, b, h, row, T, e, Hq, Hs, R, K, V, KP, C, BV, GATE, OT, DT,
                PRECISION,
            )  # fmt: skip
            put(grad_u, grad, b, h, Hs, V, row, T, C, e, BV)
    if DELTA:
        put(grad_w, dw, b, h, Hs, K, row, T, C, 0, KP)
    dG = tl.zeros((C, KP), DT)
    if GATE != 0:
        dk = dk * tl.exp((last - G).to(DT))
        held = tl.sum(dk * K_c, axis=0) + kept * tl.sum(tl.exp(last.to(DT)) + tl.zeros((1, KP), DT), axis=0)
        at_last = tl.minimum(row + tl.arange(0, C), T - 1) == tl.minimum(row + C, T) - 1
        at_last = at_last & (row + tl.arange(0, C) < T)
        dG = tl.where(at_last[:, None], held[None, :], 0.0)
    for r in range(R):
        head = h * R + r
        Q = tile(q, b, head * Hq // (Hs * R), Hq, K, row, T, C, 0, KP)
        P = tl.zeros((C, C), DT)
        dq = tl.zeros((C, KP), DT)
        for e in range(0, V, BV):
            grad_out = tile(grad_o, b, head, Hs * R, V, row, T, C, e, BV)
            P += product(grad_out, tl.trans(tile(u, b, h * Hu // Hs, Hu, V, row, T, C, e, BV)), OT, DT, PRECISION)
            S = state_tile(states, n * chunks + c, K, V, 0, KP, e, BV)
            dq += product(grad_out, tl.trans(S), OT, DT, PRECISION)
        if GATE != 0:
            dq = dq * tl.exp(G.to(DT))
        if GATE == 2:
            put(grad_stored, P, b, head, Hs * R, C, row, T, C, 0, C)
        else:
            P = P * weights(G, C, GATE, False, DT)
            dq += product(P, K_c, OT, DT, PRECISION)
            dk += product(tl.trans(P.to(OT)), Q, OT, DT, PRECISION)
        if GATE != 0:
            dG += Q * dq
        put(grad_q, dq, b, head, Hs * R, K, row, T, C, 0, KP)
    put(grad_k, dk, b, h, Hs, K, row, T, C, 0, KP)
    if GATE == 1:
        dG -= K_c * dk
        put(grad_clock, tl.sum(dG, axis=1)[:, None], b, h, Hs, 1, row, T, C, 0, 1)
    if GATE == 2:
        put(grad_clock, dG - K_c * dk, b, h, Hs, K, row, T, C, 0, KP)
