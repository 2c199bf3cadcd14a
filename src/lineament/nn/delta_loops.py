"""One token of a converted layer's delta rule as one compiled loop. Imported when it is used: numba is an extra."""

import math

import numpy as np

from lineament.ops.compiled import loop
from lineament.ops.recurrence.step_loops import step_


@loop
def _filter(x, taps, tail, y):
    """Write the short convolution of a token to y and move its tail on."""
    past = tail.shape[0]
    for c in range(x.shape[0]):
        y[c] = x[c] * taps[0, c]
    for j in range(past):
        for c in range(x.shape[0]):
            y[c] += tail[j, c] * taps[past - j, c]
    for j in range(past - 1):
        tail[j] = tail[j + 1]
    if past:
        tail[past - 1] = x


@loop
def _softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


@loop
def _sigmoid(x):
    return 1 / (1 + math.exp(-x))


@loop
def delta_heads_step_(x, taps, decay, beta, rate, length, gate, lengthened, opened, tail, memory, out):
    """Filter, normalise, gate, step and gate the output.

    x [B, (Hq + Hk) K + Hk V], side by side; decay [B, Hk c] and beta [B, Hk] before their nonlinearities, c = 1 or K;
    length [Hk], what queries are multiplied by; gate [B, Hq V] before the sigmoid, which is `opened` at its start;
    lengthened: whether a key's length goes to its value. Changed: tail, memory [B, Hk, K, V]; filled: out [B, Hq, V].
    """
    rows, heads, keys, width = memory.shape
    queries, channels = out.shape[1], decay.shape[1] // heads
    y = np.empty(x.shape[1], dtype=memory.dtype)
    log_decay = np.empty((1, heads, channels), dtype=memory.dtype)
    strength = np.empty((1, heads), dtype=memory.dtype)
    for b in range(rows):
        _filter(x[b], taps, tail[b], y)
        q = y[: queries * keys].reshape(1, queries, keys)
        k = y[queries * keys : (queries + heads) * keys].reshape(1, heads, keys)
        v = y[(queries + heads) * keys :].reshape(1, heads, width)
        for h in range(queries):
            for i in range(keys):
                q[0, h, i] *= length[h * heads // queries]
        for h in range(heads):
            total = 0.0
            for i in range(keys):
                total += k[0, h, i] * k[0, h, i]
            norm = math.sqrt(total)
            for i in range(keys):
                k[0, h, i] /= max(norm, 1e-6)
            for i in range(width if lengthened else 0):
                v[0, h, i] *= norm
            strength[0, h] = _sigmoid(beta[b, h])
            for i in range(channels):
                log_decay[0, h, i] = -rate[h] * _softplus(decay[b, h * channels + i])
        step_(q, k, v, strength, log_decay, memory[b : b + 1], out[b : b + 1])
        for h in range(queries):
            for i in range(width):
                out[b, h, i] *= _sigmoid(gate[b, h * width + i]) / opened
