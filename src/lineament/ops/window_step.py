"""One token of windowed attention, in place: a fixed number of small operators whatever has been read before.

The slots of `WindowState` make it short: the new token takes the slot of the one that leaves, which is pushed into the
far state; softmax runs over all slots in whatever order they stand.
"""

import torch
from torch import Tensor

from lineament._base.autocast import without_autocast
from lineament.ops.window_reference import common_scale
from lineament.ops.window_state import WindowState, code_shares, expanded

EPS = 1e-6  # in the denominator of pure linear attention, as `linear_attention` has it


def windowed_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor | None,
    phi_k: Tensor | None,
    log_scale: Tensor | None,
    state: WindowState,
    *,
    window: int,
    sinks: int,
    log_decay: Tensor | None = None,
    relative: bool = False,
    outer: int = 0,
    logits: bool = False,
) -> Tensor:
    """Read one more token and move the state on, in place; the same numbers as `windowed_linear_attention`.

    Args:
        q: [B, Hq, K], scaled. k: [B, Hk, K]. v: [B, Hk, V]. phi_q: [B, Hq, F]. phi_k: [B, Hk, F].
        log_scale: [B, Hq] or [Hq].
        state: moved on by one token; rows may have seen unequal numbers of tokens.
        window, sinks: those the state was made with.
        log_decay: [B, Hk] or None.
        relative: lambda counts from the largest exact logit (the LoLCATs form).
        outer: as in `windowed_linear_attention`.
        logits: phi_q holds the logarithms of both factors, not normalised: `e^(lambda + a_i + b_j)` is a cell's weight.

    Returns:
        o [B, Hq, V] in v's dtype.

    Example:
        >>> from lineament.ops.window_state import empty_state
        >>> x = torch.ones(1, 1, 2)
        >>> state = empty_state(1, 1, 2, 2, 2, window=3, sinks=1, like=x)
        >>> windowed_step_(x, x, x, x, x, torch.zeros(1), state, window=3, sinks=1).tolist(), state.count.tolist()
        ([[[1.0, 1.0]]], [1])
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, phi_q, phi_k, log_scale)):
        raise RuntimeError("windowed_step_ writes in place and has no gradient; use windowed_linear_attention to train")
    far, features, count = state.far, state.features, state.count
    if phi_q is None or phi_k is None or log_scale is None or not features.shape[-1]:
        phi_q = phi_k = log_scale = None
    if phi_k is not None and log_decay is not None:
        far.mul_(log_decay.to(far.dtype).exp()[..., None, None])
    counts = count.tolist()
    if not counts:
        return v.new_empty(0, q.shape[1], v.shape[2])
    write = _write_even_ if counts.count(counts[0]) == len(counts) else _write_uneven_
    write(state, k, v, phi_k, counts, window, sinks, outer)
    count.add_(1)
    if log_decay is not None and logits and phi_q is not None and log_scale is not None:
        phi_q, total = code_shares(phi_q, outer)  # cells may have faded: only shares are safe
        log_scale, logits = log_scale + total, False
    with without_autocast(q.device):
        out = _look(_wide(q, state.keys.dtype), phi_q, log_scale, state, counts, relative, outer, logits)
    return _wide(out, v.dtype).view(*q.shape[:2], -1)


def _look(
    q: Tensor, phi_q: Tensor | None, log_scale: Tensor | None, state: WindowState, counts: list[int], relative: bool,
    outer: int, logits: bool,
) -> Tensor:  # fmt: skip
    """Read a state that the token has been written to already; `counts` are those before it. [B Hk, r, V]."""
    far, keys, values, _, count = state
    B, Hk, slots, K = keys.shape
    if not slots and phi_q is not None:
        phi_q = expanded(code_shares(phi_q, outer)[0] if logits else phi_q, outer)
        out = torch.matmul(phi_q.view(B, Hk, -1, far.shape[2]).to(far.dtype), far)
        return out[..., :-1] / (out[..., -1:] + EPS)
    near = _wide(torch.bmm(q.reshape(B * Hk, -1, K), keys.view(-1, slots, K).mT), far.dtype)
    if min(counts) < slots - 1:
        empty = torch.arange(slots, device=q.device) >= count[:, None]
        near.view(B, -1, slots).masked_fill_(empty[:, None], -torch.inf)
    if phi_q is None or log_scale is None or max(counts) < slots:  # nothing is far yet
        return torch.bmm(_wide(torch.softmax(near, -1), values.dtype), values.view(-1, slots, values.shape[-1]))
    if logits and min(counts) >= slots:
        return _read_cells(near, phi_q, log_scale, state, outer)
    if logits:
        phi_q, total = code_shares(phi_q, outer)
        log_scale = log_scale + total
    return _read(near, expanded(phi_q, outer), log_scale, state, relative)


def _wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Spare the call that would change nothing: there are tens of them a token."""
    return x if x.dtype == dtype else x.to(dtype)


def _read_cells(near: Tensor, codes: Tensor, log_scale: Tensor, state: WindowState, outer: int) -> Tensor:
    """Read slots and cells by one softmax over the logits of both; [B Hk, r, V].

    Its scale cancels in the quotient. No underflow can leave nothing: cells that hold keys weigh e^-60 of the largest.
    """
    far, values, groups, slots = state.far, state.values, near.shape[0], near.shape[2]
    first, second = codes.split((outer, codes.shape[-1] - outer), -1)
    first = first + log_scale.expand(first.shape[:-1]).unsqueeze(-1)
    cells = (first.unsqueeze(-1) + second.unsqueeze(-2)).view(groups, -1, far.shape[2])
    weight, cells = torch.cat((near, _wide(cells, near.dtype)), -1).softmax(-1).split((slots, far.shape[2]), -1)
    read = torch.bmm(cells, far.view(groups, *far.shape[2:]))
    total = weight.sum(-1, keepdim=True).add_(read[..., -1:])
    out = torch.bmm(_wide(weight, values.dtype), values.view(groups, slots, -1))
    return (read[..., :-1] + out).div_(total)


def _read(logits: Tensor, phi_q: Tensor, log_scale: Tensor, state: WindowState, relative: bool) -> Tensor:
    """Join the slots' logits [B Hk, r, s + w] and the far state under one denominator; [B Hk, r, V]."""
    far, values, groups = state.far, state.values, logits.shape[0]
    top = logits.amax(-1, keepdim=True)
    log_scale = log_scale.to(far.dtype).expand(far.shape[0], -1).reshape(top.shape)
    lift, near = common_scale(top, log_scale + top if relative else log_scale)
    weight = logits.sub_(top.add_(lift)).exp_()
    phi = phi_q.reshape(groups, -1, far.shape[2]).mul(near)
    read = torch.bmm(phi.to(far.dtype), far.view(groups, *far.shape[2:]))
    out = torch.bmm(weight.to(values.dtype), values.view(groups, *values.shape[2:]))
    total = weight.sum(-1, keepdim=True).add_(read[..., -1:])
    return out.add(read[..., :-1]).div_(total)


def _push_(far: Tensor, phi: Tensor, v: Tensor) -> None:
    """Add phi [.., F] times [v, 1] [.., V + 1] to the far state [.., F, V + 1]."""
    phi, v = _wide(phi, far.dtype), _wide(v, far.dtype)
    far.narrow(-1, 0, v.shape[-1]).addcmul_(phi.unsqueeze(-1), v.unsqueeze(-2))
    far.select(-1, -1).add_(phi)


def _write_even_(
    state: WindowState, k: Tensor, v: Tensor, phi_k: Tensor | None, counts: list[int], window: int, sinks: int,
    outer: int,
) -> None:  # fmt: skip
    far, keys, values, features, _ = state
    n = counts[0]
    if n >= sinks and not window:
        if phi_k is not None:
            _push_(far, expanded(phi_k, outer), v)
        return
    slot = n if n < sinks else sinks + (n - sinks) % window
    value = values.select(2, slot)
    if phi_k is not None:
        feature = features.select(2, slot)
        if n >= sinks + window:
            _push_(far, expanded(feature, outer), value)
        feature.copy_(phi_k)
    keys.select(2, slot).copy_(k)
    value.copy_(v)


def _write_uneven_(
    state: WindowState, k: Tensor, v: Tensor, phi_k: Tensor | None, counts: list[int], window: int, sinks: int,
    outer: int,
) -> None:  # fmt: skip
    for row, count in enumerate(counts):
        one = WindowState(*(x[row : row + 1] for x in state))
        phi = None if phi_k is None else phi_k[row : row + 1]
        _write_even_(one, k[row : row + 1], v[row : row + 1], phi, [count], window, sinks, outer)
