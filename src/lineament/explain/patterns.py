"""Attention patterns: which position looks at which, as arrays and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.explain.places import run
from lineament.explain.recording import prepared
from lineament.explain.relevance import named
from lineament.graph import capture
from lineament.report import Picture, Section, heatmap, page


@dataclass(frozen=True)
class Patterns:
    """Attention patterns of one run.

    Attributes:
        weights: softmax layer, counted from 0 -> [B, H, T, T]; rows sum to 1.
        tokens: words of the first row, for pictures.
    """

    weights: dict[int, Tensor]
    tokens: Sequence[str] = ()

    def png(self, layer: int, head: int, *, row: int = 0, dark: bool = False) -> bytes:
        """Draw a head's pattern: a row per position that looks, a column per position looked at.

        Raises:
            InputError: no such layer or head.
        """
        found = self.weights.get(layer)
        if found is None or not 0 <= head < found.shape[1]:
            heads = next(iter(self.weights.values())).shape[1]
            raise InputError(f"layer {layer}, head {head}; there are layers {list(self.weights)} of {heads} heads")
        words = [word.replace("\n", "⏎") for word in self.tokens] or None
        return heatmap(
            found[row, head].float().tolist(), xlabel="looked at", ylabel="from", title=f"a{layer}.h{head}",
            unit="attention", row_names=words, column_names=words, dark=dark,
        )  # fmt: skip

    def write_html(self, path: str | Path, heads: Sequence[tuple[int, int]], *, title: str = "Attention") -> Path:
        """Write a page with the patterns of some (layer, head)."""
        pictures = [
            Picture(self.png(*at), f"Attention pattern of layer {at[0]}, head {at[1]}", "", self.png(*at, dark=True))
            for at in heads
        ]
        return page(title, [Section("Who looks where", pictures)], path)


def patterns(model: nn.Module, inputs: Mapping[str, Any] | Tensor, *, tokens: Sequence[str] = ()) -> Patterns:
    """Return the attention patterns of every softmax layer of a transformers model.

    Args:
        model: in eval mode; it comes back as it was. inputs: as for the model.
        tokens: words of the first row, for pictures.

    Raises:
        InputError: the model cannot return its attention.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise InputError("who attends to whom needs a transformers model that can return its attention")
    config: Any = model.config
    before = config._attn_implementation
    with prepared(model), torch.no_grad():
        try:
            model.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
            with capture(model, _attends) as seen:  # (output_attentions=True would leave hooks of its own behind)
                run(model, named(model, inputs))
        finally:
            model.set_attn_implementation(before)  # pyright: ignore[reportCallIssue]
    weights: dict[int, Tensor] = {}
    known: set[int] = set()
    for call in (call for name in seen for call in seen[name]):
        found = call[1] if isinstance(call, tuple) and len(call) > 1 else None
        if isinstance(found, Tensor) and found.dim() == 4 and found.data_ptr() not in known:  # a wrapper gives it twice
            known.add(found.data_ptr())
            weights[len(weights)] = found
    if not weights:
        raise InputError(f"{type(model).__name__} returns no attention patterns")
    return Patterns(weights, tokens)


def _attends(name: str, module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()
