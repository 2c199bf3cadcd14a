"""Tiny models with random weights, one per family: for tests, doctests and trying things out."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lineament._base.errors import unknown
from lineament._base.seeds import seeded
from lineament.models.adapters import ADAPTERS, head_shape
from lineament.models.student import build_student
from lineament.nn import MixerConfig

_COMMON = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 8, "attn_logit_softcapping": 20.0},
    "gemma3_text": {
        "query_pre_attn_scalar": 8, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "gpt2": {"hidden_size": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {"hidden_size": 48, "head_dim": None},
    "opt": {"hidden_size": 48, "ffn_dim": 32, "word_embed_proj_dim": 48, "dropout": 0.0},
}  # fmt: skip


def tiny_teacher(model_type: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """Return a random softmax model of a family: 3 layers, 6 query heads of width 8.

    Args:
        model_type: a key of `ADAPTERS`. seed: of the weights. changes: fields of its config.
    """
    if model_type not in ADAPTERS:
        raise unknown("model_type", model_type, ADAPTERS)
    fields = {**_COMMON, **_OWN.get(model_type, {}), **changes}
    if model_type in ("gpt2", "gpt_neox", "opt"):
        for name in ("num_key_value_heads", "head_dim"):
            fields.pop(name, None)
    config = AutoConfig.for_model(model_type, **fields)
    with seeded(seed):
        model = AutoModelForCausalLM.from_config(config)
        for p in model.parameters():  # initial weights are so small that attention is uniform
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    return model.eval()


def tiny(
    model_type: str = "llama", kind: str = "hedgehog-window", *, layers: tuple[int, ...] | None = None, **mixer: Any
) -> Any:
    """Return a random student of a family.

    Args:
        kind: of the mixers. layers: which are converted (None: all). mixer: other fields of `MixerConfig`.

    Example:
        >>> tiny("gpt2", "kda").config.model_type
        'lineament-gpt2'
    """
    teacher = tiny_teacher(model_type)
    shape = head_shape(teacher.config)
    chosen = range(teacher.config.num_hidden_layers) if layers is None else layers
    fields = {"window": 6, "sinks": 2, **mixer}
    with seeded(1):
        return build_student(teacher, {i: MixerConfig(kind=kind, **shape, **fields) for i in chosen}, share=True)
