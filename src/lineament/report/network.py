"""A network drawn in ranks, from below: who hands how much to whom."""

from collections.abc import Collection, Mapping, Sequence

from matplotlib.patches import FancyArrowPatch

from lineament._base.errors import InputError
from lineament.report.style import canvas


def network(
    ranks: Sequence[Sequence[str]],
    edges: Mapping[tuple[str, str], float],
    *,
    aside: Collection[str] = (),
    title: str | None = None,
    dark: bool = False,
) -> bytes:
    """Draw nodes in ranks with lines between them, as wide as their weight: blue for, vermilion against.

    Args:
        ranks: node names, the lowest rank first.
        edges: (from, to) -> weight, between nodes of the ranks.
        aside: nodes to draw in a column of their own at the right.
        title: above. dark: for dark pages.

    Returns:
        A PNG.

    Raises:
        InputError: no node, or an edge of a node that is in no rank.

    Example:
        >>> network([["embed"], ["a0.h1", "m0"], ["logits"]], {("embed", "m0"): 0.5, ("m0", "logits"): -0.2})[:4]
        b'\\x89PNG'
    """
    places: dict[str, tuple[float, float]] = {}
    for height, rank in enumerate(ranks):
        row = [name for name in rank if name not in aside]
        places |= {name: (0.94, height) for name in rank if name in aside}
        places |= {name: ((0.84 if aside else 1) * (i + 0.5) / len(row), height) for i, name in enumerate(row)}
    strange = [name for pair in edges for name in pair if name not in places]
    if not places or strange:
        raise InputError(f"{strange[0]!r} is in no rank" if strange else "there is no node to draw")
    most = max((abs(weight) for weight in edges.values()), default=1.0) or 1.0
    widest = max(len(rank) for rank in ranks)
    with canvas(min(12.0, max(4.8, 0.62 * widest + 1.6)), min(14.0, 0.36 * len(ranks) + 1.2), dark=dark) as c:
        for (first, second), weight in sorted(edges.items(), key=lambda pair: abs(pair[1])):
            share = abs(weight) / most
            line = FancyArrowPatch(
                places[first], places[second], arrowstyle="-", connectionstyle="arc3,rad=0.12", shrinkA=0, shrinkB=0,
                color=c.colours[weight < 0], linewidth=0.4 + 3.2 * share, alpha=0.25 + 0.6 * share, zorder=1,
            )  # fmt: skip
            c.axes.add_patch(line)
        box = {"boxstyle": "round,pad=0.25", "facecolor": c.paper, "edgecolor": c.soft, "linewidth": 0.7}
        for name, (x, y) in places.items():
            c.axes.text(
                x, y, name, ha="center", va="center", fontsize=7.5, color=c.ink, zorder=2, bbox=box, parse_math=False
            )
        c.axes.set_axis_off()
        c.axes.set_xlim(0, 1)
        c.axes.set_ylim(-0.6, len(ranks) - 0.4)
        if title:
            c.label(title, "", "")
        return c.png()
