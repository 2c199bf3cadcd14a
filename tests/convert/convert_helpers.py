"""A tiny teacher, its tokenizer and its text, for tests that run a whole conversion in seconds."""

import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(180)]


def tiny_llama(layers: int = 3, *, seed: int = 0, **changes) -> LlamaForCausalLM:
    """A random Llama: 4 query heads, 2 key-value heads of width 8."""
    torch.manual_seed(seed)
    given = {
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**given, **changes})).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word tokenizer with every printable character beside, so that any text survives."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = ["<unk>", "<s>", "</s>", *sorted(byte_level.alphabet())]
    vocabulary = {token: i for i, token in enumerate(tokens[:256])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def text_folder(path: Path, documents: int = 24, words: int = 300) -> Path:
    """A folder with small text files."""
    draw = random.Random(0)
    path.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        text = " ".join(draw.choice(WORDS) for _ in range(words))
        (path / f"{number}.txt").write_text(f"Document {number}. {text}\n", encoding="utf-8")
    return path


def teacher_folder(path: Path, **changes) -> Path:
    """A saved tiny teacher."""
    tiny_llama(**changes).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def tiny_plan(data: Path, **changes):
    """A plan that runs in seconds on the tiny teacher."""
    from lineament.convert import Plan

    product = {"map": "product", "codes": 4, "query_scale": True}
    given = {
        "window": 16, "sinks": 2, "keep": "auto-heads:0.25", "options": product, "transfer_loss": "attention-kl",
        "transfer_positions": 16, "damage_tokens": 128, "damage_prompts": 0,
        "transfer_steps": 3, "transfer_lengths": (32, 64), "transfer_tokens": 64, "transfer_pool": 3,
        "distil": "lora", "distil_steps": 4, "distil_lengths": (48, 64), "distil_tokens": 64, "lora_rank": 2,
        "distil_retrieval": 0.0, "precision": "fp32", "data": (str(data),), "calibration_tokens": 128,
        "evaluate_lengths": (64,), "evaluate_tokens": 128, "evaluate_prompts": 0, "checkpoint_every": 2,
    }  # fmt: skip
    if "mixer" in changes:  # these options are our own mixer's
        given |= {"options": {}, "transfer_loss": "output-mse"}
    return Plan(**{**given, **changes})
