"""Tiny random decoders of several families."""

import torch
import transformers as hf

_SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "max_position_embeddings": 128}

MAKERS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED, head_dim=8)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=4, sliding_window_pattern=2)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=61, n_embd=32, n_layer=4, n_head=4, n_positions=128)),
    "neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SMALL, max_position_embeddings=128)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=61,
            hidden_size=32,
            num_hidden_layers=4,
            ffn_dim=48,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
        )
    ),
}
LAYERS = {"gpt2": "transformer.h", "neox": "gpt_neox.layers", "opt": "model.decoder.layers"}


def tiny(family):
    """A model in eval mode and the names of its layers."""
    torch.manual_seed(0)
    model = MAKERS[family]().eval()
    stem = LAYERS.get(family, "model.layers")
    return model, [f"{stem}.{i}" for i in range(4)]


def batch(padded=False):
    """Token numbers [2, 9], the first row left-padded by 3 if asked."""
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}
