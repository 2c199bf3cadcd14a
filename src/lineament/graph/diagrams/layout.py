"""Where everything stands: columns of operators, wires between them, values that pass by in lanes below.

Coordinates are pixels. A panel is cut into rows where it would become too wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from lineament.graph.diagrams.fold import Cell, Panel
from lineament.graph.diagrams.signs import Sign, sign
from lineament.graph.diagrams.term import Port, Term

PITCH, SEGMENT, HEAD, GROUP = 17.0, 27.0, 22.0, 14.0
WIDE, MOVE = 1120.0, 34.0
BELOW = 1e4
"""Where a value counts as standing whose lane is not placed yet."""


@dataclass
class Mark:
    """A sign at its place."""

    sign: Sign
    x0: float
    y0: float
    x1: float
    y1: float
    words: str
    kind: str


@dataclass
class Drawing:
    """What to draw of one panel, from (0, 0) to (width, height)."""

    wires: dict[int, list[str]] = field(default_factory=dict)
    labels: list[tuple[float, float, int, str]] = field(default_factory=list)
    dots: list[tuple[float, float]] = field(default_factory=list)
    dashes: list[tuple[float, float, float]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    width: float = 0.0
    height: float = 0.0

    def wire(self, axis: int, *points: tuple[float, float]) -> None:
        """Draw through points, level at each of them."""
        (x, y), *rest = points
        path = [f"M{x:g} {y:g}"]
        for a, b in rest:
            half = (a - x) / 2
            path.append(f"H{a:g}" if b == y else f"C{x + half:g} {y:g} {a - half:g} {b:g} {a:g} {b:g}")
            x, y = a, b
        self.wires.setdefault(axis, []).append("".join(path))


def place(term: Term, panel: Panel, names: Mapping[int, str]) -> Drawing:
    """Lay a panel out."""
    return _Layout(term, panel, names).run()


class _Layout:
    def __init__(self, term: Term, panel: Panel, names: Mapping[int, str]) -> None:
        self.term, self.panel, self.names, self.out = term, panel, names, Drawing()
        self.made = dict.fromkeys(panel.inputs, -1)
        self.columns: list[list[Cell]] = []
        for cell in panel.cells:
            at = max((self.made[p.value] + 1 for p in cell.inputs if p.value in self.made), default=0)
            while len(self.columns) <= at:
                self.columns.append([])
            self.columns[at].append(cell)
            self.made |= {p.value: at for p in cell.outputs}
        self.reads: dict[int, list[int]] = {}
        for at, column in enumerate(self.columns):
            for cell in column:
                for port in cell.inputs:
                    self.reads.setdefault(port.value, []).append(at)
        for value in panel.outputs:
            self.reads.setdefault(value, []).append(len(self.columns))
        self.axes = {v: term.values[v].axes for v in self.made}

    def count(self, value: int) -> int:
        return max(1, len(self.axes[value]))

    def height(self, ports: tuple[Port, ...]) -> float:
        return sum((self.count(p.value) - 1) * PITCH for p in ports) + SEGMENT * max(0, len(ports) - 1)

    # heights

    def run(self) -> Drawing:
        self.signs = {id(cell): sign(self.term, cell) for column in self.columns for cell in column}
        self.before: dict[tuple[int, int], float] = {}  # (id of a cell, number of its input) -> y
        self.after: dict[int, float] = {}  # value -> y where it is made
        self.lane: dict[int, float] = {}
        low = self._stack_inputs()
        bottoms = [self._stack(at) for at in range(len(self.columns))]
        self._lanes(low, bottoms)
        self._across()
        return self.out

    def _stack_inputs(self) -> float:
        y = HEAD
        for value in self.panel.inputs:
            self.after[value] = y
            y += (self.count(value) - 1) * PITCH + SEGMENT
        return y - SEGMENT

    def _stack(self, at: int) -> float:
        """Put the cells of a column below each other, each near where its first input comes from."""
        column, cursor = self.columns[at], 0.0
        came = {id(c): min((self._source(p.value, at) for p in c.inputs), default=0.0) for c in column}
        column.sort(key=lambda c: came[id(c)])
        for cell in column:
            near = [self.after[p.value] for p in cell.inputs if self.made[p.value] == at - 1]
            y = max(cursor + HEAD, min(near, default=cursor + HEAD) if near else cursor + HEAD)
            top, ports = y, sorted(enumerate(cell.inputs), key=lambda each: self._source(each[1].value, at))
            for i, port in ports:
                self.before[id(cell), i] = y
                y += (self.count(port.value) - 1) * PITCH + SEGMENT
            bottom = top + max(self.height(cell.inputs), self.height(cell.outputs))
            y = top
            for port in cell.outputs:
                self.after[port.value] = y
                y += (self.count(port.value) - 1) * PITCH + SEGMENT
            cursor = bottom + GROUP
        return cursor - GROUP

    def _lanes(self, low: float, bottoms: list[float]) -> None:
        """Give values that pass by columns a lane below everything there; short ones come first."""
        spans = []
        for value, reads in self.reads.items():
            first, last = self.made[value] + 1, max(reads) - 1
            if last >= first and any(at not in reads or max(reads) > at for at in range(first, last + 1)):
                spans.append((last - first, first, value, last))
        for _, first, value, last in sorted(spans):
            y = max(bottoms[first : last + 1], default=low) + SEGMENT
            self.lane[value] = y
            for at in range(first, last + 1):
                bottoms[at] = y + (self.count(value) - 1) * PITCH
        self.bottoms, self.row = bottoms or [low], 0

    # widths

    def _across(self) -> None:
        x, top = 6.0, 0.0
        self._label_all(self.panel.inputs, x, top)
        x += self._label_width(self.panel.inputs) + 4
        starts = dict.fromkeys(self.panel.inputs, 6.0)
        for at, column in enumerate(self.columns):
            wide = max((self.signs[id(c)].width for c in column), default=16.0) + 14
            made = [p.value for c in column for p in c.outputs]
            room = max(self._label_width(made), 8.0)
            if x + MOVE + wide + room > WIDE and at:
                x, top, starts = self._next_row(at, x, top, starts)
            x = self._moves(at, x, top, starts)
            for cell in column:
                self._cell(cell, x, x + wide, top)
            for value, y in self.lane.items():
                if self._passes(value, at):
                    self._straight(value, x, x + wide, y + top)
            x += wide
            starts = dict.fromkeys(made, x) | {v: x for v in self.lane if self._passes(v, at)}
            for cell in column:
                self._labels(cell, x, top)
            self._dashes(at, x, x + room, top)
            x += room
        self._moves(len(self.columns), x, top, starts)
        self.out.width = max(self.out.width, x + MOVE + 6)
        self.out.height = top + max(self.bottoms[self.row :]) + 14

    def _passes(self, value: int, at: int) -> bool:
        return value in self.lane and self.made[value] < at and max(self.reads[value]) > at

    def _next_row(
        self, at: int, x: float, top: float, starts: Mapping[int, float]
    ) -> tuple[float, float, dict[int, float]]:
        """End a row and begin the next one with the same wires."""
        self.out.width = max(self.out.width, x + 14)
        alive = [v for v in self.made if self.made[v] < at and max(self.reads.get(v, [-1])) >= at]
        for value in alive:
            self._straight(value, starts.get(value, x), x + 14, self._source(value, at) + top)
        top += max(self.bottoms[self.row : at]) + 40
        self.row = at
        for value in alive:
            y = self._source(value, at) + top
            for i, axis in enumerate(self.axes[value]):
                self.out.labels.append((8.0, y + i * PITCH - 4, axis, self._name(value, i)))
        x = 6.0 + self._label_width(alive) + 4
        return x, top, dict.fromkeys(alive, 6.0)

    def _source(self, value: int, at: int) -> float:
        """Return where a value comes from when it enters a column."""
        if self.made[value] == at - 1:
            return self.after[value]
        return self.lane.get(value, self.after[value] + BELOW)

    def _moves(self, at: int, x: float, top: float, starts: dict[int, float]) -> float:
        """Lead every value from where it is to where the next column wants it."""
        ends: dict[int, list[float]] = {}
        for cell in self.columns[at] if at < len(self.columns) else ():
            for i, port in enumerate(cell.inputs):
                ends.setdefault(port.value, []).append(self.before[id(cell), i])
        for value in self.lane:
            if self.made[value] < at and max(self.reads[value]) > at:
                ends.setdefault(value, []).append(self.lane[value])
        if at == len(self.columns):
            for value in self.panel.outputs:
                ends.setdefault(value, []).append(self._source(value, at))
        for value in self.panel.outputs:
            if value not in self.lane and self.made[value] < at < len(self.columns):
                ends.setdefault(value, []).append(self.after[value])
        still = all(ys == [self._source(value, at)] for value, ys in ends.items())
        stop = x + (8.0 if still else MOVE)
        for value, ys in ends.items():
            source = self._source(value, at) + top
            for i, axis in self._slots(value):
                for y in ys:
                    self.out.wire(axis, (starts.get(value, x), source + i * PITCH), (x, source + i * PITCH),
                                  (stop, y + top + i * PITCH))  # fmt: skip
                if len(ys) > 1:
                    self.out.dots.append((x, source + i * PITCH))
        return stop

    def _slots(self, value: int) -> list[tuple[int, int]]:
        return list(enumerate(self.axes[value])) or [(0, -1)]

    def _straight(self, value: int, x0: float, x1: float, y: float) -> None:
        for i, axis in self._slots(value):
            self.out.wire(axis, (x0, y + i * PITCH), (x1, y + i * PITCH))

    # cells

    def _cell(self, cell: Cell, x0: float, x1: float, top: float) -> None:
        mine = self.signs[id(cell)]
        inward = {(i, s): self.before[id(cell), i] + top + s * PITCH for i, p in enumerate(cell.inputs)
                  for s in range(self.count(p.value))}  # fmt: skip
        outward = {(i, s): self.after[p.value] + top + s * PITCH for i, p in enumerate(cell.outputs)
                   for s in range(self.count(p.value))}  # fmt: skip
        given = [
            (label, inward[i, s], p.value, s) for i, p in enumerate(cell.inputs) for s, label in enumerate(p.labels)
        ]
        found = [
            (label, outward[i, s], p.value, s) for i, p in enumerate(cell.outputs) for s, label in enumerate(p.labels)
        ]
        through = {label for label, *_ in given} & {label for label, *_ in found} if cell.op is not None else set()
        over = set(cell.op.attrs.get("over", ())) if cell.op and cell.op.kind in ("softmax", "norm") else set()
        ended = [y for label, y, *_ in given if label not in through or label in over]
        begun = [y for label, y, *_ in found if label not in through]
        ends = [y for key, y in inward.items() if not cell.inputs[key[0]].labels]
        ends += [y for key, y in outward.items() if not cell.outputs[key[0]].labels]
        every = [*inward.values(), *outward.values()]
        y0, y1 = self._span(mine, [*ended, *begun, *ends], every)
        width = min(x1 - x0 - 8, mine.width)
        left, right = (x0 + x1 - width) / 2, (x0 + x1 + width) / 2
        for key, y in inward.items():
            if not cell.inputs[key[0]].labels:
                self.out.wire(-1, (x0, y), (left, y))
        for key, y in outward.items():
            if not cell.outputs[key[0]].labels:
                self.out.wire(-1, (right, y), (x1, y))
        self._threads(cell, mine, given, found, through, (x0, left, right, x1))
        names = [" ".join(self._type(p.value) for p in ports) or "()" for ports in (cell.inputs, cell.outputs)]
        words = f"{mine.words}: {names[0]} to {names[1]}" + (f"; {cell.frame}" if cell.frame else "")
        self.out.marks.append(Mark(mine, left, y0, right, y1, words, cell.op.kind if cell.op else "block"))

    def _span(self, mine: Sign, own: list[float], every: list[float]) -> tuple[float, float]:
        if mine.shape == "pill" or (not own and mine.shape not in ("block", "none")):
            return min(every) - 19, min(every) - 5
        if mine.shape in ("block", "none"):
            return min(every) - 9, max(every) + 9
        return min(own) - 9, max(own) + 9

    def _threads(self, cell: Cell, mine: Sign, given: list, found: list, through: set[int], xs: tuple) -> None:  # pyright: ignore[reportMissingTypeArgument]
        x0, left, right, x1 = xs
        target = {label: y for label, y, *_ in found}
        middle = (x0 + x1) / 2
        axis = lambda value, slot: self.axes[value][slot]  # noqa: E731
        meets = {label for label, *_ in given if sum(label == other for other, *_ in given) > 1}
        for label in dict.fromkeys(label for label, *_ in given):
            ends = [(y, axis(value, s)) for other, y, value, s in given if other == label]
            if label in through:
                for y, one in ends:
                    if label in meets:
                        self.out.wire(one, (x0, y), (middle, target[label]), (x1, target[label]))
                    else:
                        self.out.wire(one, (x0, y), (x1, target[label]))
                if label in meets:
                    self.out.dots.append((middle, target[label]))
            elif mine.shape == "none" and len(ends) == 2:
                (a, one), (b, _) = ends
                bulge = x1 - 4
                self.out.wires.setdefault(one, []).append(f"M{x0:g} {a:g}C{bulge:g} {a:g} {bulge:g} {b:g} {x0:g} {b:g}")
            else:
                for y, one in ends:
                    self.out.wire(one, (x0, y), (left, y))
        for label, y, value, s in found:
            if label not in through:
                self.out.wire(axis(value, s), (right, y), (x1, y))

    # words

    def _name(self, value: int, slot: int) -> str:
        axes = self.axes[value]
        return self.names[axes[slot]] + "′" * axes[:slot].count(axes[slot])

    def _type(self, value: int) -> str:
        return "(" + " ".join(self._name(value, s) for s in range(len(self.axes[value]))) + ")"

    def _label_width(self, values: list[int]) -> float:
        return max((7.0 * len(self._name(v, s)) + 6 for v in values for s in range(len(self.axes[v]))), default=0.0)

    def _label_all(self, values: list[int], x: float, top: float) -> None:
        for value in values:
            for s, axis in enumerate(self.axes[value]):
                self.out.labels.append((x + 2, self.after[value] + top + s * PITCH - 4, axis, self._name(value, s)))

    def _labels(self, cell: Cell, x: float, top: float) -> None:
        """Name the wires where the set of axes changed."""
        inward = {label for p in cell.inputs for label in p.labels}
        if cell.op is None or any(set(p.labels) != inward for p in cell.outputs):
            self._label_all([p.value for p in cell.outputs], x, top)

    def _dashes(self, at: int, x0: float, x1: float, top: float) -> None:
        """Part the tensors of a tuple."""
        spans = [(self.after[p.value], self.count(p.value)) for c in self.columns[at] for p in c.outputs]
        spans += [(y, self.count(v)) for v, y in self.lane.items() if self._passes(v, at)]
        spans.sort()
        for (y, n), (z, _) in pairwise(spans):
            bottom = y + (n - 1) * PITCH
            if z - bottom > 12:
                self.out.dashes.append((x0 - 4, x1 + 4, (bottom + z - 6) / 2 + top))
