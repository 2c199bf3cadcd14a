"""Additive mixers by their decay: fixed per head (RetNet), per channel (GLA, HGRN-2), by a time step (Mamba-2)."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from lineament._base.backends import widest
from lineament.nn.config import MixerConfig
from lineament.nn.recurrent import Recurrent, Terms, spread_rates
from lineament.nn.state import State, widened


class Retention(Recurrent):
    """RetNet (arXiv:2307.08621): `log_decay_h = log(1 - 2^(-5-h))`, fixed."""

    def terms(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Terms:
        """Keep q, k and v."""
        return Terms(q, k, v, retention_decay(self.config.states, q).expand(*q.shape[:2], -1))


def retention_decay(heads: int, like: Tensor) -> Tensor:
    """Return RetNet's log decays [heads] in float32 or wider."""
    place = torch.arange(heads, device=like.device, dtype=widest(like.device))
    return torch.log1p(-(2.0 ** (-5.0 - place))).to(torch.promote_types(like.dtype, torch.float32))


class GatedLinear(Recurrent):
    """Gated linear attention (arXiv:2312.06635): `log_decay = logsigmoid(W_2 W_1 x) / temperature` per key channel.

    Args:
        config: the shape. rank: of the gate's projection. temperature: the larger, the slower the forgetting.
    """

    def __init__(self, config: MixerConfig, *, rank: int = 16, temperature: float = 16.0) -> None:
        super().__init__(config)
        self.temperature = temperature
        wide = config.states * config.key_width
        self.gate = nn.Sequential(nn.Linear(config.model_width, rank, bias=False), nn.Linear(rank, wide))

    def terms(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Terms:
        """Gate by x."""
        gate = logsigmoid(widened(self.gate(x))) / self.temperature
        return Terms(q, k, v, gate.unflatten(-1, (-1, self.config.key_width)))


class LowerBounds(nn.Module):
    """How much each layer may not forget: `gamma_l = sum_{0 < i <= l} softmax(Gamma)_i`, 0 at the bottom, rising.

    One table serves a model (`share_lower_bounds_`); its row is the absolute layer index, also in hybrids. Every layer
    calls this module, so that FSDP may gather the table for each: as a unit of its own, not as part of a block's.

    Args:
        layers, width: L and the channels of a layer.
    """

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.empty(layers, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let the bounds rise evenly."""
        nn.init.zeros_(self.logits)

    def forward(self, layer: int) -> Tensor:
        """Return gamma of a layer, [width] in float32 or wider."""
        return widened(self.logits).softmax(0)[1 : layer + 1].sum(0)


class ForgetGate(nn.Module):
    """HGRN's gate (arXiv:2311.04823): `f = gamma_l + (1 - gamma_l) sigma(z)`, from logits z.

    Args:
        width: channels. layer, layers: the layer's place l of L, counted over all layers of the model.
    """

    def __init__(self, width: int, layer: int, layers: int) -> None:
        super().__init__()
        self.layer, self.bounds = layer, LowerBounds(layers, width)
        self.borrowed: tuple[LowerBounds, ...] = ()  # another gate's table, which only that gate saves

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return log f and 1 - f of logits z [.., H, K]."""
        z = widened(z)
        bounds = self.borrowed[0] if self.borrowed else self.bounds
        bound = bounds(self.layer).view(z.shape[-2:])
        if self.layer:
            return bounded_forget(z, bound)
        return bounded_forget(z + bound if torch.is_grad_enabled() else z, None)  # 0: every step reads every parameter


def bounded_forget(z: Tensor, bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return log f and 1 - f of `f = bound + (1 - bound) sigma(z)`; None bounds by nothing."""
    if bound is None:
        return logsigmoid(z), torch.sigmoid(-z)
    return torch.logaddexp(bound.log(), torch.log1p(-bound) + logsigmoid(z)), (1 - bound) * torch.sigmoid(-z)


def share_lower_bounds_(model: nn.Module) -> bool:
    """Let all forget gates of a model use one table, that of the first; say whether there is one."""
    gates = [module for module in model.modules() if isinstance(module, ForgetGate)]
    for gate in gates[1:]:
        gate.bounds, gate.borrowed = None, (gates[0].bounds,)
    return bool(gates)


class HGRN2(Recurrent):
    """HGRN-2 (arXiv:2404.07904): decay f per key channel and the tied key 1 - f; `k` holds the logits of f.

    Args:
        config: the shape. layer, layers: the layer's place, for the gate's lower bound.
    """

    def __init__(self, config: MixerConfig, *, layer: int = 0, layers: int = 1) -> None:
        super().__init__(config)
        self.forget = ForgetGate(config.key_heads * config.key_width, layer, layers)

    def terms(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Terms:
        """Turn the logits k into decay and key."""
        log_decay, key = self.forget(k)
        return Terms(q, key, v, log_decay)


class StateSpace(Recurrent):
    """Mamba-2's SSD (arXiv:2405.21060): `S <- e^(-A dt) S + B (dt x)^T`, `o = S^T C + skip x`; q is C, k is B, v is x.

    Args:
        config: the shape: heads = key_heads = groups of B and C, value_heads = heads of x, K = N, V = P.
        limit: the largest time step (the same in prefill and decoding).
    """

    def __init__(self, config: MixerConfig, *, limit: float = math.inf) -> None:
        super().__init__(config)
        self.limit = limit
        self.step = nn.Linear(config.model_width, config.states, bias=False)
        self.step_bias = nn.Parameter(torch.empty(config.states))
        self.log_rate = nn.Parameter(torch.empty(config.states))
        self.skip = nn.Parameter(torch.empty(config.out_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set rates 1 to H, time steps from 1e-3 to 0.1 and the skip 1."""
        with torch.no_grad():
            self.step_bias.copy_(spread_rates(self.step_bias))
            self.log_rate.copy_(torch.arange(1, len(self.log_rate) + 1).log())
            self.skip.fill_(1.0)

    def terms(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Terms:
        """Multiply v by its time step."""
        dt = softplus(widened(self.step(x)) + widened(self.step_bias)).clamp(max=self.limit)
        return Terms(q, k, v * dt[..., None], -widened(self.log_rate).exp() * dt)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, cu_seqlens: Tensor | None = None, state: State = None
    ) -> tuple[Tensor, State]:
        """See `HeadMixer`."""
        o, state = super().forward(q, k, v, x=x, cu_seqlens=cu_seqlens, state=state)
        own = v if v.shape[2] == o.shape[2] else v.repeat_interleave(o.shape[2] // v.shape[2], 2)
        return (o + own * self.skip[:, None]).to(v.dtype), state
