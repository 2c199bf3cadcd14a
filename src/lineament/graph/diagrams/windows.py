"""Convolutions and pools: a star reads places through windows, then a product or a reduction closes the windows."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from lineament.graph.axis_rules import shape
from lineament.graph.diagrams.build import Builder, Labels, View
from lineament.graph.diagrams.moves import viewed
from lineament.graph.diagrams.rules import fresh_axis, line_up, product, rule, tie
from lineament.graph.diagrams.term import Repeat
from lineament.graph.terms import Atom


def _each(x: Any, count: int) -> list[int]:
    return [x] * count if isinstance(x, int) else list(x) * (count if len(x) == 1 else 1)


def through_windows(
    b: Builder, node: fx.Node, x: View, sizes: Sequence[int], *, stride: Sequence[int], padding: Sequence[Any],
    dilation: Sequence[int], fill: float = 0.0, axes: Sequence[Sequence[Atom]] | None = None,
) -> View:  # fmt: skip
    """Read the last dimensions through windows; the places in the windows come as further dimensions at the end."""
    count = len(sizes)
    dims = range(len(x.dims) - count, len(x.dims))
    act = [i for i in range(count) if (sizes[i], stride[i], tuple(padding[i])) != (1, 1, (0, 0))]
    if not act:
        return x.with_dims([*x.dims, *([()] * count)])
    for i in act:
        x = b.single(x, dims[i])
    labels, atoms = b.labels(x), b.atoms(node)[-count:]
    over = tuple(labels[dims[i]][0] for i in act)
    places, windows = tuple(b.label() for _ in act), tuple(b.label() for _ in act)
    out, ends, fresh = [list(run) for run in labels], [[] for _ in range(count)], {}
    for i, place, window in zip(act, places, windows, strict=True):
        length = shape(node)[len(shape(node)) - count + i]
        out[dims[i]] = [place] if length != 1 else []
        ends[i] = [window] if sizes[i] != 1 else []
        if length != 1:
            fresh[place] = fresh_axis(atoms[i], length)
        if sizes[i] != 1:
            fresh[window] = fresh_axis(axes[i] if axes else [], sizes[i])
    place_of = dict(zip(over, zip(places, windows, strict=True), strict=True))
    order: list[int] = []
    tail: list[int] = []
    for label in b.port(x, labels):
        new = place_of.get(label, (label,))
        order += [each for each in new[:1] if each in fresh or label not in place_of]
        tail += [each for each in new[1:] if each in fresh]
    options = {"size": sizes, "stride": stride, "dilation": dilation, "padding": [tuple(p) for p in padding]}
    attrs = {key: tuple(value[i] for i in act) for key, value in options.items()}
    return b.emit("window", [(x, labels)], [*out, *ends], fresh=fresh, order=[*order, *tail], over=over,
                   spatial=places, windows=windows, fill=fill, **attrs)  # fmt: skip


@rule("conv1d", "conv2d", "conv3d")
def conv(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    x, rows, bias, count = _grouped(b, a)
    sizes, dilation = list(rows.shape[3:]), _each(a.dilation, count)
    if a.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, sizes, strict=True)]
        padding: list[Any] = [(t // 2, t - t // 2) for t in total]
    else:
        padding = [(p, p) for p in _each(0 if a.padding == "valid" else a.padding, count)]
    kernel = [[rows.value.axes[s] for s in run if isinstance(s, int)] for run in rows.dims[3:]]
    x = through_windows(
        b, node, x, sizes, stride=_each(a.stride, count), padding=padding, dilation=dilation, axes=kernel
    )
    x, rows = b.agree(x, 1, rows, 0)
    x, rows = b.agree(x, 2, rows, 2)
    own, columns = b.labels(x), b.labels(rows)
    for i, j in ((1, 0), (2, 2), *((3 + count + i, 3 + i) for i in range(count))):
        if own[i] and columns[j]:
            tie(own[i], columns[j])
    dims: Labels = [own[0], [*(own[1] or columns[0]), *columns[1]], *own[3 : 3 + count]]
    added = None if bias is None else (bias, [list(columns[0]), list(columns[1])])
    return _unbatched(product(b, [(x, own), (rows, columns)], dims, added), node)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    """Multiply first, then add what falls on the same place."""
    x, rows, bias, count = _grouped(b, a, transposed=True)
    lengths = shape(node)[-count:]
    x, rows = b.agree(x, 1, rows, 0)
    x, rows = b.agree(x, 2, rows, 1)
    for i in range(count):
        x = b.single(x, 3 + i)
    own, columns = b.labels(x), b.labels(rows)
    tie(own[1], columns[0])
    tie(own[2], columns[1])
    dims: Labels = [own[0], [*own[1], *columns[2]], *own[3:], *columns[3:]]
    x = product(b, [(x, own), (rows, columns)], dims)
    labels, atoms = b.labels(x), b.atoms(node)[-count:]
    over = tuple(run[0] for run in labels[2 : 2 + count])
    windows = tuple(run[0] if run else b.label() for run in labels[2 + count :])
    places = tuple(b.label() for _ in range(count))
    fresh = {place: fresh_axis(atoms[i], n) for i, (place, n) in enumerate(zip(places, lengths, strict=True)) if n != 1}
    new = dict(zip(over, places, strict=True))
    order = [new.get(label, label) for label in b.port(x, labels) if label not in windows]
    order = [label for label in order if label in fresh or label not in places]
    outward: Labels = [*labels[:2], *([place] if place in fresh else [] for place in places)]
    found = b.emit("spread", [(x, labels)], outward, fresh=fresh, order=order, over=over, windows=windows,
                   spatial=places, stride=tuple(_each(a.stride, count)), dilation=tuple(_each(a.dilation, count)),
                   padding=tuple((p, p) for p in _each(a.padding, count)), length=tuple(lengths))  # fmt: skip
    if bias is not None:
        vector = bias.with_dims([(*bias.dims[0], *bias.dims[1]), *([()] * count)])
        views, labels, out = line_up(b, [found, vector])
        found = b.emit("add", list(zip(views, labels, strict=True)), out)
    return _unbatched(found, node)


def _grouped(b: Builder, a: SimpleNamespace, *, transposed: bool = False) -> tuple[View, View, View | None, int]:
    """Read channels as [group, channel], the kernel as [group, out, in, ...] (transposed: [group, in, out, ...])."""
    weight, x = b.view_of(a.weight), b.view_of(a.input)
    count = len(weight.dims) - 2
    x = x.with_dims([(), *x.dims]) if len(x.dims) == count + 1 else x
    x = viewed(b, x, [x.shape[0], a.groups, x.shape[1] // a.groups, *x.shape[2:]])
    outs = weight.shape[1] if transposed else weight.shape[0] // a.groups
    rows = viewed(b, weight, [a.groups, weight.shape[0] // a.groups, *weight.shape[1:]])
    bias = None
    if a.bias is not None:
        bias, at = viewed(b, b.view_of(a.bias), [a.groups, outs]), 2 if transposed else 1
        for i, j in ((0, 0), (at, 1)):
            rows, bias = b.agree(rows, i, bias, j) if rows.dims[i] else (rows, bias)
    return x, rows, bias, count


def _unbatched(x: View, node: fx.Node) -> View:
    return x.with_dims(x.dims[-len(shape(node)) :])


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
def pool(b: Builder, node: fx.Node, a: SimpleNamespace) -> Any:
    x, name = b.view_of(next(iter(vars(a).values()))), b.walk.name(node)
    count, most = int(name[-2]), name.startswith("max")
    sizes, padding = _each(a.kernel_size, count), _each(a.padding, count)
    stride = _each(a.stride, count) if a.stride not in (None, []) else sizes
    uneven = not most and ((any(padding) and not a.count_include_pad) or getattr(a, "divisor_override", None))
    if a.ceil_mode or uneven:
        return b.opaque(node, list(vars(a).values()), {})
    dilation = _each(a.dilation, count) if most else [1] * count
    x = through_windows(b, node, x, sizes, stride=stride, padding=[(p, p) for p in padding], dilation=dilation,
                        fill=-torch.inf if most else 0.0)  # fmt: skip
    return reduced(b, x, count, "amax" if most else "mean")


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d")
def adaptive_pool(b: Builder, node: fx.Node, a: SimpleNamespace) -> Any:
    x, name = b.view_of(a.self), b.walk.name(node)
    count, most = int(name[-2]), "max" in name
    wanted = _each(a.output_size, count)
    have = x.shape[-count:]
    if any(n % m for n, m in zip(have, wanted, strict=True)) or most:
        return b.opaque(node, list(vars(a).values()), {})
    sizes = [n // m for n, m in zip(have, wanted, strict=True)]
    if all(m == 1 for m in wanted):
        kept = x.with_dims([*x.dims[:-count], *([()] * count), *x.dims[-count:]])
        return reduced(b, kept, count, "mean")
    x = through_windows(b, node, x, sizes, stride=sizes, padding=[(0, 0)] * count, dilation=[1] * count)
    return reduced(b, x, count, "mean")


def reduced(b: Builder, x: View, count: int, fn: str) -> View:
    """Reduce over the last dimensions."""
    labels = b.labels(x)
    over = tuple(label for run in labels[-count:] for label in run)
    if not over:
        return x.with_dims(x.dims[:-count])
    return b.emit("reduce", [(x, labels)], labels[:-count], fn=fn, over=over, options={})


@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
def upsample(b: Builder, node: fx.Node, a: SimpleNamespace) -> Any:
    """Repeat every place, where the factor is whole."""
    x, count = b.view_of(getattr(a, "self", None) or a.input), int(b.walk.name(node)[-2])
    factors = [n / m for n, m in zip(shape(node)[-count:], x.shape[-count:], strict=True)]
    if any(f != int(f) for f in factors):
        return b.opaque(node, list(vars(a).values()), {})
    last = [(*run, Repeat(int(f))) if f != 1 else run for run, f in zip(x.dims[-count:], factors, strict=True)]
    return x.with_dims([*x.dims[:-count], *last])
