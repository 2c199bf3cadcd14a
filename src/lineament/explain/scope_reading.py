"""A linear replay to read: a model by name and a text or picture in, tables, a page and JSON out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineament._base.errors import InputError
from lineament.data import pieces
from lineament.explain.reading import picture_of, text_of
from lineament.explain.scope import Scope, scope
from lineament.report import HeatText, Picture, Section, Text, Tiles, heat_image, page, table


@dataclass(frozen=True, kw_only=True)
class Scoped:
    """What a model is for one input: f = A x + r.

    Attributes:
        model: its name. target: the output that is read, in words. against: the runner-up.
        value: f of the target. linear: its part A x. bias: its part r.
        margin_share: how much of the margin before the runner-up is the biases'.
        error: the largest |A x + r - f| as a share of the largest |f|.
        kinds: how operators are replayed. guards: of the masks.
        tokens: words or their parts, with `votes` A_i x each; or `pixels` [Y, X], the votes summed over colours.
        singular: the largest singular values of A. basis: their eigen-inputs, a size per token or [Y, X] per value.
    """

    model: str
    target: str
    against: str
    value: float
    linear: float
    bias: float
    margin_share: float
    error: float
    kinds: dict[str, int]
    guards: dict[str, float]
    tokens: Sequence[str] = ()
    votes: Sequence[float] = ()
    pixels: Sequence[Sequence[float]] = ()
    singular: Sequence[float] = ()
    basis: Sequence[Any] = ()

    def to_json(self) -> dict[str, Any]:
        """Return everything, for `json.dumps`."""
        return asdict(self)

    def numbers(self) -> dict[str, Any]:
        """Return what to see first."""
        return {
            "output": self.value, "A x": self.linear, "bias response r": self.bias,
            f"bias in the margin before {self.against}": self.margin_share, "error of f = A x + r": self.error,
        }  # fmt: skip

    def tables(self) -> list[Any]:
        """Return rich tables: the sum, the votes of words, how operators were read, singular values."""
        found = [table([{"what": k, "value": v} for k, v in self.numbers().items()], title=f"{self.target} = A x + r")]
        rows = [{"token": repr(t), "vote": v} for t, v in zip(self.tokens, self.votes, strict=True)]
        found += [table(rows, title="votes A_i x")] if rows else []
        if self.singular:
            rows = [{"rank": i + 1, "singular value": s} for i, s in enumerate(self.singular)]
            found.append(table(rows, title="singular values of A"))
        return found

    def write_html(self, path: str | Path) -> Path:
        """Write a page: the sum, the votes, the singular basis, how operators were read."""
        caption = "Blue votes for the output, vermilion against it; with the bias response they add up to it."
        if self.tokens:
            shown: list[Any] = [HeatText(self.tokens, self.votes, caption)]
            basis: list[Any] = [HeatText(self.tokens, sizes, f"{s:.4g}") for s, sizes in self._pairs()]
        else:
            shown = [_drawn(self.pixels, f"Votes of the picture's places for {self.target}", caption)]
            basis = [_drawn(grid, f"Eigen-input of {s:.4g}", f"Singular value {s:.4g}.") for s, grid in self._pairs()]
        kinds = [{"replayed as": kind, "operators": count} for kind, count in self.kinds.items()]
        note = "{guarded:g} of {elements:g} masks lie near 0 (the slope stands in); the largest is {largest:.3g}."
        sections = [Section(f"{self.target} = A x + r", [Tiles(self.numbers()), *shown])]
        sections += [Section("Singular basis: the inputs A responds to most", basis)] if basis else []
        sections.append(Section("How operators were read", [kinds, Text(note.format(**self.guards))]))
        return page(f"{self.model} as a linear map", sections, path)

    def _pairs(self) -> Any:
        return zip(self.singular, self.basis, strict=True)


def _drawn(grid: Sequence[Sequence[float]], alt: str, caption: str) -> Picture:
    return Picture(heat_image(grid), alt, caption, heat_image(grid, dark=True))


def scope_text(model: str, text: str, *, target: str | None = None, singular: int = 4, **choices: Any) -> Scoped:
    """Read a language model as a linear map of a text's embeddings, at the next token's logits.

    Args:
        model: as for `models.load_teacher`; students too.
        text: at least one token.
        target: the word to read (its first token); the likeliest if None.
        singular: how many singular values, at most; a map has fewer than its outputs.
        choices: center, gate, offset, as for `scope`.

    Raises:
        InputError: an empty text, or one longer than the model reads.
    """
    net, tokenizer, ids, wanted = text_of(model, text, target)
    found = scope(net, {"input_ids": ids}, output=lambda out: out.logits[:, -1], **choices)
    rest, votes, values, basis = _read(found, wanted, singular, lambda k: repr(tokenizer.decode([k])))
    return Scoped(
        model=model, tokens=pieces(tokenizer, ids[0].tolist()), votes=votes[0].sum(-1).tolist(),
        singular=values, basis=[v[0].norm(dim=-1).tolist() for v in basis], **rest,
    )  # fmt: skip


def scope_image(
    model: str, image: str | Path, *, target: int | None = None, singular: int = 4, **choices: Any
) -> Scoped:
    """Read an image classifier as a linear map of a picture.

    Args:
        model: folder or Hub name of a transformers image classifier.
        image: a picture file.
        target: a class number; the likeliest if None.
        singular: how many singular values, at most; a map has fewer than its outputs.
        choices: center, gate, offset, as for `scope`.

    Raises:
        InputError: no such model, no picture, or no such class.
    """
    net, pixels, _ = picture_of(model, Path(image))
    found = scope(net, {"pixel_values": pixels}, **choices)
    labels: Any = net.config.id2label or {}
    rest, votes, values, basis = _read(found, target, singular, lambda k: str(labels.get(k, k)))
    return Scoped(
        model=model, pixels=votes[0].sum(0).tolist(), singular=values, basis=[v[0].sum(0).tolist() for v in basis],
        **rest,
    )  # fmt: skip


def _read(
    found: Scope, target: int | None, singular: int, word: Any
) -> tuple[dict[str, Any], Tensor, list[float], Tensor]:
    """Return the sum of one output, its votes, and the singular values with their eigen-inputs."""
    scores, bias = found.output[0], found.bias[0]
    if target is not None and not 0 <= target < len(scores):
        raise InputError(f"target {target} is out of range; the output has classes 0 to {len(scores) - 1}")
    one = int(scores.argmax()) if target is None else target
    other = int(torch.where(torch.arange(len(scores)) == one, -torch.inf, scores).argmax())
    votes = found.votes((0, one))
    singular = min(singular, min(found.output.numel(), found.input.numel()) - 1)  # a map of few outputs has few
    values, basis = (torch.empty(0), torch.empty(0)) if singular < 1 else found.singular(singular)[1:]
    rest = {
        "target": word(one), "against": word(other), "value": float(scores[one]), "linear": float(votes.sum()),
        "bias": float(bias[one]), "margin_share": found.bias_share((0, one), (0, other)), "error": found.error,
        "kinds": dict(found.kinds), "guards": asdict(found.guards),
    }  # fmt: skip
    return rest, votes, values.tolist(), basis
