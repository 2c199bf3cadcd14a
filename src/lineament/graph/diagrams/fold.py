"""What is drawn: panels of cells. Blocks that follow one another and are alike become one cell, defined once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lineament.graph.diagrams.term import Op, Port, Term

SMALL = 3
"""A block of at most so many operators is drawn where it stands."""


@dataclass(frozen=True, eq=False)
class Cell:
    """A thing in a column: an operator, or a block (then `op` is None).

    Attributes:
        inputs, outputs: ports with wires; weights and tables are told in the operator's sign.
        name: of a block. times: how often it is repeated. panel: where it is defined.
    """

    op: Op | None
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    name: str = ""
    times: int = 1
    panel: int = 0
    frame: str = ""
    steps: tuple[Op, ...] = ()
    """Of an elementwise function that is written as several operators."""


@dataclass(eq=False)
class Panel:
    """A row of columns: the whole model, or the definition of a block.

    Attributes:
        title: what it is. cells: in order. inputs, outputs: values at its ends. uses: where the block stands.
    """

    title: str
    cells: list[Cell]
    inputs: list[int]
    outputs: list[int]
    uses: list[str] = field(default_factory=list)


def panels(term: Term, kinds: Mapping[str, str], *, fold: bool = True) -> list[Panel]:
    """Return what is drawn: the whole first, then the blocks.

    Args:
        term: of the model. kinds: module name -> class name. fold: False draws every operator where it stands.
    """
    live = _drawn(term)
    ops = [op for op in term.ops if any(port.value in live for port in op.outputs)]
    results = [result.value for result in term.results]
    whole = Panel(kinds.get("", "model"), [], [v for v in term.inputs if v in live], list(dict.fromkeys(results)))
    found, known = [whole], {}
    for unit in _runs(term, ops, live, results) if fold else [(None, [ops])]:
        prefix, blocks = unit
        if prefix is None or len(blocks[0]) <= SMALL:
            whole.cells += [cell for block in blocks for cell in _cells(block, ops, live, results)]
            continue
        inward, outward = _ends(blocks[0], ops, live, results)
        _, last = _ends(blocks[-1], ops, live, results)
        key = term.signature(blocks[0], sizes=False)
        if key not in known:
            known[key] = len(found)
            kind = kinds.get(prefix, prefix)
            found.append(Panel(kind, _cells(blocks[0], ops, live, results), inward, outward))
        panel = found[known[key]]
        where = prefix if len(blocks) == 1 else f"{prefix} to {_prefix(blocks[-1][0].frame)}"
        panel.uses.append(where)
        whole.cells.append(
            Cell(
                None, tuple(_whole(term, v) for v in inward), tuple(_whole(term, v) for v in last), panel.title,
                len(blocks), known[key], where,
            )
        )  # fmt: skip
    return _told_apart(found)


def _told_apart(found: list[Panel]) -> list[Panel]:
    titles = [panel.title for panel in found]
    for i, panel in enumerate(found):
        if titles.count(panel.title) > 1 and i:
            panel.title += f" ({'ABCDEFGHIJKLMNOPQRSTUVWXYZ'[titles[:i].count(titles[i]) % 26]})"
    for cell in (cell for cell in found[0].cells if cell.op is None):
        object.__setattr__(cell, "name", found[cell.panel].title)
    return found


def _whole(term: Term, value: int) -> Port:
    return Port(value, tuple(range(len(term.values[value].axes))))


def _drawn(term: Term) -> set[int]:
    """Return the values with wires: those that depend on an input; a result always."""
    live = set(term.inputs) | {result.value for result in term.results}
    for op in term.ops:
        if any(port.value in live for port in op.inputs):
            live |= {port.value for port in op.outputs}
    return live


def _cells(block: Sequence[Op], ops: Sequence[Op], live: set[int], results: Sequence[int]) -> list[Cell]:
    """Turn operators into cells; a run of elementwise ones on one value becomes a single function."""
    found: list[Cell] = []
    at = 0
    while at < len(block):
        run = [block[at]]
        if _pointwise(block[at]):
            best = 1
            for end in range(at + 1, min(len(block), at + 16)):
                if not _pointwise(block[end]):
                    break
                run.append(block[end])
                inward, outward = _ends(run, ops, live, results)
                if len(inward) == 1 and len(outward) == 1:
                    best = len(run)
            run = run[:best]
        at += len(run)
        if len(run) == 1:
            op = run[0]
            found.append(Cell(op, tuple(p for p in op.inputs if p.value in live), op.outputs, frame=op.frame))
        else:
            source = next(p for p in run[0].inputs if p.value in live)
            found.append(Cell(run[-1], (source,), _relabelled(run, source), frame=run[-1].frame, steps=tuple(run)))
    return found


def _pointwise(op: Op) -> bool:
    return op.kind in ("map", "scale", "add") or (
        op.kind == "einsum" and all(label in op.outputs[0].labels for port in op.inputs for label in port.labels)
    )


def _relabelled(run: Sequence[Op], source: Port) -> tuple[Port, ...]:
    """Follow labels from the value that goes in to the one that comes out."""
    names = {source.value: source.labels}
    for op in run:
        own: dict[int, int] = {}
        for port in op.inputs:
            own |= dict(zip(port.labels, names[port.value], strict=True)) if port.value in names else {}
        names[op.outputs[0].value] = tuple(own.get(label, -1 - label) for label in op.outputs[0].labels)
    return (Port(run[-1].outputs[0].value, names[run[-1].outputs[0].value]),)


def _prefix(frame: str) -> str | None:
    """Return the outermost numbered module of a dotted name."""
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", frame)
    return found[0] if found else None


def _runs(
    term: Term, ops: Sequence[Op], live: set[int], results: Sequence[int]
) -> list[tuple[str | None, list[list[Op]]]]:
    """Cut operators into blocks by module, and join blocks that follow one another and are alike."""
    units: list[tuple[str | None, list[Op]]] = []
    for op in ops:
        prefix = _prefix(op.frame)
        if units and units[-1][0] == prefix:
            units[-1][1].append(op)
        else:
            units.append((prefix, [op]))
    found: list[tuple[str | None, list[list[Op]]]] = []
    signs: list[object] = []
    for prefix, block in units:
        sign = (term.signature(block), prefix is not None) if prefix else None
        if sign and signs and signs[-1] == sign and _chained(found[-1][1][-1], block, ops, live, results):
            found[-1][1].append(block)
        else:
            found.append((prefix, [block]))
            signs.append(sign)
    return found


def _ends(
    block: Sequence[Op], ops: Sequence[Op], live: set[int], results: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return the values that a block takes from outside and those that are read outside, in order."""
    made = {port.value: None for op in block for port in op.outputs}
    inward = dict.fromkeys(p.value for op in block for p in op.inputs if p.value in live and p.value not in made)
    inside = set(map(id, block))
    read = {p.value for op in ops if id(op) not in inside for p in op.inputs} | set(results)
    return list(inward), [value for value in made if value in read]


def _chained(one: Sequence[Op], two: Sequence[Op], ops: Sequence[Op], live: set[int], results: Sequence[int]) -> bool:
    """Say whether a block takes what the one before gives, and otherwise what that one took."""
    first, given = _ends(one, ops, live, results)
    second, _ = _ends(two, ops, live, results)
    return (
        len(first) == len(second) and bool(given) and set(given) <= set(second)
        and all(b in given or a == b for a, b in zip(first, second, strict=True))
    )  # fmt: skip
