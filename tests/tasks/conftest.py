"""A tokenizer of one token per character and models that know it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lineament._base.seeds import seeded


class Letters:
    """Text <-> its characters' codes, below 128."""

    bos_token_id = None

    def __call__(self, text, **options):
        def ids(one):
            return [ord(c) % 128 for c in one]

        return {"input_ids": ids(text) if isinstance(text, str) else [ids(one) for one in text]}

    def decode(self, ids):
        return "".join(map(chr, ids.tolist()))


@pytest.fixture(scope="session")
def letters():
    return Letters()


def llama(seed=0, **changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=128, num_key_value_heads=2, max_position_embeddings=4096, **sizes, **changes)
    with seeded(seed):
        model = LlamaForCausalLM(config)
        for p in model.parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="session")
def model():
    return llama()


@pytest.fixture(scope="session")
def other():
    return llama(seed=1)


@pytest.fixture(scope="session")
def filler():
    return [f"Sentence number {i} of a long text says nothing. " * 40 for i in range(4)]
