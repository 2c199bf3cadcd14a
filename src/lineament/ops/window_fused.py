"""One token of windowed attention with product features, gates included, by compiled loops (`window_loops`)."""

from importlib import import_module

import torch
from torch import Tensor

from lineament.ops import compiled
from lineament.ops.window_state import DEPTH, WindowState


def refused(state: WindowState, *tensors: Tensor) -> str | None:
    """Say why the compiled step can't run on a state and a token's tensors; None when it can."""
    reason = compiled.refused(state.far, *state[1:4], *tensors)
    return reason or (None if all(x.is_contiguous() for x in state) else "a state that is a view")


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
    own = (*compiled.arrays(q, k, v, weight, bias), *compiled.written(*state, out))
    import_module("lineament.ops.window_loops").product_step_(*own, window, sinks, DEPTH)
    return out
