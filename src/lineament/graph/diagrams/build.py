"""From a traced graph to the operators of a term: which label stands at which axis.

The walk of `graph.axes` says of every dimension which axes it is made of; here each operator is put into labels. A
`View` is a value as the model sees it: its dimensions as runs of the value's axes. Views, transposes and expansions
only change this reading.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lineament.graph.axes import Walk
from lineament.graph.diagrams.term import OPAQUE, Repeat
from lineament.graph.terms import Atom, flat
from lineament.graph.values import Pieces, Value

Slot = int | Repeat
Labels = list[list["int | Repeat"]]
"""Per dimension the labels of its axes; where a value is only repeated, how often."""


@dataclass(eq=False)
class Draft:
    """A value in the making."""

    axes: list[Atom]
    origin: str
    name: str = ""
    cuts: tuple[tuple[int, int, int], ...] = ()
    dims: tuple[int, ...] = ()
    tensor: Tensor | None = None
    maker: DraftOp | None = field(default=None, repr=False)


@dataclass(eq=False)
class DraftOp:
    """An operator in the making: ports are (value, labels)."""

    kind: str
    inputs: list[tuple[Draft, tuple[int, ...]]]
    outputs: list[tuple[Draft, tuple[int, ...]]]
    attrs: dict[str, Any]
    frame: str


@dataclass(frozen=True, eq=False)
class View:
    """A value as the model sees it: per dimension, places in the value's axes, outer first."""

    value: Draft
    dims: tuple[tuple[Slot, ...], ...]

    def size(self, slot: Slot) -> int:
        return slot.size if isinstance(slot, Repeat) else self.value.axes[slot].size

    def sizes(self, dim: int) -> list[int]:
        return [self.size(slot) for slot in self.dims[dim]]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes(dim)) for dim in range(len(self.dims)))

    def with_dims(self, dims: Sequence[Sequence[Slot]]) -> View:
        return View(self.value, tuple(tuple(dim) for dim in dims))


class Builder:
    """The term in the making, and the label counter."""

    def __init__(self, walk: Walk) -> None:
        self.walk, self.traced = walk, walk.traced
        self.ops: list[DraftOp] = []
        self.inputs: list[Draft] = []
        self.env: dict[fx.Node, Any] = {}
        self.frame = ""
        self.counts: dict[str, int] = {"operators": 0, "constant": 0}
        self._labels = 0
        self._constants: dict[tuple[int, tuple[int, ...]], tuple[Tensor, View]] = {}

    # values

    def atoms(self, node: fx.Node, which: int | None = None) -> list[list[Atom]]:
        """Return the axes of each dimension of a node's value, as the walk resolved them."""
        value = self.walk.env.get(node)
        value = value[which] if which is not None and isinstance(value, list | tuple) else value
        given = node.meta["val"]
        shape = (given if which is None else given[which]).shape
        if isinstance(value, Pieces):
            found = [flat(axis) for axis in value.values[0].dims]
            for other in value.values[1:]:
                for i, axis in enumerate(other.dims):
                    if [a.size for a in flat(axis)] != [a.size for a in found[i]]:
                        found[i] = [Atom(int(shape[i]))]
            found[value.dim] = [Atom(int(shape[value.dim]))] if shape[value.dim] != 1 else []
        elif isinstance(value, Value) and len(value.dims) == len(shape):
            found = [flat(axis) for axis in value.dims]
        else:
            found = [[] for _ in shape]
        return [
            atoms if math.prod(atom.size for atom in atoms) == size else [Atom(int(size))] if size != 1 else []
            for atoms, size in zip(found, shape, strict=True)
        ]

    def leaf(self, node: fx.Node, origin: str, name: str) -> View:
        """Make a value of an input or a parameter."""
        atoms = self.atoms(node)
        draft = Draft([a for dim in atoms for a in dim], origin, name, dims=tuple(len(dim) for dim in atoms))
        return View(draft, _runs(atoms))

    def view_of(self, x: Any, like: Sequence[Sequence[int]] | None = None) -> View:
        """Return a constant as a value; `like` gives the axis sizes of its dimensions."""
        if isinstance(x, View):
            return x
        assert isinstance(x, Tensor)
        sizes = [
            list(like[i]) if like is not None and math.prod(like[i]) == n else [n] if n != 1 else []
            for i, n in enumerate(x.shape)
        ]
        key = (id(x), tuple(size for dim in sizes for size in dim))
        if key not in self._constants:
            atoms = [[Atom(size) for size in dim] for dim in sizes]
            draft = Draft([a for dim in atoms for a in dim], "constant", tensor=x.reshape([*key[1]]))
            draft.dims = tuple(len(dim) for dim in atoms)
            self._constants[key] = (x, View(draft, _runs(atoms)))  # x is held, so that its id stays its own
        return self._constants[key][1]

    # labels

    def label(self) -> int:
        self._labels += 1
        return self._labels

    def labels(self, view: View) -> Labels:
        """Give every axis of a view a label of its own."""
        return [[slot if isinstance(slot, Repeat) else self.label() for slot in dim] for dim in view.dims]

    def agree(self, a: View, i: int, b: View, j: int) -> tuple[View, View]:
        """Split axes until dimension i of one view and j of another are made of axes of the same sizes."""
        wanted = refined(a.sizes(i), b.sizes(j))
        if wanted is None:
            return self.single(a, i), self.single(b, j)
        return self.refine(a, i, wanted), self.refine(b, j, wanted)

    def refine(self, view: View, dim: int, sizes: Sequence[int]) -> View:
        """Split axes of a dimension so that these are its sizes."""
        wanted, at = list(sizes), 0
        while at < len(view.dims[dim]):
            slot, parts, left = view.dims[dim][at], [], view.size(view.dims[dim][at])
            while left > 1:
                parts.append(wanted.pop(0))
                left //= parts[-1]
            if isinstance(slot, Repeat):
                runs = [list(run) for run in view.dims]
                runs[dim][at : at + 1] = [Repeat(size) for size in parts]
                view = view.with_dims(runs)
            elif len(parts) > 1:
                view = self._split(view, slot, parts)
            at += max(1, len(parts))
        return view

    def _split(self, view: View, slot: int, sizes: Sequence[int]) -> View:
        old, extra = view.value, len(sizes) - 1
        atoms = [*old.axes[:slot], *(Atom(size) for size in sizes), *old.axes[slot + 1 :]]
        if old.origin in ("weight", "constant"):  # is read anew
            new = Draft(atoms, old.origin, old.name, old.cuts, tensor=old.tensor)
            ends = list(accumulate(old.dims))
            new.dims = tuple(n + extra * (end - n <= slot < end) for n, end in zip(old.dims, ends, strict=True))
            if old.tensor is not None:
                new.tensor = old.tensor.reshape([atom.size for atom in atoms])
        else:
            labels = [self.label() for _ in old.axes]
            outward = [*labels[:slot], *(self.label() for _ in sizes), *labels[slot + 1 :]]
            new = Draft(atoms, "op")
            order = tuple(range(len(labels)))
            self.add("reshape", [(old, tuple(labels))], [(new, tuple(outward))], order=order)
        return View(new, moved(view.dims, slot, len(sizes)))

    def single(self, view: View, dim: int) -> View:
        """Join the axes of a dimension into one, repeats made real; a dimension of size 1 becomes an axis of size 1."""
        slots = view.dims[dim]
        if len(slots) == 1 and not isinstance(slots[0], Repeat):
            return view
        view = self.real(view, dim)
        slots, old = [slot for slot in view.dims[dim] if isinstance(slot, int)], view.value.axes
        others = [i for i in range(len(old)) if i not in slots]
        first = min(slots, default=len(old))
        before = [i for i in others if i < first]
        order = [*before, *slots, *(i for i in others if i >= first)]
        joined = Atom(math.prod(view.sizes(dim)))
        atoms = [*(old[i] for i in before), joined, *(old[i] for i in others if i >= first)]
        labels = [self.label() for _ in old]
        fresh = self.label()
        outward = [*(labels[i] for i in before), fresh, *(labels[i] for i in others if i >= first)]
        out = Draft(atoms, "op")
        self.add("reshape", [(view.value, tuple(labels))], [(out, tuple(outward))], order=order)
        place = {i: outward.index(labels[i]) for i in others}
        return View(
            out,
            tuple(
                (len(before),) if d == dim else tuple(s if isinstance(s, Repeat) else place[s] for s in dims)
                for d, dims in enumerate(view.dims)
            ),
        )

    def real(self, view: View, dim: int) -> View:
        """Turn repeats of a dimension into axes of the value."""
        if not any(isinstance(slot, Repeat) for slot in view.dims[dim]):
            return view
        inward = self.labels(view)
        outward = [list(run) for run in inward]
        extra: dict[int, Atom] = {}
        for i, slot in enumerate(inward[dim]):
            if isinstance(slot, Repeat):
                outward[dim][i] = label = self.label()
                extra[label] = Atom(slot.size)
        return self.emit("map", [(view, inward)], outward, fresh=extra, fn="clone.default", args=({"at": 0},))

    # operators

    def add(self, kind: str, inputs: Any, outputs: Any, **attrs: Any) -> DraftOp:
        op = DraftOp(kind, list(inputs), list(outputs), attrs, self.frame)
        for value, _ in outputs:
            value.maker = op
        self.ops.append(op)
        return op

    def emit(
        self,
        kind: str,
        operands: Sequence[tuple[View, Labels]],
        dims: Labels,
        *,
        fresh: Mapping[int, Atom] | None = None,
        order: Sequence[int] | None = None,
        **attrs: Any,
    ) -> View:
        """Enter an operator with one output and return it as the model sees it.

        Args:
            operands: views with the labels of their dimensions. dims: labels of the output's dimensions.
            fresh: axes of labels that no operand has. order: of the output's axes; by default as they come in.
        """
        ports = [(view.value, self.port(view, labels)) for view, labels in operands]
        wanted = [label for dim in dims for label in dim if not isinstance(label, Repeat)]
        atoms: dict[int, Atom] = {}
        weak: dict[int, bool] = {}
        for value, labels in ports:
            for label, atom in zip(labels, value.axes, strict=True):
                if label not in atoms or (weak[label] and not (atom.wild or value.origin == "constant")):
                    atoms[label], weak[label] = atom, atom.wild or value.origin == "constant"
        atoms |= fresh or {}
        if order is None:
            first = [label for _, labels in ports for label in labels]
            order = list(dict.fromkeys([*(label for label in first if label in wanted), *wanted]))
        out = Draft([atoms[label] for label in order], "op")
        self.add(kind, ports, [(out, tuple(order))], **attrs)
        at = {label: i for i, label in enumerate(order)}
        return View(out, tuple(tuple(s if isinstance(s, Repeat) else at[s] for s in dim) for dim in dims))

    def port(self, view: View, labels: Labels) -> tuple[int, ...]:
        """Return the labels in the order of the value's axes."""
        found: dict[int, int] = {}
        for dim, run in zip(view.dims, labels, strict=True):
            real = [slot for slot in dim if not isinstance(slot, Repeat)]
            found.update(zip(real, (label for label in run if not isinstance(label, Repeat)), strict=True))
        return tuple(found[i] if i in found else self.label() for i in range(len(view.value.axes)))

    def opaque(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Enter an operator that the term has no meaning for; running the term calls it."""
        views: list[View] = []

        def stand(x: Any) -> Any:
            if isinstance(x, View | Tensor):
                views.append(self.view_of(x))
                return {"at": len(views) - 1}
            return x

        args, kwargs = pytree.tree_map(stand, (list(args), dict(kwargs)), is_leaf=lambda x: isinstance(x, View))
        many = node.meta["val"] if isinstance(node.meta["val"], list | tuple) else [node.meta["val"]]
        outs, found = [], []
        for i, each in enumerate(many):
            if isinstance(each, Tensor):
                atoms = self.atoms(node, i if isinstance(node.meta["val"], list | tuple) else None)
                draft = Draft([a for dim in atoms for a in dim], "op")
                outs.append((draft, tuple(self.label() for _ in draft.axes)))
                found.append(View(draft, _runs(atoms)))
            else:
                found.append(None)
        ports = [(view.value, tuple(self.label() for _ in view.value.axes)) for view in views]
        name = node.target._schema.name.partition("::")[2] + "." + (node.target._schema.overload_name or "default")
        self.add(OPAQUE, ports, outs, fn=name, args=args, options=kwargs, dims=tuple(view.dims for view in views))
        self.counts[OPAQUE] = self.counts.get(OPAQUE, 0) + 1
        self.counts[f"{OPAQUE}: {self.walk.name(node)}"] = self.counts.get(f"{OPAQUE}: {self.walk.name(node)}", 0) + 1
        return tuple(found) if isinstance(node.meta["val"], list | tuple) else found[0]


def moved(dims: Sequence[Sequence[Slot]], slot: int, count: int) -> tuple[tuple[Slot, ...], ...]:
    """Return dimensions after the axis at a place became several."""

    def to(s: Slot) -> tuple[Slot, ...]:
        if isinstance(s, Repeat) or s < slot:
            return (s,)
        return tuple(range(slot, slot + count)) if s == slot else (s + count - 1,)

    return tuple(tuple(new for s in dim for new in to(s)) for dim in dims)


def _runs(atoms: Sequence[Sequence[Atom]]) -> tuple[tuple[int, ...], ...]:
    found, at = [], 0
    for dim in atoms:
        found.append(tuple(range(at, at + len(dim))))
        at += len(dim)
    return tuple(found)


def refined(a: Sequence[int], b: Sequence[int]) -> list[int] | None:
    """Return the coarsest sizes that refine both; None where one doesn't divide the other."""
    left, right, found = list(a), list(b), []
    while left and right:
        size = min(left[0], right[0])
        for run in (left, right):
            if run[0] % size:
                return None
            run[0] //= size
            if run[0] == 1:
                run.pop(0)
        found.append(size)
    return None if left or right else found


def folded(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Evaluate an operator on constants; real numbers are float64 whatever the model says."""
    wide = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64}
    args, kwargs = pytree.tree_map(lambda x: wide.get(x, x) if isinstance(x, torch.dtype) else x, (args, kwargs))
    found = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    widen = lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
    return pytree.tree_map(widen, found)
