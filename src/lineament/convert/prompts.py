"""Retrieval prompts by step number, for placement and for training; those for evaluation are worded otherwise."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lineament.tasks.haystack import Haystack
from lineament.tasks.retrieval import train_examples

MakePrompts = Callable[[int, int, int], tuple[Tensor, Tensor]]
NEAR = 64  # tokens between the window's end and the nearest fact


def prompt_maker(tokenizer: Any, filler: Sequence[str], templates: str, *, window: int, seed: int) -> MakePrompts:
    """Return (length, rows, step) -> (ids [rows, length], answer bool [rows, length]); kinds take turns.

    Args:
        filler: documents that the facts are hidden in. templates: "train" or "place".
        window: facts lie beyond it.
    """
    hay, makers = Haystack(filler, tokenizer), {}

    def make(length: int, rows: int, step: int) -> tuple[Tensor, Tensor]:
        key = (length, rows)
        if key not in makers:
            makers[key] = train_examples(
                tokenizer, hay, length, rows, templates=templates, seed=seed, beyond=window + NEAR
            )
        return makers[key](step)

    return make
