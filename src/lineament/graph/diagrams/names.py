"""A letter for every axis, by what is done to it: m is normalised, k is summed over in scores, h is shared by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lineament.graph.diagrams.build import Draft, DraftOp
from lineament.graph.terms import Atom, flat, root

Identity = Any
Call = Callable[[Atom, str], None]
WORDS = {
    "B": ("b", "batch"), "T": ("x̄", "tokens"), "M": ("m", "model width"), "H": ("h", "heads"),
    "R": ("r", "queries per head"), "K": ("k", "key depth"), "U": ("v", "value depth"), "V": ("V", "vocabulary"),
    "F": ("f", "hidden width"), "C": ("c", "channels"), "Y": ("ȳ", "rows"), "X": ("x̄", "columns"), "Z": ("z̄", "depth"),
    "I": ("i", "window rows"), "J": ("j", "window columns"), "O": ("o", "outputs"), "A": ("a", "axis"),
    "N": ("t", "table"), "D": ("d", "features"),
}  # fmt: skip
"""Key -> symbol and word."""
_INPUTS = {
    (True, 1): "T", (True, 2): "BT", (False, 1): "D", (False, 2): "BD", (False, 3): "BTM", (False, 4): "BCYX",
    (False, 5): "BCZYX",
}  # fmt: skip
_SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def identity(atom: Atom) -> Identity:
    """Return what makes an axis this one: itself, or the parts that lie end to end in it."""
    atom = root(atom)
    if atom.parts is None:
        return atom
    return tuple(tuple(identity(each) for each in flat(part)) for part in atom.parts)


def named(
    axes: Sequence[Identity], values: Sequence[Draft], ops: Sequence[DraftOp], results: Sequence[Draft]
) -> list[tuple[str, str]]:
    """Return a name and a word for each axis."""
    letters: dict[Identity, str] = {}
    table_inputs = {value for op in ops if op.kind == "take" for value, _ in op.inputs[1:]}

    def call(axis: Atom, letter: str) -> None:
        letters.setdefault(identity(axis), letter)

    for value in values:
        if value.origin == "input":
            kinds = _INPUTS.get((value in table_inputs, len(value.dims)), [])
            at = 0
            for letter, count in zip(kinds, value.dims, strict=False):
                for axis in value.axes[at : at + count]:
                    call(axis, letter)
                at += count
    for op in ops:
        _by_kind(op, call, letters)
    for op in ops:
        if op.kind == "softmax":
            _attention(op, ops, call)
    for op in ops:
        if op.kind == "einsum":
            _product(op, call, letters, "O" if op.outputs[0][0] in results else "F")
    for op in ops:
        if op.kind == "take":
            _table(op, call)
    return _numbered([letters.get(atom, "A") for atom in axes])


def _by_label(op: DraftOp) -> dict[int, Atom]:
    return {
        label: axis for value, run in (*op.inputs, *op.outputs) for label, axis in zip(run, value.axes, strict=True)
    }


def _by_kind(op: DraftOp, call: Call, letters: Mapping[Identity, str]) -> None:
    axes = _by_label(op)
    if op.kind == "norm" and len(op.attrs["over"]) == 1:
        call(axes[op.attrs["over"][0]], "M")
    if op.kind == "take" and op.inputs[0][0].origin == "weight":
        for label in op.attrs["over"]:
            call(axes[label], "V")
        for label in op.inputs[0][1]:
            call(axes[label], "M")
    if op.kind in ("window", "spread"):
        for i, (old, place, window) in enumerate(
            zip(op.attrs["over"], op.attrs["spatial"], op.attrs["windows"], strict=True)
        ):
            if place in axes:
                call(axes[place], letters.get(identity(axes[old]), "X"))
            if window in axes:
                call(axes[window], "IJ"[i % 2])
    if op.kind in ("slice", "pad", "cat", "scan"):
        old = [axis for label, axis in axes.items() if not any(label in run for _, run in op.outputs)]
        new = [axis for label, axis in axes.items() if not any(label in run for _, run in op.inputs)]
        if old and len(new) == 1 and identity(old[0]) in letters:
            call(new[0], letters[identity(old[0])])


def _attention(op: DraftOp, ops: Sequence[DraftOp], call: Call) -> None:
    """Name the axes of scores and of what they weigh."""
    made = op.inputs[0][0].maker
    while made is not None and made.kind in ("scale", "mask", "add") and made.inputs[0][0].origin == "op":
        made = made.inputs[0][0].maker
    if made is None or made.kind != "einsum" or len(made.inputs) != 2 or made.attrs.get("bias"):
        return
    axes, out = _by_label(made), made.outputs[0][1]
    (_, query), (_, key) = made.inputs
    for label in (*query, *key):
        if label not in out:
            call(axes[label], "K")
    over = [_by_label(op)[label] for label in op.attrs["over"]]
    tokens = [identity(axis) for axis in over]
    for axis in over:
        call(axis, "T")
    for label in query:
        if label in key and label in out:
            call(axes[label], "H")
    for label in query:
        if label not in key and identity(axes[label]) not in tokens:
            call(axes[label], "R")
    for reader in ops:
        if reader.kind == "einsum" and reader.inputs[0][0] is op.outputs[0][0] and len(reader.inputs) == 2:
            for label in set(reader.inputs[1][1]) - set(reader.inputs[0][1]):
                call(_by_label(reader)[label], "U")


def _product(op: DraftOp, call: Call, letters: Mapping[Identity, str], last: str) -> None:
    """Name what a learned map gives: channels beside places, else hidden units."""
    learned = [port for port in op.inputs if port[0].origin == "weight"]
    axes, given = _by_label(op), {label for value, run in op.inputs if value.origin != "weight" for label in run}
    places = any(letters.get(identity(axes[label])) in tuple("YXZ") for label in given)
    for _, run in learned:
        for label in run:
            call(axes[label], "C" if places else last if label in op.outputs[0][1] else "M")


def _table(op: DraftOp, call: Call) -> None:
    for label in op.inputs[0][1]:
        call(_by_label(op)[label], "N")


def _numbered(letters: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(told_apart([WORDS[letter][0] for letter in letters]), (WORDS[k][1] for k in letters), strict=True))


def told_apart(symbols: Sequence[str]) -> list[str]:
    """Number the symbols that occur more than once."""
    seen: dict[str, int] = {}
    found = []
    for symbol in symbols:
        seen[symbol] = seen.get(symbol, 0) + 1
        found.append(symbol + (str(seen[symbol]).translate(_SUBSCRIPT) if symbols.count(symbol) > 1 else ""))
    return found


def bare(name: str) -> str:
    """Return a name without its number."""
    return name.rstrip("₀₁₂₃₄₅₆₇₈₉")
