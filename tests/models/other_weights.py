"""Tiny models of other people's families, built by transformers itself with random weights."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {**COMMON, **DELTA, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": {**COMMON, **DELTA},
    "olmo_hybrid": {**COMMON, **DELTA, "linear_num_key_heads": 4},
    "kimi_linear": {
        **COMMON, **EXPERTS, "linear_num_heads": 4, "linear_head_dim": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
        "num_key_value_heads": 4, "first_k_dense_replace": 1,
    },
    "minimax": {
        **COMMON, "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mamba2": {
        "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8,
        "n_groups": 2, "chunk_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip


def other_model(model_type: str, seed: int = 0) -> Any:
    """Return a random tiny model of a family, in eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **FAMILIES[model_type]))
    with torch.no_grad():  # initial weights are so small that every layer is nearly its residual
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=p.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    return model.eval()
