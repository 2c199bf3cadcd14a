"""A diagram in words: for screen readers, terminals and searching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lineament.graph.diagrams.fold import Cell, Panel
from lineament.graph.diagrams.signs import sign
from lineament.graph.diagrams.term import Port, Term


def text(term: Term, panels: Sequence[Panel], names: Mapping[int, str]) -> str:
    """Write panels as numbered lines: what goes in, what is done, what comes out.

    Args:
        term: the model. panels: what `fold.panels` gives. names: axis -> name as drawn.
    """
    lines = ["axes: " + ", ".join(f"{name} = {term.axes[a].size} {term.axes[a].what}" for a, name in names.items())]
    for panel in panels:
        places = f" ({', '.join(panel.uses)})" if panel.uses else ""
        lines += ["", f"{panel.title}{places}: {_values(term, panel.inputs, names)} -> "
                      f"{_values(term, panel.outputs, names)}"]  # fmt: skip
        made = {value: f"input {i + 1}" if len(panel.inputs) > 1 else "input" for i, value in enumerate(panel.inputs)}
        for i, cell in enumerate(panel.cells, 1):
            lines.append(f"  {i}. {_line(term, cell, made, names)}")
            made |= {port.value: f"line {i}" for port in cell.outputs}
    flops = sum(term.flops(op) for op in term.ops)
    lines += ["", f"{len(term.ops)} operators of the term, {term.counts.get('opaque', 0)} opaque; "
                  f"{flops:,} operations in products"]  # fmt: skip
    return "\n".join(lines) + "\n"


def _line(term: Term, cell: Cell, made: Mapping[int, str], names: Mapping[int, str]) -> str:
    source = " and ".join(made.get(port.value, "a weight") for port in cell.inputs)
    inward, outward = (_ports(term, ports, names) for ports in (cell.inputs, cell.outputs))
    frame = f"  [{cell.frame}]" if cell.frame else ""
    return f"{sign(term, cell).words}: {source} {inward} -> {outward}{frame}"


def _ports(term: Term, ports: Sequence[Port], names: Mapping[int, str]) -> str:
    return _values(term, [port.value for port in ports], names)


def _values(term: Term, values: Sequence[int], names: Mapping[int, str]) -> str:
    return " ".join(f"({' '.join(names[axis] for axis in term.values[value].axes)})" for value in values)
