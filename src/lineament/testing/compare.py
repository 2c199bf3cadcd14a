"""Comparing results of runs: trees of tensors, by the largest error beside the largest value."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2.5e-2}
"""Largest error allowed, as a share of the largest expected value, by dtype of the arithmetic."""


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """List the tensors of a state or result with their places: tensors, tuples, dicts, and objects with `tensors()`.

    Example:
        >>> [name for name, _ in leaves((torch.zeros(1), {"far": torch.zeros(1)}), "out")]
        ['out.0', 'out.1.far']
    """
    if isinstance(tree, Tensor):
        yield path, tree
    elif hasattr(tree, "tensors"):
        yield from leaves(tree.tensors(), path)
    elif isinstance(tree, dict):
        for key, each in tree.items():
            yield from leaves(each, f"{path}.{key}")
    elif isinstance(tree, list | tuple):
        names = getattr(tree, "_fields", None) or range(len(tree))
        for key, each in zip(names, tree, strict=True):
            yield from leaves(each, f"{path}.{key}")


def error(found: Tensor, expected: Tensor) -> float:
    """Return the largest error as a share of the largest expected value; infinity where NaN or infinity differ.

    Example:
        >>> round(error(torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0])), 3)
        0.1
    """
    if not found.numel():
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    same = (found == expected) | (found.isnan() & expected.isnan())
    gap = torch.where(same, 0.0, (found - expected).abs()).max().item()
    finite = expected[expected.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    gap = gap if gap == gap else float("inf")
    return gap / scale if scale > 0 else gap


def same(found: Any, expected: Any, tolerance: float, what: str) -> None:
    """Compare two trees tensor by tensor.

    Args:
        found, expected: tensors or trees of them.
        tolerance: the largest error allowed, as a share of the largest expected value of each tensor; 0 for equal bits.
        what: how the message calls them.

    Raises:
        AssertionError: another structure, another shape, or too large an error, with its size.
    """
    one, other = dict(leaves(found, what)), dict(leaves(expected, what))
    if one.keys() != other.keys():
        raise AssertionError(f"{what}: the tensors are {sorted(one)}; expected {sorted(other)}")
    for name in other:
        if one[name].shape != other[name].shape:
            raise AssertionError(f"{name} has shape {tuple(one[name].shape)}; expected {tuple(other[name].shape)}")
        gap = error(one[name], other[name])
        if not gap <= tolerance:
            raise AssertionError(f"{name} differs by {gap:.2g} of its largest value; allowed is {tolerance:.2g}")


def rms(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Compare by root mean square, the measure for low precision.

    Raises:
        AssertionError: too large an error, or a number that is not finite.
    """
    found, expected = found.detach().double(), expected.detach().double()
    if not found.isfinite().all():
        raise AssertionError(f"{what} holds NaN or infinity")
    gap = ((found - expected).square().mean() / expected.square().mean().clamp_min(1e-30)).sqrt().item()
    if not gap <= tolerance:
        raise AssertionError(f"{what} differs by {gap:.2g} in root mean square; allowed is {tolerance:.2g}")


def copied(tree: Any) -> dict[str, Tensor]:
    """Return clones of a tree's tensors by place, to see later whether they were changed."""
    return {name: x.detach().clone() for name, x in leaves(tree, "it")}
