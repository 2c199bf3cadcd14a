"""The parts of a model that a conversion works on: decoder layers, their attention, the mixers of a student."""

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import nn

from lineament._base.errors import InputError
from lineament.models.adapters import adapter_for, attentions, head_shape, sliding_layers
from lineament.models.student import mixers_of
from lineament.nn import ConvertedHeads, MixerConfig


@dataclass(frozen=True)
class Parts:
    """A decoder, taken apart.

    Args:
        layers: names of the decoder layers, in the order the model calls them. names: of their attention modules.
        attentions: those modules. shapes: {layer: heads, key_heads, key_width, value_width, model_width} of the
            layers that may be converted.
    """

    layers: list[str]
    names: list[str]
    attentions: list[nn.Module]
    shapes: dict[int, dict[str, int]]


def parts(model: nn.Module) -> Parts:
    """Take a causal language model apart.

    Raises:
        InputError: no attention module is found; the error names what there is.
    """
    adapter, found = adapter_for(model), attentions(model)
    sliding, shape = sliding_layers(model.config), head_shape(model.config)
    return Parts(
        layers=[f"{adapter.layers}.{i}" for i in found],
        names=[name for name, _ in found.values()],
        attentions=[module for _, module in found.values()],
        shapes={i: dict(shape) for i in found if i not in sliding},
    )


@dataclass(frozen=True)
class ConvertedLayer:
    """A converted layer of a student: its index, its heads' module and that module's config."""

    layer: int
    heads: ConvertedHeads

    @property
    def config(self) -> MixerConfig:
        """Shape and choices of the layer's mixer."""
        return self.heads.config

    @property
    def filling(self) -> nn.Module:
        """The linear mixer of the heads that don't stay softmax."""
        assert self.heads.filling is not None
        return self.heads.filling


def converted(student: nn.Module) -> dict[str, ConvertedLayer]:
    """Return {name of the heads' module: converted layer} of a student, in order."""
    names = {layer: name for layer, (name, _) in attentions(student).items()}
    return {
        f"{names[layer]}.mixer": ConvertedLayer(layer, heads)
        for layer, heads in mixers_of(student).items()
        if heads.filling is not None
    }


def lora_targets(student: nn.Module, wanted: str) -> list[str]:
    """Return the names of the projections that LoRA joins: "attention", "all" or a list of names.

    Raises:
        InputError: none of them is in the model.
    """
    linear = {
        name.rpartition(".")[2]: None
        for name, module in student.get_submodule(adapter_for(student).layers).named_modules()
        if ".mixer" not in name and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    }
    asked = {"attention": adapter_for(student).projections, "all": tuple(linear)}.get(wanted)
    names = asked or tuple(one.strip() for one in wanted.split(",") if one.strip())
    found = [name for name in names if name in linear]
    if not found:
        raise InputError(f"lora_targets {wanted!r} names no projection of the model; it has {', '.join(linear)}")
    return found


@torch.no_grad()
def teacher_digest(model: nn.Module) -> str:
    """Return 32 hex digits that name a model's shape and weights (by a sample of every tensor)."""
    whole = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()
        step = max(1, values.numel() // 64)
        sample = values[::step][:64].float().cpu().contiguous()
        whole.update(json.dumps([name, list(parameter.shape)]).encode())
        whole.update(sample.numpy().tobytes())
    return whole.hexdigest()[:32]
