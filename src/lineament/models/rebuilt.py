"""Decoders of transformers with other insides: neighbouring layers in one wide layer, feed-forward layers in parts.

The result is the family's own class with a field `rebuilt` in its config, an ordinary folder: `save_pretrained`,
`AutoModelForCausalLM.from_pretrained` (after `import lineament.models`), `generate`, caches and all.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lineament._base.errors import InputError
from lineament.graph import swap
from lineament.models.student import take_config
from lineament.nn import Experts, ExpertsConfig, SelectiveConfig, SelectiveMLP
from lineament.nn.residual import check_groups

FAMILIES = ("llama", "mistral", "qwen2")  # layers made from the config alone: two norms, q k v o, a gated MLP
PREFIX = "lineament-rebuilt-"
FORMAT = 1
LAYERS = "model.layers"
READ = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"}
WRITE = ("self_attn.o_proj", "mlp.down_proj")
KINDS: dict[str, tuple[type, type]] = {
    "experts": (Experts, ExpertsConfig),
    "selective": (SelectiveMLP, SelectiveConfig),
}
NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}


def widen(model: nn.Module, groups: Sequence[Sequence[int]]) -> Any:
    """Return a copy of a decoder in which groups of neighbouring layers are one wide layer each.

    A wide layer is `h' = h + sum_i attention_i(h)`, `h'' = h' + sum_i mlp_i(h')`: the attentions of the group side by
    side, then its MLPs. It has the parameters of its layers (the weights of their norms are multiplied into the
    projections) as one layer with more heads and more units, so fewer and larger matmuls run.

    Args:
        model: a Llama, Mistral or Qwen2 causal language model, not rebuilt yet; not changed.
        groups: runs of neighbouring layers, `[(10, 11), (12, 13)]` say; layers not named stay as they are.

    Raises:
        InputError: another family, a model rebuilt already, or groups that are no runs or overlap.

    Example:
        >>> from lineament.models import tiny_teacher
        >>> wide = widen(tiny_teacher("llama"), [(1, 2)])
        >>> len(wide.model.layers), wide.model.layers[1].self_attn.q_proj.out_features
        (2, 96)
    """
    config = _plain_config(model)
    count = config.num_hidden_layers
    runs = _all_groups(groups, count)
    kinds = getattr(config, "layer_types", None)
    if kinds and any(len({kinds[i] for i in run}) > 1 for run in runs):
        raise InputError(f"a group mixes kinds of attention ({', '.join(sorted(set(kinds)))}); give layers of one kind")
    about = {"format": FORMAT, "widths": [len(run) for run in runs], "mlps": {}}
    changes: dict[str, Any] = {"num_hidden_layers": len(runs)}
    if kinds:
        changes["layer_types"] = [kinds[run[0]] for run in runs]
    new = _copied(model, _config(config, about, **changes))
    old = list(new.model.layers)
    new.model.layers = nn.ModuleList(
        old[run[0]] if len(run) == 1 else _joined([old[i] for i in run], new.config, at) for at, run in enumerate(runs)
    )
    for at, own in enumerate(new.model.layers):
        layer: Any = own
        layer.self_attn.layer_idx = at
    return new


def with_mlps(model: nn.Module, mlps: Mapping[int, Experts | SelectiveMLP]) -> Any:
    """Return a copy of a decoder with other feed-forward layers in some places: `Experts` or `SelectiveMLP`.

    Args:
        model: a Llama, Mistral or Qwen2 causal language model, possibly widened; not changed.
        mlps: layer -> what stands in for its MLP (`weights.experts.split` and `selective` make them).

    Raises:
        InputError: another family, or a layer or width that the model does not have.
    """
    config: Any = model.config
    _check_family(config)
    about = copy.deepcopy(getattr(config, "rebuilt", None)) or {
        "format": FORMAT, "widths": [1] * config.num_hidden_layers, "mlps": {},
    }  # fmt: skip
    for layer, own in mlps.items():
        if not 0 <= layer < config.num_hidden_layers:
            raise InputError(f"layer {layer} is outside the model's layers 0 to {config.num_hidden_layers - 1}")
        if own.config.width != config.hidden_size:
            raise InputError(f"what stands in for layer {layer} has width {own.config.width}, not {config.hidden_size}")
        kind = next(kind for kind, (cls, _) in KINDS.items() if isinstance(own, cls))
        active = {"active": own.active} if isinstance(own, Experts) else {}
        about["mlps"][str(layer)] = {"kind": kind, **own.config.to_json(), **active}
    new = _copied(model, _config(config, about))
    swap(new, {f"{LAYERS}.{layer}.mlp": own for layer, own in mlps.items()})
    return new


def experts_of(model: nn.Module) -> dict[int, Experts]:
    """Return {layer: its experts} of a rebuilt model."""
    found = {i: layer.mlp for i, layer in enumerate(model.get_submodule(LAYERS))}  # type: ignore[arg-type]
    return {i: mlp for i, mlp in found.items() if isinstance(mlp, Experts)}


def set_active_(model: nn.Module, active: int | Mapping[int, int]) -> Any:
    """Set how many experts work on a token, in all layers or by layer; in place, the config too. Returns the model.

    Raises:
        InputError: no experts, or a number outside them.
    """
    found = experts_of(model)
    if not found:
        raise InputError(f"{type(model).__name__} has no experts; weights.experts.split makes some")
    for layer, number in (dict.fromkeys(found, active) if isinstance(active, int) else active).items():
        if layer not in found or not 1 <= number <= found[layer].config.experts:
            raise InputError(f"layer {layer} can't have {number} active experts")
        found[layer].active = number
        model.config.rebuilt["mlps"][str(layer)]["active"] = number  # pyright: ignore
    return model


class _Rebuilt(PreTrainedModel):
    """What rebuilt models add to their family's class: after the plain layers, those that the config names."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        about = getattr(config, "rebuilt", None)
        if not about:
            raise InputError("this config says nothing of what is rebuilt; lineament.models.widen writes one")
        if about.get("format", 0) > FORMAT:
            raise InputError(f"this model was written in format {about['format']}; upgrade lineament")
        layers = self.get_submodule(LAYERS)
        for at, width in enumerate(about["widths"]):
            if width > 1:
                layers[at] = _wide_layer(type(layers[at]), config, width, at)  # type: ignore[operator,index]
        for at, own in about["mlps"].items():
            layer, settings = KINDS[own["kind"]]
            layers[int(at)].mlp = layer(settings(**{k: v for k, v in own.items() if k != "kind"}))  # type: ignore

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Experts | SelectiveMLP):
            if not any(getattr(x, "_is_hf_initialized", False) for x in module.parameters(recurse=False)):
                module.reset_parameters()
            return
        super()._init_weights(module)


def _check_family(config: Any) -> str:
    kind = str(config.model_type).removeprefix(PREFIX)
    if kind not in FAMILIES:
        raise InputError(f"{config.model_type} can't be rebuilt; expected one of {', '.join(FAMILIES)}")
    return kind


def _plain_config(model: nn.Module) -> Any:
    config: Any = model.config
    _check_family(config)
    if getattr(config, "rebuilt", None):
        raise InputError("this model is rebuilt already; widen the model it came from")
    return config


def _all_groups(groups: Sequence[Sequence[int]], count: int) -> list[tuple[int, ...]]:
    """Check groups and add a group of one for every layer that none of them names."""
    check_groups(groups, count)
    named = {layer: tuple(group) for group in groups for layer in group}
    return list(dict.fromkeys(named.get(i, (i,)) for i in range(count)))


def _config(config: Any, about: Mapping[str, Any], **changes: Any) -> Any:
    kind = _check_family(config)
    left_out = ("model_type", "architectures", "quantization_config", "rebuilt", *changes)
    data = {name: value for name, value in config.to_dict().items() if name not in left_out}
    new = config_class(kind).from_dict({**data, **changes, "rebuilt": dict(about)})
    new._attn_implementation_internal = config._attn_implementation_internal
    return new


def _copied(model: nn.Module, config: Any) -> Any:
    new: Any = copy.deepcopy(model)
    take_config(new, config)
    new.__class__ = rebuilt_class(type(model))
    return new


def _wide_layer(kind: type[nn.Module], config: Any, width: int, at: int) -> Any:
    """Make a layer of the family with `width` times the heads and units."""
    wide = copy.deepcopy(config)
    wide.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        setattr(wide, name, width * getattr(config, name))
    layer: Any = kind(wide, at)  # type: ignore[call-arg]
    layer.self_attn.config = config  # one place for the attention implementation, so that changing it reaches all
    return layer


@torch.no_grad()
def _joined(layers: Sequence[Any], config: Any, at: int) -> Any:
    """Return some layers as one wide layer with their weights."""
    like = next(layers[0].parameters())
    wide = _wide_layer(type(layers[0]), config, len(layers), at).to(device=like.device, dtype=like.dtype)
    for name in READ:
        norm = NORMS[name.partition(".")[0]]
        wide.get_submodule(name).weight.copy_(
            torch.cat([each.get_submodule(name).weight * each.get_submodule(norm).weight for each in layers])
        )
        _biases(wide, layers, name, torch.cat)
    for name in WRITE:
        wide.get_submodule(name).weight.copy_(torch.cat([each.get_submodule(name).weight for each in layers], dim=1))
        _biases(wide, layers, name, lambda given: torch.stack(given).sum(0))
    for norm in NORMS.values():
        wide.get_submodule(norm).weight.fill_(1.0)
    return wide.train(layers[0].training)


def _biases(wide: Any, layers: Sequence[Any], name: str, join: Any) -> None:
    bias: Tensor | None = wide.get_submodule(name).bias
    if bias is not None:
        bias.copy_(join([each.get_submodule(name).bias for each in layers]))


@cache
def config_class(kind: str) -> type:
    """Return the config class of a family's rebuilt models, e.g. `RebuiltLlamaConfig`."""
    base = CONFIG_MAPPING[kind]
    body = {
        "model_type": PREFIX + kind, "rebuilt": None, "__annotations__": {"rebuilt": dict | None},
        "__module__": __name__, "__doc__": f"{base.__name__} with `rebuilt`: wide layers and experts.",
    }  # fmt: skip
    return _published(type(f"Rebuilt{base.__name__}", (base,), body))


@cache
def rebuilt_class(cls: type) -> type:
    """Return the class of rebuilt models of a family's class, e.g. `RebuiltLlamaForCausalLM`."""
    if issubclass(cls, _Rebuilt):
        return cls
    body = {
        "config_class": config_class(cls.config_class.model_type), "__module__": __name__,
        "__doc__": f"{cls.__name__} with wide layers or experts.",
    }  # fmt: skip
    return _published(type(f"Rebuilt{cls.__name__}", (_Rebuilt, cls), body))


def _published(cls: type) -> type:
    """Make a class that was made here findable by name, so that it can be pickled."""
    globals()[cls.__name__] = cls
    return cls


def register_rebuilt() -> None:
    """Let transformers' Auto classes load rebuilt models."""
    for kind in FAMILIES:
        config = config_class(kind)
        AutoConfig.register(PREFIX + kind, config, exist_ok=True)
        model = rebuilt_class(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]])
        AutoModelForCausalLM.register(config, model, exist_ok=True)
