# pyright: reportArgumentType=false, reportCallIssue=false
"""What every Triton kernel of the recurrence is made of: tiles of [B, T, H, W] tensors, products, decayed pairs.

A chunk is C tokens of one head. Its clock G is the log decay summed from the chunk's start, inclusive: nothing at all,
a column per head, or one per key channel (GATE 0, 1, 2). It is float64, or float32 where the inputs are bfloat16.

Types: DT is the state's (sums, exponents), OT what products take (bfloat16 where all inputs are, else DT).
"""

import triton
import triton.language as tl

NEVER = -100.0  # a factor of exp(-100) is 0 in float32: float32 clocks count no further, so that their sums stay sharp


@triton.jit
def tile(x, b, h, H: tl.constexpr, width: tl.constexpr, row, T, C: tl.constexpr, start, W: tl.constexpr):
    """Load [C, W] of x [B, T, H, width] from token `row` and channel `start` on; zeros beyond either end."""
    i = tl.arange(0, C)[:, None]
    d = start + tl.arange(0, W)[None, :]
    there = row + i < T
    if width % W != 0:
        there = there & (d < width)
    return tl.load(x + ((b * T + row) * H + h) * width + i * (H * width) + d, mask=there, other=0.0)


@triton.jit
def put(x, value, b, h, H: tl.constexpr, width: tl.constexpr, row, T, C: tl.constexpr, start, W: tl.constexpr):
    """Store what `tile` would load."""
    i = tl.arange(0, C)[:, None]
    d = start + tl.arange(0, W)[None, :]
    there = row + i < T
    if width % W != 0:
        there = there & (d < width)
    place = x + ((b * T + row) * H + h) * width + i * (H * width) + d
    tl.store(place, value.to(x.dtype.element_ty), mask=there)


@triton.jit
def clock_tile(
    clock, b, h, H: tl.constexpr, width: tl.constexpr, row, T, C: tl.constexpr, start, W: tl.constexpr
):  # fmt: skip
    """Load the clock; tokens beyond the end keep the time of the last one, so that no difference is positive."""
    i = tl.minimum(row + tl.arange(0, C), T - 1)[:, None]
    d = start + tl.arange(0, W)[None, :]
    place = clock + (b * T * H + h) * width + i.to(tl.int64) * (H * width) + d
    if width % W != 0:
        return tl.load(place, mask=(d < width) & (i >= 0), other=0.0)
    else:
        return tl.load(place)


@triton.jit
def state_tile(x, place, K: tl.constexpr, V: tl.constexpr, d, BK: tl.constexpr, e, BV: tl.constexpr):
    """Load [BK, BV] of the matrix number `place` of x [.., K, V]; zeros beyond."""
    d = d + tl.arange(0, BK)[:, None]
    e = e + tl.arange(0, BV)[None, :]
    return tl.load(x + place * (K * V) + d * V + e, mask=(d < K) & (e < V), other=0.0)


@triton.jit
def put_state(x, value, place, K: tl.constexpr, V: tl.constexpr, d, BK: tl.constexpr, e, BV: tl.constexpr):
    d = d + tl.arange(0, BK)[:, None]
    e = e + tl.arange(0, BV)[None, :]
    tl.store(x + place * (K * V) + d * V + e, value.to(x.dtype.element_ty), mask=(d < K) & (e < V))


@triton.jit
def product(a, b, OT: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(OT), b.to(OT), input_precision=PRECISION, out_dtype=DT)


@triton.jit
def pairs(
    x, k, G, C: tl.constexpr, GATE: tl.constexpr, STRICT: tl.constexpr, OT: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[C, C]: x_i k_j e^(G_i - G_j) for j <= i (j < i if STRICT), else 0; one decay per head or none."""
    return product(x, tl.trans(k), OT, DT, PRECISION) * weights(G, C, GATE, STRICT, DT)


@triton.jit
def weights(G, C: tl.constexpr, GATE: tl.constexpr, STRICT: tl.constexpr, DT: tl.constexpr):
    """[C, C]: e^(G_i - G_j) for j <= i (j < i if STRICT), else 0."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    past = (j < i) if STRICT else (j <= i)
    if GATE == 1:
        return tl.exp(tl.where(past, (G - tl.trans(G)).to(DT), float("-inf")))
    else:
        return tl.where(past, 1.0, 0.0).to(DT)


@triton.jit
def tile_pairs(x, b, h, H: tl.constexpr, row, T, C: tl.constexpr):
    """Load [C, C] pairs of one chunk, kept as [B, T, H, C]."""
    return tile(x, b, h, H, C, row, T, C, 0, C)


@triton.jit
def clock_kernel(
    gates, sums, T, floor, W: tl.constexpr, C: tl.constexpr, BW: tl.constexpr, BACKWARD: tl.constexpr
):  # fmt: skip
    """Sum [B, T, W] over each chunk's tokens, from its start or (BACKWARD) from its end; nothing under `floor`."""
    chunks = tl.cdiv(T, C)
    b, row = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks * C
    x = tile(gates, b, 0, 1, W, row, T, C, tl.program_id(1) * BW, BW)
    if not BACKWARD:
        x = tl.maximum(x, floor)
    x = x.to(sums.dtype.element_ty)
    put(sums, tl.cumsum(x, axis=0, reverse=BACKWARD), b, 0, 1, W, row, T, C, tl.program_id(1) * BW, BW)
