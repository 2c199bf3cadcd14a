"""Students: a teacher's own class with mixers in some attention modules, an ordinary transformers model."""

import copy
from collections.abc import Mapping
from functools import cache
from itertools import chain
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lineament._base.errors import InputError
from lineament.models.adapters import ADAPTERS, PREFIX, adapter_for, attentions, head_shape, refusal, within
from lineament.models.attention import NAME, Decoder, attention_class, decoder_class
from lineament.models.cache import adopt
from lineament.nn import ConvertedHeads, MixerConfig, build

FORMAT = 1
DOORS: tuple[Any, ...] = (
    AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification,
)  # fmt: skip


class FilledModel(PreTrainedModel):
    """What models with mixers add to transformers' class: their own attention and initial weights."""

    _own_attention = NAME

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *_: Any, **__: Any) -> str:
        return self._own_attention

    def _init_weights(self, module: nn.Module) -> None:
        if not type(module).__module__.startswith("lineament.nn"):
            super()._init_weights(module)
            return
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and not any(getattr(x, "_is_hf_initialized", False) for x in own):
            module.reset_parameters()  # type: ignore[operator]


class StatefulModel(FilledModel):
    """What causal models with mixers add besides: their cache."""

    _supports_lineament = True

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any):
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "dynamic_full"):
            raise InputError(
                f"cache_implementation={kind!r} can't hold a student's states; leave it out (its cache hardly grows)"
            )
        given = model_kwargs.get("past_key_values")
        if given is not None:
            adopt(given, self.config)
        done = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get("past_key_values")
        if made is not None and given is None:
            adopt(made, self.config)
            if generation_config.is_assistant:
                made.activate_past_recording()
        return done


class _Student(StatefulModel):
    """What students add to their teacher's class."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        attach(self)


def config_for(config: Any, mixers: Mapping[int, MixerConfig]) -> Any:
    """Return the student's config: the teacher's, plus `lineament = {"format", "layers": {"3": ...}}`.

    Raises:
        InputError: a layer is outside the model or can't be converted so, or a mixer's shape is not the layer's.
    """
    shape = head_shape(config)
    for layer, mixer in mixers.items():
        for name, expected in shape.items():
            if getattr(mixer, name) != expected:
                raise InputError(
                    f"layer {layer}: the mixer has {name}={getattr(mixer, name)}, the model has {expected}"
                )
        reason = refusal(config, layer, mixer.kind, mixer.full_heads)
        if reason:
            raise InputError(reason)
    data = {
        k: v for k, v in config.to_dict().items() if k not in ("model_type", "quantization_config", "architectures")
    }
    layers = {str(layer): mixers[layer].to_json() for layer in sorted(mixers)}
    new = config_class(adapter_for(config).model_type).from_dict(
        {**data, "lineament": {"format": FORMAT, "layers": layers}}
    )
    new._attn_implementation_internal = NAME
    return new


def mixer_configs(config: Any) -> dict[int, MixerConfig]:
    """Return {layer: MixerConfig} of a student's config.

    Raises:
        InputError: the config is of a newer format than this version knows.
    """
    about = getattr(config, "lineament", None) or {"format": FORMAT, "layers": {}}
    if about.get("format", 0) > FORMAT:
        raise InputError(
            f"this student was written in format {about['format']}; this version of lineament reads up to {FORMAT}: "
            "pip install --upgrade lineament"
        )
    return {int(layer): MixerConfig.from_json(own) for layer, own in about["layers"].items()}


def attach(model: nn.Module, mixers: Mapping[int, nn.Module] | None = None) -> None:
    """Put mixers into the attention modules that the model's config names (fresh ones unless given)."""
    configs = mixer_configs(model.config)
    found = attentions(model)
    for layer, config in configs.items():
        if layer not in found:
            raise InputError(f"the config converts layer {layer}, but the model has layers 0 to {len(found) - 1}")
        module = found[layer][1]
        if hasattr(module, "mixer"):  # of the decoder inside, which transformers may make by its own class
            continue
        module.__class__ = attention_class(type(module))
        module.add_module("mixer", build(config) if mixers is None else mixers[layer])
    decoder = model.get_submodule(within(model, adapter_for(model).decoder))
    if not isinstance(decoder, Decoder):
        decoder.__class__ = decoder_class(type(decoder))


def build_student(teacher: nn.Module, mixers: Mapping[int, MixerConfig], *, share: bool = False) -> Any:
    """Return a student: the teacher's weights, with mixers in the given layers.

    Args:
        teacher: a causal language model with an adapter. Not changed.
        mixers: {layer: MixerConfig}. Layers not named stay softmax.
        share: use the teacher's own parameters instead of copies (training the student then trains the teacher).

    Returns:
        A model of `student_class(type(teacher))`, in the teacher's mode (train or eval), device and dtype.

    Raises:
        InputError: no adapter for the teacher, it is a student already, it is spread over devices (see
            `require_own_forward`), or a layer can't be converted so.

    Example:
        >>> from lineament.models import tiny_teacher, head_shape
        >>> teacher = tiny_teacher("llama")
        >>> student = build_student(teacher, {0: MixerConfig(kind="kda", **head_shape(teacher.config))})
        >>> type(student).__name__
        'LineamentLlamaForCausalLM'
    """
    adapter = adapter_for(teacher)
    require_own_forward(teacher)
    if getattr(teacher.config, "lineament", None):
        raise InputError("this model is a student already; convert its teacher")
    if not hasattr(teacher, "lm_head") and not hasattr(teacher, adapter.head):
        raise InputError(f"{type(teacher).__name__} has no language-model head; load it with AutoModelForCausalLM")
    config = config_for(teacher.config, mixers)
    tensors = chain(teacher.parameters(), teacher.buffers())
    student: Any = copy.deepcopy(teacher, {id(t): t for t in tensors} if share else {})
    take_config(student, config)
    student.__class__ = student_class(type(teacher))
    made: dict[int, nn.Module] = {}
    for layer, (_, module) in attentions(student).items():
        if layer in mixers:
            like = next(module.parameters())
            made[layer] = build(mixers[layer]).to(device=like.device, dtype=like.dtype).train(student.training)
    attach(student, made)
    return student


def require_own_forward(teacher: nn.Module) -> None:
    """Check that a model's modules run the forward of their class: a student's new classes would go unheard.

    Raises:
        InputError: hooks of accelerate stand before it (`device_map`, offloading).
    """
    for name, module in teacher.named_modules():
        if hasattr(module, "_hf_hook"):
            raise InputError(
                f"{name or 'the model'} is hooked by accelerate, which spreads the model over devices or offloads it; "
                "load it without device_map"
            )


def take_config(model: nn.Module, config: Any) -> None:
    """Give a model and all its parts that hold its config another one."""
    old = type(model.config)
    for module in model.modules():
        if isinstance(getattr(module, "config", None), old):
            module.config = config


def mixers_of(model: nn.Module) -> dict[int, ConvertedHeads]:
    """Return {layer: mixer} of a student."""
    found = {layer: getattr(module, "mixer", None) for layer, (_, module) in attentions(model).items()}
    return {layer: mixer for layer, mixer in found.items() if mixer is not None}


@cache
def config_class(model_type: str) -> type:
    """Return the config class of a family's students, e.g. `LineamentLlamaConfig`."""
    base = CONFIG_MAPPING[model_type]
    name = f"Lineament{base.__name__}"
    body = {
        "model_type": PREFIX + model_type,
        "lineament": None,
        "__annotations__": {"lineament": dict | None},
        "__module__": __name__,
        "__doc__": f"{base.__name__} of a student: `lineament` says which layers have which mixer.",
    }
    return _published(type(name, (base,), body))


@cache
def student_class(cls: type) -> type:
    """Return the class of students whose teacher is a `cls`, e.g. `LineamentLlamaForCausalLM`."""
    if issubclass(cls, _Student):
        return cls
    model_type = cls.config_class.model_type
    body = {
        "config_class": config_class(model_type),
        "__module__": __name__,
        "__doc__": f"{cls.__name__} with linear mixers in some layers.",
    }
    # OPT's model without head holds its decoder, those of all others are theirs
    is_decoder = cls is AutoModel._model_mapping[CONFIG_MAPPING[model_type]] and "." not in ADAPTERS[model_type].decoder
    bases = (_Student, Decoder, cls) if is_decoder else (_Student, cls)
    return _published(type(f"Lineament{cls.__name__}", bases, body))


def _published(cls: type) -> type:
    """Make a class that was made here findable by name, so that it can be pickled."""
    globals()[cls.__name__] = cls
    return cls


def register(model_type: str) -> None:
    """Let `AutoConfig`, `AutoModelForCausalLM` and its relatives load the students of a family that has an adapter."""
    teacher, config = CONFIG_MAPPING[model_type], config_class(model_type)
    AutoConfig.register(PREFIX + model_type, config, exist_ok=True)
    for door in DOORS:
        if teacher in door._model_mapping:
            door.register(config, student_class(door._model_mapping[teacher]), exist_ok=True)


def register_all() -> None:
    """Register every family of `ADAPTERS`."""
    for model_type in ADAPTERS:
        register(model_type)
