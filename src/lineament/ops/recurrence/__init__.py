"""The one recurrence of the library, in two public functions and two in-place steps.

`S_t = (I - b_t k_t k_t^T) Diag(a_t) S_{t-1} + b_t k_t v_t^T`, `o_t = S_t^T q_t`: `delta_rule`. Without the erase
term and with b = 1 it is `decayed_attention`. The decay `a_t = exp(log_decay_t)` is one, a number per head, or one per
key channel.

How a backend is written (`BACKENDS_DECAYED`, `BACKENDS_DELTA`). Each is a function
`run(q, k, v, log_decay, state, *, chunk_size)` or `run(q, k, v, beta, log_decay, state, *, chunk_size)`, called by the
door after it checked shapes and devices, with

- q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V], in the dtypes and strides the user gave (any float dtype, not
  expanded: Hs = max(Hk, Hv) state heads, heads repeat consecutively, T >= 1);
- beta [B, T, Hs] and log_decay None | [B, T, Hs] | [B, T, Hs, K] in the dtype of `state`, log_decay clamped at -1e3
  (finite; the door's clamp gives the zero gradient);
- state [B, Hs, K, V], float32 or float64, never None, never written to; all sums are in its dtype or wider (products
  may take the inputs' own precision);
- chunk_size: None (the backend's own choice) or a power of two; a backend without chunks ignores it.

It returns o [B, T, max(Hq, Hs), V] in v's dtype and a new state like `state`, both differentiable in every input.
Packed documents never reach a backend: the door cuts them into rows of one length class (`packed.py`).
"""

from lineament._base.backends import Backend
from lineament.ops.recurrence.doors import decayed_attention, delta_rule
from lineament.ops.recurrence.step import decayed_step_, delta_step_
from lineament.ops.recurrence.usable import needs_fla, needs_triton

_ROOM = "lineament.ops.recurrence"

__all__ = ["BACKENDS_DECAYED", "BACKENDS_DELTA", "decayed_attention", "decayed_step_", "delta_rule", "delta_step_"]

BACKENDS_DECAYED = {  # best first; nothing is imported before it is taken
    "triton": Backend(f"{_ROOM}.triton_decayed:run", needs_triton),
    "fla": Backend(f"{_ROOM}.fla:run_decayed", needs_fla),
    "chunked": Backend(f"{_ROOM}.chunked:run_decayed"),
    "chunked-autograd": Backend(f"{_ROOM}.autograd:run_decayed", plain=True),
    "reference": Backend(f"{_ROOM}.reference:run_decayed"),
}

BACKENDS_DELTA = {
    "triton": Backend(f"{_ROOM}.triton_delta:run", needs_triton),
    "fla": Backend(f"{_ROOM}.fla:run_delta", needs_fla),
    "chunked": Backend(f"{_ROOM}.chunked:run_delta"),
    "chunked-autograd": Backend(f"{_ROOM}.autograd:run_delta", plain=True),
    "reference": Backend(f"{_ROOM}.reference:run_delta"),
}
