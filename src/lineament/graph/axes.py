"""The identity of every axis of a model: which positions may be permuted together without changing what it computes.

The traced graph is walked once per refinement; every operator ties, factors, cuts or freezes axes (`axis_rules`,
`axis_moves`). What stays free is the symmetry group: one class of positions per free atom. A class may be permuted
apart for each position of others, its `outer` ones (the channels of each head): in every tensor that shows the class
these are shown as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lineament.graph import axis_moves
from lineament.graph.axis_rules import RULES
from lineament.graph.terms import Atom, Axis, fixed, flat, freeze, fresh, leaves, merge, root, size_of, wild
from lineament.graph.trace import Traced, trace
from lineament.graph.values import Pieces, Value, broadcast, is_constant, unknown

PASSES = 64


@dataclass(frozen=True)
class AxisClass:
    """Positions that are permuted together.

    Attributes:
        size: how many.
        outer: classes for each of whose positions this one may be permuted apart, outermost first.
        why: what keeps the order; None for a free class.
        members: (parameter, dimension) where it stands.
    """

    size: int
    outer: tuple[int, ...]
    why: str | None
    members: tuple[tuple[str, int], ...]

    @property
    def frozen(self) -> bool:
        return self.why is not None


@dataclass(frozen=True)
class Leaf:
    """A factor of an axis: all positions of a class (None: a size that belongs to no class)."""

    size: int
    cls: int | None


@dataclass(frozen=True)
class Cut:
    """A factor of an axis: several axes end to end."""

    parts: tuple[tuple[Leaf | Cut, ...], ...]

    @property
    def size(self) -> int:
        return sum(math.prod(factor.size for factor in part) for part in self.parts)


Tree = tuple[Leaf | Cut, ...]


@dataclass(frozen=True)
class Axes:
    """What `axes` found.

    Attributes:
        classes: all classes that parameters show, free and frozen.
        tensors: name of a parameter or of a buffer that moves along (running statistics) -> a tree per dimension.
        nodes: name of a node of the graph -> a tree per dimension, for the activations.
        opaque: operators without a rule that froze what they touched.
        traced: the graph.
    """

    classes: tuple[AxisClass, ...]
    tensors: Mapping[str, tuple[Tree, ...]]
    nodes: Mapping[str, tuple[Tree, ...]]
    opaque: Mapping[str, int]
    traced: Traced = field(repr=False)


def axes(model: nn.Module, *args: Any, **kwargs: Any) -> Axes:
    """Find the identity of every axis of a model.

    Args:
        model: any module that can be traced; it is read as in eval mode. Put it there first (`model.eval()`).
        args, kwargs: an example call; only shapes count.

    Raises:
        InputError: the model can't be traced.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> [(c.size, c.members) for c in axes(mlp, torch.zeros(1, 4)).classes if not c.frozen]
        [(8, (('0.weight', 0), ('0.bias', 0), ('2.weight', 1)))]
    """
    traced = trace(model, *args, **kwargs)
    return _result(walked(traced, [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]))


def walked(traced: Traced, given: Sequence[Tensor]) -> Walk:
    """Walk over a trace until no packed axis asks to be seen in pieces."""
    hints: dict[tuple[str, int], tuple[int, ...]] = {}
    for _ in range(PASSES):
        walk = Walk(traced, hints)
        walk.run(given)
        wanted = {birth: tuple(sorted(borders)) for birth, borders in walk.wanted.items() if birth not in hints}
        if not wanted:
            break
        hints |= wanted
    return walk


class Walk:
    """One pass over the graph."""

    def __init__(self, traced: Traced, hints: Mapping[tuple[str, int], tuple[int, ...]]) -> None:
        self.traced, self.hints = traced, hints
        self.wanted: dict[tuple[str, int], set[int]] = {}
        self.seen: list[Value] = []
        self.env: dict[fx.Node, Any] = {}
        self.tensors: dict[str, Value] = {}
        self.opaque_names: dict[str, int] = {}

    def run(self, given: Sequence[Tensor]) -> None:
        graph = self.traced.module.graph
        places = [node for node in graph.nodes if node.op == "placeholder"]
        names = [*self.traced.parameters, *self.traced.buffers]
        moving = {*self.traced.parameters, *self._statistics(places, names)}
        for node, name in zip(places, names, strict=False):
            sizes = tuple(node.meta["val"].shape)
            if name in moving:
                self.tensors[name] = self.env[node] = Value([fresh(size) for size in sizes])
            else:
                self.env[node] = unknown(sizes, f"{name}: a buffer")
        for node, tensor in zip(places[len(names) :], given, strict=True):
            self.env[node] = unknown(tuple(tensor.shape), f"{node.name}: an input of the model")
        for node in graph.nodes:
            if node.op == "get_attr":
                self.env[node] = _literal(getattr(self.traced.module, str(node.target)), node.name)
            elif node.op == "call_function":
                self.env[node] = self._call(node)
            elif node.op == "output":
                for value in _values(fx.node.map_arg(node.args, self.env.get)):
                    value.freeze("an output of the model")

    def _statistics(self, places: Sequence[fx.Node], names: Sequence[str]) -> set[str]:
        """Return the buffers that are running statistics: they move with their channels."""
        at = dict(zip(places, names, strict=False))
        return {
            at[arg]
            for node in self.traced.module.graph.nodes
            if node.op == "call_function" and self.name(node) in ("batch_norm", "instance_norm")
            for arg in node.args[3:5]
            if isinstance(arg, fx.Node) and arg in at
        }

    @staticmethod
    def name(node: fx.Node) -> str:
        """Return an operator's name without overload."""
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            name = target._schema.name.rpartition("::")[2]
            return name[:-1] if name.endswith("_") and not name.startswith("__") else name
        return getattr(target, "__name__", str(target))

    def contract(self, like: Value, batch: Sequence[Axis], a: Axis, b: Axis, node: fx.Node) -> None:
        """Tie two axes that are summed over together, side by side with what stays."""
        self.saw(Value([*batch, merge(a, b, node.name)], like.hidden))

    def saw(self, value: Value) -> None:
        """Keep a tensor that limits how far inner classes may be permuted apart."""
        self.seen.append(value)

    def want_pieces(self, birth: tuple[str, int], start: int, stop: int, size: int) -> None:
        """Ask that the next pass view a packed axis as pieces with these borders."""
        self.wanted.setdefault(birth, set()).update((0, start, stop, size))

    def opaque(self, node: fx.Node, values: Iterable[Any]) -> Any:
        """Freeze what an operator touches that has no rule."""
        why = f"{self.name(node)} at {node.name}: no rule for it"
        self.opaque_names[self.name(node)] = self.opaque_names.get(self.name(node), 0) + 1
        for value in _values(list(values)):
            value.freeze(why)
            if is_constant(value.owner):
                value.owner.freeze(why)
        return pytree.tree_map(lambda x: unknown(tuple(x.shape), why) if isinstance(x, Tensor) else x, node.meta["val"])

    def _call(self, node: fx.Node) -> Any:
        name = self.name(node)
        args, kwargs = (fx.node.map_arg(given, lambda n: self.env[n]) for given in (node.args, node.kwargs))
        if name == "getitem":
            return args[0][args[1]]
        if "val" not in node.meta or not any(isinstance(x, Tensor) for x in pytree.tree_leaves(node.meta["val"])):
            return None
        mutable = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        if mutable and any(is_constant(value.owner) for value in _values([args[0]])):
            return self.opaque(node, [args, kwargs])  # a constant that is written to is none any longer
        found = self._apply(node, name, args, kwargs)
        for value in _values(found):
            self.seen.append(value)
        return found

    def _apply(self, node: fx.Node, name: str, args: Any, kwargs: Any) -> Any:
        if isinstance(args[0], Pieces) and RULES.get(name) is axis_moves.same:
            return args[0].map(lambda value: value.with_dims(value.dims)) if args else None
        if name not in axis_moves.PIECEWISE:
            args, kwargs = (
                pytree.tree_map(lambda x: x.whole(node.name) if isinstance(x, Pieces) else x, given, is_leaf=_is_value)
                for given in (args, kwargs)
            )
        if name in RULES:
            return RULES[name](self, node, *args, **kwargs)
        operands = _values([args, kwargs])
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        if not pointwise and name not in POINTWISE:
            return self.opaque(node, operands)
        if any(value.choice is not None for value in operands):
            if name in ("to", "clamp") or len(operands) == 0:
                return operands[0]
            for value in operands:
                if value.choice is not None:
                    freeze(value.choice, f"{node.name}: arithmetic on positions")
        if not operands:
            return Value([wild(int(size)) for size in node.meta["val"].shape])
        return broadcast(operands, node.name)


POINTWISE = {"gelu", "masked_fill", "addcmul", "addcdiv", "lerp", "clamp", "softplus", "log_sigmoid", "hardtanh", "elu",
             "__and__", "__or__", "__xor__", "logical_and", "logical_or", "logical_not", "bitwise_not", "rsub", "div",
             "floor_divide", "copy", "isin", "selu", "celu", "leaky_relu", "relu6", "hardswish", "hardsigmoid", "mish",
             "softsign", "tanhshrink", "threshold", "dropout", "square", "true_divide", "multiply", "subtract",
             "clip", "where", "pow", "normal", "fill", "zero", "silu", "logsigmoid", "type_as", "__iand__",
             "__ior__", "float_power", "rrelu"}  # fmt: skip


def _is_value(x: Any) -> bool:
    return isinstance(x, Value | Pieces)


def _values(tree: Any) -> list[Value]:
    found: list[Value] = []
    for leaf in pytree.tree_leaves(tree, is_leaf=_is_value):
        if isinstance(leaf, Value):
            found.append(leaf)
        elif isinstance(leaf, Pieces):
            found += leaf.values
    return found


def _literal(tensor: Any, name: str) -> Value:
    """A tensor made in the code: constant where all its entries along an axis are one."""
    if not isinstance(tensor, Tensor):
        return Value([])
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        same = [bool((tensor == tensor.narrow(i, 0, 1)).all()) for i in range(tensor.dim())]
    return Value([wild(n) if ok else fixed(n, f"{name}: a constant") for n, ok in zip(tensor.shape, same, strict=True)])


def _result(walk: Walk) -> Axes:
    """Number the classes, and find for each the classes that are outside it everywhere."""
    ids: dict[Atom, int] = {}
    members: list[list[tuple[str, int]]] = []
    for name, value in walk.tensors.items():
        for dim, axis in enumerate(value.dims):
            for atom in leaves(axis):
                if atom not in ids:
                    ids[atom] = len(ids)
                    members.append([])
                if (name, dim) not in members[ids[atom]]:
                    members[ids[atom]].append((name, dim))
    around: dict[Atom, set[Atom]] = {}
    order: list[Atom] = []
    for value in walk.tensors.values():
        _note(around, list(_contexts(value, outer_only=True)))
    for value in walk.seen:
        _note(around, _contexts(value, outer_only=False))
    order = list(ids)
    outer = {atom: {other for other in around.get(atom, ()) if other in ids} for atom in order}
    classes = tuple(
        AxisClass(
            atom.size,
            tuple(ids[o] for o in sorted(outer[atom], key=lambda o: (len(outer[o]), ids[o]))),
            atom.why if atom.frozen else None,
            tuple(members[i]),
        )
        for i, atom in enumerate(order)
    )
    trees = {name: tuple(_tree(axis, ids) for axis in value.dims) for name, value in walk.tensors.items()}
    nodes = {
        node.name: tuple(_tree(axis, ids) for axis in value.dims)
        for node, value in walk.env.items()
        if node.op == "call_function" and isinstance(value, Value) and value.choice is None
    }
    return Axes(classes, trees, nodes, walk.opaque_names, walk.traced)


def _note(around: dict[Atom, set[Atom]], contexts: Iterable[tuple[Atom, set[Atom]]]) -> None:
    for atom, context in contexts:
        if atom in around:
            around[atom] &= context
        else:
            around[atom] = set(context)


def _contexts(value: Value, *, outer_only: bool) -> list[tuple[Atom, set[Atom]]]:
    """Return every atom of a tensor with the atoms whose position is known where it stands.

    In a parameter only those before it count, so that two classes are never outside each other.
    """
    found: list[tuple[Atom, set[Atom]]] = []
    hidden = {root(atom) for axis in value.hidden for atom in flat((axis,))}
    direct = [[atom for atom in flat(axis) if atom.parts is None and not atom.wild] for axis in value.dims]
    everywhere = hidden | {atom for atoms in direct for atom in atoms}

    def visit(axis: Axis, known: set[Atom]) -> None:
        for atom in flat(axis):
            if atom.parts is not None:
                for part in atom.parts:
                    inside = {a for a in flat(part) if a.parts is None and not a.wild}
                    visit(part, set(known) if outer_only else known | inside)
            elif not atom.wild:
                found.append((atom, known - {atom}))
                if outer_only:
                    known = known | {atom}

    known: set[Atom] = set() if outer_only else everywhere
    for axis, atoms in zip(value.dims, direct, strict=True):
        visit(axis, known)
        if outer_only:
            known = known | set(atoms)
    return found


def _tree(axis: Axis, ids: Mapping[Atom, int]) -> Tree:
    return tuple(
        Leaf(atom.size, ids.get(atom)) if atom.parts is None else Cut(tuple(_tree(part, ids) for part in atom.parts))
        for atom in flat(axis)
    )


__all__ = ["Axes", "AxisClass", "Cut", "Leaf", "Tree", "axes", "size_of"]
