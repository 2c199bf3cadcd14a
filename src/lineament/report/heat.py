"""Relevance to look at: words and pictures coloured by how much speaks for and against."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from lineament._base.errors import InputError
from lineament.report.style import canvas

FOR, AGAINST = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class HeatText:
    """Words with a number each, shown on a page with coloured grounds: blue speaks for, vermilion against."""

    tokens: Sequence[str]
    values: Sequence[float]
    caption: str = ""

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.values) or not len(self.tokens):
            raise InputError(f"{len(self.tokens)} words and {len(self.values)} numbers; expected as many, at least one")

    def shades(self) -> list[tuple[str, str, str]]:
        """Return (word, CSS colour, number in words) of each word."""
        found = []
        for token, x, share in zip(self.tokens, self.values, _shares(self.values), strict=True):
            red, green, blue = (int((FOR if x >= 0 else AGAINST)[i : i + 2], 16) for i in (1, 3, 5))
            found.append((token, f"rgba({red},{green},{blue},{0.75 * share:.3f})", f"{x:+.4g}"))
        return found


def _shares(values: Sequence[float]) -> list[float]:
    """Return magnitudes as shares of the largest; what is no number has none."""
    sizes = [abs(x) if math.isfinite(x) else 0.0 for x in values]
    most = max(sizes, default=0.0) or 1.0
    return [size / most for size in sizes]


def heat_text(tokens: Sequence[str], values: Sequence[float], *, title: str | None = None, dark: bool = False) -> bytes:
    """Draw words with coloured grounds.

    Args:
        tokens: words or parts of words, in order. values: a number each.
        title: above them. dark: for dark pages.

    Returns:
        A PNG.

    Example:
        >>> heat_text(["Paris", " is"], [0.8, -0.1])[:4]
        b'\\x89PNG'
    """
    shades = HeatText(tokens, values).shades()
    lines: list[list[tuple[str, float, float]]] = [[]]
    for (token, _, _), x, share in zip(shades, values, _shares(values), strict=True):
        if sum(len(word) for word, *_ in lines[-1]) + len(token) > 72 or token == "\n":
            lines.append([])
        lines[-1].append((token.replace("\n", "⏎"), x, share))
    with canvas(8.4, 0.34 * len(lines) + (0.9 if title else 0.5), dark=dark) as c:
        c.axes.set_axis_off()
        c.axes.set_xlim(0, 74)
        c.axes.set_ylim(len(lines), 0)
        for row, line in enumerate(lines):
            column = 0
            for word, x, share in line:
                ground = {"facecolor": FOR if x >= 0 else AGAINST, "alpha": 0.75 * share, "pad": 1.5, "lw": 0}
                c.axes.text(column, row + 0.5, word, family="DejaVu Sans Mono", fontsize=9.5, va="center", color=c.ink,
                            bbox=ground, parse_math=False)  # fmt: skip
                column += len(word)
        if title:
            c.label(title, "", "")
        return c.png()


def heat_image(
    values: Sequence[Sequence[float]], *, image: Any = None, title: str | None = None, dark: bool = False
) -> bytes:
    """Draw a map of relevance, blue for and vermilion against, over a picture if there is one.

    Args:
        values: [Y, X]; colours reach to the largest |value|.
        image: [Y, X] or [Y, X, 3] in 0 to 1, shown grey beneath.
        title: above it. dark: for dark pages.

    Returns:
        A PNG.

    Raises:
        InputError: values that are no grid.

    Example:
        >>> heat_image([[0.0, 1.0], [-1.0, 0.5]])[:4]
        b'\\x89PNG'
    """
    grid = np.asarray(values, dtype=float)
    if grid.ndim != 2 or not grid.size:
        raise InputError(f"a map of relevance needs [Y, X] values; given shape {list(grid.shape)}")
    sizes = np.abs(np.where(np.isfinite(grid), grid, 0.0))
    most = float(sizes.max()) or 1.0
    with canvas(5.2, 5.2 * grid.shape[0] / grid.shape[1] + 0.5, dark=dark) as c:
        c.axes.set_axis_off()
        colours = LinearSegmentedColormap.from_list("relevance", [AGAINST, c.paper, FOR])
        if image is not None:
            grey = np.asarray(image, dtype=float)
            grey = grey.mean(-1) if grey.ndim == 3 else grey
            extent = (-0.5, grid.shape[1] - 0.5, grid.shape[0] - 0.5, -0.5)
            c.axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=extent)
        alpha = 1.0 if image is None else 0.85 * sizes / most
        shown = c.axes.imshow(grid, cmap=colours, vmin=-most, vmax=most, alpha=alpha, interpolation="nearest")
        bar = c.figure.colorbar(shown, ax=c.axes, shrink=0.85, pad=0.02)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.tick_params(colors=c.soft, labelcolor=c.soft, length=0)
        bar.set_label("relevance", color=c.soft)
        if title:
            c.label(title, "", "")
        return c.png()
