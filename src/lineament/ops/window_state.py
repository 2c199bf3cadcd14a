"""What windowed attention remembers between two calls, and one call made ready for a backend.

The exact set of query n, `{n-w < i <= n} U {i < s}`, is kept in `s + w` slots: position p < s stays in slot p for ever,
position p >= s lives in slot `s + (p - s) mod w` until token p + w takes the slot and pushes it into the far state. So
the filled slots *are* the exact set, no token is in it twice, and one more token costs no copy of the window.
"""

from typing import NamedTuple

import torch
from torch import Tensor

DEPTH = 30.0  # nats


class WindowState(NamedTuple):
    """The memory of `windowed_linear_attention`; every tensor's first axis is the row (or packed document).

    Attributes:
        far: [B, Hk, F, V + 1], float32 or wider: sum of phi(k_j) [v_j, 1]^T over the keys that left the window.
        keys: [B, Hk, s + w, K], the exact slots (see the module's first lines).
        values: [B, Hk, s + w, V].
        features: [B, Hk, s + w, F'], phi(k) of the keys still in the window, which they need when they leave; in
            factors where features are products (`expanded`).
        count: [B], int64, tokens seen. Slots at or beyond min(count, s + w) are empty.
    """

    far: Tensor
    keys: Tensor
    values: Tensor
    features: Tensor
    count: Tensor


class WindowCall(NamedTuple):
    """Rows of one length and one position, as a backend gets them; L = P + T, where P earlier keys stand in front.

    q [B, T, Hq, K]; k [B, Hk, L, K]; v [B, Hk, L, V]; phi_q [B, T, Hq, F']; phi_k [B, Hk, L, F']; log_scale [B, T, Hq];
    log_decay [B, T, Hk] or None; far [B, Hk, F, V + 1]; sink_k [B, Hk, s', K]; sink_v [B, Hk, s', V]. Query t has
    position count + t and key l has position count - P + l. With F = 0 there is no far part. F' = F, or the columns of
    both factors where `outer` is not 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    phi_q: Tensor
    phi_k: Tensor
    log_scale: Tensor
    log_decay: Tensor | None
    far: Tensor
    sink_k: Tensor
    sink_v: Tensor
    window: int
    sinks: int
    count: int
    relative: bool
    outer: int = 0

    @property
    def prefix(self) -> int:
        return self.k.shape[2] - self.q.shape[1]


def expanded(phi: Tensor, outer: int) -> Tensor:
    """Multiply out features given as two factors: the first `outer` columns times all others; 0 changes nothing.

    Example:
        >>> expanded(torch.tensor([2.0, 3.0, 5.0, 7.0]), 2).tolist()
        [10.0, 14.0, 15.0, 21.0]
    """
    if not outer:
        return phi
    return (phi[..., :outer, None] * phi[..., None, outer:]).flatten(-2)


def cut(y: Tensor, codes: int) -> Tensor:
    """Return both halves of y [..., 2 C] as [..., 2, C], logits lower than the top by more than `DEPTH` raised to that.

    Shares below 1e-13 are denormal once multiplied, and a CPU is slow on those.
    """
    y = y.unflatten(-1, (2, codes))
    return torch.maximum(y, y.detach().amax(-1, keepdim=True) - DEPTH)


def code_shares(y: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Return softmax of both halves of y [..., 2 C] (`cut`), side by side, and the sum of their log sums [...]."""
    y = cut(y, codes)
    return y.softmax(-1).flatten(-2), y.logsumexp(-1).sum(-1)


def folded(grad: Tensor, phi: Tensor, outer: int) -> Tensor:
    """Turn the gradient of `expanded(phi, outer)` into that of phi."""
    if not outer:
        return grad
    grad = grad.unflatten(-1, (outer, -1))
    first = torch.matmul(grad, phi[..., outer:, None])[..., 0]
    second = torch.matmul(phi[..., None, :outer], grad)[..., 0, :]
    return torch.cat([first, second], dim=-1)


def width_of(columns: int, outer: int) -> int:
    """Return the number of features that `columns` of phi stand for."""
    return outer * (columns - outer) if outer else columns


def empty_state(
    rows: int, heads: int, key_width: int, value_width: int, features: int, *, window: int, sinks: int, like: Tensor,
    outer: int = 0,
) -> WindowState:  # fmt: skip
    """Return the state before the first token; slots have the dtype of `like`, the far state float32 or wider.

    `features` counts the columns of phi; `outer` of them are the first factor of products.

    Example:
        >>> empty_state(2, 3, 8, 8, 16, window=4, sinks=1, like=torch.zeros(())).keys.shape
        torch.Size([2, 3, 5, 8])
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    slots = window + sinks
    return WindowState(
        far=torch.zeros(rows, heads, width_of(features, outer), value_width + 1, dtype=wide, device=like.device),
        keys=like.new_zeros(rows, heads, slots, key_width),
        values=like.new_zeros(rows, heads, slots, value_width),
        features=like.new_zeros(rows, heads, slots, features),
        count=torch.zeros(rows, dtype=torch.int64, device=like.device),
    )


def _slots(start: int, stop: int, window: int, sinks: int, device: torch.device) -> Tensor:
    """Slots of the positions start .. stop-1, all >= sinks, at most `window` of them."""
    return (torch.arange(start, stop, device=device) - sinks) % max(window, 1) + sinks


def with_past(new: Tensor, past: Tensor, count: int, window: int, sinks: int) -> Tensor:
    """Put the keys still in the window (oldest first, sinks left out) before the new ones.

    Args:
        new: [B, Hk, T, X]. past: [B, Hk, s + w, X], slots of a state that has seen `count` tokens.
    """
    kept = min(window, max(count - sinks, 0))
    if not kept:
        return new
    index = _slots(count - kept, count, window, sinks, new.device)
    return torch.cat([past.index_select(2, index).to(new.dtype), new], dim=2)


def sink_rows(new: Tensor, past: Tensor, count: int, sinks: int) -> Tensor:
    """Return the sinks [B, Hk, s, X]; those that no new token sees yet hold anything finite, backends hide them."""
    if count >= sinks:
        return past[:, :, :sinks].to(new.dtype)
    index = torch.arange(sinks - count, device=new.device).clamp(max=new.shape[2] - 1)
    return torch.cat([past[:, :, :count].to(new.dtype), new.index_select(2, index)], dim=2)


def advanced(past: Tensor, new: Tensor, count: int, window: int, sinks: int) -> Tensor:
    """Return the slots after the new tokens [B, Hk, T, X] have been written into them.

    Slot i < s holds position i, slot i >= s the last position p < count + T with p = i modulo w. No branch depends on
    T, so that a tracer may keep it open.
    """
    slot = torch.arange(window + sinks, device=new.device)
    last = count + new.shape[2] - 1
    turns = torch.div(last - slot, max(window, 1), rounding_mode="floor").clamp(min=0) * window
    position = slot + torch.where(slot < sinks, 0, turns)
    fresh = (position >= count) & (position <= last)
    found = new.index_select(2, (position - count).clamp(0, new.shape[2] - 1))
    return torch.where(fresh[:, None], found.to(past.dtype), past)
