"""Two language models by name: brought onto each other, and measured along the line between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.weights.elements import Element
from lineament.weights.match import match
from lineament.weights.path import Path, path
from lineament.weights.point import Point
from lineament.weights.sources import open_named
from lineament.weights.symmetry import Symmetry, symmetry

EXAMPLE = torch.tensor([[1, 2, 3, 4]])


@dataclass(frozen=True)
class Aligned:
    """What `align_models` did: the group, the element, and the distance before and after."""

    group: Symmetry
    element: Element
    point: Point
    before: float
    after: float

    def row(self) -> dict[str, Any]:
        """Return the numbers as one mapping."""
        return {
            "free_classes": len(self.group.free), "log10_elements": self.group.log10_order,
            "self_check": self.group.error, "positions_moved": self.element.moved(), "distance_before": self.before,
            "distance_after": self.after,
        }  # fmt: skip


def align_models(a: str | File, b: str | File, *, restarts: int = 3, seed: int = 0, check: bool = True) -> Aligned:
    """Bring language model b onto a by weight matching; a group is derived from a's graph.

    Raises:
        InputError: not two causal language models of one architecture and size.
    """
    model, first, second = _opened(a, b)
    group = symmetry(model, input_ids=EXAMPLE, use_cache=False, check=int(check))
    element = match([first, second], group, restarts=restarts, seed=seed)[1]
    moved = element.apply(second)
    return Aligned(group, element, moved, _distance(first, second), _distance(first, moved))


def connect_models(
    a: str | File, b: str | File, windows: Sequence[Tensor], *, points: int = 11, align: bool = False,
    restarts: int = 3, seed: int = 0,
) -> Path:  # fmt: skip
    """Measure the loss of two language models along the line between them, in nats per token.

    Args:
        windows: batches of tokens, int64 [B, T]. align: bring b onto a first.
    """
    model, first, second = _opened(a, b)
    if align:
        second = align_models(a, b, restarts=restarts, seed=seed).point
    return path(model, first, second, [{"input_ids": w, "labels": w} for w in windows], points=points)


def text_windows(model: str | File, text: str | File, *, length: int, tokens: int) -> list[Tensor]:
    """Cut unseen text into batches of windows for a model; the `test` part of a data set that comes by name."""
    from transformers import AutoTokenizer

    from lineament import data

    split = None if File(text).exists() else "test"
    tokenizer = AutoTokenizer.from_pretrained(_folder(model, open_named(model)))
    found = data.windows(data.load_text(text, split=split), tokenizer, length, max_tokens=tokens)
    return list(found.split(4))


def _opened(a: str | File, b: str | File) -> tuple[nn.Module, Point, Point]:
    from lineament.models import load_model

    first, second = open_named(a), open_named(b)
    model = load_model(_folder(a, first))
    odd = sorted(
        name for name in {*first, *second}
        if name not in first or name not in second or first.shape(name) != second.shape(name)
    )  # fmt: skip
    if odd:
        listed = ", ".join(
            f"{n} {list(first.shape(n)) if n in first else 'missing'} / "
            f"{list(second.shape(n)) if n in second else 'missing'}" for n in odd[:10]
        )  # fmt: skip
        raise InputError(
            f"{a} and {b} differ in {len(odd)} tensors: {listed}; only models of one architecture and size meet"
        )
    return model, first, second


def _folder(name: str | File, point: Point) -> File:
    """Return where a point's config and tokenizer lie: of an adapter, those of its base."""
    if point.folder is None:
        raise InputError(f"{name} has no config.json beside its weights; expected a folder of transformers")
    return point.folder


def _distance(a: Point, b: Point) -> float:
    return math.sqrt(math.fsum(float((a.value(n) - b.value(n)).double().square().sum()) for n in a if _float(a, n)))


def _float(point: Point, name: str) -> bool:
    return point.dtype(name).is_floating_point
