"""One token of the recurrence as one compiled loop. Imported when it is used: numba is an extra."""

import numpy as np

from lineament.ops.compiled import loop


@loop
def step_(q, k, v, beta, log_decay, state, out):
    """Decay, erase (where beta [B, Hs] has columns), write and read, row by row of every state [K, V].

    log_decay [B, Hs, 0], [B, Hs, 1] or [B, Hs, K]; heads of q, k, v and out repeat consecutively.
    """
    rows, heads, keys, width = state.shape
    reads, gates, erases = out.shape[1] // heads, log_decay.shape[2], beta.shape[1] > 0
    one = np.exp(state.dtype.type(0))
    written = np.empty(width, dtype=state.dtype)
    for b in range(rows):
        for h in range(heads):
            S, key, value = state[b, h], k[b, h * k.shape[1] // heads], v[b, h * v.shape[1] // heads]
            factor = np.exp(log_decay[b, h, 0]) if gates else one
            written[:] = 0
            for i in range(keys):
                row, x = S[i], key[i]
                if gates > 1:
                    factor = np.exp(log_decay[b, h, i])
                for c in range(width):
                    row[c] *= factor
                    written[c] += x * row[c]
            strength = beta[b, h] if erases else one
            for c in range(width):
                written[c] = (value[c] - written[c]) * strength if erases else value[c]
            for r in range(reads):
                out[b, h * reads + r, :] = 0
            for i in range(keys):
                row, x = S[i], key[i]
                for c in range(width):
                    row[c] += x * written[c]
                for r in range(reads):
                    at = h * reads + r
                    o, y = out[b, at], q[b, at * q.shape[1] // out.shape[1], i]
                    for c in range(width):
                        o[c] += y * row[c]
