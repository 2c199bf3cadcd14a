"""Encoder students: BERT-type models with linear attention in both directions, as ordinary transformers models.

Only the product of queries, keys and values changes hands: a converted attention module runs its teacher's own forward,
and transformers' attention interface gives q, k and v to the module's `mixer`. Inherited weights keep their names.
"""

import copy
from collections.abc import Mapping
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lineament._base.errors import InputError, near_miss
from lineament.models.adapters import PREFIX, head_shape
from lineament.models.student import FORMAT, FilledModel, config_class, mixer_configs
from lineament.nn.bidirectional import BidirectionalHeads
from lineament.nn.config import MixerConfig

NAME = "lineament-encoder"
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra")  # `*SelfAttention` over transformers' interface
DOORS = (
    auto.AutoModel, auto.AutoModelForMaskedLM, auto.AutoModelForSequenceClassification,
    auto.AutoModelForTokenClassification, auto.AutoModelForQuestionAnswering, auto.AutoModelForMultipleChoice,
    auto.AutoModelForPreTraining,
)  # fmt: skip


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of an encoder student's layer: its mixer, or softmax where the layer has none.

    Args:
        query, key, value: [B, H, T, K]. attention_mask: [B, 1, 1, T], or any mask whose rows are all the same.

    Returns:
        [B, T, H, V], and None (no weights are made).
    """
    mixer = getattr(module, "mixer", None)
    if mixer is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    q = q * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return mixer(q, k, v, mask=padding_mask(attention_mask, len(key))), None


def padding_mask(mask: Tensor | None, batch: int) -> Tensor | None:
    """Return [B, T], true for real tokens, from a mask [B, 1, T or 1, T] (bool, or 0 and very negative).

    Raises:
        InputError: the mask differs from query to query, which a sum over all keys can't do.
    """
    if mask is None:
        return None
    real = mask if mask.dtype == torch.bool else mask >= 0
    if real.shape[1] * real.shape[2] > 1 and not bool((real == real[:, :1, :1]).all()):
        raise InputError(
            f"attention_mask of shape {list(mask.shape)} differs from query to query; linear attention in both "
            "directions takes a padding mask [B, T]"
        )
    return real[:, 0, 0].expand(batch, -1)


def mask(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """Return the padding mask as [B, 1, 1, T]: enough for both kinds of layer, and linear in T."""
    if attention_mask is not None and attention_mask.dim() != 2:
        raise InputError(f"attention_mask has {attention_mask.dim()} axes; an encoder student takes [B, T]")
    return None if attention_mask is None else attention_mask[:, None, None, :].bool()


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)


class _Encoder(FilledModel):
    """What encoder students add to their teacher's class."""

    _own_attention = NAME

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        _attach(self, {layer: BidirectionalHeads(own) for layer, own in mixer_configs(config).items()})


def self_attentions(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """Return {layer: (name, self-attention module)} of an encoder.

    Raises:
        InputError: the family is unknown (the attention modules found are named), or it is used as a decoder.
    """
    config: Any = model.config
    kind = str(config.model_type).removeprefix(PREFIX)
    if kind not in ENCODERS:
        found = sorted({type(m).__name__ for m in model.modules() if "attention" in type(m).__name__.lower()})
        raise InputError(
            f"no encoder family {kind!r}.{near_miss(kind, ENCODERS)} Known: {', '.join(ENCODERS)}. "
            f"Attention modules found: {', '.join(found) or 'none'}. If they attend in both directions over "
            f"transformers' attention interface, call lineament.models.encoder.register({kind!r})."
        )
    if config.is_decoder:
        raise InputError(f"{type(model).__name__} is set up as a decoder (is_decoder); convert it as an encoder only")
    modules = [(name, m) for name, m in model.named_modules() if type(m).__name__.endswith("SelfAttention")]
    return dict(enumerate(modules))


def encoder_config(config: Any, mixers: Mapping[int, MixerConfig]) -> Any:
    """Return the student's config: the teacher's, plus `lineament = {"format", "layers": {"3": ...}}`.

    Raises:
        InputError: a layer is outside the model, or a mixer's shape is not the layer's.
    """
    shape, layers = head_shape(config), int(config.num_hidden_layers)
    for layer, mixer in mixers.items():
        if not 0 <= layer < layers:
            raise InputError(f"layer {layer} is outside the model's layers 0 to {layers - 1}")
        if mixer.full_heads:
            raise InputError(f"layer {layer}: full_heads={mixer.full_heads}; an encoder's layer is linear or it is not")
        for name, expected in shape.items():
            if getattr(mixer, name) != expected:
                raise InputError(
                    f"layer {layer}: the mixer has {name}={getattr(mixer, name)}, the model has {expected}"
                )
    data = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
    about = {"format": FORMAT, "layers": {str(layer): mixers[layer].to_json() for layer in sorted(mixers)}}
    new: Any = config_class(config.model_type).from_dict({**data, "lineament": about})
    new._attn_implementation_internal = NAME
    return new


def build_encoder(teacher: nn.Module, mixers: Mapping[int, MixerConfig], *, share: bool = False) -> Any:
    """Return an encoder student: the teacher's weights, with linear attention in the given layers.

    Args:
        teacher: a BERT-type model (`ENCODERS`), with any head or none. Not changed.
        mixers: {layer: MixerConfig} with `kind` a feature map. Layers not named stay softmax.
        share: use the teacher's own parameters instead of copies.

    Raises:
        InputError: an unknown family, a student already, or a mixer that does not fit.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> teacher = BertModel(BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=9))
        >>> student = build_encoder(teacher, {0: MixerConfig(kind="hedgehog", **head_shape(teacher.config))})
        >>> type(student).__name__, student.dummy_inputs["input_ids"].ndim
        ('LineamentBertModel', 2)
    """
    if getattr(teacher.config, "lineament", None):
        raise InputError("this model is a student already; convert its teacher")
    self_attentions(teacher)
    config = encoder_config(teacher.config, mixers)
    made = {layer: BidirectionalHeads(own) for layer, own in mixers.items()}
    tensors = chain(teacher.parameters(), teacher.buffers())
    student: Any = copy.deepcopy(teacher, {id(t): t for t in tensors} if share else {})
    old = type(teacher.config)
    for module in student.modules():
        if isinstance(getattr(module, "config", None), old):
            module.config = config
    student.__class__ = encoder_class(type(teacher))
    with torch.device("meta"):
        type(student)(config)  # transformers learns what a class can output (hidden_states) when one is constructed
    like = next(teacher.parameters())
    _attach(student, {n: m.to(device=like.device, dtype=like.dtype).train(teacher.training) for n, m in made.items()})
    return student


def _attach(model: nn.Module, mixers: Mapping[int, nn.Module]) -> None:
    found = self_attentions(model)
    for layer, mixer in mixers.items():
        if layer not in found:
            raise InputError(f"the config converts layer {layer}, but the model has layers 0 to {len(found) - 1}")
        found[layer][1].add_module("mixer", mixer)


def encoder_mixers(model: nn.Module) -> dict[int, BidirectionalHeads]:
    """Return {layer: mixer} of an encoder student."""
    found = {layer: getattr(module, "mixer", None) for layer, (_, module) in self_attentions(model).items()}
    return {layer: mixer for layer, mixer in found.items() if mixer is not None}


@cache
def encoder_class(cls: type) -> type:
    """Return the class of encoder students whose teacher is a `cls`, e.g. `LineamentBertModel`."""
    body = {
        "config_class": config_class(cls.config_class.model_type),
        "__module__": __name__,
        "__doc__": f"{cls.__name__} with linear attention in some layers.",
    }
    made = type(f"Lineament{cls.__name__}", (_Encoder, cls), body)
    globals()[made.__name__] = made  # so that it can be pickled
    return made


def register(model_type: str) -> None:
    """Let `AutoModel` and its relatives load the students of an encoder family."""
    teacher = CONFIG_MAPPING[model_type]
    config = config_class(model_type)
    AutoConfig.register(PREFIX + model_type, config, exist_ok=True)
    for door in DOORS:
        door.register(config, encoder_class(door._model_mapping[teacher]), exist_ok=True)


def register_encoders() -> None:
    """Register every family of `ENCODERS`."""
    for model_type in ENCODERS:
        register(model_type)
