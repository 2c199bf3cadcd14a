"""Chains of nodes drawn as lines from below: which way what came, as an SVG for light and dark pages."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

from lineament._base.errors import InputError
from lineament.report.style import DARK_PALETTE, PALETTE

Stop = tuple[str, int | None, str]
"""(row, column, label); without a column a node stands among the others of its row."""

ROW, LETTER, PAD, EDGE = 46.0, 6.9, 7.0, 16.0
STYLE = (
    f"svg{{--f:{PALETTE[0]};--a:{PALETTE[1]}}}@media(prefers-color-scheme:dark)"
    f"{{svg{{--f:{DARK_PALETTE[0]};--a:{DARK_PALETTE[1]}}}}}"
    """svg{--p:#fff;--k:#1c2126;--s:#5f6a73;--l:#e3e7ea;background:var(--p);font:11px 'DejaVu Sans',Verdana,sans-serif}
@media(prefers-color-scheme:dark){svg{--p:#171b1f;--k:#e8ecef;--s:#a1abb3;--l:#30373d}}
.f,.a{fill:none;stroke-opacity:.55;stroke-linecap:round;stroke-linejoin:round}
.f{stroke:var(--f)}.a{stroke:var(--a)}.f:hover,.a:hover{stroke-opacity:1}
rect{fill:var(--p);stroke:var(--s);stroke-width:.8}.r{stroke:var(--l)}text{fill:var(--k);text-anchor:middle}
text.s{fill:var(--s);text-anchor:end}text.t{font-size:13px;font-weight:700;text-anchor:start}"""
)


def routes(
    chains: Sequence[tuple[Sequence[Stop], float]],
    rows: Sequence[str],
    columns: Sequence[str] = (),
    *,
    title: str,
    words: str,
) -> str:
    """Draw chains from below, each a line as wide as its weight: blue for, vermilion against.

    Args:
        chains: (its stops, the lowest first; its weight). rows: of the stops, the lowest first; those no chain stops at
            are left out. columns: what stands under each column, if stops have columns.
        title: above. words: what is seen, in plain text, for those who can't.

    Returns:
        An SVG.

    Raises:
        InputError: no chain, or a stop in a row or column that isn't there.

    Example:
        >>> chains = [([("words", 0, "Paris"), ("layer 1", 0, "mlp"), ("answer", None, "France")], 0.7)]
        >>> routes(chains, ["words", "layer 1", "answer"], ["Paris"], title="Why", words="Paris, by the MLP")[:4]
        '<svg'
    """
    stops = list(dict.fromkeys(stop for chain, _ in chains for stop in chain))
    strange = [s for s in stops if s[0] not in rows or (s[1] is not None and not 0 <= s[1] < len(columns))]
    if not stops or strange:
        raise InputError(f"{strange[0]!r} is in no row or column" if strange else "there is no path to draw")
    used = [row for row in rows if any(stop[0] == row for stop in stops)]
    left = EDGE + LETTER * max(map(len, used)) + 14
    centres, width = _columns(stops, columns, left)
    width = max(width, 1.25 * LETTER * len(title) + 2 * EDGE)
    height = {row: EDGE + 30 + ROW * (len(used) - i - 0.5) for i, row in enumerate(used)}
    places = _places(stops, centres, height, (left + width) / 2)
    bottom = EDGE + 30 + ROW * len(used)
    body = [f'<text class="t" x="{EDGE:g}" y="{EDGE + 10:g}">{escape(title)}</text>']
    for row, y in height.items():
        body.append(f'<path class="r" d="M{left:g} {y:g}H{width - EDGE:g}"/>')
        body.append(f'<text class="s" x="{left - 8:g}" y="{y + 4:g}">{escape(row)}</text>')
    body += _lines(chains, places)
    body += [_box(stop[2], *places[stop]) for stop in stops]
    end = bottom + (22 if columns else 4)
    body += [f'<text x="{x:g}" y="{bottom + 12:g}">{escape(columns[i])}</text>' for i, x in centres.items()]
    size = f'viewBox="0 0 {width:g} {end:g}" width="{width:g}" height="{end:g}"'
    head = f'<title id="t">{escape(title)}</title><desc id="d">{escape(words)}</desc><style>{STYLE}</style>'
    look = 'role="img" aria-labelledby="t d"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {look}>{head}{"".join(body)}</svg>\n'


def _wide(label: str) -> float:
    return LETTER * len(label) + 2 * PAD


def _room(stops: Sequence[Stop], column: int | None) -> float:
    """Return the width of the widest row of a column."""
    rows = {row for row, at, _ in stops if at == column}
    return max((sum(_wide(s[2]) + 6 for s in stops if s[:2] == (row, column)) for row in rows), default=0.0)


def _columns(stops: Sequence[Stop], columns: Sequence[str], left: float) -> tuple[dict[int, float], float]:
    """Return where the columns are, and where the picture ends."""
    centres, x = {}, left
    for i, word in enumerate(columns):
        taken = _room(stops, i)
        room = max(LETTER * len(word) + 8, taken and taken + 20)
        centres[i], x = x + room / 2, x + room
    return centres, max(x, left + _room(stops, None)) + 2 * EDGE


def _places(
    stops: Sequence[Stop], centres: Mapping[int, float], height: Mapping[str, float], middle: float
) -> dict[Stop, tuple[float, float]]:
    """Set the stops of one row and column side by side."""
    places = {}
    for row, column in dict.fromkeys(stop[:2] for stop in stops):
        here = [stop for stop in stops if stop[:2] == (row, column)]
        x = middle if column is None else centres[column]
        x -= sum(_wide(stop[2]) + 6 for stop in here) / 2
        for stop in sorted(here, key=lambda stop: (len(stop[2]), stop[2])):
            room = _wide(stop[2]) + 6
            places[stop], x = (x + room / 2, height[row]), x + room
    return places


def _lines(chains: Sequence[tuple[Sequence[Stop], float]], places: Mapping[Stop, tuple[float, float]]) -> list[str]:
    most = max(abs(weight) for _, weight in chains) or 1.0
    found = []
    for i, (chain, weight) in sorted(enumerate(chains), key=lambda pair: abs(pair[1][1])):
        lane = max(-12.0, min(12.0, 2.4 * (i - (len(chains) - 1) / 2)))
        points = [(places[chain[0]][0] + lane, places[chain[0]][1])]
        for stop in chain[1:]:
            points += _way(points[-1][1], *places[stop], lane, places)
        d = f"M{points[0][0]:g} {points[0][1]:g}"
        for (x, y), (u, v) in pairwise(points):
            d += f"C{x:g} {(y + v) / 2:g} {u:g} {(y + v) / 2:g} {u:g} {v:g}"
        name = " → ".join(f"{label} ({row})" for row, _, label in chain)
        style = f'class="{"f" if weight >= 0 else "a"}" stroke-width="{1 + 6 * abs(weight) / most:.3g}"'
        found.append(f'<path {style} d="{d}"><title>{escape(f"{weight:+.3g}: {name}")}</title></path>')
    return found


def _way(
    start: float, x: float, y: float, lane: float, places: Mapping[Stop, tuple[float, float]]
) -> list[tuple[float, float]]:
    """Return the points of a line up to a stop at (x, y), past the boxes between at which it does not stop."""
    found = []
    for height in sorted({v for _, v in places.values() if y < v < start}, reverse=True):
        at = x + lane
        for stop, (u, v) in sorted(places.items(), key=lambda pair: pair[1]):
            if v == height and abs(u - at) < _wide(stop[2]) / 2 + 3:
                at = u + _wide(stop[2]) / 2 + 6 + (lane + 12) / 2
        found.append((at, height))
    return [*found, (x + lane, y)]


def _box(label: str, x: float, y: float) -> str:
    room = _wide(label)
    box = f'<rect x="{x - room / 2:g}" y="{y - 10:g}" width="{room:g}" height="20" rx="4"/>'
    return f'{box}<text x="{x:g}" y="{y + 4:g}">{escape(label)}</text>'
