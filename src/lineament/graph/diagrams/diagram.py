"""The door: a model in, a diagram out that can be drawn, read and run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lineament._base.errors import InputError
from lineament.graph.diagrams import svg as drawing
from lineament.graph.diagrams import text as words
from lineament.graph.diagrams.assemble import term_of
from lineament.graph.diagrams.execute import execute
from lineament.graph.diagrams.fold import Panel, panels
from lineament.graph.diagrams.term import Term
from lineament.graph.double import InDouble
from lineament.graph.trace import trace
from lineament.io import write_text


@dataclass(frozen=True)
class Diagram:
    """A model's term, and the ways to look at it.

    Attributes:
        term: what is drawn and run.
        name: of the model.
        kinds: module name -> class name.
        model: whose weights it runs on.
    """

    term: Term
    name: str
    kinds: Mapping[str, str]
    model: nn.Module = field(repr=False)

    def panels(self, *, fold: bool = True) -> list[Panel]:
        """Return what is drawn: the whole, then every block once. `fold=False`: every operator where it stands."""
        return panels(self.term, self.kinds, fold=fold)

    def svg(self, *, fold: bool = True) -> str:
        """Draw it; the title and the description in it say the same in words."""
        shown = self.panels(fold=fold)
        return drawing.svg(self.term, shown, f"Neural circuit diagram of {self.name}", self._summary(shown))

    def text(self, *, fold: bool = True) -> str:
        """Say it in numbered lines."""
        shown = self.panels(fold=fold)
        return words.text(self.term, shown, drawing.shown_names(self.term, shown))

    def html(self, *, fold: bool = True) -> str:
        """Return a page with the drawing and, below it, the text."""
        name, said = escape(self.name), escape(self.text(fold=fold))
        head = f'<head><meta charset="utf-8"><title>{name}</title>{PAGE}</head>'
        body = f"<h1>{name}</h1>{self.svg(fold=fold)}<h2>In words</h2><pre>{said}</pre>"
        return f'<!doctype html><html lang="en">{head}<body>{body}</body></html>\n'

    def to_json(self) -> dict[str, Any]:
        """Return the term as plain values."""
        return {"name": self.name, **self.term.to_json()}

    def execute(self, *args: Any, dtype: torch.dtype = torch.float64, **kwargs: Any) -> list[Tensor]:
        """Run the term on a call like the traced one, with the model's weights.

        Args:
            args, kwargs: as for the model; shapes must be those of the trace.
            dtype: of all arithmetic on real numbers.

        Returns:
            The tensors of the output.
        """
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        return execute(self.term, dict(self.model.named_parameters()), given, dtype=dtype)

    def error(self, *args: Any, **kwargs: Any) -> float:
        """Return the largest difference between the term and the model in float64, as a share of the largest output.

        The model itself runs in float64 throughout: where its code asks for a narrower real type it gets this one. Its
        weights are cast and cast back.
        """
        dtypes = {name: tensor.dtype for name, tensor in self.model.state_dict().items()}
        modes = [(module, module.training) for module in self.model.modules()]
        wide = pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x,
                               (args, kwargs))  # fmt: skip
        held = {name: tensor.detach().clone() for name, tensor in self.model.named_buffers()}
        try:
            self.model.double().eval()
            with torch.no_grad(), InDouble():
                wanted = self.model(*wide[0], **wide[1])
            with torch.no_grad():
                found = self.execute(*wide[0], **wide[1])
        finally:
            _narrow(self.model, dtypes, held)
            for module, training in modes:
                module.training = training
        wanted = wanted.logits if isinstance(getattr(wanted, "logits", None), Tensor) else wanted
        tensors = [leaf for leaf in pytree.tree_leaves(wanted) if isinstance(leaf, Tensor)]
        shares = [
            float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
            for a, b in zip(found, tensors, strict=True)
        ]
        return max(shares, key=lambda share: math.inf if math.isnan(share) else share)

    def write(self, path: str | Path, *, fold: bool = True) -> Path:
        """Write .svg, .html, .txt or .json, by the name's ending.

        Raises:
            InputError: another ending.
        """
        import json

        path = Path(path)
        makers = {".svg": self.svg, ".html": self.html, ".txt": self.text}
        if path.suffix == ".json":
            return write_text(path, json.dumps(self.to_json(), ensure_ascii=False) + "\n")
        if path.suffix not in makers:
            raise InputError(f"{path} ends in {path.suffix or 'nothing'!r}; expected .svg, .html, .txt or .json")
        return write_text(path, makers[path.suffix](fold=fold))

    def _summary(self, shown: list[Panel]) -> str:
        blocks = [f"{cell.name}, {cell.times} times" if cell.times > 1 else cell.name
                  for cell in shown[0].cells if cell.op is None]  # fmt: skip
        made = f"made of the blocks {'; '.join(blocks)}" if blocks else "without blocks"
        axes = len(drawing.shown_names(self.term, shown))
        return (
            f"{self.name}: {len(self.term.ops)} operators on {axes} axes, {made}. "
            "Wires are axes and run from left to right; every sign has a title. The text form lists all operators."
        )


def diagram(model: nn.Module, *args: Any, **kwargs: Any) -> Diagram:
    """Trace a model and build its diagram.

    Args:
        model: any module that can be traced; it is read as in eval mode, in the plain-autograd form of our operators.
        args, kwargs: an example call; only shapes count. Unequal sizes keep axes apart for the eye, not for the term.

    Raises:
        InputError: the model can't be traced (module and line are named), or writes into part of a tensor.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> found = diagram(mlp, torch.zeros(1, 4))
        >>> [(op.kind, op.frame) for op in found.term.ops]
        [('einsum', '0'), ('map', '1'), ('einsum', '2')]
        >>> found.error(torch.ones(1, 4)) < 1e-12
        True
    """
    traced = trace(model, *args, **kwargs)
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    return Diagram(term_of(traced, given), type(model).__name__, kinds, model)


def _narrow(model: nn.Module, dtypes: Mapping[str, torch.dtype], held: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers back their types, bit by bit."""
    for name, tensor in model.named_parameters():
        tensor.data = tensor.data.to(dtypes[name])
    for name, tensor in model.named_buffers():
        tensor.data = held[name]


PAGE = """<style>body{font-family:'DejaVu Sans',Verdana,sans-serif;margin:1.5rem;background:#fff;color:#1c2126}
svg{max-width:100%;height:auto}pre{overflow:auto;font-size:12px}
@media(prefers-color-scheme:dark){body{background:#171b1f;color:#e8ecef}}</style>"""
