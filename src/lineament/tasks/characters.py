"""A character model on real text: the smallest language-modelling comparison of mixers that means something."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lineament import data, train
from lineament._base.seeds import generator, seeded
from lineament.tasks.perplexity import perplexity
from lineament.tasks.predictions import next_token_loss


@dataclass(frozen=True)
class Characters:
    """A text as numbers of characters.

    Attributes:
        vocab: how many characters there are. train, test: int64 [N, length] windows that do not overlap.
    """

    vocab: int
    train: Tensor
    test: Tensor


def characters(name: str = "python-topics", *, length: int = 128) -> Characters:
    """Read a text of `data.load_text` as characters, in its splits "train" and "test"."""
    learnt, held_out, vocab = character_ids(name)
    return Characters(vocab, learnt.unfold(0, length, length), held_out.unfold(0, length, length))


@cache
def character_ids(name: str = "python-topics") -> tuple[Tensor, Tensor, int]:
    """Return a text as numbers of its characters: to learn from, held out, and how many there are."""
    texts = ["\n".join(data.load_text(name, split=split)) for split in ("train", "test")]
    known = {c: i for i, c in enumerate(sorted(set("".join(texts))))}
    learnt, held_out = (torch.tensor([known[c] for c in text]) for text in texts)
    return learnt, held_out, len(known)


def learn_characters(
    config: Any,
    text: Characters,
    *,
    steps: int = 200,
    batch: int = 16,
    lr: float = 3e-3,
    seed: int = 0,
    scored: int = 256,
) -> float:
    """Train a decoder from scratch and return its loss on unseen text, in nats per character.

    Args:
        config, text, steps, batch, lr, seed: as of `character_model`. scored: windows of the test text, at most.
    """
    model = character_model(config, text, steps=steps, batch=batch, lr=lr, seed=seed)
    return score_characters(model, text, scored=scored)


def character_model(
    config: Any, text: Characters, *, steps: int = 200, batch: int = 16, lr: float = 3e-3, seed: int = 0
) -> Any:
    """Return a decoder trained from scratch on a text, in eval mode.

    Args:
        config: a `DecoderConfig` whose vocabulary is the text's. text: as from `characters`.
        steps, batch, lr: AdamW, cosine to 0. seed: of the weights and of the windows drawn.
    """
    from lineament.models import DecoderForCausalLM

    with seeded(seed):
        model = DecoderForCausalLM(config)

    def draw(step: int) -> Tensor:
        return text.train[torch.randint(len(text.train), (batch,), generator=generator(seed * 100_003 + step))]

    train.fit(model.train(), draw, next_token_loss, train.FitConfig(steps=steps, lr=lr, warmup=10, seed=seed))
    return model.eval()


def score_characters(model: nn.Module, text: Characters, *, scored: int = 256) -> float:
    """Return a model's loss on unseen text, in nats per character, over `scored` windows at most."""
    return perplexity(model, text.test[:scored], batch_size=32).nll
