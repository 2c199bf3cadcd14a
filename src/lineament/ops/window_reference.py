"""Windowed attention as its definition says: every weight of a dense [T, keys] matrix, in plain operators."""

from collections.abc import Callable

import torch
from torch import Tensor

from lineament._base.backends import widest
from lineament.ops.window_state import WindowCall, expanded

HEADROOM = 40.0  # nats that the far part's logit may raise the common scale above the exact part's largest logit
CEILING = 100.0  # nats beyond which the far part's logit is cut: the exact part then weighs less than 1e-26


def common_scale(top: Tensor, log_scale: Tensor, exp: Callable[[Tensor], Tensor] = torch.exp) -> tuple[Tensor, Tensor]:
    """Return (c - top, e^(lambda - c)) for the common scale c = max(top, lambda), safe where lambda is -inf or huge.

    c cancels in the quotient, so it's held at top + 40 at most: the exact part then never underflows, and a query whose
    far state is still empty reads its window even if lambda is far above its logits. `exp` is torch.exp2 where the
    logits are in base 2.
    """
    gap = (log_scale - top).clamp(max=CEILING)
    lift = gap.detach().clamp(0, HEADROOM)
    return lift, exp(gap - lift)


def run(call: WindowCall) -> tuple[Tensor, Tensor]:
    """Return o [B, T, Hq, V] and the far state after the last token."""
    groups = call.q.shape[2] // call.k.shape[1]
    wide = call.far.dtype
    phi_q, phi_k = (expanded(x.to(wide), call.outer) for x in (call.phi_q, call.phi_k))
    q, phi_q = (x.transpose(1, 2).to(wide) for x in (call.q, phi_q))
    left_k = phi_k
    k, v, phi_k, sink_k, sink_v, far = (
        x.to(wide).repeat_interleave(groups, 1) for x in (call.k, call.v, phi_k, call.sink_k, call.sink_v, call.far)
    )
    T, window = q.shape[2], call.window
    n = call.count + torch.arange(T, device=q.device)[:, None]
    j = call.count - call.prefix + torch.arange(k.shape[2], device=q.device)
    exact = (n - window < j) & (j <= n) & (j >= call.sinks)
    seen = torch.arange(sink_k.shape[2], device=q.device) <= n
    logits = torch.cat([q @ sink_k.mT, q @ k.mT], dim=-1)
    logits = logits.masked_fill(~torch.cat([seen, exact], dim=-1), -torch.inf)
    top = logits.max(-1, keepdim=True).values
    if not call.relative:
        top = top.detach()  # c cancels, so no gradient passes through it
    log_scale = call.log_scale.transpose(1, 2)[..., None].to(wide)
    lift, near = common_scale(top.detach(), log_scale + top if call.relative else log_scale)
    weight = (logits - top.detach() - lift).exp()
    gone = (j <= n - window) & (j >= call.sinks)  # [T, L] keys in the far state when n reads
    clock = _clock(call).repeat_interleave(groups, 1)  # [B, Hq, T] log decay since the call began
    entered = (j + window - call.count).clamp(0, T - 1)  # the step at which key j enters the far state
    since = clock[..., :, None] - clock[..., entered][..., None, :]
    decay = since.masked_fill(~gone, -torch.inf).exp().to(wide)
    weight = weight + torch.nn.functional.pad((phi_q @ phi_k.mT) * decay * near, (sink_k.shape[2], 0))
    v1 = torch.nn.functional.pad(torch.cat([sink_v, v], dim=2), (0, 1), value=1.0)
    top_bottom = weight @ v1 + near * clock.exp().to(wide)[..., None] * (phi_q @ far)
    o = top_bottom[..., :-1] / top_bottom[..., -1:]
    left = decay[:, ::groups, -1, :, None] * left_k
    far = clock[:, ::groups, -1].exp().to(wide)[..., None, None] * call.far
    far = far + left.mT @ torch.nn.functional.pad(call.v.to(wide), (0, 1), value=1.0)
    return o.transpose(1, 2), far


def _clock(call: WindowCall) -> Tensor:
    """Inclusive running sum of the log decay, [B, Hk, T] in the widest float there is; zeros without one."""
    wide = widest(call.far.device)
    if call.log_decay is None:
        return call.far.new_zeros(*call.far.shape[:2], call.q.shape[1], dtype=wide)
    return call.log_decay.transpose(1, 2).to(wide).cumsum(-1)
