"""Two models side by side: how far apart, at what angle, and by how many directions, tensor by tensor."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lineament.weights.geometry import dot_product
from lineament.weights.point import Point
from lineament.weights.write import check_tensor


def compare(a: Point, b: Point, *, ranks: bool = True) -> Iterator[dict[str, Any]]:
    """Measure the difference of two models tensor by tensor, one at a time.

    Args:
        ranks: also the effective rank of the difference of matrices (an eigenvalue problem each).

    Yields:
        Per tensor: name, shape, norm of a, distance `||b - a||`, the same relative to a, angle in degrees, and the
        effective rank.

    Raises:
        InputError: other names or shapes, or a tensor that holds NaN or infinity (named).
    """
    for name, spec in (b - a).specs.items():
        if not spec.floating:
            continue
        x, y = a.value(name), b.value(name)
        check_tensor(name, x, a.label)
        check_tensor(name, y, b.label)
        xx, yy, xy = dot_product(x, x), dot_product(y, y), dot_product(x, y)
        delta = y - x
        row = _row(name, list(spec.shape), xx, yy, dot_product(delta, delta), xy)
        if ranks and delta.dim() == 2 and row["distance"]:
            row["effective rank"] = effective_rank(delta)
        yield row


def _row(name: str, shape: list[int], xx: float, yy: float, dd: float, xy: float) -> dict[str, Any]:
    cosine = max(-1.0, min(1.0, xy / math.sqrt(xx * yy))) if xx and yy else math.nan
    return {
        "tensor": name, "shape": shape, "norm": math.sqrt(xx), "other norm": math.sqrt(yy), "distance": math.sqrt(dd),
        "relative": math.sqrt(dd / xx) if xx else math.nan,
        "angle": math.degrees(math.acos(cosine)) if cosine == cosine else math.nan, "effective rank": None,
    }  # fmt: skip


def total(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add the rows up to the whole model."""
    xx, yy, dd = (math.fsum(row[key] ** 2 for row in rows) for key in ("norm", "other norm", "distance"))
    return _row("all", [], xx, yy, dd, (xx + yy - dd) / 2)


def effective_rank(x: Tensor) -> float:
    """Return `exp(H(p))`, the entropy of the normalised singular values (Roy and Vetterli 2007).

    Singular values come from the Gram matrix of the shorter side in float64, so those below 1e-7 of the largest drown.

    Example:
        >>> round(effective_rank(torch.eye(3)), 6), round(effective_rank(torch.ones(4, 3)), 3)
        (3.0, 1.0)
    """
    x = x if x.shape[0] <= x.shape[1] else x.T
    gram = torch.zeros(len(x), len(x), dtype=torch.float64)
    for piece in x.split(4096, 1):
        wide = piece.double()
        gram.addmm_(wide, wide.T)
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    values = values[values > values.max() * 1e-14].sqrt()
    p = values / values.sum()
    return float((-(p * p.log()).sum()).exp())


def grid(rows: Sequence[Mapping[str, Any]], key: str = "relative") -> tuple[list[str], list[str], list[list[float]]]:
    """Lay rows out as layers x kinds of tensors, for a picture; tensors outside the layers are left out."""
    cells: dict[tuple[str, int], float] = {}
    for row in rows:
        if match := re.search(r"(?:^|\.)(\d+)\.(.*)$", row["tensor"]):
            cells[match[2], int(match[1])] = row[key]
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = sorted({layer for _, layer in cells})
    return kinds, list(map(str, layers)), [[cells.get((kind, layer), math.nan) for layer in layers] for kind in kinds]
