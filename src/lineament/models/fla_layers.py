"""Mixing layers of flash-linear-attention's checkpoints, under its own parameter names, on this library's operators.

Written from the papers' equations and from the names and shapes of fla's configuration classes. A layer makes the
recurrence's `Terms`; convolutions, norm, gate, cache and packing are the same in all.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, logsigmoid, silu, softplus
from transformers.activations import ACT2FN

from lineament._base.errors import InputError
from lineament.nn import KeyValues, MixerCache, Rows, ShortConv, causal_softmax
from lineament.nn.decays import bounded_forget, retention_decay
from lineament.nn.mixer import unit
from lineament.nn.positions import rotate
from lineament.nn.recurrent import Terms, recur, spread_rates
from lineament.nn.rows import beginnings, positions
from lineament.nn.state import widened
from lineament.ops import windowed_linear_attention


class Conv(ShortConv):
    """A short convolution whose weight is laid out as in `nn.Conv1d`: [C, 1, W], the current token last."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, width, identity=False)
        self.weight = nn.Parameter(torch.empty(channels, 1, width).uniform_(-(width**-0.5), width**-0.5))

    def reset_parameters(self) -> None:
        """Leave the weight as it was made."""

    def taps(self) -> Tensor:
        return self.weight[:, 0].flip(-1).T


class GatedNorm(nn.Module):
    """`o / rms(o) * weight * act(gate)` over the last axis."""

    def __init__(self, width: int, eps: float, activation: str = "silu") -> None:
        super().__init__()
        self.weight, self.eps, self.act = nn.Parameter(torch.ones(width)), eps, ACT2FN[activation]

    def forward(self, o: Tensor, gate: Tensor) -> Tensor:
        wide = widened(o)
        wide = wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight
        return (wide * self.act(widened(gate))).to(o.dtype)


class Layer(nn.Module):
    """What fla's linear layers share: three projections, convolutions, a recurrence, an output projection.

    Attributes:
        names: of the three inputs, as in "q_proj" and "q_conv1d". activation: behind each convolution (or in its
            place), None for none.
    """

    names = ("q", "k", "v")
    activation: Any = staticmethod(silu)

    def __init__(self, config: Any, layer: int, widths: tuple[int, int, int], value_width: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        for name, width in zip(self.names, widths, strict=True):
            setattr(self, f"{name}_proj", nn.Linear(config.hidden_size, width, bias=False))
            if config.use_short_conv:
                setattr(self, f"{name}_conv1d", Conv(width, config.conv_size))
        self.o_proj = nn.Linear(value_width, config.hidden_size, bias=False)

    def terms(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Terms:
        """Make the recurrence's inputs of x [B, T, D], the three projections [B, T, width] and positions [B, T]."""
        raise NotImplementedError

    def finished(self, o: Tensor, x: Tensor) -> Tensor:
        """Norm and gate o [B, T, H, V]; returns [B, T, H V]."""
        raise NotImplementedError

    def forward(self, x: Tensor, *, cache: MixerCache | None = None, rows: Rows | None = None) -> Tensor:
        """Map [B, T, D] to [B, T, D]; protocol of `nn.Mixer`."""
        packed, cu = (x, None) if rows is None else (rows.pack(x), rows.cu_seqlens)
        count, position = placed(packed, cache, cu)
        parts = [getattr(self, f"{name}_proj")(packed) for name in self.names]
        if self.config.use_short_conv:
            parts = self._convolved(parts, cache, cu)
        if self.activation is not None:
            parts = [self.activation(part) for part in parts]
        terms = self.terms(packed, parts[0], parts[1], parts[2], position)
        o, state = recur(terms, state=None if cache is None else cache.filling, cu_seqlens=cu)
        if cache is not None:
            cache.filling, cache.count = state, count + (packed.shape[1] if cu is None else cu.diff())
        y = self.o_proj(self.finished(o.to(x.dtype), packed))
        return y if rows is None else rows.unpack(y)

    def _convolved(self, parts: list[Tensor], cache: MixerCache | None, cu: Tensor | None) -> list[Tensor]:
        widths = [part.shape[-1] for part in parts]
        old = None if cache is None or cache.tail is None else cache.tail.split(widths, dim=-1)
        done = [
            getattr(self, f"{name}_conv1d")(part, None if old is None else old[i], cu)
            for i, (name, part) in enumerate(zip(self.names, parts, strict=True))
        ]
        if cache is not None:
            cache.tail = torch.cat([tail for _, tail in done], dim=-1)
        return [y for y, _ in done]


def placed(x: Tensor, cache: MixerCache | None, cu: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the tokens seen before by each row or document, and every token's position."""
    count = cache.count if cache is not None else None
    if count is None:
        count = beginnings(len(x) if cu is None else len(cu) - 1, x.device)
    return count, positions(x.shape[1], cu, count)


class Additive(Layer):
    """GLA's and RetNet's frame: grouped key-value heads, a gated norm per head."""

    activation = None

    def __init__(self, config: Any, layer: int) -> None:
        heads, groups = config.num_heads, config.num_heads // (config.num_kv_heads or config.num_heads)
        keys, values = int(config.hidden_size * config.expand_k), int(config.hidden_size * config.expand_v)
        super().__init__(config, layer, (keys, keys // groups, values // groups), values)
        self.K, self.V, self.keys = keys // heads, values // heads, keys // groups
        self.feature = None if config.feature_map is None else ACT2FN[config.feature_map]
        if config.use_short_conv:
            self.activation = silu
        if config.use_output_gate:
            self.g_proj = nn.Linear(config.hidden_size, values, bias=False)
        fused = config.use_output_gate and config.fuse_norm and config.hidden_act == "swish"
        norm = GatedNorm if fused else nn.RMSNorm
        self.norm_name = "g_norm_swish_gate" if fused else "g_norm"
        setattr(self, self.norm_name, norm(self.V, config.norm_eps))

    def heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x.unflatten(-1, (-1, width)) for x, width in ((q, self.K), (k, self.K), (v, self.V)))
        return (q, k, v) if self.feature is None else (self.feature(q), self.feature(k), v)

    def finished(self, o: Tensor, x: Tensor) -> Tensor:
        norm = self.get_submodule(self.norm_name)
        if not self.config.use_output_gate:
            return norm(o).flatten(2)
        gate = self.get_submodule("g_proj")(x)
        if isinstance(norm, GatedNorm):
            return norm(o, gate.unflatten(-1, (-1, self.V))).flatten(2)
        return norm(o).flatten(2) * ACT2FN[self.config.hidden_act](gate)


class Gla(Additive):
    """Gated linear attention (arXiv:2312.06635)."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        rank = getattr(config, "gate_low_rank_dim", 16)
        self.gk_proj = nn.Sequential(nn.Linear(config.hidden_size, rank, bias=False), nn.Linear(rank, self.keys))

    def terms(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Terms:
        q, k, v = self.heads(q, k, v)
        gate = logsigmoid(widened(self.gk_proj(x))).unflatten(-1, (-1, self.K)) / 16
        if self.config.clamp_min is not None:
            gate = gate.clamp(min=self.config.clamp_min)
        return Terms(q * self.K**-0.5, k, v, gate)


class Retention(Additive):
    """Retention (arXiv:2307.08621) with rotary positions."""

    def terms(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Terms:
        q, k, v = self.heads(q, k, v)
        q, k = rotate(q, position, 1e4), rotate(k, position, 1e4)
        groups = q.shape[2] // k.shape[2]  # every query head has its own decay, so key heads are repeated
        k, v = (y.repeat_interleave(groups, dim=2) for y in (k, v))
        return Terms(q * self.K**-0.5, k, v, retention_decay(q.shape[2], x).expand(*q.shape[:3]))


class Hgrn2(Layer):
    """HGRN-2 (arXiv:2404.07904); the model sets `lower_bound` [D] before it calls, None at the bottom."""

    names = ("q", "f", "i")
    activation = None
    lower_bound: Tensor | None = None

    def __init__(self, config: Any, layer: int) -> None:
        width = config.expand_ratio or config.hidden_size // config.num_heads
        heads = config.hidden_size // width
        super().__init__(config, layer, (heads * width, heads * width, config.hidden_size), config.hidden_size)
        self.K, self.V = width, config.hidden_size // heads
        self.g_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the bound of the last call: it hangs in that call's graph, and can't be copied."""
        return {name: value for name, value in super().__getstate__().items() if name != "lower_bound"}

    def terms(self, x: Tensor, q: Tensor, f: Tensor, i: Tensor, position: Tensor) -> Terms:
        log_keep, write = bounded_forget(widened(f), self.lower_bound if self.layer > 0 else None)
        q, k, gate = (y.unflatten(-1, (-1, self.K)) for y in (silu(q), write, log_keep))
        return Terms(q * self.K**-0.5, k, i.unflatten(-1, (-1, self.V)), gate)

    def finished(self, o: Tensor, x: Tensor) -> Tensor:
        return self.g_norm(o.flatten(2))


class DeltaNet(Layer):
    """DeltaNet (arXiv:2406.06484); negative eigenvalues where `allow_neg_eigval`."""

    def __init__(self, config: Any, layer: int) -> None:
        keys, values = int(config.hidden_size * config.expand_k), int(config.hidden_size * config.expand_v)
        super().__init__(config, layer, (keys, keys, values), values)
        self.K, self.V = keys // config.num_heads, values // config.num_heads
        self.activation = None
        if config.use_beta:
            self.b_proj = nn.Linear(config.hidden_size, config.num_heads, bias=False)
        if config.use_gate:
            self.g_proj = nn.Linear(config.hidden_size, values, bias=False)
        self.o_norm = (GatedNorm if config.use_gate else nn.RMSNorm)(self.V, config.norm_eps)

    def terms(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Terms:
        act = {"silu": silu, "relu": torch.relu, "elu": lambda y: elu(y) + 1, "identity": lambda y: y}
        if self.config.qk_activation not in act or self.config.qk_norm not in ("l2", "sum"):
            raise InputError(
                f"qk_activation={self.config.qk_activation!r}, qk_norm={self.config.qk_norm!r} are unknown"
            )
        q, k = (widened(act[self.config.qk_activation](y)).unflatten(-1, (-1, self.K)) for y in (q, k))
        q, k = (unit(y) if self.config.qk_norm == "l2" else y / y.sum(-1, keepdim=True) for y in (q, k))
        beta = widened(self.b_proj(x)).sigmoid() if self.config.use_beta else torch.ones_like(q[..., 0])
        beta = beta * 2 if self.config.allow_neg_eigval else beta
        return Terms(q * self.K**-0.5, k, silu(v).unflatten(-1, (-1, self.V)), None, beta)

    def finished(self, o: Tensor, x: Tensor) -> Tensor:
        if not self.config.use_gate:
            return self.o_norm(o).flatten(2)
        return self.o_norm(o, self.g_proj(x).unflatten(-1, (-1, self.V))).flatten(2)


class GatedDelta(Layer):
    """Gated DeltaNet (arXiv:2412.06464): a decay per value head by a time step."""

    def __init__(self, config: Any, layer: int) -> None:
        self.K, self.V = config.head_dim, int(config.head_dim * config.expand_v)
        self.Hv = config.num_v_heads or config.num_heads
        keys, values = config.num_heads * self.K, self.Hv * self.V
        super().__init__(config, layer, (keys, keys, values), values)
        self.b_proj = nn.Linear(config.hidden_size, self.Hv, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.Hv).uniform_(1, 16).log())
        self.gates(config, values)

    def gates(self, config: Any, values: int) -> None:
        """Make what differs between a decay per head and one per channel."""
        self.a_proj = nn.Linear(config.hidden_size, self.Hv, bias=False)
        self.dt_bias = nn.Parameter(spread_rates(torch.empty(self.Hv)))
        if config.use_gate:
            self.g_proj = nn.Linear(config.hidden_size, values, bias=False)
        self.o_norm = (GatedNorm if config.use_gate else nn.RMSNorm)(self.V, config.norm_eps)

    def log_decay(self, x: Tensor) -> Tensor:
        return -widened(self.A_log).exp() * softplus(widened(self.a_proj(x)) + widened(self.dt_bias))

    def terms(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Terms:
        q, k = (unit(widened(y).unflatten(-1, (-1, self.K))) for y in (q, k))
        beta = widened(self.b_proj(x)).sigmoid() * (2 if self.config.allow_neg_eigval else 1)
        return Terms(q * self.K**-0.5, k, v.unflatten(-1, (-1, self.V)), self.log_decay(x), beta)

    def finished(self, o: Tensor, x: Tensor) -> Tensor:
        if not hasattr(self, "g_proj"):
            return self.o_norm(o).flatten(2)
        return self.o_norm(o, self.g_proj(x).unflatten(-1, (-1, self.V))).flatten(2)


class Kda(GatedDelta):
    """Kimi delta attention (arXiv:2510.26692): a decay per key channel through a bottleneck, a sigmoid gate."""

    def gates(self, config: Any, values: int) -> None:
        D, V = config.hidden_size, self.V
        self.f_proj = nn.Sequential(nn.Linear(D, V, bias=False), nn.Linear(V, self.Hv * self.K, bias=False))
        self.dt_bias = nn.Parameter(spread_rates(torch.empty(self.Hv * self.K)))
        self.g_proj = nn.Sequential(nn.Linear(D, V, bias=False), nn.Linear(V, values))
        self.o_norm = GatedNorm(V, config.norm_eps, "sigmoid")

    def log_decay(self, x: Tensor) -> Tensor:
        rate = widened(self.A_log).exp()[:, None]
        step = (widened(self.f_proj(x)) + widened(self.dt_bias)).unflatten(-1, (self.Hv, self.K))
        bound = self.config.lower_bound
        return -rate * softplus(step) if bound is None else bound * (rate * step).sigmoid()


class Softmax(nn.Module):
    """The full-attention (or sliding-window) layer of fla's hybrids."""

    def __init__(self, config: Any, spec: dict[str, Any]) -> None:
        super().__init__()
        D, heads = config.hidden_size, spec["num_heads"]
        self.K, self.window, self.theta = D // heads, spec.get("window_size"), spec.get("rope_theta", 1e4)
        kept, bias = (spec.get("num_kv_heads") or heads) * self.K, bool(spec.get("qkv_bias", False))
        self.q_proj, self.o_proj = nn.Linear(D, D, bias=bias), nn.Linear(D, D, bias=False)
        self.k_proj, self.v_proj = nn.Linear(D, kept, bias=bias), nn.Linear(D, kept, bias=bias)

    def forward(self, x: Tensor, *, cache: MixerCache | None = None, rows: Rows | None = None) -> Tensor:
        """Map [B, T, D] to [B, T, D]; protocol of `nn.Mixer`."""
        packed, cu = (x, None) if rows is None else (rows.pack(x), rows.cu_seqlens)
        count, position = placed(packed, cache, cu)
        q, k, v = (proj(packed).unflatten(-1, (-1, self.K)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, position, self.theta) * self.K**-0.5, rotate(k, position, self.theta)
        if cache is not None:
            cache.count = count + (packed.shape[1] if cu is None else cu.diff())
        if self.window is not None:
            at: dict[str, Any] = {"window": self.window, "sinks": 0, "cu_seqlens": cu}
            state = None if cache is None else cache.filling
            o, state = windowed_linear_attention(q, k, v, None, None, None, state=state, **at)
            if cache is not None:
                cache.filling = state
            y = self.o_proj(o.flatten(2))
            return y if rows is None else rows.unpack(y)
        if rows is not None:
            q, k, v = (rows.unpack(part) for part in (q, k, v))
        if cache is not None and cache.full is None:
            cache.full = KeyValues()
        return self.o_proj(causal_softmax(q, k, v, rows=rows, past=None if cache is None else cache.full).flatten(2))
