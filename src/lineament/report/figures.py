"""Three plots, as PNG: curves with error bars, grouped bars, a heatmap."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from lineament._base.errors import InputError
from lineament.report.style import MARKERS, Canvas, canvas
from lineament.report.tables import cell

Points = Sequence[Sequence[float]]
"""(x, y), (x, y, error) or (x, y, low, high), each a sequence of numbers."""

Value = float | None | Sequence[float]
"""A height, or (height, low, high)."""


def curve(
    series: Mapping[str, Points],
    *,
    xlabel: str,
    ylabel: str,
    title: str | None = None,
    log: str = "",
    levels: Mapping[str, float] | None = None,
    dark: bool = False,
) -> bytes:
    """Draw lines with error bars, each named at its end.

    Args:
        series: name -> (x, y), (x, y, error) or (x, y, low, high). NaN leaves a gap.
        xlabel, ylabel: what is measured, with units.
        title: above the plot.
        log: "x", "y" or "xy" for logarithmic axes (of base 2 along x, where lengths double).
        levels: name -> height of dashed horizontal lines, a goal or a ceiling.
        dark: for dark pages.

    Returns:
        A PNG.

    Raises:
        InputError: nothing to draw, or x and y of different lengths.

    Example:
        >>> curve({"student": ([1, 2], [3.0, 2.5])}, xlabel="context (tokens)", ylabel="perplexity")[:4]
        b'\\x89PNG'
    """
    if not series:
        raise InputError("there is no series to draw; give at least one")
    with canvas(dark=dark) as c:
        ends: list[tuple[str, float, float, str]] = []
        for index, (name, points) in enumerate(series.items()):
            x, y, errors = _points(name, points)
            c.axes.errorbar(
                x, y, yerr=errors, color=c.colour(index), marker=MARKERS[index % len(MARKERS)],
                capsize=2.5, elinewidth=1.1, label=name,
            )  # fmt: skip
            last = np.flatnonzero(np.isfinite(y))
            if last.size:
                ends.append((name, float(x[last[-1]]), float(y[last[-1]]), c.colour(index)))
        _scale(c, log)
        if "x" in log:
            _ticks(c, sorted({float(x) for points in series.values() for x in points[0]}))
        for name, height in (levels or {}).items():
            c.axes.axhline(height, color=c.soft, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
            ends.append((name, c.axes.get_xlim()[1], height, c.soft))
        c.axes.grid(axis="y", color=c.grid, linewidth=0.8)
        c.label(title, xlabel, ylabel)
        if len(ends) <= 6:
            _name_ends(c, ends)
        else:
            c.legend()
        return c.png()


def bars(
    groups: Mapping[str, Mapping[str, Value]],
    *,
    ylabel: str,
    xlabel: str = "",
    title: str | None = None,
    log: bool = False,
    levels: Mapping[str, float] | None = None,
    dark: bool = False,
) -> bytes:
    """Draw grouped bars with their values on top.

    Args:
        groups: group -> series -> height, or (height, low, high); None leaves the bar out.
        ylabel, xlabel: what is measured, with units.
        title: above the plot.
        log: a logarithmic height axis.
        levels: name -> height of dashed horizontal lines.
        dark: for dark pages.

    Returns:
        A PNG.

    Raises:
        InputError: nothing to draw.

    Example:
        >>> bars({"2k": {"teacher": 1.0, "student": 1.2}}, ylabel="prefill speed (x)")[:4]
        b'\\x89PNG'
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    if not names:
        raise InputError("there is no bar to draw; give at least one group with one value")
    width = 0.8 / len(names)
    with canvas(max(6.4, 0.42 * len(names) * len(groups) + 1.2), dark=dark) as c:
        for index, name in enumerate(names):
            found = [
                (at, *_bar(group[name])) for at, group in enumerate(groups.values()) if group.get(name) is not None
            ]
            at = [place - 0.4 + width * (index + 0.5) for place, *_ in found]
            tops = [height for _, height, *_ in found]
            c.axes.bar(at, tops, width * 0.92, color=c.colour(index), label=name)
            spread = np.array([[max(h - low, 0), max(high - h, 0)] for _, h, low, high in found]).T
            if found and spread.any():
                c.axes.errorbar(at, tops, yerr=spread, fmt="none", ecolor=c.ink, elinewidth=1.1, capsize=2.5)
            if len(names) * len(groups) <= 18:
                for place, (_, height, _, high) in zip(at, found, strict=True):
                    _above(c, place, max(height, high, 0.0), cell(float(height)))
        c.axes.set_xticks(range(len(groups)), list(groups), color=c.ink, parse_math=False)
        c.axes.tick_params(axis="x", length=0)
        _scale(c, "y" if log else "")
        c.axes.margins(y=0.14)
        for height in (levels or {}).values():
            c.axes.axhline(height, color=c.soft, linestyle=(0, (4, 3)), linewidth=1.1)
        c.axes.grid(axis="y", color=c.grid, linewidth=0.8)
        c.label(title, xlabel, ylabel)
        if len(names) > 1:
            c.legend()
        _name_ends(c, [(name, 0.0, height, c.soft) for name, height in (levels or {}).items()])
        return c.png()


def heatmap(
    values: Sequence[Sequence[float]],
    *,
    xlabel: str,
    ylabel: str,
    title: str | None = None,
    unit: str = "",
    marked: Collection[tuple[int, int]] = (),
    row_names: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
    dark: bool = False,
) -> bytes:
    """Draw a table of numbers as colours, light for small.

    Args:
        values: rows of numbers; NaN stays empty.
        xlabel, ylabel: what columns and rows count.
        title: above the plot.
        unit: what the colours measure.
        marked: (row, column) of cells to frame.
        row_names, column_names: words beside each row and under each column, instead of numbers.
        dark: for dark pages.

    Returns:
        A PNG.

    Raises:
        InputError: no values, or rows of different lengths.

    Example:
        >>> heatmap([[0.0, 0.1], [0.5, 0.2]], xlabel="layer", ylabel="head", marked=[(1, 0)])[:4]
        b'\\x89PNG'
    """
    if len({len(row) for row in values}) != 1 or not len(values[0]):
        raise InputError(f"a heatmap needs rows of one length; given {[len(row) for row in values]}")
    grid = np.asarray(values, dtype=float)
    rows, columns = grid.shape
    width = min(12.0, max(4.2, 0.3 * columns + 2.0))
    with canvas(width, min(9.0, max(2.2, (width - 2.0) / columns * rows + 1.3)), dark=dark) as c:
        shades = [c.grid, c.colours[0], "#e3f3fd"] if dark else ["#f1f5f8", c.colours[0], "#062b45"]
        colours = LinearSegmentedColormap.from_list("house", shades)
        image = c.axes.imshow(grid, cmap=colours, aspect="equal", interpolation="nearest")
        for row, column in marked:
            corner = (column - 0.5, row - 0.5)
            c.axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=c.colours[1], linewidth=1.6))
        for axis, count, names in ((c.axes.xaxis, columns, column_names), (c.axes.yaxis, rows, row_names)):
            axis.set_ticks(range(0, count, 1 if names else max(1, math.ceil(count / 16))), names)
        for axis, turn in ((c.axes.xaxis, 90 if column_names else 0), (c.axes.yaxis, 0)):
            for word in axis.get_ticklabels():
                word.set(rotation=turn, parse_math=False)
        for spine in c.axes.spines.values():
            spine.set_visible(False)
        c.axes.tick_params(length=0)
        bar = c.figure.colorbar(image, ax=c.axes, shrink=0.9, pad=0.02)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.tick_params(colors=c.soft, labelcolor=c.soft, length=0)
        bar.set_label(unit, color=c.soft)
        c.label(title, xlabel, ylabel)
        return c.png()


def _points(name: str, points: Points) -> tuple[np.ndarray, np.ndarray, Any]:
    parts = [np.asarray(part, dtype=float) for part in points]
    if not 2 <= len(parts) <= 4 or len({part.shape for part in parts}) != 1 or parts[0].ndim != 1:
        shapes = ", ".join(str(part.shape) for part in parts)
        raise InputError(f"series {name!r} has parts of shapes {shapes}; expected x and y of one length, and errors")
    x, y = parts[:2]
    if len(parts) == 4:
        return x, y, np.clip(np.stack([y - parts[2], parts[3] - y]), 0, None)
    return x, y, parts[2] if len(parts) == 3 else None


def _bar(value: Value) -> tuple[float, float, float]:
    if isinstance(value, Sequence):
        height, low, high = value
        return height, low, high
    assert value is not None
    return value, value, value


def _above(c: Canvas, x: float, y: float, text: str) -> None:
    c.axes.annotate(text, (x, y), (0, 3), textcoords="offset points", ha="center", fontsize=8, color=c.soft)


def _scale(c: Canvas, log: str) -> None:
    if "x" in log:
        c.axes.set_xscale("log", base=2)
    if "y" in log:
        c.axes.set_yscale("log")


def _ticks(c: Canvas, places: list[float]) -> None:
    """Write lengths as people say them: 512, 2k, 32k."""
    places = places if len(places) <= 10 else places[:: math.ceil(len(places) / 10)]
    c.axes.set_xticks(places, [f"{x / 1024:g}k" if x >= 1024 and x % 1024 == 0 else f"{x:g}" for x in places])
    c.axes.minorticks_off()


def _name_ends(c: Canvas, ends: list[tuple[str, float, float, str]]) -> None:
    """Write each name beside its line's end, pushed apart where they would touch."""
    c.figure.canvas.draw()
    gap = 12.5 * c.figure.dpi / 72
    heights = [c.axes.transData.transform((x, y))[1] for _, x, y, _ in ends]
    placed: dict[int, float] = {}
    at = -math.inf
    for index in sorted(range(len(ends)), key=heights.__getitem__):
        at = max(heights[index], at + gap)
        placed[index] = at
    shift = _centre(placed, heights, gap)
    for index, (name, _, y, colour) in enumerate(ends):
        up = (placed[index] + shift - heights[index]) * 72 / c.figure.dpi
        c.axes.annotate(
            name, (1, y), (6, up), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
            color=colour, fontsize=9, fontweight="bold", annotation_clip=False, parse_math=False,
        )  # fmt: skip


def _centre(placed: Mapping[int, float], heights: Sequence[float], gap: float) -> float:
    """Pushing went upwards only; take half of it back where all names were pushed as one pile."""
    pushed = [placed[i] - heights[i] for i in placed]
    return -max(pushed) / 2 if len(pushed) > 1 and max(pushed) > gap / 2 and max(heights) - min(heights) < gap else 0.0
