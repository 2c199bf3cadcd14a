"""One token of the recurrence, in place: what decoding calls. By a compiled loop on a CPU that has numba."""

from importlib import import_module

import torch
from torch import Tensor

from lineament._base.autocast import without_autocast
from lineament.ops.compiled import arrays, refused, written


def decayed_step_(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, out: Tensor | None = None
) -> Tensor:
    """Advance `state` by one token of `decayed_attention`, in place, and return what the token reads.

    `S <- Diag(exp(log_decay)) S + k v^T`, `o = S^T q`. Shapes are trusted (this runs once per layer and token).

    Args:
        q: [B, Hq, K].
        k: [B, Hk, K].
        v: [B, Hv, V].
        log_decay: None, [B, Hs] or [B, Hs, K].
        state: [B, Hs, K, V], float32 or wider; changed.
        out: [B, max(Hq, Hs), V] to write into, in the dtype of `state`; made if None.

    Returns:
        o [B, max(Hq, Hs), V], in v's dtype if `out` is None.

    Example:
        >>> state, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1)
        >>> tuple(decayed_step_(one, one, one, None, state).item() for _ in range(3))
        (1.0, 2.0, 3.0)
    """
    if _loops(state, out, q, k, v, log_decay):
        return _looped(q, k, v, None, log_decay, state, out)
    _decay_(state, log_decay)
    wide = state.dtype
    _write_(state, k.to(wide), v.to(wide))
    return _read(state, q, v.dtype, out)


def delta_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Advance `state` by one token of `delta_rule`, in place, and return what the token reads.

    `S <- Diag(exp(log_decay)) S`, `S <- S + k (b (v - S^T k))^T`, `o = S^T q`. Shapes are trusted.

    Args:
        q: [B, Hq, K].
        k: [B, Hk, K].
        v: [B, Hv, V].
        beta: [B, Hs].
        log_decay: None, [B, Hs] or [B, Hs, K].
        state: [B, Hs, K, V], float32 or wider; changed.
        out: [B, max(Hq, Hs), V] to write into, in the dtype of `state`; made if None.

    Returns:
        o [B, max(Hq, Hs), V], in v's dtype if `out` is None.

    Example:
        >>> state, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1)
        >>> tuple(delta_step_(one, one, x * one, torch.ones(1, 1), None, state).item() for x in (3.0, 5.0))
        (3.0, 5.0)
    """
    if _loops(state, out, q, k, v, beta, log_decay):
        return _looped(q, k, v, beta, log_decay, state, out)
    _decay_(state, log_decay)
    wide, heads = state.dtype, state.shape[1]
    wide_k, wide_v = k.to(wide), v.to(wide)
    full_k = wide_k if k.shape[1] == heads else wide_k.repeat_interleave(heads // k.shape[1], 1)
    full_v = wide_v if v.shape[1] == heads else wide_v.repeat_interleave(heads // v.shape[1], 1)
    with without_autocast(state.device):
        held = torch.matmul(full_k[:, :, None], state)[:, :, 0]  # [B, Hs, V]
    _write_(state, full_k, (full_v - held).mul_(beta.to(wide)[..., None]))
    return _read(state, q, v.dtype, out)


def _loops(state: Tensor, out: Tensor | None, *read: Tensor | None) -> bool:
    """Say whether a loop may do the step: nothing is differentiated, and it can run."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (state, *read)):
        return False
    return refused(state) is None and (out is None or out.is_contiguous())


def _looped(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, state: Tensor, out: Tensor | None
) -> Tensor:
    wide, (rows, heads, _, width) = state.dtype, state.shape
    o = state.new_empty(rows, max(q.shape[1], heads), width) if out is None else out
    beta = state.new_empty(rows, 0) if beta is None else beta
    rates = state.new_empty(rows, heads, 0) if log_decay is None else log_decay
    rates = rates if rates.dim() == 3 else rates.unsqueeze(-1)
    read = (x if x.dtype == wide else x.to(wide) for x in (q, k, v, beta, rates))
    import_module("lineament.ops.recurrence.step_loops").step_(*arrays(*read), *written(state, o))
    return o if out is not None or v.dtype == wide else o.to(v.dtype)


def _decay_(state: Tensor, log_decay: Tensor | None) -> None:
    if log_decay is not None:
        factor = log_decay.to(state.dtype).exp()
        state.mul_(factor[..., None, None] if factor.dim() == 2 else factor[..., None])


def _write_(state: Tensor, k: Tensor, v: Tensor) -> None:
    """Add k v^T to the state, heads of k or v repeated consecutively."""
    heads = state.shape[1]
    few = min(k.shape[1], v.shape[1])
    grouped = state.unflatten(1, (few, heads // few))
    k, v = k.unflatten(1, (few, -1)), v.unflatten(1, (few, -1))
    grouped.addcmul_(k[..., None], v[..., None, :])


def _read(state: Tensor, q: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    heads = state.shape[1]
    if q.shape[1] < heads:
        q = q.repeat_interleave(heads // q.shape[1], 1)
    q = q.to(state.dtype).unflatten(1, (heads, -1))  # [B, Hs, r, K]
    with without_autocast(state.device):
        if out is None:
            return torch.matmul(q, state).flatten(1, 2).to(dtype)
        torch.matmul(q, state, out=out.unflatten(1, (heads, -1)))
    return out
