"""Where the attention sits in each family of decoders: data, one row per transformers `model_type`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lineament._base.errors import InputError, near_miss

SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj")
EXACT = ("hedgehog-window", "softmax-window", "lolcats")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a conversion must know of a family.

    Attributes:
        model_type: transformers' name, e.g. "llama".
        decoder: path of the module that runs the layers. layers: path of its list of layers.
        attention: name of a layer's attention module.
        cache: the name under which that module receives the cache.
        projections: names of its projections, in order of use (LoRA's targets; the last one is the output's).
        embedding, head: paths of the token embedding and of the output layer.
        reads: a layer's modules through which attention and MLP read the residual stream; empty where unknown.
        writes: a layer's modules whose outputs are added to it.
        down: a layer's last linear map of the MLP, whose input are the neurons.
        norm: path of the norm before the head.
        learns_positions: whether positions are rows of a learned table, so that none is further than its last.
    """

    model_type: str
    decoder: str = "model"
    layers: str = "model.layers"
    attention: str = "self_attn"
    cache: str = "past_key_values"
    projections: tuple[str, ...] = SPLIT
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    reads: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    writes: tuple[str, ...] = ("self_attn", "mlp")
    down: str = "mlp.down_proj"
    norm: str = "model.norm"
    learns_positions: bool = False

    @property
    def where(self) -> str:
        """Glob of the attention modules' names."""
        return f"{self.layers}.*.{self.attention}"


GPT2 = Adapter(
    model_type="gpt2",
    decoder="transformer",
    layers="transformer.h",
    attention="attn",
    projections=("c_attn", "c_proj"),
    embedding="transformer.wte",
    reads=("ln_1", "ln_2"),
    writes=("attn", "mlp"),
    down="mlp.c_proj",
    norm="transformer.ln_f",
    learns_positions=True,
)
GPT_NEOX = Adapter(
    model_type="gpt_neox",
    decoder="gpt_neox",
    layers="gpt_neox.layers",
    attention="attention",
    cache="layer_past",
    projections=("query_key_value", "dense"),
    embedding="gpt_neox.embed_in",
    head="embed_out",
    writes=("attention", "mlp"),
    down="mlp.dense_4h_to_h",
    norm="gpt_neox.final_layer_norm",
)
OPT = Adapter(
    model_type="opt",
    decoder="model.decoder",
    layers="model.decoder.layers",
    projections=("q_proj", "k_proj", "v_proj", "out_proj"),
    embedding="model.decoder.embed_tokens",
    reads=(),  # its MLP sees tokens without their batch, and has no module of its own
    writes=(),
    down="fc2",
    norm="model.decoder.final_layer_norm",
    learns_positions=True,
)


def _twice_normed(model_type: str) -> Adapter:
    """Return Gemma's layer: what attention and MLP write passes a norm first."""
    return Adapter(
        model_type=model_type,
        reads=("input_layernorm", "pre_feedforward_layernorm"),
        writes=("post_attention_layernorm", "post_feedforward_layernorm"),
    )


ADAPTERS: dict[str, Adapter] = {
    **{name: Adapter(model_type=name) for name in ("llama", "mistral", "qwen2", "qwen3", "smollm3")},
    "gemma2": _twice_normed("gemma2"),
    "gemma3_text": _twice_normed("gemma3_text"),
    "phi3": Adapter(model_type="phi3", projections=("qkv_proj", "o_proj")),
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "opt": OPT,
}
PREFIX = "lineament-"


def adapter_for(model: nn.Module | Any) -> Adapter:
    """Return the adapter of a model (or of a config).

    Raises:
        InputError: no adapter; the error names the attention modules found and the row to write.

    Example:
        >>> from transformers import LlamaConfig
        >>> adapter_for(LlamaConfig()).where
        'model.layers.*.self_attn'
    """
    config = getattr(model, "config", model)
    kind = str(getattr(config, "model_type", "")).removeprefix(PREFIX)
    if kind in ADAPTERS:
        return ADAPTERS[kind]
    if not isinstance(model, nn.Module):
        raise InputError(
            f"no adapter for model_type {kind!r}.{near_miss(kind, ADAPTERS)} Known: {', '.join(ADAPTERS)}."
        )
    found = {type(m).__name__: name for name, m in model.named_modules() if "attention" in type(m).__name__.lower()}
    listed = ", ".join(f"{cls} at {name}" for cls, name in list(found.items())[:5]) or "none"
    raise InputError(
        f"no adapter for model_type {kind!r}. Attention modules found: {listed}. If they are causal softmax over "
        f"transformers' attention interface, add a row to lineament.models.ADAPTERS: "
        f"ADAPTERS[{kind!r}] = Adapter(model_type={kind!r}, decoder=..., layers=..., attention=...) and call "
        f"lineament.models.register({kind!r})."
    )


def attentions(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """Return {layer: (name, attention module)} of a decoder, with a head or without."""
    return dict(_attentions(model, adapter_for(model)))


def within(model: Any, path: str) -> str:
    """Return an adapter's path as it is in this model: one without a head has no name for its decoder.

    Example:
        >>> from lineament.models import tiny_teacher
        >>> teacher = tiny_teacher("llama")
        >>> within(teacher, "model.layers"), within(teacher.model, "model.layers"), within(teacher.model, "model")
        ('model.layers', 'layers', '')
    """
    prefix = getattr(model, "base_model_prefix", "")
    headless = getattr(model, "base_model", None) is model and f"{path}.".startswith(f"{prefix}.")
    return path[len(prefix) + 1 :] if headless else path


def _attentions(model: nn.Module, adapter: Adapter) -> Iterator[tuple[int, tuple[str, nn.Module]]]:
    layers = within(model, adapter.layers)
    for index, layer in enumerate(model.get_submodule(layers)):  # type: ignore[arg-type]
        yield index, (f"{layers}.{index}.{adapter.attention}", layer.get_submodule(adapter.attention))


def head_shape(config: Any) -> dict[str, int]:
    """Return the MixerConfig fields that a model's config fixes: heads, key_heads, key_width, value_width, model_width.

    Example:
        >>> from transformers import GPT2Config
        >>> head_shape(GPT2Config())["key_width"]
        64
    """
    text = config.get_text_config(decoder=True)
    heads = int(text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    return {
        "heads": heads,
        "key_heads": int(getattr(text, "num_key_value_heads", None) or heads),
        "key_width": width,
        "value_width": width,
        "model_width": int(text.hidden_size),
    }


def learned_positions(config: Any) -> int | None:
    """Return how many positions a model can be given at all; None where they are computed, as by RoPE.

    Example:
        >>> from transformers import GPT2Config
        >>> learned_positions(GPT2Config())
        1024
    """
    adapter = ADAPTERS.get(str(getattr(config, "model_type", "")).removeprefix(PREFIX))
    return int(config.max_position_embeddings) if adapter is not None and adapter.learns_positions else None


def sliding_layers(config: Any) -> tuple[int, ...]:
    """Return the layers whose teacher attention is a sliding window already; conversions leave them as they are.

    Without `layer_types`, as in Mistral's and Phi-3's configs, `sliding_window` limits every layer, unless it is as
    long as the model's context.

    Example:
        >>> from transformers import MistralConfig
        >>> sliding_layers(MistralConfig(num_hidden_layers=2, sliding_window=4096, max_position_embeddings=32768))
        (0, 1)
    """
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    if not kinds:
        window, longest = getattr(text, "sliding_window", None), getattr(text, "max_position_embeddings", None)
        limited = window and (not longest or window < longest)
        kinds = ["sliding_attention"] * int(text.num_hidden_layers) if limited else []
    return tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")


def refusal(config: Any, layer: int, kind: str, full_heads: tuple[int, ...]) -> str | None:
    """Say why a layer can't be converted this way, or None."""
    text = config.get_text_config(decoder=True)
    layers = int(text.num_hidden_layers)
    if not 0 <= layer < layers:
        return f"layer {layer} is outside the model's layers 0 to {layers - 1}"
    reason = softcap_refusal(getattr(text, "attn_logit_softcapping", None), kind, bool(full_heads))
    if reason is None and full_heads and layer in sliding_layers(config):
        return f"layer {layer} is a sliding window in the teacher, so none of its heads can stay full softmax"
    return reason


def softcap_refusal(softcap: float | None, kind: str, full_heads: bool) -> str | None:
    """Say why a mixer can't stand in for attention whose logits are squashed to `softcap`, or None.

    Args:
        softcap: the teacher's `attn_logit_softcapping`; None or 0 where logits are as they are.
        kind: of the mixer. full_heads: whether some heads of a converted layer stay softmax.
    """
    if softcap and (kind in EXACT or full_heads):
        return (
            f"the teacher squashes its attention logits (attn_logit_softcapping={softcap}), which the exact softmax "
            f"part of {kind!r} doesn't do; take a mixer without an exact part (hedgehog, kda, ...), or set "
            "config.attn_logit_softcapping = None in the teacher first and see what that costs"
        )
    return None
