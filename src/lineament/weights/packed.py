"""Packed weights: told apart by config and names, refused or unpacked, never averaged."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lineament._base.errors import InputError
from lineament.weights.point import Source, Spec

MARKS = (
    ".qweight", ".qzeros", ".g_idx", ".weight_packed", ".SCB", ".absmax", ".quant_map", ".weight_format", ".blocks",
    ".weight_scale", ".weight_scale_inv", ".weight_zero_point",
)  # fmt: skip
SCALES = (".weight_scale_inv", ".weight_scale")
BESIDE = (*SCALES, ".input_scale", ".weight_zero_point")


def unpacked(source: Source, config: Mapping[str, Any], dequantise: bool) -> tuple[Source, dict[str, Any]]:
    """Return a source of plain floating weights, and what changes in the config.

    Float8 and int8 weights with a scale per tensor, output row or square block are unpacked to float32.

    Raises:
        InputError: the weights are packed and `dequantise` is False, or the form is one that isn't unpacked here.
    """
    given = config.get("quantization_config")
    marked = [name for name in source.specs if name.endswith(MARKS) or ".quant_state." in name]
    bare = [name for name, spec in source.specs.items() if spec.floating and spec.dtype.itemsize == 1]
    if not (given or marked or bare):
        return source, {}
    kind = given.get("quant_method", "packed") if isinstance(given, Mapping) else "packed"
    what = f"{source.label} holds quantised weights ({kind}; e.g. {(marked or bare or ['?'])[0]})"
    if not dequantise:
        raise InputError(f"{what}; they can't be averaged as they are: open with dequantise (--dequantise), or use the "
                         "model before quantisation")  # fmt: skip
    homes = {name: name.removesuffix(end) + ".weight" for end in SCALES for name in source.specs if name.endswith(end)}
    scales = {weight: scale for scale, weight in homes.items()}
    odd = [name for name in marked if not name.endswith(BESIDE)] + [name for name in bare if name not in scales]
    odd += [name for name in marked if name.endswith(".weight_zero_point")]
    if odd or any(weight not in source.specs for weight in scales):
        raise InputError(f"{what}, a form that isn't unpacked here ({(odd or list(homes))[0]}); load it with "
                         "transformers, call model.dequantize() and save it")  # fmt: skip
    plain = {n: Spec(torch.float32, s.shape) if n in scales else s for n, s in source.specs.items()
             if not n.endswith(BESIDE)}  # fmt: skip
    block = given.get("weight_block_size") if isinstance(given, Mapping) else None

    def load(name: str) -> Tensor:
        tensor = source.load(name)
        return _scaled(tensor, source.load(scales[name]), block, name) if name in scales else tensor

    return replace(source, specs=plain, load=load), {"quantization_config": None}


def _scaled(weight: Tensor, scale: Tensor, block: Any, name: str) -> Tensor:
    scale = scale.float()
    if scale.numel() > 1 and scale.dim() == 2 and block:
        for axis in (0, 1):
            scale = scale.repeat_interleave(block[axis], axis)[
                tuple([slice(None)] * axis + [slice(weight.shape[axis])])
            ]
    elif scale.numel() > 1:
        scale = scale.reshape(-1, *[1] * (weight.dim() - 1))
    if scale.numel() > 1 and (scale.shape[0] != weight.shape[0] or scale.shape[1] not in (1, weight.shape[1])):
        raise InputError(f"{name!r} of shape {tuple(weight.shape)} has a scale of shape {tuple(scale.shape)}; expected "
                         "one per tensor, row or block")  # fmt: skip
    return weight.float().mul_(scale)
