"""Spellings of one thing made one: norms written out, rotary positions, masks, scales, biases, packed projections."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from lineament.graph.diagrams.build import Draft, DraftOp
from lineament.graph.diagrams.moves import replaced, split_weight, weight_part
from lineament.graph.terms import Atom

LOW = -1e4
"""What is added to a score to hide it is at most this."""


class Uses:
    """The operators in the making, and who reads what."""

    def __init__(self, ops: Sequence[DraftOp], results: Collection[Draft]) -> None:
        self.ops, self.results = list(ops), set(results)
        self.readers: dict[Draft, list[DraftOp]] = defaultdict(list)
        self.learned: set[Draft] = set()
        for op in self.ops:
            self.enter(op)

    def enter(self, op: DraftOp) -> None:
        for value, _ in op.inputs:
            self.readers[value].append(op)
        if all(self.is_learned(value) for value, _ in op.inputs):
            self.learned.update(value for value, _ in op.outputs)

    def is_learned(self, value: Draft) -> bool:
        """Say whether a value depends on weights and constants only."""
        return value.origin in ("weight", "constant") or value in self.learned

    def alone(self, value: Draft) -> DraftOp | None:
        """Return the operator that makes a value which one operator reads; None otherwise."""
        return value.maker if len(self.readers[value]) == 1 and value not in self.results else None

    def replace(self, old: Sequence[DraftOp], new: DraftOp) -> None:
        """Put an operator in the place of some; it makes what the first of them made."""
        for op in old:
            for value, _ in op.inputs:
                if op in self.readers[value]:
                    self.readers[value].remove(op)
        at = self.ops.index(old[0])
        self.ops = [op for op in self.ops if op not in old]
        self.ops.insert(min(at, len(self.ops)), new)
        for value, _ in new.outputs:
            value.maker = new
        self.enter(new)


def fused(ops: Sequence[DraftOp], results: Sequence[Draft]) -> list[DraftOp]:
    """Apply all fusions until none applies."""
    uses = Uses(_asked(ops, results), results)
    for fusion in FUSIONS:
        for op in list(uses.ops):
            while op is not None and op in uses.ops:
                op = fusion(uses, op)
    return uses.ops


def _asked(ops: Sequence[DraftOp], results: Sequence[Draft]) -> list[DraftOp]:
    """Leave out operators that no result depends on."""
    wanted = set(results)
    kept: list[DraftOp] = []
    for op in reversed(ops):
        if any(value in wanted for value, _ in op.outputs):
            kept.append(op)
            wanted.update(value for value, _ in op.inputs)
    return kept[::-1]


def _is_map(op: DraftOp | None, fn: str, *args: Any) -> bool:
    return op is not None and op.kind == "map" and op.attrs["fn"].split(".")[0] == fn and (
        not args or tuple(op.attrs["args"][1:]) == args
    )  # fmt: skip


def _factors(op: DraftOp | None) -> list[tuple[Draft, tuple[int, ...]]] | None:
    """Return the two operands of a product in which nothing is summed, the one with all axes first."""
    if op is None or op.kind != "einsum" or len(op.inputs) != 2 or op.attrs.get("bias"):
        return None
    out = set(op.outputs[0][1])
    whole = [port for port in op.inputs if set(port[1]) == out]
    rest = [port for port in op.inputs if port is not whole[0]] if whole else []
    return [whole[0], rest[0]] if rest and set(rest[0][1]) <= out else None


def rms(uses: Uses, op: DraftOp) -> DraftOp | None:
    """x * rsqrt(mean(x^2) + eps), or x / sqrt(...)."""
    pair = _factors(op)
    if pair is None and _is_map(op, "div") and len(op.inputs) == 2 and op.attrs["args"] == ({"at": 0}, {"at": 1}):
        pair = list(op.inputs)
    for (x, own), (r, kept) in [pair, pair[::-1]] if pair else ():
        found = _mean_square(uses, op, x, r)
        if found is None or set(own) != set(op.outputs[0][1]):
            continue
        mean, eps, between = found
        places = [mean.inputs[0][1].index(label) for label in mean.attrs["over"]]
        if tuple(label for i, label in enumerate(own) if i not in places) != tuple(kept):
            continue
        attrs = {"over": tuple(own[i] for i in places), "eps": eps, "center": False, "then": ()}
        uses.replace([op, *between], DraftOp("norm", [(x, own)], op.outputs, attrs, op.frame))
    return None


def _mean_square(uses: Uses, op: DraftOp, x: Draft, r: Draft) -> tuple[DraftOp, float, list[DraftOp]] | None:
    root = uses.alone(r)
    if not _is_map(root, "rsqrt" if op.kind == "einsum" else "sqrt") or root is None:
        return None
    plus = uses.alone(root.inputs[0][0])
    if not _is_map(plus, "add") or plus is None or len(plus.inputs) != 1:
        return None
    mean = uses.alone(plus.inputs[0][0])
    if mean is None or mean.kind != "reduce" or mean.attrs["fn"] != "mean":
        return None
    square = uses.alone(mean.inputs[0][0])
    if square is None or not (_is_map(square, "pow", 2) or _is_map(square, "square")) or square.inputs[0][0] is not x:
        return None
    return mean, float(plus.attrs["args"][1]), [root, plus, mean, square]


def after(uses: Uses, op: DraftOp) -> DraftOp | None:
    """Take the gain and the bias that follow a norm into it, and the bias that follows a learned map."""
    pair = _factors(op)
    if op.kind == "add" and len(op.inputs) == 2:
        pair = list(op.inputs)
    for (x, own), (w, labels) in [pair, pair[::-1]] if pair else ():
        made = uses.alone(x)
        if made is None or not uses.is_learned(w) or set(own) != set(op.outputs[0][1]) or not set(labels) <= set(own):
            continue
        inner = dict(zip(own, made.outputs[0][1], strict=True))
        port = (w, tuple(inner[label] for label in labels))
        out = [(op.outputs[0][0], tuple(inner[label] for label in op.outputs[0][1]))]
        if made.kind in ("norm", "batch norm") and not (op.kind == "einsum" and "bias" in made.attrs["then"]):
            attrs = made.attrs | {"then": (*made.attrs["then"], "gain" if op.kind == "einsum" else "bias")}
        elif made.kind == "einsum" and op.kind == "add" and not made.attrs.get("bias"):
            kernels = {label for value, run in made.inputs if uses.is_learned(value) for label in run}
            if not set(port[1]) <= kernels or not kernels:
                continue
            attrs = {**made.attrs, "bias": True}
        else:
            continue
        uses.replace([op, made], DraftOp(made.kind, [*made.inputs, port], out, attrs, made.frame))
        return None
    return None


def rotary(uses: Uses, op: DraftOp) -> DraftOp | None:
    """x cos + (the halves of x exchanged, one negated) sin."""
    if op.kind != "add" or len(op.inputs) != 2:
        return None
    (plain, one), (turned, two) = ((uses.alone(value), labels) for value, labels in op.inputs)
    first, second = _factors(plain), _factors(turned)
    if first is None or second is None or plain is None or turned is None:
        return None
    (x, own), (cos, cos_labels) = first
    (swapped, swapped_own), (sin, sin_labels) = second
    joined = swapped.maker
    if joined is None or joined.kind != "cat" or not _halves(joined, x):
        return None
    to_one, to_two = dict(zip(plain.outputs[0][1], one, strict=True)), dict(zip(turned.outputs[0][1], two, strict=True))
    label = to_two[swapped_own[joined.outputs[0][1].index(joined.attrs["joined"])]]
    ports = [
        (x, tuple(to_one[each] for each in own)), (cos, tuple(to_one[each] for each in cos_labels)),
        (sin, tuple(to_two[each] for each in sin_labels)),
    ]  # fmt: skip
    if label not in ports[0][1]:
        return None
    new = DraftOp("rotary", ports, [(op.outputs[0][0], ports[0][1])], {"label": label}, op.frame)
    order = [op.outputs[0][1].index(each) for each in ports[0][1]]
    if order != list(range(len(order))):
        return None
    uses.replace([op, plain, turned], new)
    for each in [joined, *(value.maker for value, _ in joined.inputs)]:
        _forget(uses, each)
    return None


def _halves(joined: DraftOp, x: Draft) -> bool:
    """Say whether something is [-second half, first half] of x."""
    if len(joined.inputs) != 2:
        return False
    negated, plain = (value.maker for value, _ in joined.inputs)
    if negated is None or plain is None or negated.kind != "scale" or negated.attrs["by"] != -1.0:
        return False
    second = negated.inputs[0][0].maker
    if second is None or second.kind != "slice" or plain.kind != "slice":
        return False
    places = {each.inputs[0][1].index(each.attrs["label"]) for each in (second, plain)}
    size = x.axes[min(places)].size
    return (
        len(places) == 1 and second.inputs[0][0] is x and plain.inputs[0][0] is x
        and (plain.attrs["start"], plain.attrs["stop"]) == (0, size // 2)
        and (second.attrs["start"], second.attrs["stop"]) == (size // 2, size)
    )  # fmt: skip


def _forget(uses: Uses, op: DraftOp | None) -> None:
    """Drop an operator that nobody reads, and what only it read."""
    if op is None or op not in uses.ops or any(uses.readers[v] or v in uses.results for v, _ in op.outputs):
        return
    uses.ops.remove(op)
    for value, _ in op.inputs:
        if op in uses.readers[value]:
            uses.readers[value].remove(op)
        _forget(uses, value.maker)


def hidden(uses: Uses, op: DraftOp) -> DraftOp | None:
    """A table of zeros and very low numbers added before a softmax is a mask."""
    if op.kind != "softmax":
        return None
    (x, _), made = op.inputs[0], uses.alone(op.inputs[0][0])
    if made is None or made.kind not in ("add", "mask") or "shows" in made.attrs or len(made.inputs) != 2:
        return None
    (value, own), (table, labels) = sorted(made.inputs, key=lambda port: port[0].origin == "constant")
    out = made.outputs[0][1]
    keep = table.tensor
    if keep is None or keep.device.type == "meta" or set(own) != set(out):
        return None
    low = made.attrs.get("fill", 0.0) <= LOW
    if made.kind == "add":
        low, keep = bool(((keep == 0) | (keep <= LOW)).all()), keep == 0
    over = [labels.index(out[op.inputs[0][1].index(label)]) for label in op.attrs["over"]
            if out[op.inputs[0][1].index(label)] in labels]  # fmt: skip
    if not low or not over or not bool(keep.any(over[0]).all()):
        return None
    shown = Draft(table.axes, "constant", dims=table.dims, tensor=keep)
    attrs = {"fill": -torch.inf, "shows": _shape_of(keep, over[0])}
    order = tuple(out)
    new = DraftOp("mask", [(value, own), (shown, labels)], [(x, order)], attrs, made.frame)
    uses.replace([made], new)
    return None


def _shape_of(keep: Tensor, over: int) -> str:
    """Name a mask: causal, a window of so many steps, or a table."""
    if keep.dim() != 2 or keep.shape[0] != keep.shape[1]:
        return "table"
    keep = keep if over == 1 else keep.T
    n = len(keep)
    ones = torch.ones(n, n, dtype=torch.bool)
    if bool(keep.all()):
        return "all"
    width = int(keep[-1].sum())
    return next((name for name, table in {
        "causal": ones.tril(), f"causal, last {width}": ones.tril() & ones.triu(1 - width),
    }.items() if torch.equal(keep, table)), "table")  # fmt: skip


def scales(uses: Uses, op: DraftOp) -> DraftOp | None:
    """Scales slide past products and meet; a scale of one is none."""
    if op.kind != "scale":
        return None
    (x, own), (y, out) = op.inputs[0], op.outputs[0]
    before = uses.alone(x)
    if before is not None and before.kind == "scale":
        inner = before.inputs[0]
        by = op.attrs["by"] * before.attrs["by"]
        new = DraftOp("scale", [(inner[0], own)], op.outputs, {"by": by}, op.frame)
        uses.replace([op, before], new)
        return new
    readers = uses.readers[y]
    if op.attrs["by"] == 1.0 and own == out and y not in uses.results:
        for reader in list(readers):
            reader.inputs = [(x if value is y else value, labels) for value, labels in reader.inputs]
            uses.readers[x].append(reader)
        uses.readers[y] = []
        _forget(uses, op)
        return None
    if len(readers) != 1 or y in uses.results or readers[0].kind != "einsum" or readers[0].attrs.get("bias"):
        return None
    into = readers[0]
    if sum(value is y for value, _ in into.inputs) != 1 or any(uses.is_learned(value) for value, _ in into.inputs):
        return None
    moved = Draft(list(into.outputs[0][0].axes), "op")
    labels = into.outputs[0][1]
    product = DraftOp("einsum", [(x, run) if value is y else (value, run) for value, run in into.inputs],
                      [(moved, labels)], into.attrs, into.frame)  # fmt: skip
    new = DraftOp("scale", [(moved, labels)], into.outputs, op.attrs, into.frame)
    uses.replace([op, into], product)
    uses.ops.insert(uses.ops.index(product) + 1, new)
    into.outputs[0][0].maker = new
    uses.enter(new)
    return new


def gate(uses: Uses, op: DraftOp) -> DraftOp | None:
    """x sigmoid(x)"""
    pair = _factors(op)
    if pair is None or pair[0][1] != pair[1][1]:
        return None
    for (x, own), (s, _) in (pair, pair[::-1]):
        made = uses.alone(s)
        if _is_map(made, "sigmoid") and made is not None and made.inputs[0][0] is x:
            attrs = {"fn": "silu.default", "args": ({"at": 0},), "options": {}}
            uses.replace([op, made], DraftOp("map", [(x, own)], op.outputs, attrs, op.frame))
            return None
    return None


def parts(uses: Uses, op: DraftOp) -> DraftOp | None:
    """Part of what a learned map gives is what part of its weights gives; a split of its axis is one of theirs."""
    if op.kind not in ("slice", "reshape") or op.attrs.get("step", 1) != 1:
        return None
    (x, own), (y, out) = op.inputs[0], op.outputs[0]
    made, gone, fresh = x.maker, [each for each in own if each not in out], [each for each in out if each not in own]
    if made is None or made.kind != "einsum" or x in uses.results or len(gone) != 1:
        return None
    slot, label = own.index(gone[0]), made.outputs[0][1][own.index(gone[0])]
    if not all(_parts_too(reader, x, slot) for reader in uses.readers[x]):
        return None
    atoms: list[Atom] = [y.axes[out.index(each)] for each in fresh]
    ports = []
    for value, run in made.inputs:
        if label in run:
            at = run.index(label)
            span = (op.attrs["start"], op.attrs["stop"]) if op.kind == "slice" else (0, x.axes[slot].size)
            part = weight_part(value, at, *span, atoms) if op.kind == "slice" else split_weight(value, at, atoms)
            if part is None:
                return None
            value, run = part, replaced(run, label, fresh)
        ports.append((value, run))
    outward = replaced(made.outputs[0][1], label, fresh)
    uses.replace([op], DraftOp("einsum", ports, [(y, outward)], made.attrs, made.frame))
    _forget(uses, made)
    return None


def _parts_too(reader: DraftOp, x: Draft, slot: int) -> bool:
    """Say whether a reader takes parts of an axis or splits it, and does nothing else."""
    if reader.kind not in ("slice", "reshape") or reader.attrs.get("step", 1) != 1:
        return False
    own, out = reader.inputs[0][1], reader.outputs[0][1]
    kept = [label for i, label in enumerate(own) if i != slot]
    return [label for label in out if label in own] == kept and own[slot] not in out


FUSIONS: tuple[Callable[[Uses, DraftOp], DraftOp | None], ...] = (
    rms,
    rotary,
    after,
    parts,
    after,
    hidden,
    scales,
    gate,
)
