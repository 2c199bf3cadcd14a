"""One token of windowed attention with product features as one compiled loop: no operator per intermediate.

Imported when it is used: numba is an extra.
"""

import math

import numpy as np

from lineament.ops.compiled import loop


@loop
def _factors(x, weight, bias, codes, depth, y):
    """Write x W + b to y: the logits of both factors, none more than `depth` below its top, and the gate."""
    y[:] = bias
    for c in range(x.shape[0]):
        for f in range(y.shape[0]):
            y[f] += x[c] * weight[c, f]
    for half in range(2):
        own = y[half * codes : half * codes + codes]
        low = own[0]
        for f in range(1, codes):
            low = max(low, own[f])
        low -= depth
        for f in range(codes):
            own[f] = max(own[f], low)


@loop
def _write(k, v, y, codes, seen, window, sinks, far, keys, values, features):
    """Give the token its slot; the one that leaves goes into the far state."""
    for half in range(2):
        own = y[half * codes : half * codes + codes]
        top, total = own[0], 0.0
        for f in range(1, codes):
            top = max(top, own[f])
        for f in range(codes):
            own[f] = np.exp(own[f] - top)
            total += own[f]
        share = (math.exp(y[2 * codes]) if half == 0 else 1.0) / total
        for f in range(codes):
            own[f] *= share
    slot = seen if seen < sinks else sinks + (seen - sinks) % window
    if seen >= sinks + window:
        left, width = features[slot], v.shape[0]
        for i in range(codes):
            for j in range(codes):
                cell, phi = far[i * codes + j], left[i] * left[codes + j]
                for c in range(width):
                    cell[c] += phi * values[slot, c]
                cell[width] += phi
    features[slot] = y[: 2 * codes]
    keys[slot] = k
    values[slot] = v


@loop
def _read(q, out, both, codes, seen, far, keys, values):
    """Attend to slots and cells under one denominator; far cells count once something has left the window."""
    groups, width = out.shape
    slots = min(seen, keys.shape[0])
    cells = codes * codes if seen > keys.shape[0] else 0
    weight = np.empty(slots + cells, dtype=out.dtype)
    for g in range(groups):
        for s in range(slots):
            total = q[g, 0] * keys[s, 0]
            for c in range(1, q.shape[1]):
                total += q[g, c] * keys[s, c]
            weight[s] = total
        if cells:
            for i in range(codes):
                first = both[g, i] + both[g, 2 * codes]
                for j in range(codes):
                    weight[slots + i * codes + j] = first + both[g, codes + j]
        top = weight[0]
        for s in range(1, slots + cells):
            top = max(top, weight[s])
        below = weight[0] * 0
        out[g, :] = 0
        for s in range(slots):
            one = np.exp(weight[s] - top)
            below += one
            for c in range(width):
                out[g, c] += one * values[s, c]
        for s in range(cells):
            one = np.exp(weight[slots + s] - top)
            below += one * far[s, width]
            for c in range(width):
                out[g, c] += one * far[s, c]
        for c in range(width):
            out[g, c] /= below


@loop
def product_step_(q, k, v, weight, bias, far, keys, values, features, count, out, window, sinks, depth):
    heads, groups, codes = k.shape[1], q.shape[1] // k.shape[1], weight.shape[2] // 2
    y = np.empty(weight.shape[2], dtype=far.dtype)
    both = np.empty((groups, weight.shape[2]), dtype=far.dtype)
    for row in range(q.shape[0]):
        seen = count[row]
        for head in range(heads):
            at = q.shape[1] + head
            _factors(k[row, head], weight[at], bias[at, 0], codes, depth, y)
            own = far[row, head], keys[row, head], values[row, head], features[row, head]
            _write(k[row, head], v[row, head], y, codes, seen, window, sinks, *own)
            for g in range(groups):
                at = head * groups + g
                _factors(q[row, at], weight[at], bias[at, 0], codes, depth, both[g])
            first = head * groups
            mine = q[row, first : first + groups], out[row, first : first + groups]
            _read(*mine, both, codes, seen + 1, *own[:3])
        count[row] = seen + 1
