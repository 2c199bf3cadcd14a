"""How each operator of a trace is put into labels: products, elementwise functions, norms, choice by number.

`RULES[name](builder, node, given)` gets the arguments by their names in the operator's schema: `View` for values,
tensors for constants, plain values else. An operator without a rule is opaque.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from lineament.graph.axis_rules import entering, letters_of, shape
from lineament.graph.diagrams.build import Builder, Labels, View
from lineament.graph.diagrams.term import Repeat
from lineament.graph.terms import Atom

RULES: dict[str, Callable[..., Any]] = {}
rule = entering(RULES)


def number(x: Any) -> float | None:
    """Return a plain number, also out of a constant tensor with one entry; None for anything else."""
    if isinstance(x, bool):
        return None
    if isinstance(x, int | float):
        return x
    return float(x) if isinstance(x, Tensor) and x.numel() == 1 and x.dim() == 0 and x.device.type != "meta" else None


# lining up


def tie(a: list[int | Repeat], b: list[int | Repeat]) -> list[int | Repeat]:
    """Give two runs of labels of equal sizes the same labels, in place; return what they are together."""
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if isinstance(x, int) and isinstance(y, int):
            b[i] = x
    return [x if isinstance(x, int) else y for x, y in zip(a, b, strict=True)]


def line_up(b: Builder, given: Sequence[Any]) -> tuple[list[View], list[Labels], Labels]:
    """Align values as broadcasting does: the same axis of several has one label."""
    rank = max(len(x.dims if isinstance(x, View) else x.shape) for x in given)
    like: list[Any] = [None] * rank
    for x in given:
        if isinstance(x, View):
            for at in range(-len(x.dims), 0):
                like[at] = like[at] or x.sizes(at) or None
    views = [x if isinstance(x, View) else b.view_of(x, [like[at] or [] for at in range(-x.dim(), 0)]) for x in given]
    for at in range(-rank, 0):
        having = [i for i, v in enumerate(views) if len(v.dims) >= -at and v.dims[at] and math.prod(v.sizes(at)) != 1]
        for i in [*having[1:], *having[1:-1]]:
            views[having[0]], views[i] = b.agree(views[having[0]], at, views[i], at)
    labels = [b.labels(view) for view in views]
    out: Labels = []
    for at in range(-rank, 0):
        run: list[int | Repeat] = []
        for view, own in zip(views, labels, strict=True):
            if len(view.dims) >= -at and own[at] and math.prod(view.sizes(at)) != 1:
                run = tie(run, own[at]) if run else list(own[at])
        ones = [own[at] for view, own in zip(views, labels, strict=True) if len(view.dims) >= -at and own[at]]
        out.append(run or (list(ones[0]) if ones else []))
    return views, labels, out


def in_place(ports: Sequence[tuple[View, Labels]], out: Labels, b: Builder) -> list[int]:
    """Return the order of a product's axes: what comes in keeps its place, new axes stand where others ended."""
    wanted = [label for run in out for label in run if isinstance(label, int)]
    live = [(v, own) for v, own in ports if v.value.origin not in ("weight", "constant")] or list(ports)
    found: list[int] = []
    fresh = [x for x in _given(ports, b) if x in wanted and x not in _given(live, b)]
    for label in _given(live, b):
        if label in wanted:
            found += [label] if label not in found else []
        elif fresh:
            found, fresh = [*found, *fresh], []
    return [*found, *fresh]


def _given(ports: Sequence[tuple[View, Labels]], b: Builder) -> list[int]:
    found: list[Any] = []
    for view, own in ports:
        places = {s: x for dim, run in zip(view.dims, own, strict=True) for s, x in zip(dim, run, strict=True)
                  if isinstance(s, int)}  # fmt: skip
        found += [places[i] for i in sorted(places)]
    return list(dict.fromkeys(found))


def product(b: Builder, ports: list[tuple[View, Labels]], out: Labels, bias: tuple[View, Labels] | None = None) -> View:
    """Enter a product of values, summed over the labels that are not in `out`."""
    order = in_place(ports, out, b)
    extra: dict[str, Any] = {"bias": True} if bias else {}
    return b.emit("einsum", [*ports, *([bias] if bias else [])], out, order=order, **extra)


# linear maps


@rule("linear")
def linear(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    x, weight = b.agree(b.view_of(a.input), -1, b.view_of(a.weight), -1)
    x = b.real(x, -1 % len(x.dims)) if any(isinstance(s, Repeat) for s in x.dims[-1]) else x
    bias = None
    if a.bias is not None:
        weight, bias = b.agree(weight, 0, b.view_of(a.bias), 0)
    own, columns = b.labels(x), b.labels(weight)
    tie(own[-1], columns[-1])
    added = None if bias is None else (bias, [list(columns[0])])
    return product(b, [(x, own), (weight, columns)], [*own[:-1], *columns[:-1]], added)


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    given = list(vars(a).values())
    return multiplied(b, b.view_of(given[0]), b.view_of(given[1]))


def multiplied(b: Builder, x: View, y: View, bias: Any = None) -> View:
    """Enter a batched matrix product."""
    row, column = -1, (-2 if len(y.dims) > 1 else -1)
    x, y = b.agree(x, row, y, column)
    if any(isinstance(s, Repeat) and isinstance(t, Repeat) for s, t in zip(x.dims[row], y.dims[column], strict=True)):
        x = b.real(x, len(x.dims) - 1)
    both = [at for at in range(-min(len(x.dims), len(y.dims)), -2) if x.dims[at] and y.dims[at]]
    for at in both:
        x, y = b.agree(x, at, y, at)
    left, right = b.labels(x), b.labels(y)
    tie(left[row], right[column])
    batch: Labels = []
    for at in range(-max(len(left), len(right)), -2):
        one, two = (run[at] if len(run) >= -at else [] for run in (left, right))
        batch.append(tie(one, two) if at in both else one or two)
    out = [*batch, *([left[-2]] if len(left) > 1 else []), *([right[-1]] if len(right) > 1 else [])]
    return product(b, [(x, left), (y, right)], out)


@rule("addmm", "addmv", "baddbmm")
def addmm(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    x, y = [getattr(a, key) for key in vars(a)][1:3]
    found = multiplied(b, b.view_of(x), b.view_of(y))
    found = found if a.alpha == 1 else scaled(b, found, a.alpha)
    if a.beta == 0:
        return found
    bias = b.view_of(a.self)
    return added(b, [found, bias if a.beta == 1 else scaled(b, bias, a.beta)])


@rule("einsum")
def einsum(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    views = [b.view_of(x) for x in a.tensors]
    letters, out = letters_of(a.equation, [len(view.dims) for view in views])
    if any(len(set(run)) < len(run) for run in letters):
        return b.opaque(node, (a.equation, a.tensors), {})  # a diagonal within one tensor
    for _ in range(2):
        for i in range(len(views)):
            for j in range(i):
                for c in set(letters[i]) & set(letters[j]):
                    p, q = letters[j].index(c), letters[i].index(c)
                    if views[j].dims[p] and views[i].dims[q]:
                        views[j], views[i] = b.agree(views[j], p, views[i], q)
    labels, runs = [b.labels(view) for view in views], {}
    for own, run in zip(labels, letters, strict=True):
        for at, c in enumerate(run):
            runs[c] = tie(runs[c], own[at]) if runs.get(c) and own[at] else runs.get(c) or list(own[at])
    return product(b, list(zip(views, labels, strict=True)), [runs[c] for c in out])


# elementwise


def pointwise(b: Builder, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> View:
    """Enter an elementwise function."""
    operands: list[Any] = []

    def stand(x: Any) -> Any:
        if isinstance(x, View | Tensor) and number(x) is None:
            operands.append(x)
            return {"at": len(operands) - 1}
        return x if number(x) is None else number(x)

    template = tuple(stand(x) for x in args)
    options = {key: stand(x) for key, x in kwargs.items() if key not in ("dtype", "device", "pin_memory", "layout")}
    schema = node.target._schema  # pyright: ignore[reportFunctionMemberAccess]
    name, overload = schema.name.partition("::")[2], schema.overload_name or "default"
    name = name[:-1] if schema.is_mutable and name.endswith("_") else name
    if len(operands) == 1 and overload == "Tensor" and len(template) == 2:
        overload = "Scalar"  # the other operand was a tensor with one entry
    views, labels, out = line_up(b, operands)
    return b.emit(
        "map", list(zip(views, labels, strict=True)), out, fn=f"{name}.{overload}", args=template, options=options
    )


def added(b: Builder, given: Sequence[Any]) -> View:
    views, labels, out = line_up(b, given)
    return b.emit("add", list(zip(views, labels, strict=True)), out)


def scaled(b: Builder, x: View, by: float) -> View:
    labels = b.labels(x)
    return b.emit("scale", [(x, labels)], labels, by=float(by))


@rule("mul", "multiply")
def mul(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    x, y = a.self, a.other
    for value, by in ((x, number(y)), (y, number(x))):
        if by is not None:
            return scaled(b, value, by)
    views, labels, out = line_up(b, [x, y])
    return product(b, list(zip(views, labels, strict=True)), out)


@rule("div", "true_divide", "divide")
def div(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    by = number(a.other)
    if by and getattr(a, "rounding_mode", None) is None:
        return scaled(b, a.self, 1 / by)
    args = [a.self, a.other]
    return pointwise(b, node, args, {"rounding_mode": a.rounding_mode} if getattr(a, "rounding_mode", None) else {})


@rule("neg", "negative")
def neg(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    return scaled(b, a.self, -1.0)


@rule("add")
def add(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    x, y = a.self, a.other
    if number(x) is None and number(y) is None and getattr(a, "alpha", 1) == 1:
        return added(b, [x, y])
    return pointwise(b, node, [x, y], {"alpha": a.alpha} if getattr(a, "alpha", 1) != 1 else {})


@rule("masked_fill", "tril", "triu", "where")
def masked(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    """Keep some places, known beforehand, and fill the others with one number."""
    name, x = b.walk.name(node), getattr(a, "self", None)
    if name in ("tril", "triu"):
        rows = torch.ones([int(n) for n in shape(node)[-2:]], dtype=torch.bool)
        keep, fill = getattr(rows, name)(a.diagonal), 0.0
    elif name == "where":
        keep, fill = a.condition, number(a.other)
        if not isinstance(x, View) and isinstance(a.other, View) and isinstance(keep, Tensor):
            keep, x, fill = ~keep, a.other, number(x)
    else:
        keep, fill = ~a.mask if isinstance(a.mask, Tensor) else a.mask, number(a.value)
    if not isinstance(keep, Tensor) or fill is None or not isinstance(x, View):
        return pointwise(b, node, list(vars(a).values()), {})
    views, labels, out = line_up(b, [x, keep])
    return b.emit("mask", list(zip(views, labels, strict=True)), out, fill=fill)


@rule("glu")
def glu(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    from lineament.graph.diagrams.moves import cut

    x, dim = a.self, a.dim % len(a.self.dims)
    half = x.shape[dim] // 2
    first, second = cut(b, x, dim, 0, half, []), cut(b, x, dim, half, 2 * half, [])
    labels = b.labels(second)
    gate = b.emit("map", [(second, labels)], labels, fn="sigmoid.default", args=({"at": 0},))
    views, own, out = line_up(b, [first, gate])
    return product(b, list(zip(views, own, strict=True)), out)


def fresh_axis(atoms: Sequence[Atom], size: int) -> Atom:
    """Return the walk's axis where it is one, else a new one."""
    return atoms[0] if len(atoms) == 1 else Atom(size)
