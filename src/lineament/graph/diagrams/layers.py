"""Attention, norms, sums along axes and choice by number, put into labels."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from lineament.graph.axis_rules import shape
from lineament.graph.diagrams.build import Builder, Labels, View
from lineament.graph.diagrams.moves import viewed
from lineament.graph.diagrams.rules import added, line_up, multiplied, rule, scaled, tie
from lineament.graph.diagrams.term import Repeat


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax")
def softmax(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    x = a.self
    return normalised(b, x, a.dim % len(x.dims), log="log" in b.walk.name(node))


def normalised(b: Builder, x: View, dim: int, *, log: bool = False) -> View:
    x = b.real(x, dim)
    labels = b.labels(x)
    return b.emit("softmax", [(x, labels)], labels, over=tuple(labels[dim]), log=log)


@rule("scaled_dot_product_attention")
def attention(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    """Spell attention out: product, scale, mask, softmax, product."""
    q, k, v = (b.view_of(x) for x in (a.query, a.key, a.value))
    scale = a.scale if a.scale is not None else q.shape[-1] ** -0.5
    if a.enable_gqa and q.shape[-3] != k.shape[-3]:
        times = Repeat(q.shape[-3] // k.shape[-3])
        k, v = (x.with_dims([*x.dims[:-3], (*x.dims[-3], times), *x.dims[-2:]]) for x in (k, v))
    flipped = k.with_dims([*k.dims[:-2], k.dims[-1], k.dims[-2]])
    scores = scaled(b, multiplied(b, q, flipped), scale)
    keep = a.attn_mask
    if a.is_causal:
        keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    if isinstance(keep, Tensor) and keep.dtype == torch.bool:
        views, labels, out = line_up(b, [scores, keep])
        scores = b.emit("mask", list(zip(views, labels, strict=True)), out, fill=-torch.inf)
    elif isinstance(keep, View) and keep_is_bool(node):
        views, labels, out = line_up(b, [keep, scores])
        args = ({"at": 0}, {"at": 1}, -torch.inf)
        scores = b.emit("map", list(zip(views, labels, strict=True)), out, fn="where.ScalarOther", args=args)
    elif keep is not None:
        scores = added(b, [scores, keep])
    return multiplied(b, normalised(b, scores, len(scores.dims) - 1), v)


def keep_is_bool(node: fx.Node) -> bool:
    mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
    return isinstance(mask, fx.Node) and mask.meta["val"].dtype == torch.bool


@rule("layer_norm", "rms_norm", "fused_rms_norm")
def norm(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    x, count = b.view_of(a.input), len(a.normalized_shape)
    given = {"gain": a.weight, "bias": getattr(a, "bias", None)}
    eps = a.eps if a.eps is not None else torch.finfo(node.meta["val"].dtype).eps
    center = "layer" in b.walk.name(node)
    return _normed(b, x, range(len(x.dims) - count, len(x.dims)), given, eps, center)


def _normed(b: Builder, x: View, dims: Any, given: Any, eps: float, center: bool) -> View:
    """Normalise over dimensions; gain and bias are lined up with the last ones."""
    for dim in dims:
        x = b.real(x, dim)
    names = [name for name, value in given.items() if value is not None]
    views, labels, out = line_up(b, [x, *(given[name] for name in names)])
    over = tuple(label for dim in dims for label in out[dim])
    ports = list(zip(views, labels, strict=True))
    return b.emit("norm", ports, out, over=over, eps=eps, center=center, then=tuple(names))


@rule("batch_norm")
def batch_norm(b: Builder, node: fx.Node, a: SimpleNamespace) -> Any:
    if a.running_mean is None:
        return b.opaque(node, list(vars(a).values()), {})
    given = {"mean": a.running_mean, "var": a.running_var, "gain": a.weight, "bias": a.bias}
    names = [name for name, value in given.items() if value is not None]
    operands = [b.view_of(a.input), *(_channels(b, given[name], len(shape(node))) for name in names)]
    views, labels, out = line_up(b, operands)
    ports = list(zip(views, labels, strict=True))
    return b.emit("batch norm", ports, out, eps=a.eps, then=tuple(names[2:]))


def _channels(b: Builder, x: Any, rank: int) -> Any:
    """Put a vector of channels at the second dimension."""
    after = [()] * (rank - 2)
    return x.with_dims([x.dims[0], *after]) if isinstance(x, View) else x.reshape(-1, *([1] * (rank - 2)))


@rule("group_norm", "instance_norm")
def group_norm(b: Builder, node: fx.Node, a: SimpleNamespace) -> Any:
    x = b.view_of(a.input)
    groups = a.num_groups if b.walk.name(node) == "group_norm" else x.shape[1]
    if getattr(a, "running_mean", None) is not None:
        return b.opaque(node, list(vars(a).values()), {})
    per, after = x.shape[1] // groups, [()] * (len(x.dims) - 2)
    read = viewed(b, x, [x.shape[0], groups, per, *x.shape[2:]])
    given: dict[str, Any] = {}
    for name, vector in (("gain", a.weight), ("bias", a.bias)):
        if vector is not None:
            given[name] = (split := viewed(b, b.view_of(vector), [groups, per])).with_dims([*split.dims, *after])
    found = _normed(b, read, range(2, len(read.dims)), given, a.eps, True)
    return found.with_dims([found.dims[0], (*found.dims[1], *found.dims[2]), *found.dims[3:]])


@rule("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm", "logsumexp", "prod", "all", "any")
def reduce(b: Builder, node: fx.Node, a: SimpleNamespace) -> Any:
    x, fn = b.view_of(next(iter(vars(a).values()))), b.walk.name(node)
    dims: Any = getattr(a, "dim", None)
    dims = list(range(len(x.dims))) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    dims = [dim % max(1, len(x.dims)) for dim in dims]
    for dim in dims:
        x = b.real(x, dim)
    labels = b.labels(x)
    keep = len(shape(node)) == len(labels) and len(labels) > 0
    out: Labels = [[] if i in dims else run for i, run in enumerate(labels) if keep or i not in dims]
    options: dict[str, Any] = {}
    if fn in ("var", "std"):
        correction = getattr(a, "correction", None)
        options["correction"] = (1 if getattr(a, "unbiased", True) else 0) if correction is None else correction
    if fn in ("norm", "linalg_vector_norm"):
        order = getattr(a, "ord", getattr(a, "p", 2))
        options["ord"] = 2 if order is None else order
    over = tuple(label for dim in dims for label in labels[dim])
    if not over:
        return x.with_dims([[] if i in dims else run for i, run in enumerate(x.dims) if keep or i not in dims])
    return b.emit("reduce", [(x, labels)], out, fn=fn, over=over, options=options)


@rule("cumsum", "cumprod", "logcumsumexp", "flip", "roll")
def scan(b: Builder, node: fx.Node, a: SimpleNamespace) -> Any:
    x, fn = b.view_of(a.self), b.walk.name(node)
    dims: Any = a.dim if hasattr(a, "dim") else a.dims
    dims = [dims] if isinstance(dims, int) else list(dims)
    if not dims:
        return b.opaque(node, list(vars(a).values()), {})
    for i, dim in enumerate(dims):
        dim %= len(x.dims)
        if x.shape[dim] == 1:
            continue
        x = b.single(x, dim)
        labels = b.labels(x)
        shift: dict[str, Any] = (
            {"shift": a.shifts if isinstance(a.shifts, int) else a.shifts[i]} if fn == "roll" else {}
        )
        x = b.emit("scan", [(x, labels)], labels, fn=fn, label=labels[dim][0], **shift)
    return x


@rule("embedding")
def embedding(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    return taken(b, b.view_of(a.weight), [0], [b.view_of(a.indices)], 0)


@rule("index_select")
def index_select(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    x = b.view_of(a.self)
    return taken(b, x, [a.dim % len(x.dims)], [b.view_of(a.index)], a.dim % len(x.dims))


@rule("index")
def index(b: Builder, node: fx.Node, a: SimpleNamespace) -> Any:
    x, used = b.view_of(a.self), [(i, each) for i, each in enumerate(a.indices) if each is not None]
    nodes = [each for each in node.args[1] if each is not None]  # pyright: ignore[reportOptionalIterable, reportGeneralTypeIssues]
    if any(each.meta["val"].dtype == torch.bool for each in nodes):
        return b.opaque(node, list(vars(a).values()), {})
    at = [i for i, _ in used]
    first = at[0] if at == list(range(at[0], at[0] + len(at))) else 0
    return taken(b, x, at, [each for _, each in used], first)


def taken(b: Builder, x: View, at: Sequence[int], given: Sequence[Any], first: int) -> View:
    """Take positions of some dimensions by number; the numbers' own dimensions stand at dimension `first`."""
    for dim in at:
        x = b.single(x, dim)
    views, labels, where = line_up(b, given)
    own = b.labels(x)
    rest = [run for dim, run in enumerate(own) if dim not in at]
    over = tuple(own[dim][0] for dim in at)
    ports = [(x, own), *zip(views, labels, strict=True)]
    order = [label for run in where for label in run if isinstance(label, int)]
    order += [label for run in rest for label in run if isinstance(label, int)]
    dims = [*rest[:first], *where, *rest[first:]]
    return b.emit("take", ports, dims, order=order, over=over, shared=())


@rule("gather")
def gather(b: Builder, node: fx.Node, a: SimpleNamespace) -> Any:
    x, numbers = b.view_of(a.self), b.view_of(a.index)
    dim = a.dim % len(x.dims)
    others = [i for i in range(len(x.dims)) if i != dim]
    if any(x.shape[i] != numbers.shape[i] for i in others):
        return b.opaque(node, [x, dim, numbers], {})
    x = b.single(x, dim)
    for i in others:
        x = b.real(x, i)
        x, numbers = b.agree(x, i, numbers, i)
    own, labels = b.labels(x), b.labels(numbers)
    shared: list[Any] = []
    for i in others:
        shared += [p for p, q in zip(own[i], labels[i], strict=True) if isinstance(q, int)]
        labels[i] = tie(own[i], labels[i])
    out = [list(run) for run in labels]
    labels = [[s if isinstance(t, int) else t for s, t in zip(run, dims, strict=True)]
              for run, dims in zip(labels, numbers.dims, strict=True)]  # fmt: skip
    return b.emit("take", [(x, own), (numbers, labels)], out, over=(own[dim][0],), shared=tuple(shared))
