"""Coordinate ascent over the classes of a group: one assignment problem per class, the others held.

Maximises `sum_W <A_W, (P B)_W>` over permutations P, which is the least distance |A - P B|. A class with dependents
(heads, key-value groups, experts) is visited together with them: cyclic shifts pair every position with every source,
the dependents are solved for each pair, and the joint values make the outer assignment problem (git re-basin, Ainsworth
et al. 2023, arXiv:2209.04836, section 3.2, extended to nested classes).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lineament._base.errors import InputError
from lineament.graph import AxisClass, Cut
from lineament.weights.blocks import Place, block, places
from lineament.weights.elements import Permutation, Trees, classes_in
from lineament.weights.geometry import dot_product
from lineament.weights.paired import Paired

ROUNDS, SWEEPS, GAIN = 8, 100, 1e-12
ROUNDING = 1e-5  # a gain below this share of the largest costs may be rounding and is measured in float64
Tensors = dict[str, Tensor]


class Ascent:
    """One search: the tensors of A and of B as moved so far, and the permutation that moved them."""

    def __init__(
        self, classes: Sequence[AxisClass], trees: Trees, a: Mapping[str, Tensor], b: Mapping[str, Tensor],
        start: Permutation | None = None,
    ) -> None:  # fmt: skip
        self.classes, self.trees, self.a = classes, {name: trees[name] for name in trees if name in a}, dict(a)
        self.total = start or Permutation(classes, self.trees, {})
        held = {name: {c for tree in tree_s for c in classes_in(tree)} for name, tree_s in self.trees.items()}
        self.free = [c for c, cls in enumerate(classes) if not cls.frozen and any(c in of for of in held.values())]
        self.names = {c: [name for name in self.trees if c in held[name]] for c in self.free}
        self.held = {name: of & set(self.free) for name, of in held.items()}
        self.places: dict[tuple[str, int], list[Place]] = {
            (name, c): list(places(self.trees[name], c)) for c in self.free for name in self.names[c]
        }
        self.dependents = {c: [d for d in self.free if c in classes[d].outer] for c in self.free}
        self.units = [c for c in self.free if not any(o in self.dependents for o in classes[c].outer)]
        # of these one assignment problem tells the gain exactly: nothing depends on them, and they stand once a tensor
        self.plain = {c for c in self.units if not (self.dependents[c] or classes[c].outer) and self._stands_once(c)}
        self.near = {c: self._touched(c, held) for c in self.units}
        whole = {name: at for name in self.trees if (at := self._whole(name))}
        self.paired = Paired(whole, self.a, b)
        # the other tensors of B, which are moved along
        self.b = {name: self.total.act(name, b[name]) if start else b[name] for name in self.trees if name not in whole}
        self.waiting = set(self.units)  # units whose tensors moved since they were visited; others have nothing to gain
        self.values: dict[str, float] = {}

    def _stands_once(self, cls: int) -> bool:
        return all(len(self.places[name, cls]) == 1 for name in self.names[cls])

    def _whole(self, name: str) -> dict[int, int]:
        """Return class -> dimension for a tensor in which one or two plain classes, and no others, fill dimensions."""
        held = self.held[name]
        if not 1 <= len(held) <= 2 or not held <= self.plain:
            return {}
        at = {c: self.places[name, c][0].dim for c in held}
        filled = all(
            len(tree) == 1 and not isinstance(tree[0], Cut) for tree in map(self.trees[name].__getitem__, at.values())
        )
        return at if filled and len(set(at.values())) == len(at) else {}

    def _touched(self, cls: int, held: Mapping[str, set[int]]) -> set[int]:
        """Return the units that a step of one unit changes something for, itself included."""
        family = {cls, *self.dependents[cls]}
        return {unit for unit in self.units if any(family & held[name] for name in self.names[unit])}

    @property
    def objective(self) -> float:
        """The inner product of A with B as it stands."""
        return math.fsum([self.paired.value(self.total.perms), *(self._value(name) for name in self.b)])

    @property
    def equal(self) -> bool:
        """Whether B stands on A to the bit, so that nothing is left to gain."""
        loose = all(torch.equal(self.a[name], x) for name, x in self.b.items())
        return loose and self.paired.equal(self.total.perms)

    def _value(self, name: str) -> float:
        if name not in self.values:
            self.values[name] = dot_product(self.a[name], self.b[name])
        return self.values[name]

    def sweep(self, order: Sequence[int]) -> bool:
        """Visit units in an order; return whether the objective rose."""
        rose = [self._visit(unit, self.names[unit]) for unit in order if unit in self.waiting]
        return any(rose)

    def grow(self, draw: torch.Generator) -> None:
        """Visit every unit once, beginning where the sides are anchored, and look only at what is settled already."""
        settled: set[int] = set()
        size = {name: float(self.a[name].square().sum()) for name in self.trees}
        left = [self.units[i] for i in torch.randperm(len(self.units), generator=draw).tolist()]
        while left:
            known = {unit: self._known(unit, settled) for unit in left}
            share = {u: sum(size[n] for n in known[u]) / (sum(size[n] for n in self.names[u]) or 1.0) for u in left}
            unit = max(left, key=share.__getitem__)
            self._visit(unit, known[unit] or self.names[unit], always=True)
            settled |= {unit, *self.dependents[unit]}
            left.remove(unit)

    def _known(self, unit: int, settled: set[int]) -> list[str]:
        family = {unit, *self.dependents[unit]}
        return [
            name for name in self.names[unit]
            if self.held[name] <= settled | family and sum(len(self.places[name, c]) for c in {unit}) == 1
        ]  # fmt: skip

    def _visit(self, unit: int, names: Collection[str], *, always: bool = False) -> bool:
        """Take a unit's best step, seen from some of its tensors, if it raises the objective; say whether it did."""
        whole, sure = len(names) == len(self.names[unit]), always
        if whole:
            self.waiting.discard(unit)
        loose = [name for name in self.names[unit] if name in self.b]
        if unit in self.plain:
            best, rise, doubt = _solved(self._plain_cost(unit, names, whole))
            if best is None:
                return False
            sure, step = sure or rise > doubt, self._step({unit: best})
            before = self.total.perms.get(unit)  # what `then` comes to where nothing is nested
            total = self._step({**self.total.perms, unit: best if before is None else before[best]})
        else:
            step = self._improved(unit, self.b, names)
            total = self.total.then(step)
        moved = {name: step.act(name, self.b[name]) for name in loose}
        if not sure:
            before = math.fsum([self.paired.value(self.total.perms, unit), *map(self._value, loose)])
            values = [dot_product(self.a[name], x) for name, x in moved.items()]
            if math.fsum([self.paired.value(total.perms, unit), *values]) <= before + GAIN * abs(before):
                return False
        for name in moved:
            self.values.pop(name, None)
        self.b.update(moved)
        self.total = total
        self.waiting |= self.near[unit] - ({unit} if whole and unit in self.plain else set())
        return True

    def _plain_cost(self, unit: int, names: Collection[str], whole: bool) -> Tensor:
        """Return a plain unit's costs [n, n] as B stands, seen from some of its tensors."""
        paired = self.paired.costs(unit, self.total.perms, None if whole else {c for n in names for c in self.held[n]})
        loose = [name for name in names if name in self.b]
        if not loose:
            assert paired is not None
            return paired
        cost = self._cost(unit, self.b, loose)
        return cost if paired is None else cost + paired

    def _improved(self, cls: int, b: Mapping[str, Tensor], names: Collection[str]) -> Permutation:
        """Return the best step for a class and its dependents, seen from where B stands."""
        if not self.dependents[cls]:
            return self._step({cls: _assigned(self._cost(cls, b, names))})
        n, outer = self.classes[cls].size, [self.classes[o].size for o in self.classes[cls].outer]
        joint = torch.zeros(*outer, n, n, dtype=torch.float64)
        solved: list[dict[int, Tensor]] = []
        for shift in range(n):
            moved = (torch.arange(n) + shift) % n
            rolled = self._step({cls: moved.expand(*outer, n)})
            here = {name: rolled.act(name, b[name]) for name in names}
            inner, here = self._settled(self.dependents[cls], here)
            joint[..., torch.arange(n), moved] = self._agreement(cls, here)
            solved.append({d: inner.perms.get(d, self._still(d)) for d in self.dependents[cls]})
        best = _assigned(joint)
        chosen = (best - torch.arange(n)) % n
        return self._step({cls: best, **{d: self._gathered(cls, d, chosen, solved) for d in self.dependents[cls]}})

    def _gathered(self, cls: int, inner: int, chosen: Tensor, solved: Sequence[Mapping[int, Tensor]]) -> Tensor:
        """Take each position's solution for an inner class from the shift that its source came by."""
        stack = torch.stack([found[inner] for found in solved])  # [shift, outer sizes of inner ..., n]
        outer = self.classes[inner].outer
        grid = torch.meshgrid(*(torch.arange(self.classes[o].size) for o in outer), indexing="ij")
        here = dict(zip(outer, grid, strict=True))
        shift = chosen[(*(here[o] for o in self.classes[cls].outer), here[cls])]
        return stack[(shift, *grid)]

    def _settled(self, inner: Sequence[int], b: Tensors) -> tuple[Permutation, Tensors]:
        """Ascend over a family's inner classes, each with the others installed, to a fixed point."""
        heads = [d for d in inner if not any(o in inner for o in self.classes[d].outer)]
        total, settled = self._step({}), set()
        before = -math.inf
        for _ in range(ROUNDS):
            for d in heads:
                mine = {d, *self.dependents[d]}
                names = [name for name in self.names[d] if name in b]
                if len(settled) < len(heads):  # the first round looks at what is settled only, where there is some
                    known = [name for name in names if not (self.held[name] & set(inner)) - mine - settled]
                    names = known or names
                    settled |= mine
                if names:
                    step = self._improved(d, b, names)
                    b = {name: step.act(name, x) for name, x in b.items()}
                    total = total.then(step)
            value = math.fsum(float((self.a[name] * x).sum()) for name, x in b.items())
            if len(heads) == 1 or value <= before + 1e-6 * abs(before):
                break
            before = value
        return total, b

    def _cost(self, cls: int, b: Mapping[str, Tensor], names: Collection[str]) -> Tensor:
        """Return [outer sizes ..., n, n]: the inner product of A's position i with B's position j."""
        total: Tensor | None = None
        for name in names:
            for place in self.places[name, cls]:
                x, y = (block(t[name], self.trees[name], place, self.classes, cls) for t in (self.a, b))
                total = x @ y.mT if total is None else total + x @ y.mT
        assert total is not None
        return total

    def _agreement(self, cls: int, b: Mapping[str, Tensor]) -> Tensor:
        """Return [outer sizes ..., n]: the inner product at each position."""
        total: Tensor | float = 0.0
        for name in b:
            for place in self.places[name, cls]:
                x, y = (block(t[name], self.trees[name], place, self.classes, cls) for t in (self.a, b))
                total = total + (x * y).sum(-1).double()
        assert isinstance(total, Tensor)
        return total

    def _step(self, perms: Mapping[int, Tensor]) -> Permutation:
        return Permutation(self.classes, self.trees, perms)

    def _still(self, cls: int) -> Tensor:
        return torch.arange(self.classes[cls].size).expand(*(self.classes[o].size for o in self.classes[cls].outer), -1)


def _solved(gain: Tensor) -> tuple[Tensor | None, float, float]:
    """Solve one assignment problem [n, n].

    Returns:
        The permutation, None where it moves nothing; the gain over moving nothing; below what it may be rounding.
    """
    found = gain.double().numpy()
    best, at = _solve(found), np.arange(len(found))
    if (best == at).all():
        return None, 0.0, 0.0
    rise = float((found[at, best] - found[at, at]).sum())
    return torch.from_numpy(best), rise, ROUNDING * len(found) * float(np.abs(found).max())


def _solve(gain: np.ndarray) -> np.ndarray:
    if not np.isfinite(gain).all():
        raise InputError("the costs of matching are not finite; a tensor holds NaN or infinity")
    return linear_sum_assignment(gain, maximize=True)[1]


def _assigned(gain: Tensor) -> Tensor:
    """Solve [..., n, n] assignment problems for the largest total gain: int64 [..., n], position -> source."""
    flat = gain.detach().reshape(-1, *gain.shape[-2:]).double().numpy()
    return torch.stack([torch.from_numpy(_solve(one)) for one in flat]).view(gain.shape[:-1])
