"""One look for every plot: light and dark, colours that survive colour blindness, no ink without meaning."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#A6559D", "#C98A00", "#5B6770")
"""Blue, vermilion, green, purple, ochre, grey: after Okabe and Ito, each readable on white."""

DARK_PALETTE = ("#56B4E9", "#F5854A", "#2CC69A", "#D691CF", "#E6B84A", "#A8B3BC")

MARKERS = ("o", "s", "^", "D", "v", "P")
_LIGHT = {"paper": "#ffffff", "ink": "#1c2126", "soft": "#5f6a73", "grid": "#e3e7ea"}
_DARK = {"paper": "#171b1f", "ink": "#e8ecef", "soft": "#a1abb3", "grid": "#30373d"}


class Canvas:
    """A figure with one pair of axes, the colours to draw with, and the PNG that comes out."""

    def __init__(self, width: float, height: float, dark: bool) -> None:
        self.colours = DARK_PALETTE if dark else PALETTE
        tones = _DARK if dark else _LIGHT
        self.ink, self.soft, self.paper, self.grid = tones["ink"], tones["soft"], tones["paper"], tones["grid"]
        air = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.12)  # inches
        self.figure = Figure(figsize=(width, height), dpi=160, layout=air, facecolor=self.paper)
        FigureCanvasAgg(self.figure)
        self.axes: Axes = self.figure.add_subplot()
        self.axes.set_facecolor(self.paper)
        for side in ("top", "right"):
            self.axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            self.axes.spines[side].set_color(self.soft)
        self.axes.tick_params(colors=self.soft, which="both", width=0.8, labelcolor=self.soft)
        self.axes.set_axisbelow(True)

    def colour(self, index: int) -> str:
        """The colour of series `index`; after six they come round again, and markers tell them apart."""
        return self.colours[index % len(self.colours)]

    def label(self, title: str | None, xlabel: str, ylabel: str) -> None:
        """Write the title and what the axes measure, as they are: tokens have dollars in them."""
        if title:
            look: dict[str, Any] = {"fontsize": 11.5, "fontweight": "bold", "pad": 10}
            self.axes.set_title(title, loc="left", color=self.ink, parse_math=False, **look)
        self.axes.set_xlabel(xlabel, color=self.soft, parse_math=False)
        self.axes.set_ylabel(ylabel, color=self.soft, parse_math=False)

    def legend(self) -> None:
        """Name the series above the axes, where they hide nothing."""
        handles, labels = self.axes.get_legend_handles_labels()
        if labels:
            rows_of = min(len(labels), 4)
            found = self.figure.legend(
                handles,
                labels,
                loc="outside lower center",
                ncols=rows_of,
                frameon=False,
                labelcolor=self.ink,
                fontsize=9,
            )
            for text in found.get_texts():
                text.set_parse_math(False)

    def png(self) -> bytes:
        """Draw."""
        buffer = BytesIO()
        self.figure.savefig(buffer, format="png", facecolor=self.paper, metadata={"Software": None})
        return buffer.getvalue()


@contextmanager
def canvas(width: float = 6.4, height: float = 3.7, *, dark: bool = False) -> Iterator[Canvas]:
    """Open a canvas in the house style; matplotlib's settings are as before afterwards.

    Args:
        width, height: in inches.
        dark: for dark pages.

    Yields:
        The canvas to draw on.
    """
    settings: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "axes.linewidth": 0.8,
        "lines.linewidth": 1.9,
        "lines.markersize": 4.5,
        "axes.unicode_minus": True,
    }
    with rc_context(settings):
        yield Canvas(width, height, dark)
