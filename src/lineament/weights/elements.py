"""Elements of a symmetry group, and how they act on a model's tensors.

An element is a sequence of steps; each changes every tensor on its own, so that a large model is moved tensor by
tensor. A permutation step holds for each class `p` of shape [outer sizes ..., n]: position i of the new axis is what
stood at `p[..., i]`, where the outer positions are the new ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lineament._base.errors import InputError
from lineament.graph import AxisClass, Cut, Leaf, Tree
from lineament.weights.point import Point

P = TypeVar("P", bound=Mapping[str, Tensor])
Trees = Mapping[str, tuple[Tree, ...]]


class Step(Protocol):
    """A part of an element: it acts on one named tensor at a time and can be undone."""

    def act(self, name: str, x: Tensor) -> Tensor: ...

    def inverse(self) -> Step: ...


@dataclass(frozen=True, eq=False)
class Element:
    """An element of a model's symmetry group: it changes the weights and not the function.

    Example:
        >>> from lineament import weights
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> element = weights.symmetry(mlp, torch.ones(1, 2)).random(0)
        >>> moved = element.inverse().apply(element.apply(mlp.state_dict()))
        >>> all(torch.equal(moved[name], x) for name, x in mlp.state_dict().items())
        True
    """

    steps: tuple[Step, ...]
    aliases: Mapping[str, str]

    def apply(self, point: P) -> P:
        """Act on a model.

        Args:
            point: names -> tensors; a Point stays lazy. Names that the group doesn't know pass through.

        Raises:
            InputError: a tensor's shape is not that of the model from which the group was derived.
        """
        if isinstance(point, Point):
            made = point.computed(f"{point.label}, moved", point.specs, [point], lambda n: self.act(n, point[n]))
            # the point's mark would not tell this element from another
            moved: Any = replace(made, terms=((replace(made.terms[0][0], fingerprint=None), 1.0),))
            return moved
        found: Any = {name: self.act(name, x) for name, x in point.items()}
        return found

    def act(self, name: str, x: Tensor) -> Tensor:
        """Act on one tensor."""
        name = self.aliases.get(name, name)
        for step in self.steps:
            x = step.act(name, x)
        return x

    def then(self, other: Element) -> Element:
        """Return the element that does this one first and then the other."""
        return Element(self.steps + other.steps, self.aliases)

    def inverse(self) -> Element:
        """Return the element that undoes this one."""
        return Element(tuple(step.inverse() for step in reversed(self.steps)), self.aliases)

    @property
    def permutations(self) -> Mapping[int, Tensor]:
        """The permutation of each class, of an element that is one permutation step.

        Raises:
            InputError: the element has further steps.
        """
        if len(self.steps) != 1 or not isinstance(self.steps[0], Permutation):
            raise InputError(f"this element has {len(self.steps)} steps; expected one permutation")
        return self.steps[0].perms

    def moved(self) -> int:
        """Return how many positions are not where they were, of an element that is one permutation step."""
        return sum(int((p != torch.arange(p.shape[-1])).sum()) for p in self.permutations.values())


@dataclass(frozen=True, eq=False)
class Permutation:
    """A permutation of every class: class -> int64 [outer sizes ..., n]; classes left out stay."""

    classes: Sequence[AxisClass]
    trees: Trees
    perms: Mapping[int, Tensor]

    def act(self, name: str, x: Tensor) -> Tensor:
        if name not in self.trees:
            return x
        check_shape(name, x, self.trees[name])
        for dim, tree in enumerate(self.trees[name]):
            if not (classes_in(tree) & self.perms.keys()):
                continue
            leaf = tree[0]
            if len(tree) == 1 and isinstance(leaf, Leaf) and leaf.cls is not None and not self.classes[leaf.cls].outer:
                x = x.index_select(dim, self.perms[leaf.cls].to(x.device))  # the usual case, without the detour
                continue
            index = along(self.classes, self.trees[name], dim, self._leaf, _position)
            x = take(x, dim, index)
        return x

    def _leaf(self, cls: int | None, size: int, where: Mapping[int, Tensor], lead: int) -> Tensor:
        if cls is None or cls not in self.perms:
            return torch.arange(size).view([1] * lead + [size])
        return at_outer(self.perms[cls], self.classes[cls], where, lead)

    def then(self, other: Permutation) -> Permutation:
        """Return this permutation followed by another, as one."""
        found = {
            cls: p for cls, p in self.perms.items() if cls not in other.perms and not self._outer_moved(cls, other)
        }
        for cls in {*self.perms, *other.perms} - found.keys():
            outer, n = self.classes[cls].outer, self.classes[cls].size
            here = self._grid(cls)
            mine = self.perms.get(cls, torch.arange(n).expand(*(self.classes[o].size for o in outer), n))
            moved = mine[other._sources(cls, here)] if outer else mine
            found[cls] = moved.gather(-1, other.perms[cls]) if cls in other.perms else moved.clone()
        return replace(self, perms=found)

    def _outer_moved(self, cls: int, other: Permutation) -> bool:
        return any(o in other.perms for o in self.classes[cls].outer)

    def _grid(self, cls: int) -> dict[int, Tensor]:
        outer = self.classes[cls].outer
        ranges = [torch.arange(self.classes[o].size) for o in outer]
        return dict(zip(outer, torch.meshgrid(*ranges, indexing="ij") if outer else (), strict=True))

    def _sources(self, cls: int, here: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
        """Return where the outer positions of a class come from."""
        return tuple(
            self.perms[o][(*(here[a] for a in self.classes[o].outer), here[o])] if o in self.perms else here[o]
            for o in self.classes[cls].outer
        )

    def inverse(self) -> Permutation:
        """Undo: the inverse stands at the old outer positions."""
        found = {}
        for cls, p in self.perms.items():
            undone = torch.empty_like(p)
            undone[self._sources(cls, self._grid(cls))] = p.argsort(-1)
            found[cls] = undone
        return Permutation(self.classes, self.trees, found)


def classes_in(tree: Tree) -> set[int]:
    """Return the classes of an axis."""
    found: set[int] = set()
    for factor in tree:
        if isinstance(factor, Cut):
            found |= {cls for part in factor.parts for cls in classes_in(part)}
        elif factor.cls is not None:
            found.add(factor.cls)
    return found


def size_of(tree: Tree) -> int:
    """Return the number of positions of an axis."""
    return math.prod(factor.size for factor in tree)


def check_shape(name: str, x: Tensor, trees: Sequence[Tree]) -> None:
    """Refuse a tensor of another model."""
    wanted = [size_of(tree) for tree in trees]
    if list(x.shape) != wanted:
        raise InputError(f"{name!r} has shape {list(x.shape)}; the symmetry group was derived for {wanted}")


Leafs = Callable[[int | None, int, Mapping[int, Tensor], int], Tensor]


def along(
    classes: Sequence[AxisClass], trees: Sequence[Tree], dim: int, leaf: Leafs, combine: Callable[..., Tensor]
) -> Tensor:
    """Compute one number per position of an axis from one per position of its factors.

    Returns:
        [sizes or 1 of the dimensions before `dim` ..., size]: where an outer class stands on another dimension (the
        expert of an expert's hidden unit), the numbers depend on the position there.
    """
    own = classes_in(trees[dim])
    foreign = {o for cls in own for o in classes[cls].outer} - own
    where: dict[int, Tensor] = {}
    for other in range(dim):
        inner = 1
        for factor in reversed(trees[other]):
            if not isinstance(factor, Cut) and factor.cls in foreign and factor.cls not in where:
                at = torch.arange(size_of(trees[other])) // inner % factor.size
                where[factor.cls] = at.view([-1 if i == other else 1 for i in range(dim)])
            inner *= factor.size
    return _along(trees[dim], where, dim, leaf, combine)


def _along(tree: Tree, where: Mapping[int, Tensor], lead: int, leaf: Leafs, combine: Callable[..., Tensor]) -> Tensor:
    if not tree:
        return leaf(None, 1, where, lead)
    head, tail = tree[0], tree[1:]
    inside = {cls: at.unsqueeze(-1) for cls, at in where.items()}
    if isinstance(head, Cut):
        parts, start = [], 0
        for part in head.parts:
            parts.append(combine(None, _along(part, where, lead, leaf, combine), start))
            start += size_of(part)
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        outer = torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], dim=-1)
    else:
        outer = leaf(head.cls, head.size, where, lead)
        if head.cls is not None:
            inside[head.cls] = torch.arange(head.size).view([1] * lead + [head.size])
    if not tail:
        return outer
    joined = combine(outer.unsqueeze(-1), _along(tail, inside, lead + 1, leaf, combine), size_of(tail))
    return joined.expand(*joined.shape[:-2], head.size, size_of(tail)).flatten(-2)


def _position(outer: Tensor | None, inner: Tensor, n: int) -> Tensor:
    """Positions of a product (n: the inner size), or shifted to where a part begins."""
    return inner + n if outer is None else outer * n + inner


def at_outer(values: Tensor, cls: AxisClass, where: Mapping[int, Tensor], lead: int) -> Tensor:
    """Read values [outer sizes ..., n] at the positions of the outer classes."""
    if not cls.outer:
        return values.view([1] * lead + [cls.size])
    return values[torch.broadcast_tensors(*(where[o] for o in cls.outer))]


def take(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Take positions along a dimension; the index may differ along the dimensions before it."""
    if index.numel() == index.shape[-1]:
        return x.index_select(dim, index.flatten().to(x.device))
    index = index.view([*index.shape, *([1] * (x.dim() - dim - 1))]).expand(x.shape)
    return x.gather(dim, index.to(x.device))
