"""Finite groups as Cayley tables, by name, from generators or from a file; and their irreducible representations.

The regular representation splits into isotypic components. Over the reals, two complex-conjugate representations share
one, so that for a cyclic group the components are the Fourier frequencies.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from lineament import io
from lineament._base.errors import InputError
from lineament._base.seeds import generator

LARGEST = 1000  # elements; a table has their square


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group: `table[g, h]` is g h, elements 0 to M - 1.

    Attributes:
        identity: its number. inverse: [M].

    Raises:
        InputError: the table is no group: not square, not associative, or something has no inverse.
    """

    name: str
    table: Tensor
    identity: int = field(init=False)
    inverse: Tensor = field(init=False)

    def __post_init__(self) -> None:
        table = torch.as_tensor(self.table)
        M = len(table)
        if table.dim() != 2 or table.shape != (M, M) or not M or table.is_floating_point():
            raise InputError(f"{self.name}: the table is {list(table.shape)}; expected M x M whole numbers")
        table, every = table.long(), torch.arange(M)
        if int(table.min()) < 0 or int(table.max()) >= M:
            raise InputError(
                f"{self.name}: products are {int(table.min())} to {int(table.max())}; expected 0 to {M - 1}"
            )
        for name, product in (("row", table), ("column", table.T)):
            odd = (product.sort(1).values != every).any(1).nonzero()
            if len(odd):
                raise InputError(f"{self.name}: {name} {int(odd[0])} of the table names an element twice")
        for g in range(M):  # a row of h at a time: g (h k) = (g h) k
            if not torch.equal(table[g][table], table[table[g]]):
                raise InputError(f"{self.name}: the product is not associative, with {g} on the left")
        identity = int((table == every).all(1).nonzero()[0])
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "identity", identity)
        object.__setattr__(self, "inverse", (table == identity).long().argmax(1))

    def __len__(self) -> int:
        return len(self.table)

    @property
    def abelian(self) -> bool:
        """Whether the product may be turned around."""
        return torch.equal(self.table, self.table.T)

    @property
    def pairs(self) -> Tensor:
        """All pairs of elements [M^2, 2]."""
        return torch.cartesian_prod(*[torch.arange(len(self))] * 2)

    @property
    def classes(self) -> Tensor:
        """The number of each element's conjugacy class [M], classes numbered from 0."""
        conjugates = self.table[self.table, self.inverse[:, None]]  # g h g^-1
        return conjugates.amin(0).unique(return_inverse=True)[1]


def generated(name: str, generators: Sequence[Sequence[int]]) -> Group:
    """Return the group of permutations that some generate; (p q)(i) = p(q(i)).

    Example:
        >>> len(generated("S3", [(1, 0, 2), (1, 2, 0)]))
        6
    """
    points = range(len(generators[0]))
    for p in generators:
        if sorted(p) != list(points):
            raise InputError(f"{name}: {tuple(p)} is no permutation of 0 to {len(points) - 1}")
    found, new = [tuple(points)], [tuple(points)]
    while new:
        reached = dict.fromkeys(tuple(p[i] for i in q) for q in new for p in generators)
        new = [q for q in reached if q not in set(found)]
        found += new
        if len(found) > LARGEST:
            raise InputError(f"{name} has more than {LARGEST} elements")
    index = {p: i for i, p in enumerate(found)}
    return Group(name, torch.tensor([[index[tuple(p[i] for i in q)] for q in found] for p in found]))


def product(*groups: Group) -> Group:
    """Return the direct product."""
    if not groups:
        raise InputError("a product is of one group or more")

    def two(a: Group, b: Group) -> Group:
        table = a.table[:, None, :, None] * len(b) + b.table[None, :, None, :]
        return Group(f"{a.name}x{b.name}", table.reshape(len(a) * len(b), -1))

    return reduce(two, groups)


def cyclic(n: int) -> Group:
    """Return Z_n, addition modulo n."""
    return Group(f"Z{n}", (torch.arange(n)[:, None] + torch.arange(n)) % max(1, n))


def dihedral(n: int) -> Group:
    """Return D_n, the 2 n symmetries of a polygon of n >= 3 corners."""
    if n < 3:
        raise InputError(f"a polygon has 3 corners or more; given {n}")
    return generated(f"D{n}", [[*range(1, n), 0], [*range(n - 1, -1, -1)]])


def symmetric(n: int) -> Group:
    """Return S_n, all permutations of n things."""
    return generated(f"S{n}", [[*range(1, n), 0], [1, 0, *range(2, n)][:n] if n > 1 else [0]])


def alternating(n: int) -> Group:
    """Return A_n, the even permutations of n things."""
    cycles = [[*range(i), i + 1, i + 2, i, *range(i + 3, n)] for i in range(n - 2)]
    return generated(f"A{n}", cycles or [list(range(n))])


def quaternion(n: int = 8) -> Group:
    """Return Q8, the units 1, i, j, k of the quaternions and their negatives."""
    if n != 8:
        raise InputError(f"only the quaternion group of 8 elements is known by name; given {n}")
    return generated("Q8", [[1, 2, 3, 0, 5, 6, 7, 4], [4, 7, 6, 5, 2, 1, 0, 3]])


FAMILIES: dict[str, Callable[[int], Group]] = {
    "Z": cyclic, "D": dihedral, "S": symmetric, "A": alternating, "Q": quaternion,
}  # fmt: skip


def load_group(name_or_path: str | Path) -> Group:
    """Return a group by name, or from a JSON file with its table.

    Args:
        name_or_path: "Z31", "D5" (10 elements), "S4", "A4", "Q8", products ("Z3xZ5"); or a file {"name", "table"}.

    Raises:
        InputError: no such group; the table is none.

    Example:
        >>> tuple(len(load_group(name)) for name in ("Z7", "D5", "S4", "A4", "Q8", "Z2xZ3"))
        (7, 10, 24, 12, 8, 6)
    """
    name = str(name_or_path)
    if Path(name).suffix == ".json":
        value = io.read_json(name)
        if not isinstance(value, dict) or not isinstance(value.get("table"), list):
            raise InputError(f'{name} is no group; expected {{"name": ..., "table": [[...], ...]}}')
        try:
            table = torch.tensor(value["table"])
        except (ValueError, TypeError) as error:
            raise InputError(f"{name}: the table is no matrix of whole numbers ({error})") from None
        return Group(str(value.get("name", Path(name).stem)), table)
    found = [re.fullmatch(r"([A-Z])(\d+)", part) for part in name.split("x")]
    parts = [(each[1], int(each[2])) for each in found if each]
    if len(parts) < len(found) or any(kind not in FAMILIES or n < 1 for kind, n in parts):
        raise InputError(f"unknown group {name!r}; expected Z31, D5, S4, A4, Q8, a product like Z3xZ5, or a .json file")
    return product(*(FAMILIES[kind](n) for kind, n in parts))


@dataclass(frozen=True, eq=False)
class Irrep:
    """One irreducible representation, or a pair of complex-conjugate ones.

    Attributes:
        dim: d. kind: "real", "complex" (a conjugate pair) or "quaternionic".
        projector: [M, M] float64, onto its real functions on the group: d^2 dimensions, 2 d^2 for a pair.
    """

    dim: int
    kind: str
    projector: Tensor

    @property
    def energy(self) -> float:
        """The largest `|Y~^T (X w)^2|^2 / 2` of a unit vector in it, on all pairs: M / 2 d if real, else M / 4 d.

        That is four times the constants of arXiv:2509.21519, which leave out the factor 2 of the cross term 2 u u'.
        """
        return len(self.projector) / ((2 if self.kind == "real" else 4) * self.dim)


def irreps(group: Group) -> list[Irrep]:
    """Return the irreducible representations, the trivial one first; their d^2 (pairs counted twice) add up to M.

    The isotypic components are the eigenspaces of a random symmetric element of the group algebra's centre.

    Example:
        >>> tuple((each.dim, each.kind) for each in irreps(load_group("S3")))
        ((1, 'real'), (1, 'real'), (2, 'real'))
    """
    M, classes = len(group), group.classes
    both = torch.minimum(classes, classes[group.inverse])  # a class and that of the inverses weigh the same
    weight = torch.randn(M, generator=generator(0), dtype=torch.float64)[both]
    centre = weight[group.table[:, group.inverse]] / M**0.5  # [h, k]: weight of h k^-1
    values, vectors = torch.linalg.eigh(centre)
    gaps = (values.diff() > 1e-8 * values.abs().max()).nonzero()[:, 0] + 1
    found = []
    for part in torch.tensor_split(vectors, gaps.tolist(), dim=1):
        size, projector = part.shape[1], part @ part.T
        pair = isqrt(size) ** 2 != size
        dim = isqrt(size // 2) if pair else isqrt(size)
        character = projector[:, group.identity] * M / dim
        square = character[group.table.diagonal()].mean()  # Frobenius-Schur: 1 real, -1 quaternionic
        found.append(Irrep(dim, "complex" if pair else "real" if square > 0 else "quaternionic", projector))
    one = torch.full((M, M), 1 / M, dtype=torch.float64)
    return sorted(found, key=lambda each: (not torch.allclose(each.projector, one), each.dim, each.kind))


def purity(u: Tensor, parts: Sequence[Irrep]) -> tuple[Tensor, Tensor]:
    """Return how much of functions on a group [M, K] lies in one irrep [K], and in which [K]; the trivial one left out.

    For a cyclic group that is the share of the largest Fourier frequency.
    """
    power = torch.stack([(each.projector.to(u) @ u).square().sum(0) for each in parts[1:]])
    share, which = (power / power.sum(0).clamp_min(1e-30)).max(0)
    return share, which + 1
