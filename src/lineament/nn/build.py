"""Head mixers by name."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from lineament._base.errors import InputError, unknown
from lineament.nn.additive import Lightning, LinearHeads
from lineament.nn.blocks import DiagHeads
from lineament.nn.config import MixerConfig
from lineament.nn.decays import HGRN2, GatedLinear, Retention, StateSpace
from lineament.nn.delta import DeltaHeads
from lineament.nn.delta_rule import DeltaRule
from lineament.nn.feature_maps import FEATURE_MAPS
from lineament.nn.groups import HeadGroups
from lineament.nn.heads import ConvertedHeads
from lineament.nn.hgrn import HGRN
from lineament.nn.latent import LatentHeads
from lineament.nn.lightnet import LightNet
from lineament.nn.windowed import HedgehogWindow, Lolcats, SoftmaxWindow

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "hedgehog-window": HedgehogWindow,
    "softmax-window": SoftmaxWindow,
    "lolcats": Lolcats,
    "linear": LinearHeads,
    "lightning": Lightning,
    "gated-deltanet": DeltaHeads,
    "kda": partial(DeltaHeads, channels=True),
    # a constant map alone would not look at keys at all: it is a control for far parts, not a mixer
    **{name: partial(LinearHeads, map=name) for name in FEATURE_MAPS if name != "constant"},
}
"""What can take over a teacher's q, k and v."""

PUBLISHED: dict[str, Callable[..., nn.Module]] = {
    "retention": Retention,
    "gla": GatedLinear,
    "hgrn": HGRN,
    "hgrn2": HGRN2,
    "ssd": StateSpace,
    "lightnet": LightNet,
    "delta-rule": DeltaRule,
    "diag": DiagHeads,
    "latent": LatentHeads,
}
"""What is trained from scratch inside a `Mixer` whose slots are the publication's (`nn.LAYERS`)."""

KINDS = {**BUILDERS, **PUBLISHED}


def options_of(kind: str) -> dict[str, object]:
    """Return a kind's own options and their defaults.

    Example:
        >>> sorted(options_of("lolcats"))
        ['features', 'gamma']
    """
    if kind not in KINDS:
        raise unknown("mixer", kind, KINDS)
    builder = KINDS[kind]
    fixed = builder.keywords if isinstance(builder, partial) else {}
    found = {
        name: p.default
        for name, p in inspect.signature(builder).parameters.items()
        if p.kind is p.KEYWORD_ONLY and name not in fixed
    }
    if "map" in fixed or kind == "linear":
        target = FEATURE_MAPS[fixed.get("map", "hedgehog")]
        found |= {n: p.default for n, p in inspect.signature(target).parameters.items() if p.kind is p.KEYWORD_ONLY}
    return found


def build(config: MixerConfig) -> ConvertedHeads:
    """Build a layer's heads from a config: the filling by `config.kind`, with `config.full_heads` left softmax.

    Raises:
        InputError: the kind or one of its options is unknown.
    """
    known = options_of(config.kind)
    for name in config.options:
        if name not in known and config.kind != "linear":
            raise unknown(f"option of the mixer {config.kind}", name, known)
    rest = config.key_heads - len(config.full_heads)
    if not rest:
        return ConvertedHeads(config, None)
    options = dict(config.options)
    scale = options.get("log_scale")
    if isinstance(scale, list | tuple) and len(scale) == config.heads and config.full_heads:
        full = {h * config.groups + g for h in config.full_heads for g in range(config.groups)}
        options["log_scale"] = [s for h, s in enumerate(scale) if h not in full]
    codes = options.get("codes")
    try:
        if isinstance(codes, list | tuple):
            return ConvertedHeads(config, _by_codes(config, codes, options))
        filling = KINDS[config.kind](config.with_heads(rest * config.groups, rest), **options)
    except TypeError as error:
        raise InputError(f"the mixer {config.kind} can't take the options {options}: {error}") from None
    return ConvertedHeads(config, filling)


def _by_codes(config: MixerConfig, codes: Sequence[int], options: dict[str, Any]) -> nn.Module:
    """One filling for the heads of each size of codebook; `codes` has one entry per key-value head of the layer."""
    if len(codes) != config.key_heads:
        raise InputError(f"codes has {len(codes)} entries; the layer has {config.key_heads} key-value heads")
    if isinstance(options.get("log_scale"), list | tuple):
        raise InputError("log_scale per head and codes per head don't go together; give log_scale as one number")
    rest = [c for h, c in enumerate(codes) if h not in config.full_heads]
    groups = {}
    for size in sorted(set(rest)):
        heads = tuple(h for h, c in enumerate(rest) if c == size)
        own = config.with_heads(len(heads) * config.groups, len(heads))
        groups[f"codes_{size}"] = (heads, BUILDERS[config.kind](own, **(options | {"codes": size})))
    return HeadGroups(groups, config.groups) if len(groups) > 1 else next(iter(groups.values()))[1]
