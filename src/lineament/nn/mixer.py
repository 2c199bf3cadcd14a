"""One causal mixing layer from scratch: projections, short convolution, q/k norm, RoPE, a head mixer, norm and gate."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError, unknown
from lineament._base.shapes import bind
from lineament.nn.build import BUILDERS, build
from lineament.nn.config import MixerConfig
from lineament.nn.heads import HeadMixer, LayerState
from lineament.nn.norms import OVER, OutputNorm
from lineament.nn.positions import LearnedRotation, rotate
from lineament.nn.rows import Rows, beginnings, positions, stretch_rows
from lineament.nn.short_conv import ShortConv
from lineament.nn.state import cloned, tree_map, widened

__all__ = ["BUILDERS", "HeadMixer", "Mixer", "MixerCache", "MixerConfig", "Slots", "build"]

ACTIVATIONS = {
    "silu": nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "elu": nn.functional.elu,
    "1+elu": lambda x: 1 + nn.functional.elu(x),
}
GATES = ("sigmoid", "silu")
NORMS = ("l2", "rms")


@dataclass(frozen=True, kw_only=True)
class Slots:
    """What stands around the head mixer of a `Mixer`; an empty slot costs nothing.

    Attributes:
        projects: which of q, k and v are projected from x; a mixer that doesn't read one gets it without channels.
        bias: of all projections. scale: of q, K^-1/2 if None.
        conv: taps of a causal depthwise convolution over q, k and v; 0 for none. conv_bias: its bias.
        activation: "silu", "sigmoid", "elu" or "1+elu" after the convolution, on those of `activated`; or None.
        qk_norm: "l2", "rms" (with a learned weight per channel), or None.
        rope: theta of rotary positions, or None. learned_rope: learn the angles, behind a fixed reflection (LRPE).
        output_norm: RMS norm over "head", "full", "group" (of key heads) or "simple" (full, no weight), or None.
        norm_eps: inside that norm's root.
        output_gate: "sigmoid" or "silu" of a projection of x, or None. gate_rank: rank of that projection; None for a
            full one, 0 for the head's value width. gate_first: gate, then norm.
    """

    projects: str = "qkv"
    bias: bool = False
    scale: float | None = None
    conv: int = 0
    conv_bias: bool = False
    activation: str | None = None
    activated: str = "qkv"
    qk_norm: str | None = None
    rope: float | None = None
    learned_rope: bool = False
    output_norm: str | None = None
    norm_eps: float = 1e-5
    output_gate: str | None = None
    gate_rank: int | None = None
    gate_first: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("activation", self.activation, ACTIVATIONS),
            ("output_gate", self.output_gate, GATES),
            ("qk_norm", self.qk_norm, NORMS),
            ("output_norm", self.output_norm, OVER),
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


class Mixer(nn.Module):
    """A causal layer [B, T, D] -> [B, T, D] around a head mixer.

    Args:
        config: the head mixer's shape and kind; `full_heads` work here too.
        slots: what stands around it.

    Example:
        >>> shape = dict(heads=4, key_heads=2, key_width=8, value_width=8, model_width=32)
        >>> layer = Mixer(MixerConfig(kind="lightning", **shape), Slots(conv=4, rope=1e4, output_norm="head"))
        >>> layer(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(self, config: MixerConfig, slots: Slots | None = None) -> None:
        super().__init__()
        self.config, self.slots = config, slots or Slots()
        slots, D, K, V = self.slots, config.model_width, config.key_width, config.value_width
        self.heads_of = {"q": (config.heads, K), "k": (config.key_heads, K), "v": (config.states, V)}
        widths = {name: heads * width for name, (heads, width) in self.heads_of.items() if name in slots.projects}
        for name, wide in widths.items():
            setattr(self, f"{name}_proj", nn.Linear(D, wide, bias=slots.bias))
        wide = config.out_heads * V
        self.o_proj = nn.Linear(wide, D, bias=slots.bias)
        conv = {"identity": False, "bias": slots.conv_bias}
        self.conv = ShortConv(sum(widths.values()), slots.conv, **conv) if slots.conv else None
        self.q_norm = nn.RMSNorm(K) if slots.qk_norm == "rms" else None
        self.k_norm = nn.RMSNorm(K) if slots.qk_norm == "rms" else None
        self.rotation = LearnedRotation(K, slots.rope or 1e4) if slots.learned_rope else None
        self.heads = build(config)
        of = {"over": slots.output_norm or "head", "groups": config.key_heads, "eps": slots.norm_eps}
        self.o_norm = OutputNorm(config.out_heads, V, **of) if slots.output_norm else None
        self.gate = self._gate(D, wide, V if slots.gate_rank == 0 else slots.gate_rank) if slots.output_gate else None

    def _gate(self, D: int, wide: int, rank: int | None) -> nn.Module:
        if rank is None:
            return nn.Linear(D, wide, bias=self.slots.bias)
        return nn.Sequential(nn.Linear(D, rank, bias=False), nn.Linear(rank, wide))

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
        n = bind(
            f"x: B T {self.config.model_width}, padding_mask: B T, position_ids: B T", x, padding_mask, position_ids
        )
        if padding_mask is not None and cu_seqlens is not None:
            raise InputError("give padding_mask or cu_seqlens, not both: packed documents have no padding")
        rows = Rows.packed(cu_seqlens, n["T"]) if cu_seqlens is not None else rows
        if padding_mask is not None and not bool(padding_mask.all()):
            rows = Rows.make(padding_mask)
        rows = stretch_rows(n["T"], x.device) if rows is None else rows
        documents = n["B"] if rows is None else len(rows.cu_seqlens) - 1
        count = cache.count if cache is not None else None
        count = beginnings(documents, x.device) if count is None else count
        q, k, v = self.projected(x, cache, rows)
        if self.slots.rope is not None or self.rotation is not None:
            position = position_ids if position_ids is not None else self._positions(n["T"], rows, count)
            q, k = self._turned(q, position), self._turned(k, position)
        scale = self.config.key_width**-0.5 if self.slots.scale is None else self.slots.scale
        o, _ = self.heads(q * scale, k, v, x=x, rows=rows, state=cache, keep=cache is not None)
        if cache is not None:
            cache.count = count + (n["T"] if rows is None else rows.cu_seqlens.diff())
        return self.finished(o, x)

    def projected(self, x: Tensor, cache: MixerCache | None = None, rows: Rows | None = None) -> list[Tensor]:
        """Return q [B, T, Hq, K], k and v of x: projected, convolved, activated and normed; not scaled or turned."""
        slots, names = self.slots, [name for name in "qkv" if name in self.slots.projects]
        parts = [getattr(self, f"{name}_proj")(x) for name in names]
        if self.conv is not None:
            y, tail = torch.cat(parts, dim=-1), cache.tail if cache is not None else None
            if rows is None:
                y, tail = self.conv(y, tail)
            else:
                y, tail = self.conv(rows.pack(y), tail, rows.cu_seqlens)
                y = rows.unpack(y)
            if cache is not None:
                cache.tail = tail
            parts = list(y.split([part.shape[-1] for part in parts], dim=-1))
        made = {name: part.unflatten(-1, self.heads_of[name]) for name, part in zip(names, parts, strict=True)}
        if slots.activation is not None:
            act = ACTIVATIONS[slots.activation]
            made = {name: act(part) if name in slots.activated else part for name, part in made.items()}
        for name, norm in (("q", self.q_norm), ("k", self.k_norm)):
            if name in made and slots.qk_norm is not None:
                made[name] = unit(made[name]) if norm is None else norm(made[name])
        B, T, _ = x.shape
        return [made[n] if n in made else x.new_empty(B, T, heads, 0) for n, (heads, _) in self.heads_of.items()]

    def _turned(self, x: Tensor, position: Tensor) -> Tensor:
        if not x.shape[-1]:
            return x
        return self.rotation(x, position) if self.rotation is not None else rotate(x, position, self.slots.rope or 1e4)

    def _positions(self, length: int, rows: Rows | None, count: Tensor) -> Tensor:
        if rows is None:
            return positions(length, None, count)
        packed = positions(int(rows.cu_seqlens[-1]), rows.cu_seqlens, count)
        return rows.unpack(packed)

    def finished(self, o: Tensor, x: Tensor) -> Tensor:
        """Return the layer's output [B, T, D] for what its heads gave, o [B, T, H, V]: normed, gated and projected."""
        steps = [self._gated, self._normed] if self.slots.gate_first else [self._normed, self._gated]
        for step in steps:
            o = step(o, x)
        return self.o_proj(o.flatten(2))

    def _normed(self, o: Tensor, x: Tensor) -> Tensor:
        return o if self.o_norm is None else self.o_norm(o)

    def _gated(self, o: Tensor, x: Tensor) -> Tensor:
        if self.gate is None or self.slots.output_gate is None:
            return o
        return o * ACTIVATIONS[self.slots.output_gate](self.gate(x)).unflatten(-1, o.shape[2:])
