"""An explanation to read: a model by name and a text or picture in, tables, a page and heat maps out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.data import going_on, pieces
from lineament.explain.ledger import Ledger
from lineament.explain.methods import method_of
from lineament.explain.paths import Paths, paths
from lineament.explain.paths_reading import PathsReading
from lineament.explain.relevance import Relevance, check_length, relevance
from lineament.explain.rules import rules_of
from lineament.io import write_bytes
from lineament.models import adapter_for, attentions, head_shape, load_teacher
from lineament.report import HeatText, Picture, Section, Text, Tiles, heat_image, heat_text, heatmap, page, table


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What a model said, and where it came from.

    Attributes:
        model: its name. target: what was explained. value: its score. rules: the rule set's name.
        tokens: words or their parts, with `values`, their relevances; empty for pictures.
        pixels: relevance [Y, X] of a picture, summed over colours, with the `picture` in 0 to 1.
        heads: relevance of each attention head, a row per layer; empty where heads aren't known.
        ledger: where relevance ended.
        paths: the chains of nodes it took, if asked for.
    """

    model: str
    target: str
    value: float
    rules: str
    ledger: Ledger
    tokens: Sequence[str] = ()
    values: Sequence[float] = ()
    pixels: Sequence[Sequence[float]] = ()
    picture: Any = None
    heads: Sequence[Sequence[float]] = field(default_factory=tuple)
    paths: Paths | None = None

    @property
    def routes(self) -> PathsReading | None:
        """The paths with words."""
        words = {"input_ids": self.tokens} if len(self.tokens) else {}
        return None if self.paths is None else PathsReading(self.paths, self.target, words)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the picture, for `json.dumps`."""
        return {
            "model": self.model, "target": self.target, "value": self.value, "rules": self.rules,
            "tokens": [{"token": t, "relevance": v} for t, v in zip(self.tokens, self.values, strict=True)],
            "pixels": [list(row) for row in self.pixels], "heads": [list(row) for row in self.heads],
            "ledger": self.ledger.columns, "unaccounted": self.ledger.unaccounted, "open": self.ledger.open,
            **({"paths": self.paths.to_json()} if self.paths else {}),
        }  # fmt: skip

    def tables(self) -> list[Any]:
        """Return rich tables: the tokens that count most, and the ledger."""
        order = sorted(range(len(self.values)), key=lambda i: -abs(self.values[i]))[:15]
        rows = [{"position": i, "token": repr(self.tokens[i]), "relevance": self.values[i]} for i in sorted(order)]
        title = f"{self.target}: {self.value:.4g}, by {self.rules}"
        ledger = [{k: v for k, v in row.items() if k != "what"} for row in self.ledger.rows() if row["relevance"]]
        found = [*([table(rows, title=title)] if rows else []), table(ledger, title=f"where {title} ended")]
        opened = [{"let through without a balance": line} for line in self.ledger.open]
        found += [self.routes.table()] if self.routes else []
        return [*found, *([table(opened, title="the ledger is open: sums say nothing")] if opened else [])]

    def png(self, *, dark: bool = False) -> bytes:
        """Draw the heat map."""
        title = f"{self.target} ({self.value:.3g})"
        if len(self.pixels):
            return heat_image(self.pixels, image=self.picture, title=title, dark=dark)
        return heat_text(self.tokens, self.values, title=title, dark=dark)

    def write_png(self, path: str | Path) -> Path:
        """Write the heat map."""
        return write_bytes(path, self.png())

    def write_html(self, path: str | Path) -> Path:
        """Write a page: the heat map, the heads, the ledger."""
        numbers = {"target": self.target, "score": self.value, "rules": self.rules,
                   "unaccounted": f"{self.ledger.unaccounted:.1e}"}  # fmt: skip
        parts: list[Any] = [Tiles(numbers)]
        closed = "" if self.ledger.open else "; with the ledger below they add up to the score"
        caption = f"Blue speaks for the output, vermilion against it{closed}."
        if len(self.pixels):
            alt = f"Relevance of the picture's places for {self.target}"
            parts.append(Picture(self.png(), alt, caption, self.png(dark=True)))
        else:
            parts.append(HeatText(self.tokens, self.values, caption))
        sections = [Section("What the output comes from", parts)]
        if len(self.heads):
            options: dict[str, Any] = {"xlabel": "head", "ylabel": "layer", "unit": "|relevance|"}
            sizes = [[abs(x) for x in row] for row in self.heads]
            pictures = [heatmap(sizes, dark=dark, **options) for dark in (False, True)]
            alt = "Absolute relevance of every attention head, a row per layer"
            sections.append(Section("Heads", [Picture(pictures[0], alt, "What each head passed on.", pictures[1])]))
        sections += [self.routes.section()] if self.routes else []
        opened = [Text(f"The ledger is open. {line}.") for line in self.ledger.open]
        sections.append(Section("Where relevance ended", [self.ledger.rows(), *opened]))
        return page(f"Why {self.model} says {self.target}", sections, path)


def text_of(model: str, text: str, target: str | None) -> tuple[Any, Any, Tensor, int | None]:
    """Load a language model; return it, its tokenizer, the text's ids [1, T], and the first id of the wanted word.

    Raises:
        InputError: an empty text, or one longer than the model reads.
    """
    if not text.strip():
        raise InputError("the text is empty; give a few words for the model to go on from")
    net, tokenizer = load_teacher(model)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    check_length(net, {"input_ids": ids})
    if target is None:
        return net, tokenizer, ids, None
    lead = "" if target.startswith(" ") or text.endswith((" ", "\n")) else " "
    return net, tokenizer, ids, going_on(tokenizer, text, lead + target)[0]


def explain_text(
    model: str, text: str, *, target: str | None = None, rules: Any = "auto", unknown: str = "raise",
    **routed: Any,
) -> Explained:  # fmt: skip
    """Explain the next token a language model gives a text.

    Args:
        model: as for `models.load_teacher`; students too.
        text: at least one token.
        target: the word to explain (its first token); the likeliest if None.
        rules: as for `relevance`.
        unknown: what becomes of operators without a rule, as for `Rules`.
        routed: `top` paths are looked for too, with the other options of `paths`; `said` is called with their progress.

    Raises:
        InputError: an empty text, or one longer than the model reads.
    """
    net, tokenizer, ids, wanted = text_of(model, text, target)
    rules = _letting(rules, unknown, net)
    at, layers = _head_places(net)
    if method_of(rules) is not None:  # they explain inputs
        at = []
    ways = _ways(net, {"input_ids": ids}, wanted, rules, **routed)
    found = relevance(net, {"input_ids": ids}, target=wanted, rules=rules, at=at or None)
    word = tokenizer.decode([wanted if wanted is not None else int(found.target.split()[-1])])
    return Explained(
        model=model, target=repr(word), value=float(found.value[0]), rules=found.rules, ledger=found.ledger,
        tokens=pieces(tokenizer, ids[0].tolist()), values=found.inputs["input_ids"][0].tolist(),
        heads=_heads(net, found, layers) if at else (), paths=ways,
    )  # fmt: skip


def _ways(
    net: nn.Module, inputs: dict[str, Any], target: Any, rules: Any, *, top: int = 0,
    said: Callable[[str, int, int], None] | None = None, **options: Any,
) -> Paths | None:  # fmt: skip
    """Look for paths, if any are wanted."""
    if not top:
        return None
    tick = (lambda done, total: said("paths", done, total)) if said else None
    return paths(net, inputs, target=target, rules=rules, top=top, tick=tick, **options)


def _letting(rules: Any, unknown: str, net: nn.Module) -> Any:
    """Return rules with another way of treating operators without one, if so asked."""
    if unknown == "raise":
        return rules
    if method_of(rules) is not None:
        raise InputError(f"{rules!r} has no rules for operators, so unknown={unknown!r} means nothing there; drop it")
    return replace(rules_of(rules, net), unknown=unknown)


def _head_places(net: nn.Module) -> tuple[list[str], list[str]]:
    """Return the taps before the output projections, where heads lie side by side."""
    try:
        last, found = adapter_for(net).projections[-1], attentions(net)
    except InputError:
        return [], []
    names = [f"{name}.{last}" for name, _ in found.values()]
    return [f"{name}:input" for name in names], names


def _heads(net: nn.Module, found: Relevance, layers: Sequence[str]) -> list[list[float]]:
    width = head_shape(net.config)["value_width"]
    rows = [found.at.get(f"{name}:input") for name in layers]
    return [x.unflatten(-1, (-1, width)).sum((0, 1, 3)).tolist() for x in rows if isinstance(x, Tensor)]


def explain_image(
    model: str, image: str | Path, *, target: int | None = None, rules: Any = "auto", unknown: str = "raise",
    **routed: Any,
) -> Explained:  # fmt: skip
    """Explain the class an image classifier gives a picture.

    Args:
        model: folder or Hub name of a transformers image classifier.
        image: a picture file.
        target: a class number; the likeliest if None.
        rules, unknown, routed: as for `explain_text`.

    Raises:
        InputError: no such model, or no picture.
    """
    net, pixels, _ = picture_of(model, Path(image))
    rules = _letting(rules, unknown, net)
    ways = _ways(net, {"pixel_values": pixels}, target, rules, **routed)
    found = relevance(net, {"pixel_values": pixels}, target=target, rules=rules)
    label = int(found.target.split()[-1])
    shown = pixels[0].permute(1, 2, 0)
    shown = (shown - shown.min()) / (shown.max() - shown.min()).clamp_min(1e-9)
    return Explained(
        model=model, target=str((net.config.id2label or {}).get(label, label)), value=float(found.value[0]),  # pyright: ignore[reportCallIssue]
        rules=found.rules, ledger=found.ledger, pixels=found.inputs["pixel_values"][0].sum(0).tolist(),
        picture=shown.numpy(), paths=ways,
    )  # fmt: skip


def classifier_of(folder: Path) -> Any:
    """Return the image classifier in a folder, in eval mode."""
    from transformers import AutoModelForImageClassification

    try:
        return AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True).eval()
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{folder} can't be loaded as an image classifier: {str(error).splitlines()[0]}") from error


def picture_of(model: str, image: Path) -> tuple[nn.Module, Tensor, Any]:
    """Return an image classifier, a picture as it takes it, and its image processor."""
    from PIL import Image, UnidentifiedImageError
    from transformers import AutoImageProcessor

    from lineament.models import find_model

    if not image.is_file():
        raise InputError(f"{image} does not exist; expected a picture file")
    folder = find_model(model)
    net = classifier_of(folder)
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{folder} has no image processor: {str(error).splitlines()[0]}") from error
    try:
        with Image.open(image) as opened:
            mode = "L" if getattr(net.config, "num_channels", 3) == 1 else "RGB"
            pixels = processor(opened.convert(mode), return_tensors="pt")["pixel_values"]
    except UnidentifiedImageError as error:
        raise InputError(f"{image} is not a picture") from error
    return net.float(), pixels.to(torch.float32), processor


def coverage_of(model: str, text: str, *, rules: Any = "auto") -> list[dict[str, Any]]:
    """Return `coverage` of a language model by name, on a text."""
    from lineament.explain.coverage import coverage

    net, _, ids, _ = text_of(model, text, None)
    return coverage(net, {"input_ids": ids}, rules=rules)
