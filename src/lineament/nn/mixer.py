"""One causal mixing layer from scratch: projections, short convolution, q/k norm, RoPE, a head mixer, norm and gate."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError, unknown
from lineament._base.shapes import bind
from lineament.nn.build import BUILDERS, build
from lineament.nn.config import MixerConfig
from lineament.nn.heads import HeadMixer, LayerState
from lineament.nn.rows import Rows, beginnings, positions, stretch_rows
from lineament.nn.short_conv import ShortConv
from lineament.nn.state import cloned, tree_map, widened

__all__ = ["BUILDERS", "HeadMixer", "Mixer", "MixerCache", "MixerConfig", "Slots", "build"]

GATES = {"sigmoid": torch.sigmoid, "silu": nn.functional.silu}
NORMS = ("l2", "rms")


@dataclass(frozen=True, kw_only=True)
class Slots:
    """What stands around the head mixer of a `Mixer`; an empty slot costs nothing.

    Attributes:
        conv: taps of a causal depthwise convolution over q, k and v; 0 for none.
        activation: "silu" after the convolution, or None.
        qk_norm: "l2", "rms" (with a learned weight per channel), or None.
        rope: theta of rotary positions, or None.
        output_norm: RMS norm per head on the output. output_gate: "sigmoid" or "silu" of a projection of x, or None.
        gate_rank: rank of that projection; None for a full one.
    """

    conv: int = 0
    activation: str | None = None
    qk_norm: str | None = None
    rope: float | None = None
    output_norm: bool = False
    output_gate: str | None = None
    gate_rank: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("activation", self.activation, GATES),
            ("output_gate", self.output_gate, GATES),
            ("qk_norm", self.qk_norm, NORMS),
        ):
            if value is not None and value not in known:
                raise unknown(name, value, known)


@dataclass
class MixerCache(LayerState):
    """What a `Mixer` keeps between calls: its heads' state, the convolution's last inputs, tokens seen per row."""

    tail: Tensor | None = None
    count: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Name every tensor held."""
        around = {"tail": self.tail, "count": self.count}
        return super().tensors() | {name: x for name, x in around.items() if x is not None}

    def select(self, index: Tensor) -> None:
        """Keep (or repeat) the given rows."""
        super().select(index)
        self.tail, self.count = tree_map(lambda x: x.index_select(0, index.to(x.device)), (self.tail, self.count))

    def copy(self) -> "MixerCache":
        """Return a state that in-place steps on this one can't reach."""
        heads = super().copy()
        return MixerCache(heads.filling, heads.full, *cloned((self.tail, self.count)))


def unit(x: Tensor) -> Tensor:
    """Scale the last axis to length 1, in float32 or wider: x / sqrt(|x|^2 + 1e-6)."""
    wide = widened(x)
    return (wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


def rotate(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Turn x [B, T, H, K] by rotary positions [B, T] (halves convention)."""
    half = x.shape[-1] // 2
    speed = theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (position[..., None].to(speed.dtype) * speed)[:, :, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Mixer(nn.Module):
    """A causal layer [B, T, D] -> [B, T, D] around a head mixer.

    Args:
        config: the head mixer's shape and kind; `full_heads` work here too.
        slots: what stands around it.

    Example:
        >>> shape = dict(heads=4, key_heads=2, key_width=8, value_width=8, model_width=32)
        >>> layer = Mixer(MixerConfig(kind="lightning", **shape), Slots(conv=4, rope=1e4, output_norm=True))
        >>> layer(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(self, config: MixerConfig, slots: Slots | None = None) -> None:
        super().__init__()
        self.config, self.slots = config, slots or Slots()
        D, K, V = config.model_width, config.key_width, config.value_width
        self.q_proj = nn.Linear(D, config.heads * K, bias=False)
        self.k_proj = nn.Linear(D, config.key_heads * K, bias=False)
        self.v_proj = nn.Linear(D, config.key_heads * V, bias=False)
        self.o_proj = nn.Linear(config.heads * V, D, bias=False)
        channels = config.heads * K + config.key_heads * (K + V)
        self.conv = ShortConv(channels, self.slots.conv, identity=False) if self.slots.conv else None
        self.q_norm = nn.RMSNorm(K) if self.slots.qk_norm == "rms" else None
        self.k_norm = nn.RMSNorm(K) if self.slots.qk_norm == "rms" else None
        self.heads = build(config)
        self.o_norm = nn.RMSNorm(V, eps=1e-5) if self.slots.output_norm else None
        self.gate = self._gate() if self.slots.output_gate else None

    def _gate(self) -> nn.Module:
        wide, rank = self.config.heads * self.config.value_width, self.slots.gate_rank
        if rank is None:
            return nn.Linear(self.config.model_width, wide, bias=False)
        return nn.Sequential(nn.Linear(self.config.model_width, rank, bias=False), nn.Linear(rank, wide))

    def forward(
        self,
        x: Tensor,
        *,
        cache: MixerCache | None = None,
        padding_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """Mix over the tokens.

        Args:
            x: [B, T, D].
            cache: moved on by these tokens; a fresh `MixerCache()` begins.
            padding_mask: [B, T], nonzero for real tokens (padding left or right).
            position_ids: [B, T] for RoPE; counted from each document's first real token if None.
            cu_seqlens: [N + 1], for B = 1: N documents back to back.
            rows: in place of both: padding and packing as a model has found them, once for all its layers.

        Returns:
            [B, T, D]; rows of padding hold nothing of use.
        """
        n = bind("x: B T D, padding_mask: B T, position_ids: B T", x, padding_mask, position_ids)
        if padding_mask is not None and cu_seqlens is not None:
            raise InputError("give padding_mask or cu_seqlens, not both: packed documents have no padding")
        rows = Rows.packed(cu_seqlens, n["T"]) if cu_seqlens is not None else rows
        if padding_mask is not None and not bool(padding_mask.all()):
            rows = Rows.make(padding_mask)
        rows = stretch_rows(n["T"], x.device) if rows is None else rows
        documents = n["B"] if rows is None else len(rows.cu_seqlens) - 1
        count = cache.count if cache is not None else None
        count = beginnings(documents, x.device) if count is None else count
        q, k, v = self._projected(x, cache, rows)
        if self.slots.rope is not None:
            position = position_ids if position_ids is not None else self._positions(n["T"], rows, count)
            q, k = rotate(q, position, self.slots.rope), rotate(k, position, self.slots.rope)
        o, _ = self.heads(q * self.config.key_width**-0.5, k, v, x=x, rows=rows, state=cache, keep=cache is not None)
        if cache is not None:
            cache.count = count + (n["T"] if rows is None else rows.cu_seqlens.diff())
        return self._finished(o, x)

    def _projected(self, x: Tensor, cache: MixerCache | None, rows: Rows | None) -> tuple[Tensor, Tensor, Tensor]:
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        if self.conv is not None:
            y = torch.cat(parts, dim=-1)
            tail = cache.tail if cache is not None else None
            if rows is None:
                y, tail = self.conv(y, tail)
            else:
                y, tail = self.conv(rows.pack(y), tail, rows.cu_seqlens)
                y = rows.unpack(y)
            if cache is not None:
                cache.tail = tail
            y = nn.functional.silu(y) if self.slots.activation == "silu" else y
            parts = list(y.split([part.shape[-1] for part in parts], dim=-1))
        elif self.slots.activation == "silu":
            parts = [nn.functional.silu(part) for part in parts]
        K, V = self.config.key_width, self.config.value_width
        q, k, v = (part.unflatten(-1, (-1, width)) for part, width in zip(parts, (K, K, V), strict=True))
        if self.q_norm is not None and self.k_norm is not None:
            return self.q_norm(q), self.k_norm(k), v
        return (unit(q), unit(k), v) if self.slots.qk_norm == "l2" else (q, k, v)

    def _positions(self, length: int, rows: Rows | None, count: Tensor) -> Tensor:
        if rows is None:
            return positions(length, None, count)
        packed = positions(int(rows.cu_seqlens[-1]), rows.cu_seqlens, count)
        return rows.unpack(packed)

    def _finished(self, o: Tensor, x: Tensor) -> Tensor:
        if self.o_norm is not None:
            o = self.o_norm(o)
        o = o.flatten(2)
        if self.gate is not None and self.slots.output_gate is not None:
            o = o * GATES[self.slots.output_gate](self.gate(x))
        return self.o_proj(o)
