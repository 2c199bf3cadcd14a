"""Families of decoders as values, hybrids by ratio, and arms of equal size.

A family says which head mixer its layers have and what stands around it, by its paper's own choices; depth, width and
the share of softmax layers are the user's.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lineament._base.errors import InputError, unknown
from lineament.models.decoder import DecoderConfig, DecoderForCausalLM, fill
from lineament.nn import BUILDERS, LAYERS, MixerConfig, Slots
from lineament.nn.layers import layer_config
from lineament.nn.mlp import GATED

SOFTMAX = "softmax-window"  # the kind of a layer whose heads are all full; its window is never built
Ratio = str | Sequence[int] | Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the blocks of a family are made of.

    Attributes:
        kind: a key of `nn.BUILDERS` or `nn.PUBLISHED`, or "softmax". options: its own. shape: further fields of
            `MixerConfig`, such as window and sinks. slots: what stands around it.
        key_share, value_share: summed width of the keys' and of the values' heads, as a share of D.
        head_width: K, where the number of heads is not given.
        mlp, norm, post_norm, tied: see `DecoderConfig`. mlp_share: inner width as a share of D, before rounding; 0 for
            none.
        full: the slots of this family's softmax layers in a hybrid.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    shape: Mapping[str, Any] = field(default_factory=dict)
    slots: Slots = field(default_factory=Slots)
    key_share: float = 1.0
    value_share: float = 1.0
    head_width: int = 128
    mlp: str = "swiglu"
    mlp_share: float = 8 / 3
    norm: str = "rms"
    post_norm: bool = False
    tied: bool = False
    full: Slots = field(default_factory=lambda: Slots(rope=1e4))

    def layer(self, width: int, heads: int | None, key_heads: int | None, layer: int, layers: int) -> MixerConfig:
        """Return the mixer of layer `layer` of `layers`.

        Raises:
            InputError: an unknown kind, or heads that do not divide the widths.
        """
        keys, values = round(width * self.key_share), round(width * self.value_share)
        heads = heads or max(keys // self.head_width, 1)
        for name, total in (("keys", keys), ("values", values)):
            if total % heads:
                raise InputError(f"{heads} heads don't divide the {total} channels of the {name} (width {width})")
        softmax = self.kind == "softmax"
        return layer_config(
            SOFTMAX if softmax else self.kind, model_width=width, heads=heads, key_heads=key_heads, layer=layer,
            layers=layers, full=softmax, options=self.options,
            **{"key_width": keys // heads, "value_width": values // heads, **self.shape},
        )  # fmt: skip


def _of(name: str, **block: Any) -> Family:
    """Return the family of a published layer in a block of one's own."""
    row = LAYERS[name]
    return Family(
        kind="softmax" if row.full else row.kind, options=row.options, shape=row.shape, slots=row.slots,
        key_share=row.key, value_share=row.value, **block,
    )  # fmt: skip


FAMILIES: dict[str, Family] = {
    "llama": _of("softmax"),
    "retnet": _of("retnet", head_width=256, mlp="gelu", mlp_share=2.0, norm="layer"),
    "transnormer-t1": _of("norm-attention", norm="simple-rms"),
    "transnormer-t2": _of("norm-attention-t2", norm="simple-rms"),
    "transnormer": _of("lightning", mlp="sglu", norm="simple-rms"),
    "lightning": _of("lightning"),
    "gla": _of("gla", head_width=256),
    "hgrn": _of("hgrn"),
    "hgrn2": _of("hgrn2"),
    "mamba2": _of("mamba2", mlp_share=0.0, tied=True),
    "deltanet": _of("deltanet"),
    "gated-deltanet": _of("gated-deltanet", head_width=256),
    "kda": _of("kda", full=Slots()),
    "lightnet": _of("lightnet"),
}
"""Presets by the papers' own block choices. Sizes are not part of them."""


def family(name: str | Family) -> Family:
    """Return a family by name: a key of `FAMILIES`, or a published layer or any kind of head mixer in a Llama's block.

    Raises:
        InputError: neither; or the preset's mixer is not in this version.
    """
    if isinstance(name, Family):
        return name
    plain = {kind: Family(kind=kind, slots=Slots(output_norm="head")) for kind in BUILDERS}
    known = plain | {layer: _of(layer) for layer in LAYERS} | FAMILIES
    if name not in known:
        raise unknown("family", name, known)
    return known[name]


def full_layers(ratio: str | Sequence[int], layers: int) -> tuple[int, ...]:
    """Return which layers are softmax.

    Args:
        ratio: "pure" (none), "full" (all), "r:1" (groups of r + 1 layers, the full one last in each), or the layers
            themselves, counted from 0. A ratio that leaves no full layer gives one in the middle third, with a warning.
        layers: depth.

    Example:
        >>> full_layers("3:1", 8), full_layers("pure", 8), full_layers([0, 5], 8)
        ((3, 7), (), (0, 5))
    """
    if not isinstance(ratio, str):
        wrong = [i for i in ratio if not 0 <= i < layers]
        if wrong or len(set(ratio)) != len(ratio):
            raise InputError(f"full layers {list(ratio)}: expected different numbers from 0 to {layers - 1}")
        return tuple(sorted(ratio))
    if ratio in ("pure", "full"):
        return tuple(range(layers)) if ratio == "full" else ()
    linear, _, full = ratio.partition(":")
    if not (linear.isdigit() and full == "1"):
        raise InputError(f"ratio is {ratio!r}; expected 'pure', 'full', or linear:full such as '3:1'")
    found = tuple(i for i in range(layers) if (i + 1) % (int(linear) + 1) == 0)
    if not found and layers:
        found = (layers // 2,)
        warnings.warn(
            f"a ratio of {ratio} leaves no full layer among {layers}; layer {found[0]}, in the middle third, is full",
            stacklevel=2,
        )
    return found


def decoder_config(
    name: str | Family,
    *,
    vocab_size: int,
    width: int,
    layers: int,
    heads: int | None = None,
    key_heads: int | None = None,
    ratio: Ratio = "pure",
    full_heads: Mapping[int, Sequence[int]] | None = None,
    **changes: Any,
) -> DecoderConfig:
    """Return the config of a decoder, hybrid or not.

    Args:
        name: a family's name or value. Block choices (MLP, norms) are its own in every layer.
        vocab_size, width, layers: of the model.
        heads: query heads; by the family's head width if None. key_heads: key-value heads; as many if None.
        ratio: linear:full, e.g. "3:1"; "pure", "full"; the full layers' numbers; or one family's name per layer.
        full_heads: {layer: key-value heads that stay softmax inside that linear layer}.
        changes: fields of `DecoderConfig` (intermediate_size, mlp, norm, post_norm, tie_word_embeddings, ...).

    Raises:
        InputError: an unknown family or field, a ratio that is none, or heads that do not fit.

    Example:
        >>> config = decoder_config("kda", ratio="1:1", vocab_size=64, width=32, layers=4, heads=2)
        >>> tuple(len(layer["full_heads"]) for layer in config.lineament["layers"].values())
        (0, 2, 0, 2)
    """
    own = family(name)
    names = _per_layer(own, ratio, layers)
    made = []
    for i, each in enumerate(names):
        mixer = each.layer(width, heads, key_heads, i, layers)
        extra = (full_heads or {}).get(i)
        if extra is not None:
            if each.kind == "softmax":
                raise InputError(f"full_heads names layer {i}, softmax as a whole; name heads of linear layers")
            mixer = MixerConfig.from_json({**mixer.to_json(), "full_heads": list(extra)})
        made.append((mixer, each.slots))
    wrong = [i for i in full_heads or {} if not 0 <= i < layers]
    if wrong:
        raise InputError(f"full_heads names layer {wrong[0]}; the model has layers 0 to {layers - 1}")
    fields: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": width, "intermediate_size": _mlp_width(own, width), "mlp": own.mlp,
        "norm": own.norm, "post_norm": own.post_norm, "tie_word_embeddings": own.tied,
    }  # fmt: skip
    known = [*DecoderConfig.__annotations__]
    for field_ in changes:
        if field_ not in known:
            raise unknown("field of a decoder", field_, known)
    return fill(DecoderConfig(**{**fields, **changes}), made)


def _per_layer(own: Family, ratio: Ratio, layers: int) -> list[Family]:
    if layers < 1:
        raise InputError(f"layers={layers}; expected at least 1")
    if not isinstance(ratio, str) and any(isinstance(each, str) for each in ratio):
        if len(ratio) != layers:
            raise InputError(f"{len(ratio)} families are listed for {layers} layers")
        return [own if each == own else family(each) for each in ratio]  # type: ignore[arg-type]
    full = Family(kind="softmax", slots=own.slots if own.kind == "softmax" else own.full, head_width=own.head_width)
    chosen = full_layers(ratio, layers)  # type: ignore[arg-type]
    return [full if i in chosen else own for i in range(layers)]


def _mlp_width(own: Family, width: int) -> int:
    multiple = 256 if width >= 512 else 32
    return -(-round(width * own.mlp_share) // multiple) * multiple


def parameters(config: DecoderConfig) -> int:
    """Return how many parameters a config's model has (tied ones once), without making any.

    Example:
        >>> parameters(decoder_config("llama", vocab_size=10, width=16, layers=1, heads=2))
        4464
    """
    with torch.device("meta"):
        return sum(p.numel() for p in DecoderForCausalLM(config).parameters())


def match_parameters(config: DecoderConfig, target: int | DecoderConfig, *, tolerance: float = 0.02) -> DecoderConfig:
    """Return the config with the width of its MLP chosen so that it has as many parameters as another.

    Args:
        target: a number of parameters, or the config to match.
        tolerance: largest difference, as a share of the target.

    Raises:
        InputError: no MLP width comes that near.
    """
    wanted = target if isinstance(target, int) else parameters(target)
    if not config.intermediate_size:
        raise InputError("this family has no MLP to widen; change its depth or width instead")
    here = config.intermediate_size
    matrices = 3 if config.mlp in GATED else 2
    each = matrices * config.hidden_size * config.num_hidden_layers  # parameters per channel of the MLP
    rest = parameters(config) - each * here
    hidden = round((wanted - rest) / each)
    if hidden < 1:
        raise InputError(f"the mixers alone have {rest:,} parameters, and {wanted:,} are wanted; take fewer heads")
    for found in (8 * round(hidden / 8), hidden):  # a multiple of 8 where that is near enough
        if found and abs(rest + each * found - wanted) <= tolerance * wanted:
            return _with_mlp(config, found)
    off = abs(rest + each * hidden - wanted) / wanted
    raise InputError(f"the nearest MLP width, {hidden}, still differs by {off:.1%} from {wanted:,} parameters")


def _with_mlp(config: DecoderConfig, hidden: int) -> DecoderConfig:
    return DecoderConfig.from_dict({**config.to_dict(), "intermediate_size": hidden})
