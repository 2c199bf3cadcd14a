"""The walk of `walk.py`, head by head in compiled loops, for no decay and decays per head.

Imported when it is used: numba is an extra. A head's chunk stays in the first caches of a core: C tokens at a time are
copied into padded buffers and multiplied in register tiles (`chunked_tiles`). The system of the delta rule
is solved by substitution, decays between tokens are running products of float64 (no differences of sums), and the
gradient of the log decays is a sum of what lies across each step (no differences at all).
"""

import math
from collections import namedtuple

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
    ask_for,
    move,
    product,
    solve,
    solve_back,
    transpose,
)  # fmt: skip

# of one chunk of C tokens (or of several, one axis more): key [C, K] and its transpose, x [C, V] the values (under the
# delta rule what each token found wrong), new [C, V] what the rule writes, pairs [C, C] its system, weight [C, C] the
# decays between tokens, read [C] those since the start, beta [C], and the state [K, V] it begins with
Chunk = namedtuple("Chunk", "key keyt x new pairs weight read beta state")

# gradients of a chunk's rows, their transposed factors, and what each step's decay stands before
Back = namedtuple(
    "Back", "query q k row scaled o new x qk dqk pairs newt statet after aftert reading writing result"
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
    """Copy tokens start..stop of x [T, W], and zeros behind them and behind their columns up to a whole tile."""
    for i in range(rows):
        if start + i < stop:
            move(x, start + i, out, i, x.shape[1], 0)
            for c in range(x.shape[1], padded(x.shape[1])):  # 0 times an earlier head's NaN is NaN
                out[i, c] = 0
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
def chunks(count, size, K, V, like):
    """Return room for chunks; without gates nothing decays."""
    found = Chunk(room(count, size, K, like), room(count, K, size, like), room(count, size, V, like),
                  room(count, size, V, like), room(count, size, size, like), room(count, size, size, like),
                  np.ones((count, size), like.dtype), np.zeros((count, size), like.dtype),
                  room(count, K, V, like))  # fmt: skip
    for p in range(count):
        load_gates(np.zeros(0, like.dtype), 0, 0, size, found.weight[p], found.read[p])
    return found


@loop
def chunk_at(c, p):
    """Return one of several chunks."""
    return Chunk(c.key[p], c.keyt[p], c.x[p], c.new[p], c.pairs[p], c.weight[p], c.read[p], c.beta[p], c.state[p])


@loop
def scalars(x, b, h):
    """Return a head's numbers [T] of x [B, T, Hs], none where x has no heads."""
    return x[b, : x.shape[1] if x.shape[2] else 0, h]


@loop
def fill(c, key, value, beta, gate, start, stop, scaled, K, V):
    """Read the tokens start..stop of a head and, if it has betas, solve the delta rule of the chunk."""
    size = c.read.size
    load(key, start, stop, c.key, size)
    load(value, start, stop, c.x, size)
    transpose(c.key, c.keyt, size, K)
    if gate.size:
        load_gates(gate, start, stop, size, c.weight, c.read)
    if beta.size:
        for i in range(size):
            c.beta[i] = beta[start + i] if start + i < stop else 0
        product(c.key, c.keyt, c.pairs, size, K, size, SET, RESULT)
        weigh(c.pairs, c.weight, size, True)
        scale(c.key, c.read, scaled, size, K)
        product(scaled, c.state, c.x, size, K, V, SUBTRACT, WHOLE)
        solve(c.pairs, c.x, size, V, c.beta, c.new)


@loop
def advance(c, written, state, scaled, K, V):
    """Turn the state before a chunk into the one behind it."""
    size = c.read.size
    scale(c.key, c.weight[size - 1], scaled, size, K)
    for i in range(K):
        for j in range(V):
            state[i, j] *= c.read[size - 1]
    product(scaled.T, written, state, K, size, V, ADD, WHOLE)


def forward(q, k, v, beta, gate, states, o, size, panel, first, last):
    """Fill o and states ([1 or panels + 1, B, Hs, K, V], the first given) for the heads first..last of B Hs.

    q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V], o [B, T, max(Hq, Hs), V]; beta and gate [B, T, Hs], or no heads.
    """
    T, heads, K, V = q.shape[1], states.shape[2], padded(k.shape[3]), padded(v.shape[3])
    reads, keep, delta = o.shape[2] // heads, states.shape[0] > 1, beta.shape[2] > 0
    c = chunk_at(chunks(1, size, K, V, states), 0)
    wide = room(2, size, K, states)
    queries, scaled = wide[0], wide[1]
    qk, out = room(1, size, size, states)[0], room(1, size, V, states)[0]
    for task in range(first, last):
        b, h = task // heads, task % heads
        key, value = k[b, :, h * k.shape[2] // heads], v[b, :, h * v.shape[2] // heads]
        load(states[0, b, h], 0, k.shape[3], c.state, K)
        for start in range(0, T, size):
            stop = min(start + size, T)
            fill(c, key, value, scalars(beta, b, h), scalars(gate, b, h), start, stop, scaled, K, V)
            ask_for(key, stop, stop + size)
            ask_for(value, stop, stop + size)
            written = c.new if delta else c.x
            for r in range(reads):
                at = h * reads + r
                load(q[b, :, at * q.shape[2] // o.shape[2]], start, stop, queries, size)
                ask_for(q[b, :, at * q.shape[2] // o.shape[2]], stop, stop + size)
                product(queries, c.keyt, qk, size, K, size, SET, RESULT)
                weigh(qk, c.weight, size, False)
                product(qk, written, out, size, size, V, SET, LOWER)
                scale_(queries, c.read, size, K)
                product(queries, c.state, out, size, K, V, ADD, WHOLE)
                store(out, start, stop, o[b, :, at], 0)
            advance(c, written, c.state, scaled, K, V)
            if stop == T or (keep and stop % panel == 0):
                store(c.state, 0, k.shape[3], states[(stop + panel - 1) // panel if keep else 0, b, h], 0)


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


@loop
def buffers(size, K, V, like):
    """Return room for the gradients of a chunk."""
    wide, tall, square = room(5, size, K, like), room(3, size, V, like), room(3, size, size, like)
    return Back(wide[0], wide[1], wide[2], wide[3], wide[4], tall[0], tall[1], tall[2], square[0], square[1],
                square[2], room(1, V, size, like)[0], room(1, V, K, like)[0], room(1, K, V, like)[0],
                room(1, V, K, like)[0], np.zeros(size), np.zeros(size), np.zeros(size))  # fmt: skip


@loop
def back_through_state(c, g, written, gated, K, V):
    """From the gradient behind a chunk: that of its writes and keys, and the part of the one before; its own decay."""
    size, total = c.read.size, 0.0
    g.pairs[:], g.reading[:], g.writing[:] = 0, 0, 0
    transpose(written, g.newt, size, V)
    transpose(c.state, g.statet, K, V)
    transpose(g.after, g.aftert, K, V)
    scale(c.key, c.weight[size - 1], g.scaled, size, K)
    product(g.scaled, g.after, g.new, size, K, V, SET, WHOLE)
    product(written, g.aftert, g.k, size, V, K, SET, WHOLE)
    scale_(g.k, c.weight[size - 1], size, K)
    if gated:
        dots(c.key, g.k, g.writing, size, K, 1)
    for i in range(K):
        row = c.state.dtype.type(0)
        for j in range(V):
            g.after[i, j] *= c.read[size - 1]
            row += g.after[i, j] * c.state[i, j]
        total += row
    return total


@loop
def back_through_reads(c, g, gated, K, V):
    """From g.o, the gradient of what g.query read: g.q, and additions for keys, writes and the state before."""
    size = c.read.size
    product(g.query, c.keyt, g.qk, size, K, size, SET, RESULT)
    weigh(g.qk, c.weight, size, False)
    product(g.qk.T, g.o, g.new, size, size, V, ADD, UPPER)
    product(g.o, g.newt, g.dqk, size, V, size, SET, RESULT)
    multiply_pairs(g.dqk, g.qk, c.weight, size, False, g.pairs)
    product(g.o, g.statet, g.q, size, V, K, SET, WHOLE)
    scale_(g.q, c.read, size, K)
    if gated:
        dots(g.query, g.q, g.reading, size, K, 1)
    product(g.dqk, c.key, g.q, size, size, K, ADD, LOWER)
    product(g.dqk.T, g.query, g.k, size, size, K, ADD, UPPER)
    scale_(g.query, c.read, size, K)
    product(g.query.T, g.o, g.after, K, size, V, ADD, WHOLE)


@loop
def back_through_rule(c, g, gated, K, V):
    """From g.new, the gradient of what the delta rule wrote: g.x of the values, g.result of beta, and additions."""
    size = c.read.size
    solve_back(c.pairs, g.new, size, V, c.beta, g.x)
    g.result[:] = 0
    dots(g.new, c.x, g.result, size, V, 1)
    product(g.x, g.newt, g.dqk, size, V, size, SET, RESULT)
    for i in range(size):
        for j in range(i):
            g.dqk[i, j] = -g.dqk[i, j]
    multiply_pairs(g.dqk, c.pairs, c.weight, size, True, g.pairs)
    product(g.x, g.statet, g.row, size, V, K, SET, WHOLE)
    scale_(g.row, c.read, size, K)
    if gated:
        dots(c.key, g.row, g.reading, size, K, -1)
    for i in range(size):
        for j in range(K):
            g.k[i, j] -= g.row[i, j]
    product(g.dqk, c.key, g.k, size, size, K, ADD, LOWER)
    product(g.dqk.T, c.key, g.k, size, size, K, ADD, UPPER)
    scale(c.key, c.read, g.scaled, size, K)
    product(g.scaled.T, g.x, g.after, K, size, V, SUBTRACT, WHOLE)


def backward(q, k, v, beta, gate, states, do, grad, dq, dk, dv, dbeta, dgate, size, panel, first, last):
    """Fill the gradients of the inputs, and turn `grad` [B, Hs, K, V], of the last state, into that of the first.

    As `forward`, with the states of every panel; `do` like o. Heads that share a row must be in one range first..last.
    """
    T, heads, K, V = q.shape[1], states.shape[2], padded(k.shape[3]), padded(v.shape[3])
    reads, delta, gated, count = do.shape[2] // heads, beta.shape[2] > 0, gate.shape[2] > 0, panel // size
    several, g = chunks(count, size, K, V, states), buffers(size, K, V, states)
    for task in range(first, last):
        b, h = task // heads, task % heads
        kh, vh = h * k.shape[2] // heads, h * v.shape[2] // heads
        add_k, add_v = h * k.shape[2] % heads > 0, h * v.shape[2] % heads > 0
        load(grad[b, h], 0, k.shape[3], g.after, K)
        for start in range((T - 1) // panel * panel, -1, -panel):
            load(states[start // panel, b, h], 0, k.shape[3], several.state[0], K)
            used = min(count, (T - start + size - 1) // size)
            for p in range(used):
                c, begin = chunk_at(several, p), start + p * size
                fill(c, k[b, :, kh], v[b, :, vh], scalars(beta, b, h), scalars(gate, b, h), begin,
                     min(begin + size, T), g.scaled, K, V)  # fmt: skip
                ask_for(k[b, :, kh], begin + size, begin + 2 * size)
                ask_for(v[b, :, vh], begin + size, begin + 2 * size)
                if p + 1 < used:
                    several.state[p + 1] = c.state
                    advance(c, c.new if delta else c.x, several.state[p + 1], g.scaled, K, V)
            for p in range(used - 1, -1, -1):
                c, begin = chunk_at(several, p), start + p * size
                stop = min(begin + size, T)
                total = back_through_state(c, g, c.new if delta else c.x, gated, K, V)
                for r in range(reads):
                    at = h * reads + r
                    own = at * q.shape[2] // do.shape[2]
                    load(q[b, :, own], begin, stop, g.query, size)
                    load(do[b, :, at], begin, stop, g.o, size)
                    ask_for(q[b, :, own], max(begin - size, 0), begin)
                    ask_for(do[b, :, at], max(begin - size, 0), begin)
                    back_through_reads(c, g, gated, K, V)
                    store(g.q, begin, stop, dq[b, :, own], at * q.shape[2] % do.shape[2] > 0)
                if delta:
                    back_through_rule(c, g, gated, K, V)
                    for i in range(stop - begin):
                        dbeta[b, begin + i, h] = g.result[i]
                store(g.k, begin, stop, dk[b, :, kh], add_k)
                store(g.x if delta else g.new, begin, stop, dv[b, :, vh], add_v)
                if gated:
                    across(g.reading, g.writing, g.pairs, total, size, g.result)
                    for i in range(stop - begin):
                        dgate[b, begin + i, h] = g.result[i]
        store(g.after, 0, k.shape[3], grad[b, h], 0)
