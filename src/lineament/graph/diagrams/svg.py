"""A diagram as one SVG: paths, text and titles, light and dark, no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from lineament.graph.diagrams.fold import Panel
from lineament.graph.diagrams.layout import Drawing, Mark, place
from lineament.graph.diagrams.names import bare, told_apart
from lineament.graph.diagrams.term import Term

LIGHT = ("#0072b2", "#c2500a", "#00805a", "#a1488e", "#8f6a00", "#3b5bdb", "#b3261e", "#2b7a78", "#6b4fa0", "#5b6770")
DARK = ("#56b4e9", "#f5854a", "#2cc69a", "#d691cf", "#e6b84a", "#91a7ff", "#ff8a80", "#6fd3d0", "#b9a2ea", "#a8b3bc")
GAP = "\u2003"
STYLE = """svg{--p:#fff;--k:#1c2126;--s:#5f6a73;--t:#f4f6f7;background:var(--p)}
svg{font-family:'DejaVu Sans',Verdana,sans-serif}
@media(prefers-color-scheme:dark){svg{--p:#171b1f;--k:#e8ecef;--s:#a1abb3;--t:#22282d}}
.w{fill:none;stroke-width:1.7}.w:hover{stroke-width:4}.h{fill:none;stroke:var(--p);stroke-width:5}
.o rect,.o path{fill:var(--t);stroke:var(--k);stroke-width:1.1}
.o text{fill:var(--k);font-size:11.5px;text-anchor:middle}
.o tspan{font-size:8px;font-weight:400}.n rect{fill:transparent;stroke:none}.q rect{stroke-dasharray:3 2}
.o.b rect{fill:none}.b1 text{font-weight:700}.l{font-size:10.5px;font-style:italic}
.d{fill:var(--k)}.g{stroke:var(--s);stroke-width:1;stroke-dasharray:4 4;fill:none}
.f{fill:none;stroke:var(--s);stroke-dasharray:2 4}.c{fill:var(--k);font-size:13px;font-weight:700}
.m{fill:var(--s);font-size:11px}"""


def shown_names(term: Term, panels: Sequence[Panel]) -> dict[int, str]:
    """Name the axes that are drawn, numbered only where two of them would have one name."""
    values = [p.value for panel in panels for cell in panel.cells for p in (*cell.inputs, *cell.outputs)]
    values += [value for panel in panels for value in (*panel.inputs, *panel.outputs)]
    axes = list(dict.fromkeys(axis for value in sorted(set(values)) for axis in term.values[value].axes))
    symbols = told_apart([bare(term.axes[axis].name) for axis in axes])
    return dict(zip(axes, symbols, strict=True))


def svg(term: Term, panels: Sequence[Panel], title: str, words: str) -> str:
    """Draw panels below each other, with a list of the axes at the end.

    Args:
        term: the model. panels: what `fold.panels` gives. title: of the picture. words: the same in plain text.
    """
    names = shown_names(term, panels)
    parts: list[str] = []
    y = 14.0
    width = 320.0
    for i, panel in enumerate(panels):
        drawn = place(term, panel, names)
        head = panel.title + (f" — {', '.join(panel.uses)}" if panel.uses else "")
        parts.append(f'<text class="c" x="20" y="{y + 14:g}">{escape(head)}</text>')
        y += 24
        if i:
            parts.append(
                f'<rect class="f" x="12" y="{y:g}" width="{drawn.width + 16:g}" height="{drawn.height + 6:g}" rx="8"/>'
            )
        parts.append(f'<g transform="translate(20 {y:g})">{_panel(drawn, _colours(names))}</g>')
        y += drawn.height + 26
        width = max(width, drawn.width + 40, 40 + 8.2 * len(head))
    legend, y = _legend(term, names, width, y)
    tones = ((LIGHT, "svg{%s}"), (DARK, "@media(prefers-color-scheme:dark){svg{%s}}"))
    style = STYLE + "".join(_tone(i) for i in range(len(LIGHT)))
    style += "".join(rule % "".join(f"--a{i}:{c};" for i, c in enumerate(colours)) for colours, rule in tones)
    size = f'viewBox="0 0 {width:g} {y:g}" width="{width:g}" height="{y:g}"'
    head = f'<title id="t">{escape(title)}</title><desc id="d">{escape(words)}</desc><style>{style}</style>'
    body = head + "".join(parts) + legend
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="t d">{body}</svg>\n'


def _tone(i: int) -> str:
    return f".a{i}{{stroke:var(--a{i})}}text.a{i},tspan.a{i}{{fill:var(--a{i});stroke:none}}"


def _colours(names: Mapping[int, str]) -> dict[int, int]:
    """Give axes colours in the order in which they are met; after ten they come round again."""
    return {axis: i % len(LIGHT) for i, axis in enumerate(names)}


def _panel(drawn: Drawing, colours: Mapping[int, int]) -> str:
    found: list[str] = []
    for axis, paths in drawn.wires.items():
        d = "".join(paths)
        tone = f"w a{colours[axis]}" if axis >= 0 else "w g"
        found.append(f'<path class="h" d="{d}"/><path class="{tone}" data-axis="{axis}" d="{d}"/>')
    if drawn.dashes:
        found.append(f'<path class="g" d="{"".join(f"M{a:g} {y:g}H{b:g}" for a, b, y in drawn.dashes)}"/>')
    if drawn.dots:
        dots = dict.fromkeys(drawn.dots)
        found.append(
            f'<path class="d" d="{"".join(f"M{x - 3:g} {y:g}a3 3 0 1 0 6 0a3 3 0 1 0 -6 0" for x, y in dots)}"/>'
        )
    found += [_mark(mark) for mark in drawn.marks]
    found += [
        f'<text class="l a{colours[axis]}" x="{x:g}" y="{y:g}">{name}</text>' for x, y, axis, name in drawn.labels
    ]
    return "".join(found)


def _mark(mark: Mark) -> str:
    sign = mark.sign
    x, y, w, h = mark.x0, mark.y0, mark.x1 - mark.x0, mark.y1 - mark.y0
    kind = {"none": " n", "opaque": " q", "block": " b"}.get(sign.shape, "") + (" b1" if sign.bold else "")
    if sign.shape == "triangle":
        path = f"M{x:g} {y + h / 2:g}L{x + w:g} {y:g}V{y + h:g}Z"
        body = f'<path d="{path}"/>'
    elif sign.shape == "part":
        body = f'<path d="M{x:g} {y:g}H{x + w - 7:g}L{x + w:g} {y + h / 2:g}L{x + w - 7:g} {y + h:g}H{x:g}Z"/>'
    else:
        round_ = {"pill": h / 2, "block": 9, "none": 4}.get(sign.shape, 3)
        body = f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{round_:g}"/>'
    raised = f'<tspan dy="-4">{escape(sign.over)}</tspan>' if sign.over else ""
    raised += f'<tspan dy="{8 if sign.over else 3}">{escape(sign.under)}</tspan>' if sign.under else ""
    middle = y + h / 2 + 4
    text = f'<text x="{x + w / 2:g}" y="{middle:g}">{escape(sign.text)}{raised}</text>' if sign.text else ""
    return f'<g class="o{kind}" data-op="{escape(mark.kind)}"><title>{escape(mark.words)}</title>{body}{text}</g>'


def _legend(term: Term, names: Mapping[int, str], width: float, y: float) -> tuple[str, float]:
    """List the axes with their sizes, in lines."""
    colours, lines, line, room = _colours(names), [], [], 0.0
    for axis, name in names.items():
        text = f"{name} = {term.axes[axis].size} {term.axes[axis].what}"
        if room + 6.8 * (len(text) + 3) > width - 40 and line:
            lines.append(line)
            line, room = [], 0.0
        line.append(f'<tspan class="a{colours[axis]}">{escape(text)}</tspan>')
        room += 6.8 * (len(text) + 3)
    lines += [line] if line else []
    found = [f'<text class="m" x="20" y="{y + 16 * (i + 1):g}">{GAP.join(each)}</text>' for i, each in enumerate(lines)]
    return "".join(found), y + 16 * len(lines) + 18
