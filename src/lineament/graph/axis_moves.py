"""Operators that move, split, cut and join axes; they also act on tensors that are known as pieces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from torch import fx

from lineament.graph.axis_rules import rule, same, shape
from lineament.graph.terms import (
    Axis,
    cut_at,
    fixed,
    flat,
    freeze,
    is_wild,
    merge,
    regroup,
    root,
    size_of,
    slice_of,
    sum_of,
    wild,
)
from lineament.graph.values import Pieces, Value, broadcast, unknown

if TYPE_CHECKING:
    from lineament.graph.axes import Walk

Tensorlike = Value | Pieces


def rank(x: Tensorlike) -> int:
    return len(x.dims if isinstance(x, Value) else x.values[0].dims)


def ordered(x: Tensorlike, order: Sequence[int]) -> Tensorlike:
    """Put dimensions in another order."""
    if isinstance(x, Pieces):
        return Pieces(order.index(x.dim), [value.with_dims([value.dims[i] for i in order]) for value in x.values])
    return x.with_dims([x.dims[i] for i in order])


@rule("transpose", "swapaxes", "swapdims")
def transpose(walk: Walk, node: fx.Node, x: Tensorlike, a: int, b: int) -> Tensorlike:
    order = list(range(rank(x)))
    order[a], order[b] = order[b], order[a]
    return ordered(x, order)


@rule("t", "mT", "numpy_T", "matrix_H", "adjoint", "mH")
def flipped(walk: Walk, node: fx.Node, x: Tensorlike) -> Tensorlike:
    n = rank(x)
    if walk.name(node) == "numpy_T":
        return ordered(x, list(range(n))[::-1])
    return ordered(x, [*range(n - 2), n - 1, n - 2] if n > 1 else [0])


@rule("permute")
def permute(walk: Walk, node: fx.Node, x: Tensorlike, order: Sequence[int]) -> Tensorlike:
    return ordered(x, [i % rank(x) for i in order])


@rule("movedim", "moveaxis")
def movedim(walk: Walk, node: fx.Node, x: Tensorlike, source: Any, target: Any) -> Tensorlike:
    n = rank(x)
    moves = zip([source] if isinstance(source, int) else source, [target] if isinstance(target, int) else target,
                strict=True)  # fmt: skip
    goal = {t % n: s % n for s, t in moves}
    rest = iter(i for i in range(n) if i not in goal.values())
    return ordered(x, [goal[i] if i in goal else next(rest) for i in range(n)])


@rule("unsqueeze")
def unsqueeze(walk: Walk, node: fx.Node, x: Tensorlike, dim: int) -> Tensorlike:
    dim %= rank(x) + 1
    if isinstance(x, Pieces):
        return x.map(lambda value: unsqueeze(walk, node, value, dim), x.dim + (dim <= x.dim))  # pyright: ignore
    return x.with_dims([*x.dims[:dim], (), *x.dims[dim:]])


@rule("squeeze")
def squeeze(walk: Walk, node: fx.Node, x: Tensorlike, dim: Any = None) -> Tensorlike:
    n = rank(x)
    asked = range(n) if dim is None else [d % n for d in ([dim] if isinstance(dim, int) else dim)]
    if isinstance(x, Pieces):
        gone = [d for d in asked if d != x.dim and all(size_of(value.dims[d]) == 1 for value in x.values)]
        kept = [d for d in range(n) if d not in gone]
        return Pieces(kept.index(x.dim), [value.with_dims([value.dims[d] for d in kept]) for value in x.values])
    return x.with_dims([axis for d, axis in enumerate(x.dims) if d not in asked or size_of(axis) != 1])


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "_reshape_copy")
def view(walk: Walk, node: fx.Node, x: Tensorlike, *rest: Any, **options: Any) -> Tensorlike:
    sizes = shape(node)
    if isinstance(x, Pieces):
        moved = _view_pieces(x, sizes)
        if moved is not None:
            return moved
        x = x.whole(node.name)
    out: list[Axis] = []
    pieces: tuple[int, list[Axis], list[list[Axis]]] | None = None
    for axes, group in runs_of([size_of(axis) for axis in x.dims], sizes):
        joined: Axis = tuple(atom for i in axes for atom in x.dims[i])
        if pieces is None and len(group) > 1:
            pieces = _view_in_pieces(walk, node, joined, len(out), group)
            if pieces is not None:
                out += [()] * len(group)
                continue
        split = regroup(joined, group)
        if split is None:
            freeze(joined, f"{node.name}: a view that cuts across")
            split = [fixed(size, f"{node.name}: a view that cuts across") for size in group]
        if len(group) > 1:
            _mark_births(node, joined, split, len(out))
        out += split
    if pieces is None:
        return x.with_dims(out)
    at, before, each = pieces
    first = at - len(before)
    return Pieces(
        at,
        [
            x.with_dims([*out[:first], *before, *piece, *out[first + len(before) + len(piece) :]])  # pyright: ignore
            for piece in each
        ],
    )


def runs_of(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pair the dimensions of a view: runs of old ones with the runs of new ones of the same product."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        axes, sizes, have, want = [], [], 1, 1
        if i < len(old):
            axes, have, i = [i], old[i], i + 1
        if j < len(new):
            sizes, want, j = [new[j]], new[j], j + 1
        while have != want:
            if have < want:
                axes.append(i)
                have, i = have * old[i], i + 1
            else:
                sizes.append(new[j])
                want, j = want * new[j], j + 1
        found.append((axes, sizes))
    return found


def _mark_births(node: fx.Node, joined: Axis, split: Sequence[Axis], first: int) -> None:
    """Remember which view told apart the factors of an axis: a later cut of an outer one may ask for pieces there."""
    for i, axis in enumerate(split):
        atoms = flat(axis)
        if len(atoms) == 1 and atoms[0].born is None and atoms[0].parts is None:
            atoms[0].born = (node.name, first + i)


def _view_in_pieces(
    walk: Walk, node: fx.Node, joined: Axis, first: int, group: Sequence[int]
) -> tuple[int, list[Axis], list[list[Axis]]] | None:
    """Split a packed axis into pieces: where it is cut already, or where a former pass found that it will be."""
    for j, size in enumerate(group[:-1]):
        inner = math.prod(group[j + 1 :])
        halves = regroup(joined, [math.prod(group[:j]), size * inner]) if j else [(), joined]
        if halves is None:
            return None
        atoms = flat(halves[1])
        if len(atoms) != 1 or atoms[0].wild:
            continue
        borders = walk.hints.get((node.name, first + j))
        if borders is not None:
            cut_at(atoms[0], [border * inner for border in borders])
        parts = root(atoms[0]).parts
        if parts is None or any(size_of(part) % inner for part in parts):
            continue
        each = [regroup(part, [size_of(part) // inner, *group[j + 1 :]]) for part in parts]
        before = regroup(halves[0], group[:j])
        if before is None or any(piece is None for piece in each):
            continue
        return first + j, before, [piece for piece in each if piece is not None]
    return None


def _view_pieces(x: Pieces, sizes: Sequence[int]) -> Pieces | Value | None:
    """View pieces where the view leaves their dimension alone, or joins it with the ones behind it."""
    totals = [size_of(axis) for axis in x.values[0].dims]
    totals[x.dim] = sum(size_of(value.dims[x.dim]) for value in x.values)
    groups = runs_of(totals, sizes)
    at = 0
    for axes, group in groups:
        if x.dim in axes:
            if axes != [x.dim] or len(group) != 1:
                break
            per = [[size_of(v.dims[x.dim]) if i == at else s for i, s in enumerate(sizes)] for v in x.values]
            return Pieces(at, [v for v in (_plain_view(v, p) for v, p in zip(x.values, per, strict=True)) if v])
        at += len(group)
    axes, group = next(pair for pair in groups if x.dim in pair[0])
    if axes[0] == x.dim and len(group) == 1 and all(len(a) == len(g) for a, g in groups if a != axes):
        parts = [tuple(atom for i in axes for atom in value.dims[i]) for value in x.values]
        rest = [value.dims[: x.dim] + value.dims[axes[-1] + 1 :] for value in x.values]
        first = rest[0]
        for other in rest[1:]:
            first = [merge(a, b, "pieces joined") if a else b for a, b in zip(first, other, strict=True)]
        return Value([*first[: x.dim], sum_of(parts), *first[x.dim :]], x.values[0].hidden)
    return None


def _plain_view(x: Value, sizes: Sequence[int]) -> Value:
    out: list[Axis] = []
    for axes, group in runs_of([size_of(axis) for axis in x.dims], sizes):
        joined: Axis = tuple(atom for i in axes for atom in x.dims[i])
        split = regroup(joined, group)
        if split is None:
            freeze(joined, "a view that cuts across")
            split = [fixed(size, "a view that cuts across") for size in group]
        out += split
    return x.with_dims(out)


def taken(walk: Walk, node: fx.Node, x: Tensorlike, dim: int, start: int, stop: int) -> Tensorlike:
    """Return the positions from start to stop along a dimension."""
    if isinstance(x, Pieces):
        if dim != x.dim:
            return x.map(lambda value: taken(walk, node, value, dim, start, stop))  # pyright: ignore
        found, at = [], 0
        for value in x.values:
            size = size_of(value.dims[dim])
            a, b = max(start - at, 0), min(stop - at, size)
            if a < b:
                found.append(value if (a, b) == (0, size) else taken(walk, node, value, dim, a, b))
            at += size
        return found[0] if len(found) == 1 else Pieces(dim, found)
    axis = x.dims[dim]
    atoms = flat(axis)
    if (start, stop) != (0, size_of(axis)) and len(atoms) == 1 and atoms[0].born and not atoms[0].frozen:
        walk.want_pieces(atoms[0].born, start, stop, size_of(axis))
    return x.with_dims([*x.dims[:dim], slice_of(axis, start, stop, f"{node.name}: cut inside a product"),
                        *x.dims[dim + 1 :]])  # fmt: skip


@rule("slice")
def slice_(walk: Walk, node: fx.Node, x: Tensorlike, dim: int = 0, start: Any = None, stop: Any = None,
           step: int = 1) -> Tensorlike:  # fmt: skip
    whole = x if isinstance(x, Value) else x.whole(node.name) if step != 1 else x
    dim %= rank(whole)
    size = shape_of(whole, dim)
    a, b, _ = slice(start, stop).indices(size)
    if step == 1:
        return taken(walk, node, whole, dim, a, b)
    assert isinstance(whole, Value)
    split = (
        regroup(whole.dims[dim], [size // step, step]) if size % step == 0 and a < step and b > size - step else None
    )
    if split is not None and is_wild(split[1]):  # repeated heads, one of each group
        return whole.with_dims([*whole.dims[:dim], split[0], *whole.dims[dim + 1 :]])
    why = f"{node.name}: every {step}th position"
    freeze(whole.dims[dim], why)
    return whole.with_dims([*whole.dims[:dim], fixed(shape(node)[dim], why), *whole.dims[dim + 1 :]])


def shape_of(x: Tensorlike, dim: int) -> int:
    if isinstance(x, Pieces):
        return sum(size_of(v.dims[dim]) for v in x.values) if dim == x.dim else size_of(x.values[0].dims[dim])
    return size_of(x.dims[dim])


@rule("narrow")
def narrow(walk: Walk, node: fx.Node, x: Tensorlike, dim: int, start: int, length: int) -> Tensorlike:
    dim %= rank(x)
    start %= shape_of(x, dim)
    return taken(walk, node, x, dim, start, start + length)


@rule("select")
def select(walk: Walk, node: fx.Node, x: Tensorlike, dim: int, at: int) -> Tensorlike:
    dim %= rank(x)
    at %= shape_of(x, dim)
    one = taken(walk, node, x, dim, at, at + 1)
    if isinstance(one, Pieces):
        return one.map(lambda v: v.with_dims([*v.dims[:dim], *v.dims[dim + 1 :]]), one.dim - (dim < one.dim))
    return one.with_dims([*one.dims[:dim], *one.dims[dim + 1 :]])


@rule("unbind")
def unbind(walk: Walk, node: fx.Node, x: Tensorlike, dim: int = 0) -> tuple[Tensorlike, ...]:
    return tuple(select(walk, node, x, dim, at) for at in range(shape_of(x, dim % rank(x))))


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def split(walk: Walk, node: fx.Node, x: Tensorlike, sizes: Any, dim: int = 0) -> tuple[Tensorlike, ...]:
    dim %= rank(x)
    runs = [int(value.shape[dim]) for value in node.meta["val"]]
    edges = [0, *accumulate(runs)]
    return tuple(taken(walk, node, x, dim, a, b) for a, b in pairwise(edges))


@rule("cat", "concat", "concatenate")
def cat(walk: Walk, node: fx.Node, values: Sequence[Tensorlike], dim: int = 0) -> Value:
    whole = [x.whole(node.name) if isinstance(x, Pieces) else x for x in values]
    whole = [x for x in whole if not (len(x.dims) == 1 and size_of(x.dims[0]) == 0)]  # an empty cache
    dim %= rank(whole[0])
    out = list(whole[0].dims)
    for x in whole[1:]:
        out = [axis if i == dim or not axis else merge(axis, x.dims[i], node.name) for i, axis in enumerate(out)]
    out[dim] = sum_of([x.dims[dim] for x in whole if size_of(x.dims[dim])])
    return Value(out, frozenset().union(*(x.hidden for x in whole)))


@rule("stack")
def stack(walk: Walk, node: fx.Node, values: Sequence[Value], dim: int = 0) -> Pieces:
    dim %= len(values[0].dims) + 1
    return Pieces(dim, [x.with_dims([*x.dims[:dim], (), *x.dims[dim:]]) for x in values])


@rule("pad", "constant_pad_nd")
def pad(walk: Walk, node: fx.Node, x: Value, widths: Sequence[int], *rest: Any) -> Value:
    if rest and rest[0] not in ("constant", None) and isinstance(rest[0], str):
        return walk.opaque(node, [x])
    out = list(x.dims)
    for i, (left, right) in enumerate(zip(widths[::2], widths[1::2], strict=True)):
        if left or right:
            dim = len(out) - 1 - i
            if left < 0 or right < 0:
                return walk.opaque(node, [x])
            out[dim] = sum_of([part for part in (wild(left) if left else None, out[dim], wild(right) if right else None)
                               if part is not None])  # fmt: skip
    return Value(out, x.hidden)


@rule("expand", "expand_as", "broadcast_to")
def expand(walk: Walk, node: fx.Node, x: Value, *rest: Any, **options: Any) -> Value:
    sizes = shape(node)
    dims = [()] * (len(sizes) - len(x.dims)) + x.dims
    return x.with_dims([axis if size_of(axis) == n else wild(n) for axis, n in zip(dims, sizes, strict=True)])


@rule("repeat_interleave")
def repeat_interleave(walk: Walk, node: fx.Node, x: Value, times: Any, dim: int | None = None, **rest: Any) -> Value:
    if dim is None or not isinstance(times, int):
        return unknown(shape(node), node.name) if not isinstance(times, int) else walk.opaque(node, [x])
    out = list(x.dims)
    out[dim] = (*out[dim], *wild(times))
    return Value(out, x.hidden, x.choice)


@rule("repeat", "tile")
def repeat(walk: Walk, node: fx.Node, x: Value, times: Sequence[int]) -> Value:
    dims = [()] * (len(times) - len(x.dims)) + x.dims
    return Value([(*wild(n), *axis) for axis, n in zip(dims, times, strict=True)], x.hidden)


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like",
      "full_like", "empty_like", "scalar_tensor")  # fmt: skip
def constant(walk: Walk, node: fx.Node, *rest: Any, **options: Any) -> Value:
    return Value([wild(size) for size in shape(node)])


@rule(
    "arange", "linspace", "eye", "rand", "randn", "rand_like", "randn_like", "tril_indices", "triu_indices", "randint"
)
def numbers(walk: Walk, node: fx.Node, *rest: Any, **options: Any) -> Value:
    return unknown(shape(node), f"{node.name}: positions")


@rule("where")
def where(walk: Walk, node: fx.Node, condition: Value, *rest: Any) -> Value:
    return broadcast([condition, *(x for x in rest if isinstance(x, Value))], node.name)


PIECEWISE = {"transpose", "swapaxes", "permute", "movedim", "unsqueeze", "squeeze", "view", "reshape", "_unsafe_view",
             "flatten", "unflatten", "slice", "narrow", "select", "unbind", "split", "split_with_sizes", "chunk", "cat",
             "t", "mT", "stack"}  # fmt: skip
"""What takes Pieces as they are; the identities do too, and everything else gets the whole."""
SAME = same
