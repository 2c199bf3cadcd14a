# pyright: reportArgumentType=false, reportCallIssue=false
"""Triton kernels that the decayed and the delta family share: states, outputs, and their gradients.

A chunk of C tokens with running log decay G (inclusive, from the chunk's start), writes U and the state S before it:
`O = (Q e^G) S + A U`, A = Tril(Q K^T e^(G_i - G_j)); `S <- e^(G_last) S + (K e^(G_last - G))^T U`. For the delta rule
U = X - W S (`triton_delta` solves for W and X), else U = V. G has one column (a decay per head, or none at all) or one
per key channel; sums come as float64 and are subtracted before exp, so every exponent is <= 0 and exact.

Everything is laid out for them (`triton_decayed.Layout`): N = B Hs rows, T a multiple of C, widths powers of two of at
least 16. So there is no mask but the causal one. Products accumulate in the state's dtype.

Rows times chunks are one axis of the grid, the first: the others end at 65535 programs, fewer than 2048 documents of 32
heads need.

Names: `n` a row, `c` a chunk, `i` tokens of the chunk, `d` key channels, `e` value channels.
"""

import triton
import triton.language as tl


@triton.jit
def tile(base, row, rows: tl.constexpr, start, columns: tl.constexpr, width, DT: tl.constexpr):
    """Load [rows, columns] of a matrix of that width from a token and a column on."""
    place = (row + tl.arange(0, rows))[:, None] * width + start + tl.arange(0, columns)[None, :]
    return tl.load(base + place).to(DT)


@triton.jit
def put(base, value, row, rows: tl.constexpr, start, columns: tl.constexpr, width):
    place = (row + tl.arange(0, rows))[:, None] * width + start + tl.arange(0, columns)[None, :]
    tl.store(base + place, value.to(base.dtype.element_ty))


@triton.jit
def product(a, b, DT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=DT)


@triton.jit
def pairs(x, k, G, C: tl.constexpr, KG: tl.constexpr, STRICT: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):
    """[C, C]: sum_d x_id k_jd e^(G_id - G_jd) for j <= i (j < i if STRICT), else 0."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    past = (j < i) if STRICT else (j <= i)
    if KG == 1:
        gap = tl.where(past, (G - tl.trans(G)).to(DT), float("-inf"))
        result = product(x, tl.trans(k), DT, PRECISION) * tl.exp(gap)
    else:
        gap = tl.where(past[:, :, None], (G[:, None, :] - G[None, :, :]).to(DT), float("-inf"))
        result = tl.sum(x[:, None, :] * k[None, :, :] * tl.exp(gap), axis=2)
    return result


@triton.jit
def pairs_gradients(
    P, x, k, G, C: tl.constexpr, KG: tl.constexpr, STRICT: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr
):
    """Gradients of x and k [C, K] for that of the pairs, P [C, C]."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    past = (j < i) if STRICT else (j <= i)
    if KG == 1:
        inner = P * tl.exp(tl.where(past, (G - tl.trans(G)).to(DT), float("-inf")))
        grad_x = product(inner, k, DT, PRECISION)
        grad_k = product(tl.trans(inner), x, DT, PRECISION)
    else:
        gap = tl.where(past[:, :, None], (G[:, None, :] - G[None, :, :]).to(DT), float("-inf"))
        inner3 = P[:, :, None] * tl.exp(gap)
        grad_x = tl.sum(inner3 * k[None, :, :], axis=1)
        grad_k = tl.sum(inner3 * x[:, None, :], axis=0)
    return grad_x, grad_k


@triton.jit
def states_kernel(
    k, v, w, clock, start, states, writes, final, chunks, K: tl.constexpr, V: tl.constexpr, KG: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a row and block of value channels: keep the state before each chunk, and (delta) what it writes."""
    n = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BV
    S = tile(start + n * K * V, 0, K, e, BV, V, DT)
    for c in range(chunks):
        row = n * chunks * C + c * C
        put(states + (n * chunks + c) * K * V, S, 0, K, e, BV, V)
        U = tile(v, row, C, e, BV, V, DT)
        if DELTA:
            U -= product(tile(w, row, C, 0, K, K, DT), S, DT, PRECISION)
            put(writes, U, row, C, e, BV, V)
        G = tile(clock, row, C, 0, KG, KG, tl.float64)
        last = tile(clock, row + C - 1, 1, 0, KG, KG, tl.float64)
        left = tile(k, row, C, 0, K, K, DT) * tl.exp((last - G).to(DT))
        S = S * tl.trans(tl.exp(last.to(DT))) + product(tl.trans(left), U, DT, PRECISION)
    put(final + n * K * V, S, 0, K, e, BV, V)


@triton.jit
def outputs_kernel(
    q, k, u, clock, states, o, chunks, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KG: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a chunk of a query head (R of them read one state) and a block of value channels."""
    c = tl.program_id(0) % chunks
    h = (tl.program_id(0) // chunks).to(tl.int64)
    e = tl.program_id(1) * BV
    n = h // R
    row, head_row = n * chunks * C + c * C, h * chunks * C + c * C
    G = tile(clock, row, C, 0, KG, KG, tl.float64)
    Q = tile(q, head_row, C, 0, K, K, DT)
    A = pairs(Q, tile(k, row, C, 0, K, K, DT), G, C, KG, False, DT, PRECISION)
    S = tile(states + (n * chunks + c) * K * V, 0, K, e, BV, V, DT)
    O = product(Q * tl.exp(G.to(DT)), S, DT, PRECISION)  # noqa: E741
    O += product(A, tile(u, row, C, e, BV, V, DT), DT, PRECISION)  # noqa: E741
    put(o, O, head_row, C, e, BV, V)


@triton.jit
def states_backward_kernel(
    q, k, w, clock, grad_o, grad_final, grad_states, grad_u, grad_start, chunks, R: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, KG: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """From right to left: keep the gradient of the state behind each chunk, and that of what the chunk writes."""
    n = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BV
    D = tile(grad_final + n * K * V, 0, K, e, BV, V, DT)
    for back in range(chunks):
        c = chunks - 1 - back
        row = n * chunks * C + c * C
        put(grad_states + (n * chunks + c) * K * V, D, 0, K, e, BV, V)
        G = tile(clock, row, C, 0, KG, KG, tl.float64)
        last = tile(clock, row + C - 1, 1, 0, KG, KG, tl.float64)
        k_c = tile(k, row, C, 0, K, K, DT)
        grad = product(k_c * tl.exp((last - G).to(DT)), D, DT, PRECISION)
        D = D * tl.trans(tl.exp(last.to(DT)))
        for r in range(R):
            head_row = (n * R + r) * chunks * C + c * C
            Q = tile(q, head_row, C, 0, K, K, DT)
            grad_out = tile(grad_o, head_row, C, e, BV, V, DT)
            A = pairs(Q, k_c, G, C, KG, False, DT, PRECISION)
            grad += product(tl.trans(A), grad_out, DT, PRECISION)
            D += product(tl.trans(Q * tl.exp(G.to(DT))), grad_out, DT, PRECISION)
        put(grad_u, grad, row, C, e, BV, V)
        if DELTA:
            D -= product(tl.trans(tile(w, row, C, 0, K, K, DT)), grad, DT, PRECISION)
    put(grad_start + n * K * V, D, 0, K, e, BV, V)


@triton.jit
def inputs_backward_kernel(
    q, k, u, clock, states, grad_o, grad_states, grad_u, grad_q, grad_k, grad_w, grad_clock, chunks, R: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, KG: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a chunk of a row: gradients of q, k, w and G. The latter is q dq - k dk, channel by channel."""
    c = tl.program_id(0) % chunks
    n = (tl.program_id(0) // chunks).to(tl.int64)
    row = n * chunks * C + c * C
    S_c, D_c = states + (n * chunks + c) * K * V, grad_states + (n * chunks + c) * K * V
    G = tile(clock, row, C, 0, KG, KG, tl.float64)
    last = tile(clock, row + C - 1, 1, 0, KG, KG, tl.float64)
    k_c = tile(k, row, C, 0, K, K, DT)
    from_end = tl.zeros((C, K), DT)
    from_start = tl.zeros((C, K), DT)
    kept = tl.zeros((K,), DT)
    for e in range(0, V, BV):
        S = tile(S_c, 0, K, e, BV, V, DT)
        D = tile(D_c, 0, K, e, BV, V, DT)
        from_end += product(tile(u, row, C, e, BV, V, DT), tl.trans(D), DT, PRECISION)
        kept += tl.sum(S * D, axis=1)
        if DELTA:
            from_start -= product(tile(grad_u, row, C, e, BV, V, DT), tl.trans(S), DT, PRECISION)
    if DELTA:
        put(grad_w, from_start, row, C, 0, K, K)
    dk = from_end * tl.exp((last - G).to(DT))
    held = tl.sum(dk * k_c, axis=0) + kept * tl.sum(tl.exp(last.to(DT)) + tl.zeros((1, K), DT), axis=0)
    dG = tl.where(tl.arange(0, C)[:, None] == C - 1, held[None, :], 0.0)
    for r in range(R):
        head_row = (n * R + r) * chunks * C + c * C
        Q = tile(q, head_row, C, 0, K, K, DT)
        P = tl.zeros((C, C), DT)
        dq = tl.zeros((C, K), DT)
        for e in range(0, V, BV):
            grad_out = tile(grad_o, head_row, C, e, BV, V, DT)
            P += product(grad_out, tl.trans(tile(u, row, C, e, BV, V, DT)), DT, PRECISION)
            dq += product(grad_out, tl.trans(tile(S_c, 0, K, e, BV, V, DT)), DT, PRECISION)
        inside_q, inside_k = pairs_gradients(P, Q, k_c, G, C, KG, False, DT, PRECISION)
        dq = dq * tl.exp(G.to(DT)) + inside_q
        dk += inside_k
        dG += Q * dq
        put(grad_q, dq, head_row, C, 0, K, K)
    dG -= k_c * dk
    put(grad_k, dk, row, C, 0, K, K)
    if KG == 1:
        put(grad_clock, tl.sum(dG, axis=1)[:, None], row, C, 0, 1, 1)
    else:
        put(grad_clock, dG, row, C, 0, K, K)
