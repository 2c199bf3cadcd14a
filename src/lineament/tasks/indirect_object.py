"""Sentences about who got the object: "A and B went to the shop, A gave the ball to" - B, the name not said twice.

A made-up language of ten tokens a prompt, small enough to learn in a minute, whose answer has to be found by looking at
both names (after Wang et al. 2022, arXiv:2211.00593). The corrupted prompt names the other giver, so its answer is the
other name, and everything else is the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lineament import train
from lineament._base.seeds import generator, seeded
from lineament.tasks.predictions import next_token_loss

BOS, AND, WENT, GAVE, TO = range(5)


@dataclass(frozen=True)
class Prompts:
    """Prompts with their answers.

    Attributes:
        ids, corrupted: [B, 10] token numbers.
        answer, distractor: [B], the name that is right, and the one that is right for the corrupted prompt.
        answer_at: [B], where the answer stands in the prompt.
    """

    ids: Tensor
    corrupted: Tensor
    answer: Tensor
    distractor: Tensor
    answer_at: Tensor


@dataclass(frozen=True, kw_only=True)
class IndirectObject:
    """The language: how many names, places and objects it has. `seed`: other seeds draw other sentences.

    Example:
        >>> found = IndirectObject().prompts(2)
        >>> found.ids.shape, bool((found.ids.gather(1, found.answer_at[:, None])[:, 0] == found.answer).all())
        (torch.Size([2, 10]), True)
    """

    names: int = 24
    places: int = 8
    objects: int = 8
    seed: int = 0

    @property
    def vocab(self) -> int:
        """Size of the alphabet."""
        return 5 + self.names + self.places + self.objects

    def prompts(self, count: int, *, batch: int = 0) -> Prompts:
        """Return prompts, drawn from the seed and the number of the batch."""
        random = generator(self.seed * 1_000_003 + batch)
        pairs = torch.rand(count, self.names, generator=random).argsort(1)[:, :2] + 5
        place = torch.randint(self.places, (count,), generator=random) + 5 + self.names
        thing = torch.randint(self.objects, (count,), generator=random) + 5 + self.names + self.places
        giver = torch.randint(2, (count,), generator=random)
        rows = torch.arange(count)

        def said(giver: Tensor) -> Tensor:
            words = torch.tensor([BOS, 0, AND, 0, WENT, 0, 0, GAVE, 0, TO]).repeat(count, 1)
            words[:, 1], words[:, 3] = pairs[:, 0], pairs[:, 1]
            words[:, 5], words[:, 6], words[:, 8] = place, pairs[rows, giver], thing
            return words

        return Prompts(said(giver), said(1 - giver), pairs[rows, 1 - giver], pairs[rows, giver], 1 + 2 * (1 - giver))

    def batches(self, size: int) -> Callable[[int], Tensor]:
        """Return step -> sentences [size, 11], each prompt with its answer, to learn from at every position."""

        def draw(step: int) -> Tensor:
            found = self.prompts(size, batch=step + 1)
            return torch.cat([found.ids, found.answer[:, None]], 1)

        return draw


def learned_model(
    language: Any, *, layers: int = 4, steps: int = 1200, seed: int = 0, positions: int = 16, batch: int = 128
) -> Any:
    """Return a small GPT-2 (width 64, 4 heads) that learned a language with `vocab` and `batches`, in eval mode.

    The loss is on every position; on the answer alone it would stay at chance.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    shape: dict[str, Any] = {"n_embd": 64, "n_layer": layers, "n_head": 4, "n_positions": positions}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    with seeded(seed):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=language.vocab, **shape, **off))
    config = train.FitConfig(steps=steps, lr=1e-3, warmup=min(50, steps), seed=seed)
    train.fit(model, language.batches(batch), next_token_loss, config)
    return model.eval()
