"""Kept costs against plain inner products, after moves of everything, of two positions, and of nothing."""

import pytest
import torch

from lineament._base.seeds import generator
from lineament.weights.paired import Paired

SHAPES = {"a": (5, 4, 3, 3), "b": (4, 5), "bias": (5,), "gain": (5,), "stem": (2, 5, 3), "c": (6, 5, 2),
          "other": (7, 4)}  # fmt: skip
HELD = {"a": {0: 0, 1: 1}, "b": {1: 0, 0: 1}, "bias": {0: 0}, "gain": {0: 0}, "stem": {0: 1}, "c": {2: 0, 0: 1},
        "other": {1: 1}}  # fmt: skip
SIZES = (5, 4, 6)


def sides(dtype=torch.float64):
    return [
        {name: torch.randn(shape, generator=generator(i + 10 * side), dtype=dtype)
         for i, (name, shape) in enumerate(SHAPES.items())}
        for side in (1, 2)
    ]  # fmt: skip


def stands(b, perms):
    """B moved by hand."""
    found = {}
    for name, x in b.items():
        for cls, dim in HELD[name].items():
            x = x.index_select(dim, perms[cls]) if cls in perms else x
        found[name] = x
    return found


def by_hand(a, b, perms, cls):
    moved, total = stands(b, perms), torch.zeros(SIZES[cls], SIZES[cls], dtype=torch.float64)
    for name, at in HELD.items():
        if cls in at:
            x, y = (side[name].movedim(at[cls], 0).flatten(1 if side[name].dim() > 1 else 0) for side in (a, moved))
            total += x.view(SIZES[cls], -1) @ y.view(SIZES[cls], -1).mT
    return total


def swapped(perm):
    return perm[[1, 0, *range(2, len(perm))]]


def test_costs_follow_the_moves_of_neighbours():
    a, b = sides()
    paired, perms = Paired(HELD, a, b), {}
    for step in range(12):
        for cls in range(3):
            torch.testing.assert_close(paired.costs(cls, perms), by_hand(a, b, perms, cls))
        cls = step % 3
        still = torch.arange(SIZES[cls])
        new = torch.randperm(SIZES[cls], generator=generator(step)) if step % 2 else swapped(perms.get(cls, still))
        perms = {**perms, cls: new}
    value = sum(float((a[name] * x).sum()) for name, x in stands(b, perms).items())
    assert paired.value(perms) == pytest.approx(value, rel=1e-12)


def test_costs_seen_from_some_neighbours_can_be_widened_and_narrowed():
    a, b = sides()
    paired = Paired(HELD, a, b)
    perms = {1: torch.tensor([3, 0, 2, 1]), 2: torch.tensor([5, 4, 3, 2, 1, 0])}
    whole = by_hand(a, b, perms, 0)
    for among in ([1], [1, 2], [2], [1, 2]):
        absent = [name for name, at in HELD.items() if 0 in at and not at.keys() <= {0, *among}]
        less = [{name: x * (name not in absent) for name, x in side.items()} for side in (a, b)]
        torch.testing.assert_close(paired.costs(0, perms, among), by_hand(*less, perms, 0))
    torch.testing.assert_close(paired.costs(0, perms), whole)


def test_equal_says_whether_the_element_takes_b_onto_a():
    a, _ = sides()
    perms = {0: torch.tensor([4, 2, 0, 1, 3]), 1: torch.tensor([1, 0, 3, 2]), 2: torch.arange(6)}
    b = stands(a, {cls: perm.argsort() for cls, perm in perms.items()})
    paired = Paired(HELD, a, b)
    assert paired.equal(perms)
    assert not paired.equal({})


def test_without_tensors_there_are_no_costs():
    a, b = sides()
    assert Paired({"other": {1: 1}}, a, b).costs(0, {}) is None
