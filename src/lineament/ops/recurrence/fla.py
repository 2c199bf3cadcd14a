"""The recurrence by flash-linear-attention's kernels (fla-core, optional), where they are installed and can run.

Thin adapters: fla calls the decay `g`, wants as many heads in q as in the state, and scales q unless told not to.
"""

import torch
from torch import Tensor


def run_decayed(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, *, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Run decayed attention; the protocol of the package's docstring. fla chooses its own chunks."""
    import fla.ops

    (q, k, v, log_decay), options, every = _adapted(q, k, v, log_decay, state)
    if log_decay is not None and log_decay.dim() == 4:
        o, final = fla.ops.chunk_gla(q, k, v, g=log_decay, **options)
    else:
        o, final = fla.ops.chunk_simple_gla(q, k, v, g=log_decay, **options)
    return o.to(v.dtype), final[:, ::every].to(state.dtype)


def run_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the delta rule; the protocol of the package's docstring. fla chooses its own chunks."""
    import fla.ops

    (q, k, v, log_decay, beta), options, every = _adapted(q, k, v, log_decay, state, beta)
    if log_decay is None:
        o, final = fla.ops.chunk_delta_rule(q, k, v, beta=beta, **options)
    elif log_decay.dim() == 4:
        o, final = fla.ops.chunk_kda(q, k, v, g=log_decay, beta=beta, **options)
    else:
        o, final = fla.ops.chunk_gated_delta_rule(q, k, v, g=log_decay, beta=beta, **options)
    return o.to(v.dtype), final[:, ::every].to(state.dtype)


def _adapted(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, *more: Tensor
) -> tuple[list, dict, int]:
    """Repeat every head up to max(Hq, Hs), k and v in q's dtype; the int says which heads of the state are ours."""
    heads = max(q.shape[2], state.shape[1])

    def repeated(x: Tensor | None, axis: int) -> Tensor | None:
        return x if x is None or x.shape[axis] == heads else x.repeat_interleave(heads // x.shape[axis], axis)

    tensors = [repeated(x, 2) for x in (q, k.to(q.dtype), v.to(q.dtype), log_decay, *more)]
    start = repeated(state.to(torch.float32), 1)
    return tensors, {"scale": 1.0, "initial_state": start, "output_final_state": True}, heads // state.shape[1]
