"""The parts of a model that a conversion works on: decoder layers, their attention, the mixers of a student."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lineament._base.errors import InputError
from lineament.convert.inspect import info_from_config
from lineament.nn import MixerConfig
from lineament.nn.heads import ConvertedHeads

LORA_TARGETS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn", "query_key_value", "out_proj", "dense"),
    "all": (
        "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn", "query_key_value", "out_proj", "dense",
        "gate_proj", "up_proj", "down_proj", "gate_up_proj", "c_fc", "c_proj", "dense_h_to_4h", "dense_4h_to_h",
        "fc1", "fc2",
    ),
}  # fmt: skip


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
    info = info_from_config(model.config, name=type(model).__name__)
    found = {
        int(module.layer_idx): (name, module)
        for name, module in model.named_modules()
        if "Attention" in type(module).__name__ and getattr(module, "layer_idx", None) is not None
    }
    if sorted(found) != list(range(info.layers)):
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise InputError(
            f"{type(model).__name__}: {len(found)} attention modules found for {info.layers} layers among "
            f"{', '.join(kinds)}; a conversion needs a decoder with one attention per layer"
        )
    names = [found[i][0] for i in range(info.layers)]
    shape = {
        "heads": info.heads, "key_heads": info.key_heads, "key_width": info.head_width,
        "value_width": info.head_width, "model_width": info.width,
    }  # fmt: skip
    return Parts(
        layers=[_layer_name(name) for name in names],
        names=names,
        attentions=[found[i][1] for i in range(info.layers)],
        shapes={i: dict(shape) for i in range(info.layers) if i not in info.kept_layers},
    )


def _layer_name(attention: str) -> str:
    """Return the name of the decoder layer an attention module sits in: up to its number.

    Example:
        >>> _layer_name("model.layers.3.self_attn"), _layer_name("gpt_neox.layers.0.attention.inner")
        ('model.layers.3', 'gpt_neox.layers.0')
    """
    pieces = attention.split(".")
    last = max(i for i, piece in enumerate(pieces) if piece.isdigit())
    return ".".join(pieces[: last + 1])


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
    found = {}
    for name, module in student.named_modules():
        if isinstance(module, ConvertedHeads) and module.filling is not None:
            index = next(int(piece) for piece in reversed(name.split(".")) if piece.isdigit())
            found[name] = ConvertedLayer(index, module)
    return found


def lora_targets(student: nn.Module, wanted: str) -> list[str]:
    """Return the names of the projections that LoRA joins: "attention", "all" or a list of names.

    Raises:
        InputError: none of them is in the model.
    """
    names = LORA_TARGETS.get(wanted) or tuple(one.strip() for one in wanted.split(",") if one.strip())
    linear = {
        name.rpartition(".")[2]
        for name, module in student.named_modules()
        if ".mixer" not in name and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    }
    found = [name for name in names if name in linear]
    if not found:
        raise InputError(f"lora_targets {wanted!r} names no projection of the model; it has {', '.join(sorted(linear))}")
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


def student_of(teacher: nn.Module, configs: Mapping[int, MixerConfig], *, share: bool = False) -> nn.Module:
    """Build a student with mixers in the given layers.

    Args:
        share: let it hold the teacher's own tensors (for measuring); else it gets copies and may be trained.
    """
    from lineament.models import build_student

    student = build_student(teacher, dict(configs)).eval()
    if not share:
        theirs = {one.data_ptr() for one in teacher.parameters()}
        for parameter in student.parameters():
            if parameter.data_ptr() in theirs:
                parameter.data = parameter.data.clone()
    return student

