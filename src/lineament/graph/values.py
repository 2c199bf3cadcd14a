"""What the walker knows of a tensor: one axis per dimension, or several tensors laid end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lineament.graph.terms import Atom, Axis, fixed, freeze, leaves, merge, size_of, sum_of


@dataclass(eq=False)
class Value:
    """A tensor.

    Attributes:
        dims: an axis per dimension.
        hidden: atoms whose position each entry belongs to although no dimension shows it (a chosen expert).
        choice: the axis in which the values lie, of a tensor of indices.
        base: the tensor this one is a view of.
    """

    dims: list[Axis]
    hidden: frozenset[Atom] = frozenset()
    choice: Axis | None = None
    base: Value | None = field(default=None, repr=False)

    @property
    def owner(self) -> Value:
        return self if self.base is None else self.base.owner

    def with_dims(self, dims: Sequence[Axis]) -> Value:
        """Return a view of this tensor."""
        return Value(list(dims), self.hidden, self.choice, self)

    def freeze(self, why: str) -> None:
        for axis in self.dims:
            freeze(axis, why)
        if self.choice is not None:
            freeze(self.choice, why)


@dataclass(eq=False)
class Pieces:
    """Tensors laid end to end along one dimension that otherwise know nothing of each other (a packed q, k, v)."""

    dim: int
    values: list[Value]

    def map(self, change: Callable[[Value], Value], dim: int | None = None) -> Pieces:
        return Pieces(self.dim if dim is None else dim, [change(value) for value in self.values])

    def whole(self, why: str) -> Value:
        """Forget that they are pieces: all other dimensions are tied."""
        first, *rest = self.values
        dims = list(first.dims)
        for value in rest:
            dims = [axis if i == self.dim else merge(axis, value.dims[i], why) for i, axis in enumerate(dims)]
        dims[self.dim] = sum_of([value.dims[self.dim] for value in self.values])
        return Value(dims, frozenset().union(*(value.hidden for value in self.values)))


def unknown(shape: Sequence[int], why: str) -> Value:
    """Return a tensor all of whose positions are fixed."""
    return Value([fixed(size, why) for size in shape])


def broadcast(values: Sequence[Value], why: str) -> Value:
    """Tie tensors as an elementwise operator does; axes of size 1 tie nothing."""
    rank = max(len(value.dims) for value in values)
    dims: list[Axis] = []
    for at in range(-rank, 0):
        axis: Axis = ()
        for value in values:
            if len(value.dims) >= -at and size_of(value.dims[at]) != 1:
                axis = merge(axis, value.dims[at], why) if axis else value.dims[at]
        dims.append(axis)
    return Value(dims, frozenset().union(*(value.hidden for value in values)))


def is_constant(value: Value) -> bool:
    """Say whether some axis of a tensor is wild."""
    return any(atom.wild for axis in value.dims for atom in leaves(axis))
