"""Exact softmax on the last w and first s tokens, feature maps elsewhere: `hedgehog-window` and its relatives."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import unknown
from lineament.nn.config import MixerConfig
from lineament.nn.feature_maps import FEATURE_MAPS, Hedgehog, Product
from lineament.nn.folded import Folded, fold_gates
from lineament.nn.state import State, widened
from lineament.ops.window import lolcats_attention, lolcats_step_, windowed_linear_attention, windowed_step_
from lineament.ops.window_fused import product_step_, refused
from lineament.ops.window_state import cut

TINY = 1e-30  # under a logarithm
QUIET = -12.0  # log scale of an uncalibrated far part, in nats beside logits of order 1: a no-op to four digits


def stepping(length: int, state: State) -> bool:
    """Say whether a call is one token of decoding, which may change its state in place."""
    return length == 1 and state is not None and not torch.is_grad_enabled()


class HedgehogWindow(nn.Module):
    """One softmax denominator over exact weights near and feature-map weights far, on one common scale.

    `weight = e^s` on the last `window` and first `sinks` tokens, `e^lambda(q) g(k_j) phi(q).phi(k_j)` elsewhere.
    Starts quiet: lambda is `log_scale` per head, so low that the layer is its window and sinks. `-inf` is off exactly.

    Args:
        config: the shape. map: a key of `FEATURE_MAPS` (not cosformer). features, form, bias, temperature: the
            map's own (see `Hedgehog`). codes: of the map "product", whose lambda counts from its own log sums; `build`
            also takes a list, one number per key head of the layer.
        key_gate: learn `g(k) = e^{w.k + b}` per key head (w = b = 0 at the start).
        query_scale: learn lambda per query, `u.q + b` (u = 0 at the start), not only b per head.
        decay: learn one log decay per key head for the far state.
        log_scale: where b starts, a number or one per query head.
    """

    def __init__(
        self,
        config: MixerConfig,
        *,
        map: str = "hedgehog",
        form: str = "softmax",
        features: int | None = None,
        temperature: bool = True,
        bias: bool = False,
        codes: int = 16,
        key_gate: bool = True,
        query_scale: bool = False,
        decay: bool = False,
        log_scale: float | Sequence[float] = QUIET,
    ) -> None:
        super().__init__()
        self.config, self.start = config, log_scale
        if map == "cosformer" or map not in FEATURE_MAPS:
            raise unknown("feature map of a window's far part", map, [m for m in FEATURE_MAPS if m != "cosformer"])
        own = {"features": features, "form": form, "temperature": temperature, "bias": bias}
        own = own if map == "hedgehog" else {"codes": codes} if map == "product" else {}
        self.outer = codes if map == "product" else 0
        K, Hq, Hk = config.key_width, config.heads, config.key_heads
        self.map_q, self.map_k = FEATURE_MAPS[map](Hq, K, **own), FEATURE_MAPS[map](Hk, K, **own)
        self.root = K**0.25
        self.log_scale = nn.Parameter(torch.empty(Hq))
        self.scale_query = nn.Parameter(torch.empty(Hq, K)) if query_scale else None
        self.gate_key = nn.Parameter(torch.empty(Hk, K)) if key_gate else None
        self.gate_bias = nn.Parameter(torch.empty(Hk)) if key_gate else None
        self.decay = nn.Parameter(torch.empty(Hk)) if decay else None
        self._folds = map == "product" or (isinstance(self.map_q, Hedgehog) and form == "softmax")
        self._folded = Folded()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the far part a quiet no-op with a decay of 3e-4 nats a token."""
        with torch.no_grad():
            self.log_scale.copy_(torch.as_tensor(self.start, dtype=self.log_scale.dtype))
            for p in (self.scale_query, self.gate_key, self.gate_bias):
                if p is not None:
                    p.zero_()
            if self.decay is not None:
                self.decay.fill_(-8.0)

    def gates(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return phi(q), g(k) phi(k), lambda [.., Hq] and the log decay [.., Hk] (or None)."""
        log_scale = self.log_scale
        if isinstance(self.map_q, Product) and isinstance(self.map_k, Product):
            phi_q, total = self.map_q.factors(q * self.root)
            phi_k, log_scale = self.map_k.factors(k / self.root)[0], log_scale + total
        else:
            phi_q, phi_k = self.map_q(q * self.root), self.map_k(k / self.root)
        if self.gate_key is not None and self.gate_bias is not None:
            gate = ((widened(k) * self.gate_key).sum(-1) + self.gate_bias).exp()
            phi_k = self._gated(phi_k, gate)
        if self.scale_query is not None:
            log_scale = log_scale + (widened(q) * self.scale_query).sum(-1)
        log_decay = None
        if self.decay is not None:
            log_decay = -nn.functional.softplus(widened(self.decay)).expand(k.shape[:-1])
        return phi_q, phi_k, log_scale, log_decay

    def _gated(self, phi_k: Tensor, gate: Tensor) -> Tensor:
        """Multiply a key's features by its gate; of a product one factor."""
        gate = gate[..., None].to(phi_k.dtype)
        if not self.outer:
            return phi_k * gate
        return torch.cat([phi_k[..., : self.outer] * gate, phi_k[..., self.outer :]], dim=-1)

    def log_weights(self, q: Tensor, k: Tensor, rows: Tensor, *, sinks: int | None = None) -> Tensor:
        """Return the log of every weight before division, dense: what a transfer compares with the teacher's logits.

        Args:
            q: [B, R, Hq, K], scaled queries at the positions `rows` [R]. k: [B, T, Hk, K].
            sinks: tokens at the start that are exact; None for as many as the layer has.

        Returns:
            [B, Hq, R, T], -inf in the future.
        """
        phi_q, phi_k, log_scale, log_decay = self.gates(q, k)
        groups, n = q.shape[2] // k.shape[2], torch.arange(k.shape[1], device=k.device)
        q, k, phi_q, phi_k = (x.transpose(1, 2) for x in (q, k, phi_q, phi_k))
        k, phi_k = (x.repeat_interleave(groups, 1) for x in (k, phi_k))
        near = widened(q @ k.mT)
        if self.outer:
            halves = zip(phi_q.split(self.outer, -1), phi_k.split(self.outer, -1), strict=True)
            far = sum(widened(a @ b.mT).clamp_min(TINY).log() for a, b in halves)
        else:
            far = widened(phi_q @ phi_k.mT).clamp_min(TINY).log()
        far = far + widened(log_scale.expand(*q.shape[:1], q.shape[2], q.shape[1])).transpose(1, 2)[..., None]
        age = rows[:, None] - n
        if log_decay is not None:
            per_head = log_decay[:, :1].repeat_interleave(groups, 2).transpose(1, 2)[..., None]
            far = far + per_head * (age - self.config.window).clamp_min(0)
        exact = (age < self.config.window) | (n < (self.config.sinks if sinks is None else sinks))
        return torch.where(exact, near, far).masked_fill(age < 0, -torch.inf)

    def step_gates(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return what `gates` does for one token, q [B, Hq, K] and k [B, Hk, K], by one product.

        Of a product map's query come the logits of its codes and lambda without their log sums.
        """
        weight, bias, log_decay = self._once()
        heads, key_heads, width = q.shape[1], k.shape[1], weight.shape[2] - 1
        x = torch.cat((q, k), 1).transpose(0, 1)
        y = torch.baddbmm(bias, x if x.dtype == weight.dtype else x.to(weight.dtype), weight).transpose(0, 1)
        half, gate = y.narrow(2, 0, width), y.select(2, width)
        if self.outer:
            half = cut(half, self.outer)
            phi_q, phi_k = half.narrow(1, 0, heads), half.narrow(1, heads, key_heads).softmax(-1)
            written = phi_k.select(2, 0)
        else:
            phi = torch.stack((half, half.neg()), 2).softmax(-1)
            phi_q, phi_k = phi.narrow(1, 0, heads), phi.narrow(1, heads, key_heads)
            written = phi_k
        if self.gate_key is not None:
            written.mul_(gate.narrow(1, heads, key_heads).exp().view(*k.shape[:2], *[1] * (written.dim() - 2)))
        decay = log_decay.expand(k.shape[:-1]) if self.decay is not None else None
        return phi_q.flatten(2), phi_k.flatten(2), gate.narrow(1, 0, heads), decay

    def _once(self) -> tuple[Tensor, ...]:
        q, k = self.map_q, self.map_k
        watched = (
            self.log_scale, self.scale_query, self.gate_key, self.gate_bias, self.decay, q.weight, q.bias,
            k.weight, k.bias, getattr(q, "temperature", None), getattr(k, "temperature", None),
        )  # fmt: skip
        return self._folded.get(watched, self._fold)

    def _fold(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k = self.map_q, self.map_k
        none_q, none_k = (self.log_scale.new_zeros(m.weight.shape[:2]) for m in (q, k))
        factors, biases = [], []
        for m, root in ((q, self.root), (k, 1 / self.root)):
            temperature = getattr(m, "temperature", None)
            heat = widened(self.log_scale.new_ones(m.weight.shape[0]) if temperature is None else temperature.exp())
            factors.append(heat * root)
            biases.append(None if m.bias is None else widened(m.bias) * heat[:, None])
        weight, bias = fold_gates(
            (widened(q.weight), widened(k.weight)),
            (factors[0], factors[1]),
            (biases[0], biases[1]),
            (
                widened(none_q if self.scale_query is None else self.scale_query),
                widened(none_k if self.gate_key is None else self.gate_key),
            ),
            (
                widened(self.log_scale),
                widened(none_k[:, 0] if self.gate_bias is None else self.gate_bias),
            ),
        )
        decay = none_k[:, 0] if self.decay is None else -nn.functional.softplus(widened(self.decay))
        return weight, bias, decay

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, cu_seqlens: Tensor | None = None, state: State = None
    ) -> tuple[Tensor, State]:
        """See `HeadMixer`."""
        near: dict[str, Any] = {"window": self.config.window, "sinks": self.config.sinks}
        if cu_seqlens is None and stepping(q.shape[1], state):
            q, k, v = q.select(1, 0), k.select(1, 0), v.select(1, 0)
            if self.outer and self.config.window and self.decay is None and refused(state, q, k, v) is None:
                weight, bias, _ = self._once()
                return product_step_(q, k, v, weight, bias, state, **near).unsqueeze(1), state
            phi_q, phi_k, scale, log_decay = self.step_gates(q, k) if self._folds else self.gates(q, k)
            o = windowed_step_(
                q, k, v, phi_q, phi_k, scale, state, log_decay=log_decay, outer=self.outer, logits=bool(self.outer),
                **near,
            )  # fmt: skip
            return o.unsqueeze(1), state
        self._folded.forget()
        phi_q, phi_k, log_scale, log_decay = self.gates(q, k)
        return windowed_linear_attention(
            q, k, v, phi_q, phi_k, log_scale, log_decay=log_decay, outer=self.outer, state=state,
            cu_seqlens=cu_seqlens, **near,
        )  # fmt: skip


class SoftmaxWindow(nn.Module):
    """Window and sinks, nothing far: the baseline that a far part must beat at equal bytes. No parameters."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, cu_seqlens: Tensor | None = None, state: State = None
    ) -> tuple[Tensor, State]:
        """See `HeadMixer`."""
        near: dict[str, Any] = {"window": self.config.window, "sinks": self.config.sinks}
        if cu_seqlens is None and stepping(q.shape[1], state):
            return windowed_step_(q[:, 0], k[:, 0], v[:, 0], None, None, None, state, **near)[:, None], state
        return windowed_linear_attention(q, k, v, None, None, None, state=state, cu_seqlens=cu_seqlens, **near)


class Lolcats(nn.Module):
    """The published form: `gamma e^(s-c)` on the window, Hedgehog features beyond it on a scale of their own, no sinks.

    Args:
        config: the shape; `sinks` is not used. gamma: where the window's learned share per head starts.
        features: D' of the map.
    """

    def __init__(self, config: MixerConfig, *, gamma: float = 0.1, features: int | None = None) -> None:
        super().__init__()
        self.config, self.gamma, self.root = config, gamma, config.key_width**0.25
        self.map_q = FEATURE_MAPS["hedgehog"](config.heads, config.key_width, features=features)
        self.map_k = FEATURE_MAPS["hedgehog"](config.key_heads, config.key_width, features=features)
        self.window_logit = nn.Parameter(torch.empty(config.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every head's share to gamma."""
        with torch.no_grad():
            self.window_logit.fill_(math.log(self.gamma / (1 - self.gamma)))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, cu_seqlens: Tensor | None = None, state: State = None
    ) -> tuple[Tensor, State]:
        """See `HeadMixer`."""
        phi_q, phi_k = self.map_q(q * self.root), self.map_k(k / self.root)
        log_gamma = nn.functional.logsigmoid(widened(self.window_logit))
        if cu_seqlens is None and stepping(q.shape[1], state):
            q, k, v, phi_q, phi_k = (part[:, 0] for part in (q, k, v, phi_q, phi_k))
            o = lolcats_step_(q, k, v, phi_q, phi_k, log_gamma, state, window=self.config.window)
            return o[:, None], state
        return lolcats_attention(
            q, k, v, phi_q, phi_k, log_gamma, window=self.config.window, state=state, cu_seqlens=cu_seqlens
        )


@torch.no_grad()
def quiet_log_scale(q: Tensor, k: Tensor, *, window: int, sinks: int, share: float = 1e-3) -> Tensor:
    """Return per query head the log scale at which the far part's share stays below `share` everywhere.

    `min over queries of logsumexp over the exact set - log(2T) + log(share)`: softmax halves give `phi.phi <= 2`.

    Args:
        q: [B, T, Hq, K], scaled. k: [B, T, Hk, K]. Rows are single documents without padding.

    Returns:
        [Hq], float32.
    """
    T, Hq = q.shape[1:3]
    groups = Hq // k.shape[2]
    n = torch.arange(T, device=q.device)
    exact = (n <= n[:, None]) & ((n > n[:, None] - window) | (n < sinks))
    lowest = []
    for h in range(Hq):
        logits = q[:, :, h].float() @ k[:, :, h // groups].float().mT
        lowest.append(logits.masked_fill(~exact, -torch.inf).logsumexp(-1).min())
    return torch.stack(lowest) - math.log(2 * T) + math.log(share)
