"""Operators that only read a value differently (views, transposes, expansions), or take, join and pad parts of axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from lineament.graph.axis_moves import runs_of
from lineament.graph.axis_rules import shape
from lineament.graph.diagrams.build import Builder, Draft, Labels, View, moved, refined
from lineament.graph.diagrams.rules import fresh_axis, number, rule, tie
from lineament.graph.diagrams.term import Repeat
from lineament.graph.terms import Atom


def me(a: SimpleNamespace) -> View:
    return next(iter(vars(a).values()))


@rule("contiguous", "clone", "alias", "detach", "dropout", "feature_dropout", "lift_fresh", "lift_fresh_copy",
      "detach_copy", "positive", "alpha_dropout", "type_as", "copy")  # fmt: skip
def same(b: Builder, node: fx.Node, a: SimpleNamespace) -> Any:
    return me(a)


@rule("to", "_to_copy")
def cast(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    """Casts between real types are no part of a term; those from and to whole numbers and truth values are."""
    source, target = node.args[0].meta["val"].dtype, node.meta["val"].dtype  # pyright: ignore
    if source == target or (source.is_floating_point and target.is_floating_point):
        return me(a)
    wide = torch.float64 if target.is_floating_point else target
    labels = b.labels(me(a))
    return b.emit("map", [(me(a), labels)], labels, fn="_to_copy.default", args=({"at": 0},), options={"dtype": wide})


@rule("transpose", "swapaxes", "swapdims", "t", "mT", "numpy_T", "adjoint", "permute", "movedim", "moveaxis")
def permuted(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    x, name = me(a), b.walk.name(node)
    n = len(x.dims)
    order = list(range(n))
    if name == "permute":
        order = [i % n for i in a.dims]
    elif name in ("movedim", "moveaxis"):
        source, target = ([d] if isinstance(d, int) else d for d in (a.source, a.destination))
        goal = {t % n: s % n for s, t in zip(source, target, strict=True)}
        rest = iter(i for i in range(n) if i not in goal.values())
        order = [goal[i] if i in goal else next(rest) for i in range(n)]
    elif name == "numpy_T":
        order.reverse()
    elif n > 1:
        i, j = list(vars(a).values())[1:3] if name in ("transpose", "swapaxes", "swapdims") else (-2, -1)
        order[i], order[j] = order[j], order[i]
    return x.with_dims([x.dims[i] for i in order])


@rule("unsqueeze")
def unsqueeze(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    x, dim = me(a), a.dim % (len(me(a).dims) + 1)
    return x.with_dims([*x.dims[:dim], (), *x.dims[dim:]])


@rule("squeeze")
def squeeze(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    x, dim = me(a), getattr(a, "dim", None)
    n = len(x.dims)
    asked = range(n) if dim is None else [d % n for d in ([dim] if isinstance(dim, int) else dim)]
    return x.with_dims([run for d, run in enumerate(x.dims) if d not in asked or x.shape[d] != 1])


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "_reshape_copy")
def view(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    return viewed(b, me(a), shape(node), b.atoms(node))


def viewed(b: Builder, x: View, sizes: Sequence[int], atoms: Sequence[Sequence[Atom]] = ()) -> View:
    """Read a value in other dimensions; an axis is split, or joined and split anew, only where the sizes ask for it.

    `atoms` are the axes that the walk found for the new dimensions.
    """
    old = x.value
    groups = runs_of(x.shape, sizes)
    x = x.with_dims([[slot for i in axes for slot in x.dims[i]] for axes, _ in groups])
    found: list[tuple[int, list[int]]] = []
    for at, (_, group) in enumerate(groups):
        real = [size for size in group if size != 1]
        fine = refined(x.sizes(at), real)
        if fine is None:
            x, fine = b.single(x, at), real
        x = b.refine(x, at, fine)
        found.append((at, group))
    out: list[list[int | Repeat]] = []
    for at, group in found:
        left = [slot for slot in x.dims[at] if x.size(slot) != 1]
        for size in group:
            run: list[int | Repeat] = []
            while size > 1:
                run.append(left.pop(0))
                size //= x.size(run[-1])
            out.append(run)
    x = x.with_dims(out)
    for i, known in enumerate(atoms if x.value is not old else ()):
        for slot, atom in zip(x.dims[i], known, strict=False) if x.sizes(i) == [a.size for a in known] else ():
            if isinstance(slot, int) and all(x.value.axes[slot] is not each for each in old.axes):
                x.value.axes[slot] = atom
    return x


@rule("expand", "expand_as", "broadcast_to")
def expand(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    x, sizes = me(a), shape(node)
    dims = [()] * (len(sizes) - len(x.dims)) + list(x.dims)
    have = [1] * (len(sizes) - len(x.dims)) + list(x.shape)
    return x.with_dims([run if n == m else (Repeat(m),) for run, n, m in zip(dims, have, sizes, strict=True)])


@rule("repeat", "tile")
def repeat(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    x, times = me(a), a.repeats if hasattr(a, "repeats") else a.dims
    dims = [()] * (len(times) - len(x.dims)) + list(x.dims)
    return x.with_dims([(*((Repeat(n),) if n != 1 else ()), *run) for run, n in zip(dims, times, strict=True)])


@rule("repeat_interleave")
def repeat_interleave(b: Builder, node: fx.Node, a: SimpleNamespace) -> Any:
    x, times, dim = me(a), getattr(a, "repeats", None), getattr(a, "dim", None)
    if not isinstance(times, int) or dim is None:
        return b.opaque(node, list(vars(a).values()), {})
    return x.with_dims([(*run, Repeat(times)) if d == dim % len(x.dims) else run for d, run in enumerate(x.dims)])


# parts


def cut(b: Builder, x: View, dim: int, start: int, stop: int, atoms: Sequence[Atom]) -> View:
    """Take the positions from start to stop of a dimension; `atoms` are the axes of what is left, where known."""
    if (start, stop) == (0, x.shape[dim]):
        return x
    inner = math.prod(x.sizes(dim)[1:])
    if not x.dims[dim] or start % inner or stop % inner:
        x, inner = b.single(x, dim), 1
    lead, first, last = x.dims[dim][0], start // inner, stop // inner
    if isinstance(lead, Repeat):
        run = ([Repeat(last - first)] if last - first != 1 else []) + list(x.dims[dim][1:])
        return x.with_dims([run if d == dim else r for d, r in enumerate(x.dims)])
    taken: list[Atom] = []
    for atom in atoms:
        if math.prod(each.size for each in taken) == last - first:
            break
        taken.append(atom)
    if math.prod(each.size for each in taken) != last - first:
        taken = [Atom(last - first)] if last - first != 1 else []
    return View(_part(b, x.value, lead, first, last, taken), moved(x.dims, lead, len(taken)))


def _part(b: Builder, value: Draft, slot: int, start: int, stop: int, atoms: list[Atom]) -> Draft:
    """Take part of an axis; of a weight, be that part."""
    axes = [*value.axes[:slot], *atoms, *value.axes[slot + 1 :]]
    part = weight_part(value, slot, start, stop, atoms)
    if part is not None:
        return part
    new, labels = Draft(axes, "op"), [b.label() for _ in atoms]
    own = tuple(b.label() for _ in value.axes)
    b.add("slice", [(value, own)], [(new, replaced(own, own[slot], labels))], label=own[slot], start=start, stop=stop)
    return new


def weight_part(value: Draft, slot: int, start: int, stop: int, atoms: Sequence[Atom]) -> Draft | None:
    """Return part of a weight; None for another value, or where the axis is not the outermost of its dimension."""
    end, dim = next((e, d) for d, e in enumerate(accumulate(value.dims)) if e > slot) if value.dims else (0, 0)
    if value.origin != "weight" or slot != end - value.dims[dim]:
        return None
    inner = math.prod(atom.size for atom in value.axes[slot + 1 : end])
    dims = tuple(n + len(atoms) - 1 if d == dim else n for d, n in enumerate(value.dims))
    axes = [*value.axes[:slot], *atoms, *value.axes[slot + 1 :]]
    return Draft(axes, "weight", value.name, (*value.cuts, (dim, start * inner, stop * inner)), dims)


def split_weight(value: Draft, slot: int, atoms: Sequence[Atom]) -> Draft | None:
    """Return a weight with one axis split; None for another value."""
    if value.origin != "weight":
        return None
    ends = list(accumulate(value.dims))
    dims = tuple(n + (len(atoms) - 1) * (end - n <= slot < end) for n, end in zip(value.dims, ends, strict=True))
    return Draft([*value.axes[:slot], *atoms, *value.axes[slot + 1 :]], "weight", value.name, value.cuts, dims)


def replaced(labels: Sequence[int], label: int, by: Sequence[int]) -> tuple[int, ...]:
    at = list(labels).index(label)
    return (*labels[:at], *by, *labels[at + 1 :])


@rule("slice")
def slice_(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    x, dim = me(a), a.dim % len(me(a).dims)
    start, stop, _ = slice(a.start, a.end).indices(x.shape[dim])
    atoms = b.atoms(node)[dim]
    if a.step == 1:
        return cut(b, x, dim, start, max(start, stop), atoms)
    x = b.single(x, dim)
    size = shape(node)[dim]
    labels, out = b.labels(x), b.label()
    dims: Labels = [[out] if d == dim and size != 1 else [] if d == dim else run for d, run in enumerate(labels)]
    order = [
        out if label == labels[dim][0] else label for label in b.port(x, labels) if label != labels[dim][0] or size != 1
    ]
    return b.emit("slice", [(x, labels)], dims, fresh={out: fresh_axis(atoms, size)}, order=order,
                  label=labels[dim][0], start=start, stop=stop, step=a.step)  # fmt: skip


@rule("narrow", "select")
def narrow(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    x, dim = me(a), a.dim % len(me(a).dims)
    start = (a.start if hasattr(a, "start") else a.index) % x.shape[dim]
    if hasattr(a, "length"):
        return cut(b, x, dim, start, start + a.length, b.atoms(node)[dim])
    return _selected(b, x, dim, start)


def _selected(b: Builder, x: View, dim: int, at: int) -> View:
    x = cut(b, x, dim, at, at + 1, [])
    return x.with_dims([run for d, run in enumerate(x.dims) if d != dim])


@rule("unbind")
def unbind(b: Builder, node: fx.Node, a: SimpleNamespace) -> tuple[View, ...]:
    x, dim = me(a), a.dim % len(me(a).dims)
    return tuple(_selected(b, x, dim, at) for at in range(x.shape[dim]))


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def split(b: Builder, node: fx.Node, a: SimpleNamespace) -> tuple[View, ...]:
    x, dim = me(a), a.dim % len(me(a).dims)
    edges = [0, *accumulate(int(each.shape[dim]) for each in node.meta["val"])]
    return tuple(cut(b, x, dim, start, stop, b.atoms(node, i)[dim]) for i, (start, stop) in enumerate(pairwise(edges)))


@rule("cat", "concat", "concatenate", "stack")
def cat(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    given = [x for x in a.tensors if not (len(x.shape) == 1 and x.shape[0] == 0)]
    rank = len(shape(node))
    dim = a.dim % rank
    views = [b.view_of(x) for x in given]
    if b.walk.name(node) == "stack":
        views = [x.with_dims([*x.dims[:dim], (), *x.dims[dim:]]) for x in views]
    if len(views) == 1:
        return views[0]
    views = [b.single(x, dim) if x.shape[dim] != 1 else x for x in views]
    for i in (*range(1, len(views)), *range(1, len(views))):
        for d in range(rank):
            if d != dim and views[0].dims[d] and views[i].dims[d]:
                views[0], views[i] = b.agree(views[0], d, views[i], d)
    labels = [b.labels(x) for x in views]
    out: Labels = []
    for d in range(rank):
        run: list[int | Repeat] = []
        for own in labels if d != dim else ():
            run = tie_all(run, own[d])
        out.append(run)
    fresh = b.label()
    over = tuple(own[dim][0] if own[dim] else b.label() for own in labels)
    out[dim] = [fresh]
    axis = fresh_axis(b.atoms(node)[dim], shape(node)[dim])
    first = list(b.port(views[0], labels[0]))
    wanted = [x for run in out for x in run if isinstance(x, int)]
    order = [fresh if x == over[0] else x for x in first if x == over[0] or x in wanted]
    order += [x for x in wanted if x not in order]
    ports = list(zip(views, labels, strict=True))
    return b.emit("cat", ports, out, fresh={fresh: axis}, order=order, over=over, joined=fresh)


def tie_all(run: list[int | Repeat], own: list[int | Repeat]) -> list[int | Repeat]:
    return tie(run, own) if run and own else run or list(own)


@rule("pad", "constant_pad_nd")
def pad(b: Builder, node: fx.Node, a: SimpleNamespace) -> Any:
    x, value = me(a), number(getattr(a, "value", 0) or 0)
    if getattr(a, "mode", "constant") != "constant" or min(a.pad) < 0:
        return b.opaque(node, list(vars(a).values()), {})
    widths = {
        len(x.dims) - 1 - i: pair for i, pair in enumerate(zip(a.pad[::2], a.pad[1::2], strict=True)) if any(pair)
    }
    for dim in widths:
        x = b.single(x, dim)
    labels = b.labels(x)
    new = {labels[dim][0]: b.label() for dim in widths}
    atoms = b.atoms(node)
    fresh = {new[labels[dim][0]]: fresh_axis(atoms[dim], shape(node)[dim]) for dim in widths}
    out = [[new.get(label, label) for label in run] for run in labels]
    order = [new.get(label, label) for label in b.port(x, labels)]
    over = tuple(labels[dim][0] for dim in widths)
    return b.emit("pad", [(x, labels)], out, fresh=fresh, order=order, over=over, widths=tuple(widths.values()),
                  value=value)  # fmt: skip


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(b: Builder, node: fx.Node, a: SimpleNamespace) -> View:
    """Nothing but a view: channels become places, or places channels."""
    x, sizes = me(a), shape(node)
    *lead, c, h, w = x.shape
    if b.walk.name(node) == "pixel_shuffle":
        r = a.upscale_factor
        read = viewed(b, x, [*lead, c // r**2, r, r, h, w])
        n = len(lead)
        d = read.dims
        return read.with_dims([*d[:n], d[n], (*d[n + 3], *d[n + 1]), (*d[n + 4], *d[n + 2])])
    r = a.downscale_factor
    read = viewed(b, x, [*lead, c, sizes[-2], r, sizes[-1], r])
    n, d = len(lead), read.dims
    return read.with_dims([*d[:n], (*d[n], *d[n + 2], *d[n + 4]), d[n + 1], d[n + 3]])
