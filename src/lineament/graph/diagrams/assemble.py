"""From a traced model to its term: every operator by its rule, then fused, put in order and numbered."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lineament._base.errors import InputError
from lineament.graph.axes import POINTWISE, Walk, walked
from lineament.graph.diagrams import layers, moves, windows
from lineament.graph.diagrams.build import Builder, Draft, DraftOp, View, folded
from lineament.graph.diagrams.fuse import fused
from lineament.graph.diagrams.names import identity, named
from lineament.graph.diagrams.rules import RULES, pointwise
from lineament.graph.diagrams.term import Axis, Data, Op, Port, Result, Term
from lineament.graph.trace import Traced, module_of

VIEWS = {"slice", "select", "narrow", "view", "transpose", "permute", "unbind", "split", "chunk", "expand", "unsqueeze"}
FILLED = {"zeros": 0, "ones": 1, "empty": 0}
_ROOMS = (layers, moves, windows)  # each enters its rules


def term_of(traced: Traced, given: Sequence[Tensor]) -> Term:
    """Build the term of a trace.

    Raises:
        InputError: the model writes into part of a tensor.
    """
    walk = walked(traced, given)
    b = Builder(walk)
    results = _run(b)
    ops = fused(b.ops, [view.value for view in results])
    return _numbered(b, _ordered(ops, [view.value for view in results]), results)


def _run(b: Builder) -> list[View]:
    graph, traced = b.traced.module.graph, b.traced
    places = [node for node in graph.nodes if node.op == "placeholder"]
    names = [*traced.parameters, *traced.buffers]
    for node, name in zip(places, names, strict=False):
        if name in traced.constants and name not in traced.parameters:
            value = traced.constants[name]
            b.env[node] = value.double() if value.is_floating_point() else value
        else:
            b.env[node] = b.leaf(node, "weight", name)
    for i, node in enumerate(places[len(names) :]):
        b.env[node] = b.leaf(node, "input", f"input {i}")
        b.inputs.append(b.env[node].value)
    results: list[View] = []
    for node in graph.nodes:
        if node.op == "get_attr":
            value = getattr(traced.module, str(node.target))
            b.env[node] = value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        elif node.op == "call_function":
            b.env[node] = _called(b, node)
        elif node.op == "output":
            found = pytree.tree_leaves(fx.node.map_arg(node.args, b.env.get), is_leaf=lambda x: isinstance(x, View))
            results = [b.view_of(x) for x in found if isinstance(x, View | Tensor)]
    return results


def _called(b: Builder, node: fx.Node) -> Any:
    name = Walk.name(node)
    args, kwargs = (fx.node.map_arg(given, lambda n: b.env[n]) for given in (node.args, node.kwargs))
    if name == "getitem":
        return args[0][args[1]]
    if "val" not in node.meta or not any(isinstance(x, Tensor) for x in pytree.tree_leaves(node.meta["val"])):
        return None
    given = pytree.tree_leaves((args, kwargs), is_leaf=lambda x: isinstance(x, View))
    if not any(isinstance(x, View) for x in given) and not name.startswith("rand"):
        b.counts["constant"] += 1
        return folded(node, args, kwargs)
    if name.endswith("_like") or name.startswith("new_"):
        return _filled(b, node, name, args, kwargs)
    b.counts["operators"] += 1
    b.frame = module_of(node)
    _refuse_writing(b, node, name)
    if name in RULES:
        found = RULES[name](b, node, _arguments(node, args, kwargs))
    elif torch.Tag.pointwise in getattr(node.target, "tags", ()) or name in POINTWISE:
        found = pointwise(b, node, args, kwargs)
    else:
        found = b.opaque(node, args, kwargs)
    _check(found, node)
    return found


def _filled(b: Builder, node: fx.Node, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Only the shape of an operand counts: the result is a constant. Random numbers have no place in a term."""
    like = node.meta["val"]
    kind = name.removesuffix("_like").removeprefix("new_")
    value = FILLED.get(kind, args[-1] if kind == "full" else None)
    if value is None:
        return b.opaque(node, args, kwargs)
    b.counts["constant"] += 1
    return torch.full(tuple(like.shape), value, dtype=torch.float64 if like.dtype.is_floating_point else like.dtype)


def _arguments(node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> SimpleNamespace:
    """Name an operator's arguments as its schema does, defaults filled in."""
    schema = node.target._schema.arguments  # pyright: ignore[reportFunctionMemberAccess]
    found = {each.name: each.default_value for each in schema if each.has_default_value()}
    found = dict(zip((each.name for each in schema), args, strict=False)) | {
        key: value for key, value in found.items() if key not in [each.name for each in schema[: len(args)]]
    }
    return SimpleNamespace(**(found | kwargs))


def _refuse_writing(b: Builder, node: fx.Node, name: str) -> None:
    """A write into part of a tensor changes another value than the one it returns."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable or not isinstance(node.args[0], fx.Node):
        return
    source = node.args[0]
    inner = source.args[0] if Walk.name(source) == "getitem" else source
    if isinstance(inner, fx.Node) and Walk.name(inner) in VIEWS:
        place = f" at {b.frame}" if b.frame else ""
        raise InputError(
            f"{name}_{place} writes into a part of a tensor; a diagram has no place for that: make a new one"
        )


def _check(found: Any, node: fx.Node) -> None:
    values = found if isinstance(found, tuple | list) else (found,)
    given = node.meta["val"] if isinstance(node.meta["val"], list | tuple) else (node.meta["val"],)
    for view, like in zip(values, given, strict=False):
        if isinstance(view, View) and isinstance(like, Tensor):
            assert view.shape == tuple(like.shape), (node.format_node(), view.shape, tuple(like.shape))


def _ordered(ops: Sequence[DraftOp], results: Sequence[Draft]) -> list[DraftOp]:
    """Put operators in the order in which the results ask for them, inputs first; what nothing asks for is left out."""
    found: dict[DraftOp, None] = {}
    stack = [(draft.maker, False) for draft in reversed(results)]
    while stack:
        op, done = stack.pop()
        if op is None or op in found:
            continue
        if done:
            found[op] = None
            continue
        stack.append((op, True))
        stack += [(value.maker, False) for value, _ in reversed(op.inputs)]
    return list(found)


def _numbered(b: Builder, ops: Sequence[DraftOp], results: Sequence[View]) -> Term:
    """Give values and axes their numbers, in the order in which operators meet them."""
    drafts = [*b.inputs, *(v for op in ops for v, _ in (*op.inputs, *op.outputs)), *(view.value for view in results)]
    values = {draft: i for i, draft in enumerate(dict.fromkeys(drafts))}
    atoms: dict[Any, int] = {}
    sizes: list[int] = []
    for draft in values:
        for atom in draft.axes:
            if atoms.setdefault(identity(atom), len(atoms)) == len(sizes):
                sizes.append(atom.size)
    names = named(list(atoms), list(values), ops, [view.value for view in results])
    axes = tuple(Axis(name, size, what) for size, (name, what) in zip(sizes, names, strict=True))
    data = tuple(
        Data(tuple(atoms[identity(a)] for a in draft.axes), draft.origin, draft.name, draft.cuts, draft.dims)
        for draft in values
    )
    made = tuple(
        Op(
            op.kind,
            tuple(Port(values[draft], tuple(labels)) for draft, labels in op.inputs),
            tuple(Port(values[draft], tuple(labels)) for draft, labels in op.outputs),
            op.attrs,
            op.frame,
        )
        for op in ops
    )
    constants = {i: draft.tensor for draft, i in values.items() if draft.tensor is not None}
    ends = tuple(Result(values[view.value], view.dims) for view in results)
    return Term(axes, data, made, tuple(values[each] for each in b.inputs), ends, constants, dict(b.counts))
