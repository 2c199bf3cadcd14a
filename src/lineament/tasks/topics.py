"""A made-up language of topics with a planted rule: small enough to learn in a minute, rich enough for features.

A text follows the Markov chain of its topic. Here and there stands a mark: after "B" comes "C" if "A" stood two tokens
before it, and "D" otherwise; "A" also stands alone. So C needs two things at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lineament._base.seeds import generator

START, A, B, C, D = range(5)
SLOTS = 3  # marks in a text
SHARPNESS = 2.5  # of the chains' logits


@dataclass(frozen=True, kw_only=True)
class Topics:
    """The language. `vocab` tokens, of which 5 are marks; `seed`: other seeds are other languages.

    Example:
        >>> Topics().texts(2).shape
        torch.Size([2, 64])
    """

    topics: int = 8
    vocab: int = 64
    length: int = 64
    seed: int = 0

    @cached_property
    def chains(self) -> Tensor:
        """[topics, V, V]: how likely each word follows each word."""
        logits = SHARPNESS * torch.randn(self.topics, self.vocab, self.vocab, generator=generator(self.seed))
        logits[:, :, :5] = -torch.inf
        return logits.softmax(-1)

    def texts(self, count: int, *, batch: int = 0) -> Tensor:
        """Return texts [count, length], drawn from the seed and the number of the batch."""
        return self._drawn(count, batch)[0]

    def batches(self, size: int) -> Callable[[int], Tensor]:
        """Return step -> texts [size, length] to learn from."""
        return lambda step: self.texts(size, batch=step + 1)

    def pairs(self, count: int, *, batch: int = 0) -> tuple[Tensor, Tensor, int]:
        """Return texts that end in a mark with "A", the same with another word instead, and where "A" stands."""
        words, random = self._drawn(count, batch)
        at = self.length // 2
        words = words[:, : at + 3].clone()
        words[words < 5] = 5  # no other mark
        words[:, 0], words[:, at], words[:, at + 2] = START, A, B
        without = words.clone()
        without[:, at] = torch.randint(5, self.vocab, (count,), generator=random)
        return words, without, at

    def _drawn(self, count: int, batch: int) -> tuple[Tensor, torch.Generator]:
        random = generator(self.seed * 1_000_003 + batch)
        topic = torch.randint(self.topics, (count,), generator=random)
        words = torch.randint(5, self.vocab, (count, self.length), generator=random)
        words[:, 0] = START
        for t in range(2, self.length):
            words[:, t] = torch.multinomial(self.chains[topic, words[:, t - 1]], 1, generator=random)[:, 0]
        rows, step = torch.arange(count), (self.length - 2) // SLOTS
        for slot in range(SLOTS):
            at = 1 + slot * step + torch.randint(step - 6, (count,), generator=random)
            marked = torch.rand(count, generator=random) < 0.5
            words[rows, at] = torch.where(marked, A, words[rows, at])
            words[rows, at + 2], words[rows, at + 3] = B, torch.where(marked, C, D)
            alone = torch.rand(count, generator=random) < 0.5
            words[rows, at + 5] = torch.where(alone, A, words[rows, at + 5])
        return words, random
