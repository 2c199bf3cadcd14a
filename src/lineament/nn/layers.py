"""Published causal layers as values: a head mixer, the slots around it, and how wide its keys and values are."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lineament._base.errors import InputError, unknown
from lineament.nn.build import options_of
from lineament.nn.config import MixerConfig
from lineament.nn.mixer import Slots


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One publication: `published` makes a `MixerConfig` of it.

    Attributes:
        kind, options, slots: as of `MixerConfig` and `Mixer`.
        key, value: widths of a head as multiples of D / heads.
        shape: further fields of `MixerConfig`. full: all heads are ordinary softmax.
    """

    kind: str
    slots: Slots
    key: float = 1.0
    value: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    shape: Mapping[str, Any] = field(default_factory=dict)
    full: bool = False


DELTA = Slots(conv=4, activation="silu", qk_norm="l2", output_norm="head")
PLAIN = {"scale": 1.0, "learned_rope": True, "bias": True}
LAYERS: dict[str, Layer] = {
    "softmax": Layer(kind="softmax-window", slots=Slots(rope=1e4), full=True),
    "sliding-window": Layer(kind="softmax-window", slots=Slots(rope=1e4), shape={"window": 64, "sinks": 0}),
    "mla": Layer(kind="latent", slots=Slots(projects="q"), key=1.5),
    "linear": Layer(kind="elu", slots=Slots()),
    "hedgehog": Layer(kind="hedgehog", slots=Slots(rope=1e4)),
    "retnet": Layer(
        kind="retention", slots=Slots(rope=1e4, output_norm="head", output_gate="silu"), value=2.0
    ),
    "lightning": Layer(
        kind="lightning",
        slots=Slots(
            activation="silu", scale=1.0, output_norm="simple", norm_eps=1e-6, output_gate="sigmoid", gate_rank=0
        ),
    ),
    "minimax": Layer(
        kind="lightning", slots=Slots(activation="silu", scale=1.0, output_norm="full", output_gate="sigmoid")
    ),
    "norm-attention": Layer(
        kind="lightning", slots=Slots(activation="elu", activated="qk", output_norm="simple", **PLAIN),
        options={"none": True},
    ),
    "norm-attention-t2": Layer(
        kind="lightning", slots=Slots(activation="1+elu", activated="qk", output_norm="simple", **PLAIN),
        options={"none": True},
    ),
    "diag-attention": Layer(
        kind="diag", slots=Slots(learned_rope=True, bias=True, output_norm="simple"), options={"weights": "relu"}
    ),
    "diag-attention-t2": Layer(kind="diag", slots=Slots(learned_rope=True, bias=True)),
    "gla": Layer(kind="gla", slots=Slots(output_norm="head", output_gate="silu"), key=0.5),
    "hgrn": Layer(
        kind="hgrn",
        slots=Slots(projects="kv", activation="silu", activated="v", output_norm="full", output_gate="silu"),
    ),
    "hgrn2": Layer(kind="hgrn2", slots=Slots(activation="silu", activated="q", output_norm="full")),
    "mamba2": Layer(
        kind="ssd",
        slots=Slots(
            conv=4, conv_bias=True, activation="silu", scale=1.0,
            output_norm="group", output_gate="silu", gate_first=True,
        ),
        value=2.0,
    ),
    "lightnet": Layer(
        kind="lightnet",
        slots=Slots(
            activation="silu", activated="q", scale=1.0, output_norm="full", output_gate="sigmoid", gate_rank=0
        ),
    ),
    "deltanet": Layer(kind="delta-rule", slots=DELTA),
    "gated-deltanet": Layer(
        kind="delta-rule", slots=replace(DELTA, output_gate="silu"), key=0.75, value=1.5, options={"decay": "head"}
    ),
    "kda": Layer(
        kind="delta-rule", slots=replace(DELTA, output_gate="sigmoid", gate_rank=0), options={"decay": "channel"}
    ),
}  # fmt: skip
"""By name. Publications: see the class of each kind; `minimax` is MiniMax-Text-01's form of `lightning`, `t2` the
softmax variant of TransNormer, `mla` DeepSeek's latent attention without positions as in Kimi Linear."""


def published(
    name: str,
    *,
    model_width: int,
    heads: int,
    key_heads: int | None = None,
    layer: int = 0,
    layers: int = 1,
    options: Mapping[str, Any] | None = None,
    **shape: Any,
) -> tuple[MixerConfig, Slots]:
    """Return a published layer of any size: `Mixer(*published("kda", model_width=64, heads=2))`.

    Args:
        name: a key of `LAYERS`.
        model_width: D. heads: query heads, of Mamba-2 the heads of its values.
        key_heads: key-value heads; as many as heads if None. Of Mamba-2: the groups of B and C, 1 if None.
        layer, layers: the layer's place among all of the model, for kinds that ask for it.
        options: of the kind, beside or in place of the published ones.
        shape: further fields of `MixerConfig`, such as `key_width`, `value_width`, `value_heads`, `window`, `check`.

    Raises:
        InputError: no such layer (near miss suggested), or heads that don't divide.

    Example:
        >>> config, slots = published("gla", model_width=64, heads=4)
        >>> config.key_width, config.value_width, slots.output_gate
        (8, 16, 'silu')
    """
    if name not in LAYERS:
        raise unknown("layer", name, LAYERS)
    row = LAYERS[name]
    if "key_width" not in shape and model_width % heads:
        raise InputError(f"model_width={model_width} and heads={heads}; heads must divide it, or give key_width")
    width = model_width // heads
    widths = {"key_width": max(round(width * row.key), 1), "value_width": max(round(width * row.value), 1)}
    config = layer_config(
        row.kind, model_width=model_width, heads=heads, key_heads=key_heads, layer=layer, layers=layers, full=row.full,
        options={**row.options, **(options or {})}, **{**widths, **row.shape, **shape},
    )  # fmt: skip
    return config, row.slots


def layer_config(
    kind: str,
    *,
    model_width: int,
    heads: int,
    key_heads: int | None,
    layer: int,
    layers: int,
    full: bool,
    options: Mapping[str, Any],
    **shape: Any,
) -> MixerConfig:
    """Return a layer's config: heads as its kind counts them, its place among the layers where the kind asks for it.

    Args: as of `published`; full: all heads are ordinary softmax.
    """
    size: dict[str, Any] = {"heads": heads, "key_heads": key_heads or heads}
    if kind == "ssd":  # the heads are those of the values; B and C have few, called groups
        size = {"heads": key_heads or 1, "key_heads": key_heads or 1, "value_heads": heads}
    if full:
        size["full_heads"] = tuple(range(size["key_heads"]))
    known = options_of(kind)
    place = {name: at for name, at in (("layer", layer), ("layers", layers)) if name in known}
    return MixerConfig(kind=kind, model_width=model_width, options={**place, **options}, **{**size, **shape})
