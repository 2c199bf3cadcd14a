"""One token of windowed attention with product features, gates included, by compiled loops (`window_loops`).

At one token, the ordinary form is bound by the calls of some seventy small operators a layer; this one by memory.
"""

from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from lineament._base import extras
from lineament.ops.window_state import DEPTH, WindowState

DTYPES = (torch.float32, torch.float64)
available = cache(extras.available)


def refused(state: WindowState, *tensors: Tensor) -> str | None:
    """Say why the compiled step can't run on a state and a token's tensors; None when it can."""
    far = state.far
    if not available("numba"):
        return "numba is not installed (pip install 'lineament[cpu]')"
    if far.device.type != "cpu":
        return f"on {far.device.type}, not the CPU"
    if far.dtype not in DTYPES or any(x.dtype != far.dtype for x in (*state[1:4], *tensors)):
        return f"{tensors[0].dtype} beside a state in {far.dtype}; all must be float32 or all float64"
    if not all(x.is_contiguous() for x in state):
        return "a state that is a view"
    if torch.compiler.is_compiling():
        return "inside a compiled graph"
    return None


def product_step_(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, state: WindowState, *, window: int, sinks: int
) -> Tensor:
    """Read one more token and move the state on, in place: gates, writing and reading of the map "product".

    The same numbers as the maps' gates followed by `windowed_step_(..., logits=True)`, without a decay.

    Args:
        q: [B, Hq, K], scaled. k: [B, Hk, K]. v: [B, Hk, V]. weight: [Hq + Hk, K, 2 C + 1] and bias
            [Hq + Hk, 1, 2 C + 1], as `nn.folded.fold_gates` makes them: logits of both factors, and the gate.
        state: all of it in one dtype, float32 or float64, on the CPU. window: at least 1.

    Returns:
        o [B, Hq, V].
    """
    out = torch.empty(*q.shape[:2], v.shape[-1], dtype=v.dtype)
    read = (x.contiguous() for x in (q, k, v, weight, bias))  # one layout, compiled once
    arrays = [(x.detach() if x.requires_grad else x).numpy() for x in (*read, *state, out)]
    import_module("lineament.ops.window_loops").product_step_(*arrays, window, sinks, DEPTH)
    return out
