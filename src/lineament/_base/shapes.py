"""Check the axes of several tensors at once, at the public door."""

from functools import cache
from itertools import pairwise

from torch import Tensor

from lineament._base.errors import InputError


@cache
def _parse(spec: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    parts = (part.split(":") for part in spec.split(","))
    return tuple((name.strip(), tuple(axes.split())) for name, axes in parts)


def bind(spec: str, *tensors: Tensor | None) -> dict[str, int]:
    """Match tensors with named axes and return the size of every axis.

    Args:
        spec: "q: B T H K, v: B T H V", one entry per tensor. A number is a fixed size, `_` matches anything.
        tensors: in the order of `spec`; a None is skipped.

    Raises:
        InputError: a tensor has another number of axes, or two tensors disagree on an axis; both are named.

    Example:
        >>> import torch
        >>> bind("q: B T K, v: B T V", torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
        {'B': 2, 'T': 3, 'K': 4, 'V': 5}
    """
    entries = _parse(spec)
    if len(entries) != len(tensors):
        raise AssertionError(f"bind: {len(entries)} names for {len(tensors)} tensors")
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    for (name, axes), tensor in zip(entries, tensors, strict=True):
        if tensor is None:
            continue
        if tensor.dim() != len(axes):
            raise InputError(f"{name} has shape {list(tensor.shape)}; expected the axes [{', '.join(axes)}]")
        for axis, size in zip(axes, tensor.shape, strict=True):
            if axis == "_":
                continue
            if axis.isdigit():
                if size != int(axis):
                    raise InputError(f"{name} has shape {list(tensor.shape)}; expected size {axis} on that axis")
            elif axis not in sizes:
                sizes[axis], owner[axis] = size, name
            elif sizes[axis] != size:
                raise InputError(
                    f"{name} has {axis}={size}, but {owner[axis]} has {axis}={sizes[axis]}; these must agree"
                )
    return sizes


def check_heads(**heads: int) -> int:
    """Return the largest head count after checking that the counts divide one another (grouped heads).

    Example:
        >>> check_heads(q=9, k=3, v=3)
        9
    """
    ordered = sorted(heads.items(), key=lambda item: item[1])
    for (small, n), (large, m) in pairwise(ordered):
        if n < 1 or m % n:
            given = f"{small} has {n} heads and {large} has {m}"
            raise InputError(f"{given}; head counts must divide one another (grouped-query attention)")
    return ordered[-1][1]
