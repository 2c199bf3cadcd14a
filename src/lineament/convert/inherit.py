"""Build a student from a teacher: keep its projections, put mixers in, and start each where it changes least."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lineament.convert.plan import Plan
from lineament.convert.transfer import LayerPool
from lineament.nn import HedgehogWindow, MixerConfig, quiet_log_scale
from lineament.nn.codes import start_codes
from lineament.nn.feature_maps import Product
from lineament.nn.groups import HeadGroups

WINDOWED = ("hedgehog-window", "lolcats", "softmax-window")


def mixer_configs(
    plan: Plan,
    shapes: Mapping[int, Mapping[str, int]],
    full: Mapping[int, Sequence[int]],
    codes: Mapping[int, Sequence[int]] | None = None,
) -> dict[int, MixerConfig]:
    """Return {layer: MixerConfig} of every layer that is not wholly kept.

    Args:
        shapes: {layer: heads, key_heads, key_width, value_width, model_width} of the layers that may be replaced.
        full: {layer: key-value heads that stay softmax}. codes: {layer: codes of each key-value head}, over
            the options'.
    """
    layers = max(shapes, default=-1) + 1
    found = {}
    for layer, shape in shapes.items():
        kept = tuple(full.get(layer, ()))
        if len(kept) == shape["key_heads"]:
            continue
        options = dict(plan.options)
        if codes:
            options["codes"] = list(codes[layer])
        if plan.mixer == "lightning":
            options = {"layer": layer, "layers": layers, **options}
        near: dict[str, Any] = {"window": plan.window, "sinks": plan.sinks, "full_heads": kept}
        found[layer] = MixerConfig(kind=plan.mixer, options=options, **near, **dict[str, Any](shape))
    return found


@torch.no_grad()
def calibrate(
    mixer: nn.Module, pool: LayerPool, *, window: int, sinks: int, share: float = 1e-3, sink_code: bool = False
) -> dict[str, Any]:
    """Set a fresh mixer's codes, gates and scales from the teacher's queries and keys.

    `hedgehog-window`: the far part's log scale, so that its share stays below `share` everywhere on the pool and
    the swap alone equals window + sinks. With a product map: codebooks from clusters of keys and the scale of softmax
    itself, so that the far part starts as attention to the clusters' centres, one of them the mean key of first
    tokens with `sink_code`. Delta rules with a key length on the query side: the mean length.

    Returns:
        What was set, for the log.
    """
    if isinstance(mixer, HeadGroups):
        split = {name: [mixer.parts(x) for x in getattr(pool, name)] for name in ("q", "k", "v", "target")}
        return {
            name: calibrate(
                filling,
                LayerPool(**{n: [one[i][0] for one in xs] for n, xs in split.items()}, x=pool.x),
                window=window, sinks=sinks, share=share, sink_code=sink_code,
            )
            for i, (name, filling) in enumerate(mixer.fillings.items())
        }  # fmt: skip
    said: dict[str, Any] = {}
    scale = getattr(mixer, "log_scale", None)
    if isinstance(mixer, HedgehogWindow) and isinstance(mixer.map_q, Product) and isinstance(mixer.map_k, Product):
        q, k = (torch.cat([x[0].float() for x in xs]) for xs in (pool.q, pool.k))
        first = torch.stack([one[0, 0].float() for one in pool.k]).mean(0) / mixer.root if sink_code else None
        start_codes(mixer.map_q, mixer.map_k, q * mixer.root, k / mixer.root, sink=first)
        mixer.log_scale.zero_()
        said["codes"] = mixer.map_k.codes
    elif isinstance(scale, Tensor):
        per_window = [
            quiet_log_scale(q.float(), k.float(), window=window, sinks=sinks, share=share)
            for q, k in zip(pool.q, pool.k, strict=True)
        ]
        scale.copy_(torch.stack(per_window).amin(0))
        said["log_scale"] = [round(float(x), 4) for x in scale]
    length = getattr(mixer, "key_length", None)
    if isinstance(length, Tensor):
        sizes = torch.stack([k.float().norm(dim=-1).mean((0, 1)) for k in pool.k])
        length.copy_(sizes.mean(0))
        said["key_length"] = [round(float(x), 4) for x in length]
    return said
