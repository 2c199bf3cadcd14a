"""The recurrence as it is written: a loop over the tokens. Slow, and what the tests trust (in float64)."""

import torch
from torch import Tensor


def run_decayed(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, *, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Run decayed attention; the protocol of the package's docstring."""
    return _run(q, k, v, None, log_decay, state)


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
    """Run the delta rule; the protocol of the package's docstring."""
    return _run(q, k, v, beta, log_decay, state)


def repeat(x: Tensor, heads: int) -> Tensor:
    """Repeat the heads of x [B, T, H, W] consecutively up to `heads`."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _run(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    Hs = state.shape[1]
    q_BTHK, k_BTHK, v_BTHV = (repeat(x.to(state.dtype), max(x.shape[2], Hs)) for x in (q, k, v))
    outputs = []
    for t in range(q.shape[1]):
        k_t, v_t = k_BTHK[:, t], v_BTHV[:, t]
        if log_decay is not None:
            a_t = log_decay[:, t].exp()
            state = state * (a_t[..., None, None] if a_t.dim() == 2 else a_t[..., None])
        if beta is not None:
            held = torch.einsum("bhkv,bhk->bhv", state, k_t)
            v_t = beta[:, t, :, None] * (v_t - held)
        state = state + k_t[..., None] * v_t[..., None, :]
        q_t = q_BTHK[:, t].unflatten(1, (Hs, -1))  # [B, Hs, r, K]
        outputs.append(torch.einsum("bhkv,bhrk->bhrv", state, q_t).flatten(1, 2))
    return torch.stack(outputs, dim=1).to(v.dtype), state
