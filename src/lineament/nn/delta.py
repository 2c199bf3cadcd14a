"""Delta-rule fillings of a converted layer: `gated-deltanet` (one gate per head) and `kda` (one per key channel).

`S <- Diag(e^g) S`, `u = beta (v - S^T k)`, `S <- S + k u^T`, `o = S^T q`. Every part starts as near the identity as it
can: identity short convolution without activation, decay 1e-3 nats, beta 1/2, output gate 1, so that what the teacher
learned in its projections is what the state holds.
"""

import math
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from lineament._base.errors import unknown
from lineament.nn.config import MixerConfig
from lineament.nn.folded import Folded
from lineament.nn.recurrent import Terms, recur
from lineament.nn.short_conv import ShortConv
from lineament.nn.state import State, widened
from lineament.nn.windowed import stepping
from lineament.ops import compiled

NORMS = ("value", "query", "none")
OPENED = 1 / (1 + math.exp(-4.0))  # the output gate as it starts, which counts as 1


class DeltaState(NamedTuple):
    """A delta-rule layer's memory: S [B, Hk, K, V] and the last inputs of the short convolution (or None)."""

    memory: Tensor
    tail: Tensor | None


class DeltaHeads(nn.Module):
    """A delta-rule mixer over a teacher's q, k, v.

    Args:
        config: the shape.
        channels: a gate per key channel (KDA) instead of one per head (Gated DeltaNet).
        conv: taps of the short convolution over q, k and v; 0 for none.
        key_norm: k is normalised for the erase; its length goes to v per token ("value", writes stay exact), to q as
            a learned constant per head ("query", starts at 1: set it to the mean length), or nowhere ("none").
        rank: rank of the gates' projections (K if None). output_gate: gate the output by `sigma(W x + 4) / sigma(4)`.
        log_decay: where the decay starts, in nats a token.
    """

    backend = "auto"

    def __init__(
        self,
        config: MixerConfig,
        *,
        channels: bool = False,
        conv: int = 4,
        key_norm: str = "value",
        rank: int | None = None,
        output_gate: bool = True,
        log_decay: float = -1e-3,
    ) -> None:
        super().__init__()
        if key_norm not in NORMS:
            raise unknown("key_norm", key_norm, NORMS)
        self.config, self.channels, self.key_norm, self.start = config, channels, key_norm, log_decay
        Hq, Hk, K, V, D = config.heads, config.key_heads, config.key_width, config.value_width, config.model_width
        rank = rank or K
        self.conv = ShortConv(Hq * K + Hk * (K + V), conv) if conv else None
        self.decay_down = nn.Parameter(torch.empty(rank, D)) if channels else None
        self.decay_up = nn.Parameter(torch.empty(Hk * K, rank) if channels else torch.empty(Hk, D))
        self.decay_bias = nn.Parameter(torch.empty(Hk * K if channels else Hk))
        self.decay_rate = nn.Parameter(torch.empty(Hk))
        self.beta_weight, self.beta_bias = nn.Parameter(torch.empty(Hk, D)), nn.Parameter(torch.empty(Hk))
        self.key_length = nn.Parameter(torch.empty(Hk)) if key_norm == "query" else None
        self.gate_down = nn.Parameter(torch.empty(rank, D)) if output_gate else None
        self.gate_up = nn.Parameter(torch.empty(Hq * V, rank)) if output_gate else None
        self.gate_bias = nn.Parameter(torch.empty(Hq * V)) if output_gate else None
        self._folded = Folded()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the near-identity start."""
        with torch.no_grad():
            for p in (self.decay_up, self.decay_rate, self.beta_weight, self.beta_bias, self.gate_up):
                if p is not None:
                    p.zero_()
            self.decay_bias.fill_(math.log(math.expm1(-self.start)))
            for p in (self.decay_down, self.gate_down):
                if p is not None:
                    p.normal_(std=self.config.model_width**-0.5)
            if self.gate_bias is not None:
                self.gate_bias.fill_(4.0)
            if self.key_length is not None:
                self.key_length.fill_(1.0)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log decay [B, T, Hk] or [B, T, Hk, K] and beta [B, T, Hk] of inputs x [B, T, D], in float32."""
        f = linear(x, self.decay_down.to(x.dtype)) if self.decay_down is not None else x
        f = softplus(widened(linear(f, self.decay_up.to(x.dtype))) + widened(self.decay_bias))
        rate = widened(self.decay_rate).exp()
        if self.channels:
            f, rate = f.unflatten(-1, (self.config.key_heads, self.config.key_width)), rate[:, None]
        beta = (widened(linear(x, self.beta_weight.to(x.dtype))) + widened(self.beta_bias)).sigmoid()
        return -rate * f, beta

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, cu_seqlens: Tensor | None = None, state: State = None
    ) -> tuple[Tensor, State]:
        """See `HeadMixer`."""
        memory: Any
        memory, tail = state if state is not None else (None, None)
        if cu_seqlens is None and stepping(q.shape[1], state) and self._loops(memory, tail, q, k, v, x):
            return self._step(q, k, v, x, memory, tail.contiguous())
        self._folded.forget()
        if self.conv is not None:
            q, k, v, tail = self._convolved(q, k, v, tail, cu_seqlens)
        terms = Terms(*self._normalised(q, k, v), *self.gates(x))
        o, memory = recur(terms, state=memory, cu_seqlens=cu_seqlens, backend=self.backend)
        return self._gated(o, x), DeltaState(memory, tail)

    def _loops(self, memory: Tensor, tail: Tensor | None, *token: Tensor) -> bool:
        """Say whether a token may be read by one compiled loop."""
        if self.conv is None or tail is None or self.gate_up is None or self.key_norm == "none":
            return False
        if torch.is_autocast_enabled("cpu"):  # the gates' projections would come in another dtype
            return False
        return compiled.refused(memory, tail, self.gate_up, *token) is None

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, memory: Tensor, tail: Tensor
    ) -> tuple[Tensor, DeltaState]:
        weight, taps, rate, length = self._once()
        heads, rank = self.config.key_heads, 0 if self.gate_down is None else len(self.gate_down)
        down = linear(x.select(1, 0), weight)
        decay, beta, gate = down.split((len(weight) - heads - rank, heads, rank), dim=-1)
        decay = linear(decay, self.decay_up, self.decay_bias) if self.channels else decay + self.decay_bias
        gate = linear(gate, self.gate_up, self.gate_bias)  # type: ignore[arg-type]
        out = memory.new_empty(len(q), self.config.heads, self.config.value_width)
        token = torch.cat((q.flatten(1), k.flatten(1), v.flatten(1)), dim=-1)
        read = compiled.arrays(token, taps, decay, beta + self.beta_bias, rate, length, gate)
        loop = import_module("lineament.nn.delta_loops").delta_heads_step_
        loop(*read, self.key_norm == "value", OPENED, *compiled.written(tail, memory, out))
        return out.unsqueeze(1), DeltaState(memory, tail)

    def _once(self) -> tuple[Tensor, ...]:
        """Return the projections of x in one piece, the taps, the rates of decay and the factors of the queries."""
        conv, down, length = self.conv, self.gate_down, self.key_length
        assert conv is not None  # see _loops
        assert down is not None
        first = self.decay_up if self.decay_down is None else self.decay_down
        watched = (first, self.beta_weight, down, self.decay_rate, length, *conv.parameters())

        def make() -> tuple[Tensor, ...]:
            ones = torch.ones_like(self.decay_rate)
            weight = torch.cat((first, self.beta_weight, down))
            return weight, conv.taps(), self.decay_rate.exp(), ones if length is None else length

        return self._folded.get(watched, make)

    def _convolved(
        self, q: Tensor, k: Tensor, v: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert self.conv is not None
        widths = [part.shape[2] * part.shape[3] for part in (q, k, v)]
        y, tail = self.conv(torch.cat([part.flatten(2) for part in (q, k, v)], dim=-1), tail, cu_seqlens)
        parts = (y.unflatten(-1, (-1, part.shape[3])) for y, part in zip(y.split(widths, -1), (q, k, v), strict=True))
        return *parts, tail  # type: ignore[return-value]

    def _normalised(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length = torch.linalg.vector_norm(k, dim=-1, keepdim=True, dtype=torch.promote_types(k.dtype, torch.float32))
        k = (k / length.clamp(min=1e-6)).to(k.dtype)
        if self.key_norm == "value":
            v = (v * length).to(v.dtype)
        if self.key_length is not None:
            q = q * self.key_length.to(q.dtype).repeat_interleave(self.config.groups)[:, None]
        return q, k, v

    def _gated(self, o: Tensor, x: Tensor) -> Tensor:
        if self.gate_down is None or self.gate_up is None:
            return o
        g = linear(linear(x, self.gate_down.to(x.dtype)), self.gate_up.to(x.dtype), self.gate_bias.to(x.dtype))
        return o * (g.sigmoid() / OPENED).unflatten(-1, o.shape[2:])
