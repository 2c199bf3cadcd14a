"""Retrieval prompts as token ids with the answer at the end, for placement and for training."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lineament.tasks import make_prompts

KINDS = ("digits", "words", "two-needles", "key-value")
MakePrompts = Callable[[int, int, int], Sequence[tuple[Tensor, int]]]


def training_prompts(tokenizer: Any, filler: Sequence[str], templates: str) -> MakePrompts:
    """Return a maker of prompts: (length, count, seed) -> list of (ids with the answer, length of the answer).

    Args:
        filler: documents that the needles are hidden in. templates: "train" or "place"; the "test" ones are for
            evaluation alone. Kinds take turns.
    """

    def make(length: int, count: int, seed: int) -> list[tuple[Tensor, int]]:
        found: list[tuple[Tensor, int]] = []
        for turn in range(count):
            kind = KINDS[(turn + seed) % len(KINDS)]
            (one,) = make_prompts(
                tokenizer, kind, length, 1, templates=templates, filler=filler, seed=seed * 1009 + turn
            )
            ids = torch.tensor([*one.ids, *one.answer], dtype=torch.long)
            found.append((ids[-length:], len(one.answer)))
        return found

    return make
