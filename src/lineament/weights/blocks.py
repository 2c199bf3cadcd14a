"""Tensors laid out by a class: one row per position, one batch per position of its outer classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from lineament.graph import AxisClass, Cut, Tree
from lineament.weights.elements import classes_in, size_of


@dataclass(frozen=True)
class Place:
    """Where a class stands in a tensor: the dimension, and the way down its tree as (factor, part of a cut)."""

    dim: int
    path: tuple[tuple[int, int | None], ...]


def places(trees: Sequence[Tree], cls: int) -> Iterator[Place]:
    """Find every place of a class in a tensor."""
    for dim, tree in enumerate(trees):
        for path in _paths(tree, cls):
            yield Place(dim, path)


def _paths(tree: Tree, cls: int) -> Iterator[tuple[tuple[int, int | None], ...]]:
    for i, factor in enumerate(tree):
        if isinstance(factor, Cut):
            for j, part in enumerate(factor.parts):
                for rest in _paths(part, cls):
                    yield ((i, j), *rest)
        elif factor.cls == cls:
            yield ((i, None),)


def block(x: Tensor, trees: Sequence[Tree], place: Place, classes: Sequence[AxisClass], cls: int) -> Tensor:
    """Return x as [outer sizes ..., n, everything else] for one place of a class.

    Example:
        >>> import torch
        >>> from lineament.graph import Leaf
        >>> head, unit = AxisClass(2, (), None, ()), AxisClass(3, (0,), None, ())
        >>> trees = ((Leaf(2, 0), Leaf(3, 1)), (Leaf(5, None),))
        >>> place = next(places(trees, 1))
        >>> block(torch.zeros(6, 5), trees, place, (head, unit), 1).shape
        torch.Size([2, 3, 5])
    """
    x, kept = laid_out(x, trees, place, classes, cls)
    return x.reshape(*x.shape[:kept], -1)


def laid_out(
    x: Tensor, trees: Sequence[Tree], place: Place, classes: Sequence[AxisClass], cls: int
) -> tuple[Tensor, int]:
    """Return a view of x as [outer sizes ..., n, other dimensions ...], and how many come first."""
    labels: list[int | None] = [None] * x.dim()
    outer, behind = classes[cls].outer, 0
    for dim in reversed(range(x.dim())):  # from the last on, so that earlier dimensions keep their numbers
        tree = trees[dim]
        if dim == place.dim:
            x, at = _descend(x, dim, tree, place.path, labels)
            behind = x.dim() - at
        elif classes_in(tree) & set(outer):
            x = _opened(x, dim, tree, labels)
    at = x.dim() - behind
    order = [_nearest(labels, o, at) for o in outer] + [at]
    rest = [i for i in range(x.dim()) if i not in order]
    return x.permute(*order, *rest), len(order)


def _opened(x: Tensor, dim: int, tree: Tree, labels: list[int | None]) -> Tensor:
    """Show the factors of a dimension."""
    labels[dim : dim + 1] = [None if isinstance(factor, Cut) else factor.cls for factor in tree]
    return x.unflatten(dim, [factor.size for factor in tree]) if len(tree) > 1 else x


def _descend(
    x: Tensor, dim: int, tree: Tree, path: Sequence[tuple[int, int | None]], labels: list[int | None]
) -> tuple[Tensor, int]:
    x = _opened(x, dim, tree, labels)
    (i, j), rest = path[0], path[1:]
    factor, at = tree[i], dim + i
    if j is None or not isinstance(factor, Cut):
        return x, at
    start = sum(size_of(part) for part in factor.parts[:j])
    return _descend(x.narrow(at, start, size_of(factor.parts[j])), at, factor.parts[j], rest, labels)


def _nearest(labels: Sequence[int | None], cls: int, at: int) -> int:
    """Return the dimension that shows a class: the last one before `at`, or else the first."""
    found = [i for i, label in enumerate(labels) if label == cls]
    before = [i for i in found if i < at]
    return before[-1] if before else found[0]
