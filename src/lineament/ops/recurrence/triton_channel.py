# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false
"""Decayed pairs where every key channel has its own decay: A_ij = sum_d x_id k_jd e^(G_id - G_jd), and its gradients.

A product of two matrices gives them if the decay is cut in two at one moment: (x e^(G_i - M)) (k e^(M - G_j)), M
halfway through the chunk's decay. Both exponents stay under RANGE / 2 where no channel decays by more than RANGE nats
in a chunk: nothing overflows, and bfloat16 and float32 keep all their digits. Chunks that decay more go sixteen rows at
a time: against all earlier sixteens by one product, cut at the token before the rows (GLA, arXiv:2312.06635, section
4.3); among themselves pair by pair. There every exponent is <= 0.
"""

import triton
import triton.language as tl

from lineament.ops.recurrence.triton_tiles import clock_tile, product, put, tile

RANGE = tl.constexpr(120.0)  # e^60 squared, times sums of bfloat16 numbers, is far from 3e38


@triton.jit
def largest_decay(clock, b, h, Hs: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, start, T, C: tl.constexpr):
    """Return the most nats that any channel decays by between the first and the last token of a chunk."""
    first = clock_tile(clock, b, h, Hs, K, start, T, 1, 0, KP)
    last = clock_tile(clock, b, h, Hs, K, start + C - 1, T, 1, 0, KP)
    return tl.max(tl.max(first - last, axis=1), axis=0)


@triton.jit
def halfway(clock, b, h, Hs: tl.constexpr, K: tl.constexpr, start, T, C: tl.constexpr, d, BK: tl.constexpr):
    """Return [1, BK]: the mean of the clock at a chunk's ends."""
    first = clock_tile(clock, b, h, Hs, K, start, T, 1, d, BK)
    return 0.5 * (first + clock_tile(clock, b, h, Hs, K, start + C - 1, T, 1, d, BK))


@triton.jit
def pairs_kernel(
    x, k, clock, stored, T, Hx: tl.constexpr, Hk: tl.constexpr, Hs: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, STRICT: tl.constexpr, OT: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a chunk of one head of x: the pairs go to stored [B, T, Hs R, C]."""
    chunks = tl.cdiv(T, C)
    n, start = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks * C
    b, head = n // (Hs * R), n % (Hs * R)
    h = head // R
    if largest_decay(clock, b, h, Hs, K, KP, start, T, C) < RANGE:
        A = tl.zeros((C, C), DT)
        for d in range(0, K, BK):
            G = clock_tile(clock, b, h, Hs, K, start, T, C, d, BK)
            gap = (G - halfway(clock, b, h, Hs, K, start, T, C, d, BK)).to(DT)
            left = tile(x, b, head * Hx // (Hs * R), Hx, K, start, T, C, d, BK) * tl.exp(gap)
            right = tile(k, b, h * Hk // Hs, Hk, K, start, T, C, d, BK) * tl.exp(-gap)
            A += product(left, tl.trans(right.to(OT)), OT, DT, PRECISION)
        i = tl.arange(0, C)[:, None]
        j = tl.arange(0, C)[None, :]
        past = (j < i) if STRICT else (j <= i)
        put(stored, tl.where(past, A, 0.0), b, head, Hs * R, C, start, T, C, 0, C)
    else:
        for before in range(0, C, ROWS):
            rows_of_pairs(
                x, k, clock, stored, b, head, h, start, before, T, Hx, Hk, Hs, R, K, KP, C, ROWS, STRICT, OT, DT,
                PRECISION,
            )  # fmt: skip


@triton.jit
def rows_of_pairs(
    x, k, clock, stored, b, head, h, start, before, T, Hx: tl.constexpr, Hk: tl.constexpr, Hs: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, STRICT: tl.constexpr,
    OT: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store ROWS rows of a chunk's pairs, from token `before` of the chunk on, for decays of any size."""
    BK: tl.constexpr = 16
    row = start + before
    i = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, ROWS)[None, :]
    past = (j < i) if STRICT else (j <= i)
    columns = tl.arange(0, C)
    far = tl.zeros((ROWS, C), DT)
    near = tl.zeros((ROWS, ROWS), DT)
    for d in range(0, K, BK):
        X = tile(x, b, head * Hx // (Hs * R), Hx, K, row, T, ROWS, d, BK).to(DT)
        G = clock_tile(clock, b, h, Hs, K, row, T, ROWS, d, BK)
        if C > ROWS:
            cut = clock_tile(clock, b, h, Hs, K, tl.maximum(row - 1, start), T, 1, d, BK)
            G_c = clock_tile(clock, b, h, Hs, K, start, T, C, d, BK)
            right = tl.exp(tl.where((columns < before)[:, None], (cut - G_c).to(DT), float("-inf")))
            right *= tile(k, b, h * Hk // Hs, Hk, K, start, T, C, d, BK)
            left = X * tl.exp(tl.where(before > 0, (G - cut).to(DT), float("-inf")))
            far += product(left, tl.trans(right.to(OT)), OT, DT, PRECISION)
        own = tile(k, b, h * Hk // Hs, Hk, K, row, T, ROWS, d, BK).to(DT)
        gap = tl.where(past[:, :, None], (G[:, None, :] - G[None, :, :]).to(DT), float("-inf"))
        near += tl.sum(X[:, None, :] * own[None, :, :] * tl.exp(gap), axis=2)
    place = stored + ((b * T + row) * (Hs * R) + head) * C + i * (Hs * R * C)
    there = row + i < T
    other = (columns < before) | (columns >= before + ROWS)
    tl.store(place + columns[None, :], far.to(stored.dtype.element_ty), mask=there & other[None, :])
    tl.store(place + before + j, near.to(stored.dtype.element_ty), mask=there)


@triton.jit
def pairs_backward_kernel(
    x, k, clock, grad_stored, grad_x, grad_k, grad_clock, T, Hx: tl.constexpr, Hk: tl.constexpr, Hs: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr,
    STRICT: tl.constexpr, OT: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a chunk of a state: adds to the gradients of x, k and the clock (STRICT: x is k, all to grad_k)."""
    chunks = tl.cdiv(T, C)
    n, start = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks * C
    b, h = n // Hs, n % Hs
    if largest_decay(clock, b, h, Hs, K, KP, start, T, C) < RANGE:
        i = tl.arange(0, C)[:, None]
        j = tl.arange(0, C)[None, :]
        past = (j < i) if STRICT else (j <= i)
        for d in range(0, K, BK):
            G = clock_tile(clock, b, h, Hs, K, start, T, C, d, BK)
            gap = (G - halfway(clock, b, h, Hs, K, start, T, C, d, BK)).to(DT)
            own = tile(k, b, h * Hk // Hs, Hk, K, start, T, C, d, BK)
            right = (own * tl.exp(-gap)).to(OT)
            dk = tl.zeros((C, BK), DT)
            dG = tl.zeros((C, BK), DT)
            for r in range(R):
                head = h * R + r
                X = tile(x, b, head * Hx // (Hs * R), Hx, K, start, T, C, d, BK)
                P = tl.where(past, tile(grad_stored, b, head, Hs * R, C, start, T, C, 0, C), 0.0).to(OT)
                dx = tl.exp(gap) * product(P, right, OT, DT, PRECISION)
                left = (X * tl.exp(gap)).to(OT)
                dk_r = tl.exp(-gap) * product(tl.trans(P), left, OT, DT, PRECISION)
                dG += X * dx - own * dk_r
                dk += dk_r
                if STRICT:
                    dk += dx
                else:
                    dx += tile(grad_x, b, head, Hs * R, K, start, T, C, d, BK)
                    put(grad_x, dx, b, head, Hs * R, K, start, T, C, d, BK)
            dk += tile(grad_k, b, h, Hs, K, start, T, C, d, BK)
            dG += tile(grad_clock, b, h, Hs, K, start, T, C, d, BK)
            put(grad_k, dk, b, h, Hs, K, start, T, C, d, BK)
            put(grad_clock, dG, b, h, Hs, K, start, T, C, d, BK)
    else:
        for before in range(0, C, ROWS):
            rows_of_gradients(
                x, k, clock, grad_stored, grad_x, grad_k, grad_clock, b, h, start, before, T, Hx, Hk, Hs, R, K, KP, C,
                ROWS, STRICT, OT, DT, PRECISION,
            )  # fmt: skip


@triton.jit
def rows_of_gradients(
    x, k, clock, grad_stored, grad_x, grad_k, grad_clock, b, h, start, before, T, Hx: tl.constexpr, Hk: tl.constexpr,
    Hs: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    STRICT: tl.constexpr, OT: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients at ROWS tokens of a chunk, which are the rows of some pairs and the columns of others."""
    BK: tl.constexpr = 16
    row = start + before
    i = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, ROWS)[None, :]
    past = (j < i) if STRICT else (j <= i)
    columns = tl.arange(0, C)
    for d in range(0, K, BK):
        G = clock_tile(clock, b, h, Hs, K, row, T, ROWS, d, BK)
        own = tile(k, b, h * Hk // Hs, Hk, K, row, T, ROWS, d, BK).to(DT)
        decay = tl.exp(tl.where(past[:, :, None], (G[:, None, :] - G[None, :, :]).to(DT), float("-inf")))
        if C > ROWS:
            earlier, later = (columns < before)[:, None], (columns >= before + ROWS)[:, None]
            G_c = clock_tile(clock, b, h, Hs, K, start, T, C, d, BK)
            cut = clock_tile(clock, b, h, Hs, K, tl.maximum(row - 1, start), T, 1, d, BK)
            end = clock_tile(clock, b, h, Hs, K, row + ROWS - 1, T, 1, d, BK)
            right = tl.exp(tl.where(earlier, (cut - G_c).to(DT), float("-inf")))
            right *= tile(k, b, h * Hk // Hs, Hk, K, start, T, C, d, BK)
            behind = tl.exp(tl.where(later, (G_c - end).to(DT), float("-inf")))
            left = tl.exp(tl.where(before > 0, (G - cut).to(DT), float("-inf")))
            until = tl.exp((end - G).to(DT))
        dk = tl.zeros((ROWS, BK), DT)
        dG = tl.zeros((ROWS, BK), DT)
        for r in range(R):
            head = h * R + r
            X = tile(x, b, head * Hx // (Hs * R), Hx, K, row, T, ROWS, d, BK).to(DT)
            P = tile(grad_stored, b, head, Hs * R, C, row, T, ROWS, before, ROWS).to(DT)
            inner = P[:, :, None] * decay
            dx = tl.sum(inner * own[None, :, :], axis=1)
            dk_r = tl.sum(inner * X[:, None, :], axis=0)
            if C > ROWS:
                P = tile(grad_stored, b, head, Hs * R, C, row, T, ROWS, 0, C)
                dx += left * product(P, right, OT, DT, PRECISION)
                P = tile(grad_stored, b, head, Hs * R, C, start, T, C, before, ROWS)
                all_x = behind * tile(x, b, head * Hx // (Hs * R), Hx, K, start, T, C, d, BK)
                dk_r += until * product(tl.trans(P.to(OT)), all_x, OT, DT, PRECISION)
            dG += X * dx - own * dk_r
            dk += dk_r
            if STRICT:
                dk += dx
            else:
                dx += tile(grad_x, b, head, Hs * R, K, row, T, ROWS, d, BK)
                put(grad_x, dx, b, head, Hs * R, K, row, T, ROWS, d, BK)
        dk += tile(grad_k, b, h, Hs, K, row, T, ROWS, d, BK)
        dG += tile(grad_clock, b, h, Hs, K, row, T, ROWS, d, BK)
        put(grad_k, dk, b, h, Hs, K, row, T, ROWS, d, BK)
        put(grad_clock, dG, b, h, Hs, K, row, T, ROWS, d, BK)
