"""The walk of `walk.py`, head by head in compiled loops, for no decay and decays per head.

Imported when it is used: numba is an extra. A head's chunk stays in the first caches of a core: C tokens at a time are
copied into padded buffers and multiplied in register tiles (`chunked_tiles`). The system of the delta rule
is solved by substitution, decays between tokens are running products of float64 (no differences of sums), and the
gradient of the log decays is a sum of what lies across each step (no differences at all).
"""

import math

import numpy as np

from lineament.ops.compiled import loop
from lineament.ops.recurrence.chunked_tiles import (
    ADD,
    COLUMNS,
    LOWER,
    RESULT,
    SET,
    SUBTRACT,
    UPPER,
    WHOLE,
    move,
    product,
    solve,
    solve_back,
    transpose,
)  # fmt: skip


@loop
def padded(width):
    """Round a width up to whole tiles."""
    return (width + COLUMNS - 1) // COLUMNS * COLUMNS


@loop
def room(count, rows, columns, like):
    """Return buffers [count, rows, columns and a tile more] of zeros in the dtype of `like`."""
    return np.zeros((count, rows, columns + COLUMNS), dtype=like.dtype)


@loop
def load(x, start, stop, out, rows):
    """Copy tokens start..stop of x [T, W], and zeros behind them."""
    for i in range(rows):
        if start + i < stop:
            move(x, start + i, out, i, x.shape[1], 0)
        else:
            out[i, :] = 0


@loop
def store(x, start, stop, out, add):
    """Write, or add, rows to tokens start..stop of out [T, W]."""
    for i in range(stop - start):
        move(x, i, out, start + i, out.shape[1], add)


@loop
def load_gates(gate, start, stop, size, weight, read):
    """Fill weight_ij = e^{G_i - G_j} for j <= i (zeros beyond it are there) and read_i = e^{G_i}."""
    between, since = np.zeros(size), 1.0
    for i in range(size):
        factor = math.exp(np.float64(gate[start + i])) if start + i < min(stop, gate.shape[0]) else 1.0
        since *= factor
        read[i] = since
        for j in range(i):
            between[j] *= factor
        between[i] = 1.0
        for j in range(i + 1):
            weight[i, j] = between[j]


@loop
def scale(x, factor, out, rows, columns):
    """Multiply every row with its factor."""
    for i in range(rows):
        for c in range(columns):
            out[i, c] = x[i, c] * factor[i]


@loop
def scale_(x, factor, rows, columns):
    """Multiply every row with its factor, in place: `scale` onto itself would not be vectorised."""
    for i in range(rows):
        for c in range(columns):
            x[i, c] *= factor[i]


@loop
def weigh(pairs, weight, size, strict):
    """Weigh pairs of tokens; nothing is left above the diagonal, nor on it if strict."""
    for i in range(size):
        for j in range(size):
            pairs[i, j] *= weight[i, j]
        if strict:
            pairs[i, i] = 0


@loop
def write_chunk(k, kt, kk, weight, read, scaled, beta, x, new, state, size, K, V):
    """Solve the delta rule of a chunk: x [C, V] holds v and becomes what each token found wrong, new what it writes."""
    product(k, kt, kk, size, K, size, SET, RESULT)
    weigh(kk, weight, size, True)
    scale(k, read, scaled, size, K)
    product(scaled, state, x, size, K, V, SUBTRACT, WHOLE)
    solve(kk, x, size, V, beta, new)


@loop
def advance(k, weight, last, scaled, new, state, size, K, V):
    """Turn the state before a chunk into the one behind it."""
    scale(k, weight[size - 1], scaled, size, K)
    for i in range(K):
        for c in range(V):
            state[i, c] *= last
    product(scaled.T, new, state, K, size, V, ADD, WHOLE)


def forward(q, k, v, beta, gate, states, o, size, panel, first, last):
    """Fill o and states ([1 or panels + 1, B, Hs, K, V], the first given) for the heads first..last of B Hs.

    q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V], o [B, T, max(Hq, Hs), V]; beta and gate [B, T, Hs], or no heads.
    """
    T, heads, K, V = q.shape[1], states.shape[2], padded(k.shape[3]), padded(v.shape[3])
    reads, keep, delta, gated = o.shape[2] // heads, states.shape[0] > 1, beta.shape[2] > 0, gate.shape[2] > 0
    wide, tall, square = room(3, size, K, states), room(3, size, V, states), room(3, size, size, states)
    queries, keys, scaled = wide[0], wide[1], wide[2]
    x, new, out = tall[0], tall[1], tall[2]
    kk, qk, weight = square[0], square[1], square[2]
    kt, state = room(1, K, size, states)[0], room(1, K, V, states)[0]
    read, strength, no_gate = np.ones(size, states.dtype), np.zeros(size, states.dtype), np.zeros(0, states.dtype)
    load_gates(no_gate, 0, 0, size, weight, read)
    for task in range(first, last):
        b, h = task // heads, task % heads
        key, value = k[b, :, h * k.shape[2] // heads], v[b, :, h * v.shape[2] // heads]
        load(states[0, b, h], 0, k.shape[3], state, K)
        for start in range(0, T, size):
            stop = min(start + size, T)
            load(key, start, stop, keys, size)
            load(value, start, stop, x, size)
            transpose(keys, kt, size, K)
            if gated:
                load_gates(gate[b, :, h], start, stop, size, weight, read)
            if delta:
                for i in range(size):
                    strength[i] = beta[b, start + i, h] if start + i < stop else 0
                write_chunk(keys, kt, kk, weight, read, scaled, strength, x, new, state, size, K, V)
            written = new if delta else x
            for r in range(reads):
                at = h * reads + r
                load(q[b, :, at * q.shape[2] // o.shape[2]], start, stop, queries, size)
                product(queries, kt, qk, size, K, size, SET, RESULT)
                weigh(qk, weight, size, False)
                product(qk, written, out, size, size, V, SET, LOWER)
                scale_(queries, read, size, K)
                product(queries, state, out, size, K, V, ADD, WHOLE)
                store(out, start, stop, o[b, :, at], False)
            advance(keys, weight, read[size - 1], scaled, written, state, size, K, V)
            if stop == T or (keep and stop % panel == 0):
                store(state, 0, k.shape[3], states[(stop + panel - 1) // panel if keep else 0, b, h], False)


@loop
def dots(a, b, out, rows, columns, sign):
    """Add the products of rows of a and b, with a sign, to out [rows]."""
    for i in range(rows):
        total = a.dtype.type(0)
        for c in range(columns):
            total += a[i, c] * b[i, c]
        out[i] += sign * total


@loop
def across(reads, writes, pairs, last, size, out):
    """Fill out_t with all that step t's decay stands before: reads at or after t, writes before it, pairs over it."""
    later, beyond = np.zeros(size), 0.0
    for t in range(size - 1, -1, -1):
        beyond += reads[t]
        out[t] = beyond + last
        for j in range(t):
            later[j] += pairs[t, j]
            out[t] += later[j] + writes[j]


@loop
def multiply_pairs(dpairs, pairs, weight, size, strict, total):
    """Add dpairs * pairs to total and weigh dpairs; nothing is left above the diagonal, nor on it if strict."""
    for i in range(size):
        for j in range(i):
            total[i, j] += dpairs[i, j] * pairs[i, j]
    weigh(dpairs, weight, size, strict)


def backward(q, k, v, beta, gate, states, do, grad, dq, dk, dv, dbeta, dgate, size, panel, first, last):
    """Fill the gradients of the inputs, and turn `grad` [B, Hs, K, V], of the last state, into that of the first.

    As `forward`, with the states of every panel; `do` like o. Heads that share a row must be in one range first..last.
    """
    T, heads, K, V = q.shape[1], states.shape[2], padded(k.shape[3]), padded(v.shape[3])
    reads, delta, gated, count = do.shape[2] // heads, beta.shape[2] > 0, gate.shape[2] > 0, panel // size
    wide, tall, square = room(5, size, K, states), room(3, size, V, states), room(3, size, size, states)
    queries, grad_q, grad_k, grad_row, scaled = wide[0], wide[1], wide[2], wide[3], wide[4]
    grad_o, grad_new, grad_x = tall[0], tall[1], tall[2]
    qk, dqk, pairs = square[0], square[1], square[2]
    keys, x, new, kt = (room(count, size, K, states), room(count, size, V, states), room(count, size, V, states),
                        room(count, K, size, states))  # fmt: skip
    kk, weight, state = room(count, size, size, states), room(count, size, size, states), room(count, K, V, states)
    newt, statet, after, aftert = (room(1, V, size, states)[0], room(1, V, K, states)[0], room(1, K, V, states)[0],
                                   room(1, V, K, states)[0])  # fmt: skip
    read, strength = np.ones((count, size), states.dtype), np.zeros((count, size), states.dtype)
    reading, writing, result = np.zeros(size), np.zeros(size), np.zeros(size)
    no_gate = np.zeros(0, states.dtype)
    for p in range(count):
        load_gates(no_gate, 0, 0, size, weight[p], read[p])
    for task in range(first, last):
        b, h = task // heads, task % heads
        kh, vh = h * k.shape[2] // heads, h * v.shape[2] // heads
        add_k, add_v = h * k.shape[2] % heads > 0, h * v.shape[2] % heads > 0
        load(grad[b, h], 0, k.shape[3], after, K)
        for start in range((T - 1) // panel * panel, -1, -panel):
            load(states[start // panel, b, h], 0, k.shape[3], state[0], K)
            used = min(count, (T - start + size - 1) // size)
            for p in range(used):
                begin = start + p * size
                stop = min(begin + size, T)
                load(k[b, :, kh], begin, stop, keys[p], size)
                load(v[b, :, vh], begin, stop, x[p], size)
                transpose(keys[p], kt[p], size, K)
                if gated:
                    load_gates(gate[b, :, h], begin, stop, size, weight[p], read[p])
                if delta:
                    for i in range(size):
                        strength[p, i] = beta[b, begin + i, h] if begin + i < stop else 0
                    write_chunk(keys[p], kt[p], kk[p], weight[p], read[p], scaled, strength[p], x[p], new[p], state[p],
                                size, K, V)  # fmt: skip
                if p + 1 < used:
                    state[p + 1] = state[p]
                    advance(keys[p], weight[p], read[p, size - 1], scaled, new[p] if delta else x[p], state[p + 1],
                            size, K, V)  # fmt: skip
            for p in range(used - 1, -1, -1):
                begin = start + p * size
                stop = min(begin + size, T)
                key, S, written = keys[p], state[p], new[p] if delta else x[p]
                write, decay = weight[p, size - 1], read[p, size - 1]
                pairs[:], reading[:], writing[:], total = 0, 0, 0, 0.0
                transpose(written, newt, size, V)
                transpose(S, statet, K, V)
                transpose(after, aftert, K, V)
                scale(key, write, scaled, size, K)
                product(scaled, after, grad_new, size, K, V, SET, WHOLE)
                product(written, aftert, grad_k, size, V, K, SET, WHOLE)
                scale_(grad_k, write, size, K)
                if gated:
                    dots(key, grad_k, writing, size, K, 1)
                for i in range(K):
                    row = S.dtype.type(0)
                    for c in range(V):
                        after[i, c] *= decay
                        row += after[i, c] * S[i, c]
                    total += row
                for r in range(reads):
                    at = h * reads + r
                    own = at * q.shape[2] // do.shape[2]
                    load(q[b, :, own], begin, stop, queries, size)
                    load(do[b, :, at], begin, stop, grad_o, size)
                    product(queries, kt[p], qk, size, K, size, SET, RESULT)
                    weigh(qk, weight[p], size, False)
                    product(qk.T, grad_o, grad_new, size, size, V, ADD, UPPER)
                    product(grad_o, newt, dqk, size, V, size, SET, RESULT)
                    multiply_pairs(dqk, qk, weight[p], size, False, pairs)
                    product(grad_o, statet, grad_q, size, V, K, SET, WHOLE)
                    scale_(grad_q, read[p], size, K)
                    if gated:
                        dots(queries, grad_q, reading, size, K, 1)
                    product(dqk, key, grad_q, size, size, K, ADD, LOWER)
                    product(dqk.T, queries, grad_k, size, size, K, ADD, UPPER)
                    scale_(queries, read[p], size, K)
                    product(queries.T, grad_o, after, K, size, V, ADD, WHOLE)
                    store(grad_q, begin, stop, dq[b, :, own], at * q.shape[2] % do.shape[2] > 0)
                if delta:
                    solve_back(kk[p], grad_new, size, V, strength[p], grad_x)
                    result[:] = 0
                    dots(grad_new, x[p], result, size, V, 1)
                    for i in range(stop - begin):
                        dbeta[b, begin + i, h] = result[i]
                    product(grad_x, newt, dqk, size, V, size, SET, RESULT)
                    for i in range(size):
                        for j in range(i):
                            dqk[i, j] = -dqk[i, j]
                    multiply_pairs(dqk, kk[p], weight[p], size, True, pairs)
                    product(grad_x, statet, grad_row, size, V, K, SET, WHOLE)
                    scale_(grad_row, read[p], size, K)
                    if gated:
                        dots(key, grad_row, reading, size, K, -1)
                    for i in range(size):
                        for c in range(K):
                            grad_k[i, c] -= grad_row[i, c]
                    product(dqk, key, grad_k, size, size, K, ADD, LOWER)
                    product(dqk.T, key, grad_k, size, size, K, ADD, UPPER)
                    scale(key, read[p], scaled, size, K)
                    product(scaled.T, grad_x, after, K, size, V, SUBTRACT, WHOLE)
                store(grad_k, begin, stop, dk[b, :, kh], add_k)
                store(grad_x if delta else grad_new, begin, stop, dv[b, :, vh], add_v)
                if gated:
                    across(reading, writing, pairs, total, size, result)
                    for i in range(stop - begin):
                        dgate[b, begin + i, h] = result[i]
        store(after, 0, k.shape[3], grad[b, h], False)
