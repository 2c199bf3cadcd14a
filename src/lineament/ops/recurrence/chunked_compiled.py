"""When the chunked form runs as compiled loops (`chunked_loops`) in place of operators, and how heads share threads."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lineament.ops import compiled
from lineament.ops.recurrence.walk import panel_length

CHUNK, LONGEST = 32, 64  # tokens; measured best, and what more would no longer stay in the first cache
SMALLEST = 2**24  # numbers read from the state, about 10 ms of operators: less isn't worth waiting for the compiler

Maybe = Tensor | None


def refused(q: Tensor, k: Tensor, v: Tensor, beta: Maybe, log_decay: Maybe, states: Tensor) -> str | None:
    """Say why the loops can't run on the inputs of the recurrence and its states [.., B, Hs, K, V]; None: they can."""
    if log_decay is not None and log_decay.dim() == 4:
        return "a decay per channel is faster by operators"
    if q.shape[0] * q.shape[1] * states[0, 0].numel() < SMALLEST:
        return "a short text is faster by operators than the compiler"
    if torch.get_num_threads() > q.shape[0] * states.shape[2] // _shared(q, k, v, states):
        return f"heads that share rows are not cut, and there are {torch.get_num_threads()} threads"
    return compiled.refused(states[0], q, k, v, *(x for x in (beta, log_decay) if x is not None))


def forward(q: Tensor, k: Tensor, v: Tensor, beta: Maybe, log_decay: Maybe, states: Tensor, o: Tensor, size: int):
    """Fill o and `states` [1 or panels + 1, B, Hs, K, V], whose first entry is the state at the start, as `walk`."""
    given = _arrays(q, k, v, *(_scalars(x, q) for x in (beta, log_decay)), states, o)
    _over_heads("forward", given, _shared(q, k, v, states), states, size)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Maybe,
    log_decay: Maybe,
    states: Tensor,
    grad_o: Tensor,
    grad: Tensor,
    made: list[Tensor],
    size: int,
) -> None:
    """Fill `made` (dq, dk, dv, dbeta, dlog_decay) and turn `grad` [B, Hs, K, V] into that of the first state."""
    made = [x if x.dim() > 1 else _scalars(None, q) for x in made]
    given = _arrays(q, k, v, *(_scalars(x, q) for x in (beta, log_decay)), states, grad_o, grad, *made)
    _over_heads("backward", given, _shared(q, k, v, states), states, size)


def _shared(q: Tensor, k: Tensor, v: Tensor, states: Tensor) -> int:
    """Return how many consecutive heads share a row of an input, at most."""
    return states.shape[2] // min(states.shape[2], *(x.shape[2] for x in (q, k, v)))


def _scalars(x: Maybe, q: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:2], 0) if x is None else x


def _arrays(*tensors: Tensor) -> list[Any]:
    return [x.detach().numpy() for x in tensors]


def _over_heads(name: str, given: list[Any], shared: int, states: Tensor, size: int) -> None:
    """Run a loop on all heads, in as many ranges as torch has threads."""
    run, panel = _compiled(name, states.dtype), panel_length(size)
    ends = [*range(0, states.shape[1] * states.shape[2], shared), states.shape[1] * states.shape[2]]
    threads = min(torch.get_num_threads(), len(ends) - 1)
    ends = [ends[i * (len(ends) - 1) // threads] for i in range(threads + 1)]
    more = (min(max(size, CHUNK), LONGEST), panel)
    if threads == 1:
        run(*given, *more, *ends)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda i: run(*given, *more, *ends[i : i + 2]), range(threads)))


@cache
def _compiled(name: str, dtype: torch.dtype) -> Any:
    """Compile a loop for one dtype and any strides of the inputs."""
    from numba import types

    from lineament.ops.recurrence import chunked_loops

    scalar = {torch.float32: types.float32, torch.float64: types.float64}[dtype]

    def array(axes: int, layout: str = "A") -> Any:
        return types.Array(scalar, axes, layout)

    inputs = [array(4), array(4), array(4), array(3), array(3)]
    made = {"forward": [array(4, "C")], "backward": [array(4), array(4, "C"), *(array(x.ndim, "C") for x in inputs)]}
    numbers = [types.int64] * 4
    return compiled.loop(getattr(chunked_loops, name), (*inputs, array(5, "C"), *made[name], *numbers))
