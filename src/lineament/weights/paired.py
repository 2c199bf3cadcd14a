"""Costs of the plain case, kept between visits: one or two classes fill whole dimensions of a tensor.

B stays as it came: a class's cost takes what the other class's permutation says of B. Tensors of the same two classes
stand end to end, so that a visit is one matrix product per neighbour, over those of the neighbour's positions alone
that moved since the last visit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lineament.weights.geometry import dot_product

Perms = Mapping[int, Tensor]


@dataclass(frozen=True)
class Pair:
    """All tensors of two classes as [first, everything else, last], of A and of B."""

    first: int
    last: int
    a: Tensor
    b: Tensor


class Standing(NamedTuple):
    """A class's costs [n, n] and the neighbours' permutations for which they hold."""

    costs: Tensor
    at: dict[int, Tensor]


class Paired:
    """Two models' tensors in which one or two plain classes fill whole dimensions.

    Args:
        held: name -> {class: its dimension}, one or two classes each.
        a, b: the tensors; b as it came.
    """

    def __init__(self, held: Mapping[str, Mapping[int, int]], a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
        groups: dict[tuple[int, ...], list[str]] = {}
        for name, at in held.items():
            groups.setdefault(tuple(sorted(at)), []).append(name)
        self.pairs: dict[int, dict[int, Pair]] = {}
        self.single: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.standing: dict[int, Standing] = {}
        for classes, names in groups.items():
            first, last = classes[0], classes[-1]
            if first == last:
                self.single[first] = list(zip(*(_rows(names, held, first, side) for side in (a, b)), strict=True))
                continue
            sides = [[_between(side[name], held[name][first], held[name][last]) for name in names] for side in (a, b)]
            pair = Pair(first, last, *(torch.cat(side, 1) if len(side) > 1 else side[0].contiguous() for side in sides))
            self.pairs.setdefault(first, {})[last] = pair
            self.pairs.setdefault(last, {})[first] = pair

    def costs(self, cls: int, perms: Perms, among: Collection[int] | None = None) -> Tensor | None:
        """Return [n, n]: the inner product of A's position i with B's j as B stands; None without such tensors.

        Args:
            perms: where every class stands; one that is left out stands still.
            among: neighbours to look at; all if None.
        """
        near = self.pairs.get(cls, {})
        others = near if among is None else [other for other in near if other in among]
        if cls not in self.standing or not self.standing[cls].at.keys() <= set(others):
            fixed = [x @ y.mT for x, y in self.single.get(cls, ())]
            if not (fixed or others):
                return None
            self.standing[cls] = Standing(sum(fixed[1:], fixed[0]) if fixed else torch.zeros(()), {})
        total, at = self.standing[cls]
        for other in others:
            pair = near[other]
            now = perms.get(other, at.get(other))
            now = torch.arange(pair.a.shape[0 if other == pair.first else 2]) if now is None else now
            change = _change(pair, cls, now, at.get(other))
            total, at[other] = total if change is None else total + change, now
        self.standing[cls] = Standing(total, at)
        return total if cls not in perms else total.index_select(1, perms[cls])

    def value(self, perms: Perms, cls: int | None = None) -> float:
        """Return the inner product of A with B as it stands, in float64; of one class's tensors if it is given."""
        singles = self.single if cls is None else {cls: self.single.get(cls, [])}
        found = [
            dot_product(x, _moved(y, 0, perms.get(c))) for c, of in singles.items() for x, y in of
        ]  # fmt: skip
        return math.fsum([*found, *(dot_product(pair.a, _stands(pair, perms)) for pair in self._all(cls))])

    def equal(self, perms: Perms) -> bool:
        """Say whether B stands on A to the bit."""
        return all(torch.equal(pair.a, _stands(pair, perms)) for pair in self._all(None)) and all(
            torch.equal(x, _moved(y, 0, perms.get(c))) for c, of in self.single.items() for x, y in of
        )

    def _all(self, cls: int | None) -> Iterable[Pair]:
        if cls is not None:
            return self.pairs.get(cls, {}).values()
        return [pair for c, of in self.pairs.items() for pair in of.values() if pair.first == c]


def _rows(names: Iterable[str], held: Mapping[str, Mapping[int, int]], cls: int, side: Mapping[str, Tensor]):
    """Return tensors of one class as matrices [n, everything else], vectors in one."""
    wide = [side[name].movedim(held[name][cls], 0).reshape(side[name].shape[held[name][cls]], -1) for name in names]
    slim = [x for x in wide if x.shape[1] == 1]
    return [x for x in wide if x.shape[1] != 1] + ([torch.cat(slim, 1)] if slim else [])


def _between(x: Tensor, first: int, last: int) -> Tensor:
    order = [first, *(d for d in range(x.dim()) if d not in (first, last)), last]
    return x.permute(order).reshape(x.shape[first], -1, x.shape[last])


def _change(pair: Pair, cls: int, now: Tensor, was: Tensor | None) -> Tensor | None:
    """Return by how much a class's costs change when the other class goes from one permutation to another."""
    dim, a = 0 if cls == pair.last else 2, pair.a
    if was is None:
        b = pair.b.index_select(dim, now)
    else:
        if now is was:
            return None
        at = (now != was).nonzero().flatten()
        if not len(at):
            return None
        if len(at) < len(now):
            a, now, was = a.index_select(dim, at), now[at], was[at]
        b = pair.b.index_select(dim, now).sub_(pair.b.index_select(dim, was))
    return a.flatten(0, 1).mT @ b.flatten(0, 1) if dim == 0 else a.flatten(1) @ b.flatten(1).mT


def _moved(x: Tensor, dim: int, perm: Tensor | None) -> Tensor:
    return x if perm is None else x.index_select(dim, perm)


def _stands(pair: Pair, perms: Perms) -> Tensor:
    return _moved(_moved(pair.b, 0, perms.get(pair.first)), 2, perms.get(pair.last))
