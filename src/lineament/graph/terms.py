"""What an axis is made of: an algebra of atoms that are tied, factored and cut until they fit.

An axis is a product of atoms, the outer one first (`(heads, channels)` of a projection's rows); the empty product has
size 1. An atom is an unknown set of positions. It may turn out to be a product of atoms, or a sum of axes laid end to
end (the rows of a packed q, k, v). Two axes that meet in an operator are merged: both are refined to a common shape and
tied atom by atom. A frozen atom keeps the order of its positions. Along a wild atom a tensor is constant: it ties
nothing.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence


class Atom:
    """A set of positions: free, frozen or wild; or a product, or a sum, once that is known."""

    __slots__ = ("born", "factors", "frozen", "parent", "parts", "size", "why", "wild")

    def __init__(self, size: int, *, why: str | None = None, wild: bool = False) -> None:
        self.size = size
        self.frozen, self.why, self.wild = why is not None, why, wild
        self.parent: Atom | None = None
        self.factors: Axis | None = None
        self.parts: list[Axis] | None = None
        self.born: tuple[str, int] | None = None  # the view (and its dimension) that split it off

    def like(self, size: int) -> Atom:
        """Return a new atom of another size that is as free as this one."""
        atom = Atom(size, wild=self.wild)
        atom.frozen, atom.why = self.frozen, self.why
        return atom


Axis = tuple[Atom, ...]


def fresh(size: int) -> Axis:
    """Return an axis whose positions may be permuted until something says otherwise."""
    return (Atom(size),) if size != 1 else ()


def fixed(size: int, why: str) -> Axis:
    """Return an axis whose positions keep their order."""
    return (Atom(size, why=why),) if size != 1 else ()


def wild(size: int) -> Axis:
    """Return an axis along which a tensor is constant."""
    return (Atom(size, wild=True),) if size != 1 else ()


def root(atom: Atom) -> Atom:
    """Return the atom that stands for all atoms tied to this one."""
    while atom.parent is not None:
        if atom.parent.parent is not None:
            atom.parent = atom.parent.parent
        atom = atom.parent
    return atom


def size_of(axis: Axis) -> int:
    """Return the number of positions."""
    return math.prod(atom.size for atom in axis)


def flat(axis: Axis) -> list[Atom]:
    """Resolve an axis to roots that are no products."""
    found: list[Atom] = []
    for atom in map(root, axis):
        if atom.factors is not None:
            found += flat(atom.factors)
        elif atom.size != 1:
            found.append(atom)
    return found


def leaves(axis: Axis) -> Iterator[Atom]:
    """Walk over all atoms of an axis, those inside sums too."""
    for atom in flat(axis):
        if atom.parts is None:
            yield atom
        else:
            for part in atom.parts:
                yield from leaves(part)


def is_wild(axis: Axis) -> bool:
    """Say whether a tensor is constant along the whole axis."""
    return all(atom.wild for atom in leaves(axis))


def freeze(axis: Axis, why: str) -> None:
    """Keep the order of all positions; the first reason stays."""
    for atom in leaves(axis):
        if not atom.frozen:
            atom.frozen, atom.why, atom.wild = True, why, False


def factor(atom: Atom, outer: int) -> bool:
    """Make an atom the product of `outer` and what is left; False where it can't be."""
    inner = atom.size // outer
    if atom.parts is None:
        atom.factors = (atom.like(outer), atom.like(inner))
        return True
    if len(atom.parts) % outer or any(size_of(part) * len(atom.parts) != atom.size for part in atom.parts):
        return False
    per = len(atom.parts) // outer  # equal parts, read as rows of equal runs: the runs must be alike
    runs = [sum_of(atom.parts[i * per : (i + 1) * per]) for i in range(outer)]
    why = "equal parts read as one axis"
    for run in runs[1:]:
        merge(runs[0], run, why)
    atom.factors, atom.parts = (Atom(outer, why=why), *runs[0]), None
    return True


def regroup(axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
    """Read an axis as several axes of these sizes, outer first; None where its atoms don't allow it."""
    queue, found = deque(axis), []
    for size in sizes:
        taken: list[Atom] = []
        while size > 1:
            atom = _first(queue)
            if size % atom.size == 0:
                taken.append(queue.popleft())
                size //= atom.size
            elif atom.size % size or not factor(atom, size):
                return None
        found.append(tuple(taken))
    return found


def merge(x: Axis, y: Axis, why: str) -> Axis:
    """Tie two axes of one size and return what they are together; both are frozen where they can't be brought together.

    Along wild atoms nothing is tied, and the other axis decides.
    """
    pairs = _aligned(x, y)
    if pairs is None:
        freeze(x, why)
        freeze(y, why)
        return fixed(size_of(x), why)
    found: list[Atom] = []
    for a, b in pairs:
        found += _tied(a, b, why)
    return tuple(found)


def _first(queue: deque[Atom]) -> Atom:
    """Return the first atom of a queue that is no product, putting factors in place of products."""
    while True:
        atom = root(queue.popleft())
        if atom.factors is not None:
            queue.extendleft(reversed(atom.factors))
        elif atom.size != 1:
            queue.appendleft(atom)
            return atom


def _aligned(x: Axis, y: Axis) -> list[tuple[Atom, Atom]] | None:
    xs, ys, pairs = deque(x), deque(y), []
    left = size_of(x)
    while left > 1:
        a, b = _first(xs), _first(ys)
        if a.size == b.size:
            pairs.append((xs.popleft(), ys.popleft()))
            left //= a.size
        elif a.size > b.size:
            if a.size % b.size or not factor(a, b.size):
                return None
        elif b.size % a.size or not factor(b, a.size):
            return None
    return pairs


def _tied(a: Atom, b: Atom, why: str) -> Axis:
    a, b = root(a), root(b)
    if a is b:
        return (a,)
    if a.factors is not None or b.factors is not None:
        return merge((a,), (b,), why)
    if a.parts is not None or b.parts is not None:
        if a.parts is None and a.wild:
            return (b,)
        if b.parts is None and b.wild:
            return (a,)
        return _tied_sums(a, b, why)
    if a.wild or b.wild:
        return (b if a.wild else a,)
    b.parent = a
    a.born = a.born or b.born
    if b.frozen and not a.frozen:
        a.frozen, a.why = True, b.why
    return (a,)


def _tied_sums(a: Atom, b: Atom, why: str) -> Axis:
    borders = {0, a.size}
    for atom in (a, b):
        at = 0
        for part in atom.parts or ():
            at += size_of(part)
            borders.add(at)
    cuts = sorted(borders)
    if not (cut_at(a, cuts) and cut_at(b, cuts)):
        freeze((a,), why)
        freeze((b,), why)
        return fixed(a.size, why)
    return sum_of([merge(p, q, why) for p, q in zip(a.parts or (), b.parts or (), strict=True)])


def sum_of(parts: Sequence[Axis]) -> Axis:
    """Return the axis that has these axes end to end."""
    listed: list[Axis] = []
    for part in parts:
        atoms = flat(part)
        inner = atoms[0].parts if len(atoms) == 1 else None
        listed += inner if inner is not None else [part]
    if len(listed) == 1:
        return listed[0]
    size = sum(map(size_of, listed))
    if all(part and is_wild(part) for part in listed):
        return wild(size)
    atom = Atom(size)
    atom.parts = listed
    return (atom,)


def cut_at(atom: Atom, borders: Sequence[int]) -> bool:
    """Make an atom a sum that has these borders among its own; False where a product stands in the way."""
    atom = root(atom)
    if atom.factors is not None:
        return False
    if atom.parts is None:
        sizes = [b - a for a, b in itertools.pairwise(borders)]
        if len(sizes) > 1:
            atom.parts = [(atom.like(size),) for size in sizes]
        else:
            atom.parts = [(atom.like(atom.size),)]
        return True
    at, listed = 0, []
    for part in atom.parts:
        inside = [b - at for b in borders if at < b < at + size_of(part)]
        pieces = _cut_part(part, inside)
        if pieces is None:
            return False
        listed += pieces
        at += size_of(part)
    atom.parts = listed
    return True


def _cut_part(part: Axis, inside: Sequence[int]) -> list[Axis] | None:
    if not inside:
        return [part]
    atoms = flat(part)
    inner = math.prod(atom.size for atom in atoms[1:])
    if any(border % inner for border in inside):
        return None
    borders = [0, *(border // inner for border in inside), atoms[0].size]
    if not cut_at(atoms[0], borders):
        return None
    return [(*slice_of((atoms[0],), a, b), *atoms[1:]) for a, b in itertools.pairwise(borders)]


def slice_of(axis: Axis, start: int, stop: int, why: str = "cut inside a product") -> Axis:
    """Return the positions from start to stop of an axis, cutting it there."""
    if start == 0 and stop == size_of(axis):
        return axis
    if start >= stop:
        return (Atom(0, wild=True),)
    atoms = flat(axis)
    inner = math.prod(atom.size for atom in atoms[1:])
    if not (start % inner or stop % inner):
        borders = sorted({0, start // inner, stop // inner, atoms[0].size})
        if atoms[0].parts is None and atoms[0].wild:
            return (*wild((stop - start) // inner), *atoms[1:])
        if cut_at(atoms[0], borders):
            at, taken = 0, []
            for part in atoms[0].parts or ():
                if start <= at * inner < stop:
                    taken.append(part)
                at += size_of(part)
            return (*sum_of(taken), *atoms[1:])
    freeze(axis, why)
    return fixed(stop - start, why)
