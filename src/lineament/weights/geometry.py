"""Inner products and arcs between tensors, accumulated in float64 by pieces so that no wide copy is ever whole."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

PIECE = 1 << 18  # elements: a piece of every model stays in cache, and no fresh pages are touched for it


def wide(x: Tensor) -> Tensor:
    """Return a tensor in float32 or wider; integers and booleans as they are."""
    if not (x.is_floating_point() or x.is_complex()):
        return x
    return x.float() if x.itemsize == 1 else x.to(torch.promote_types(x.dtype, torch.float32))


def pieces(*tensors: Tensor, size: int = PIECE) -> Iterator[tuple[Tensor, ...]]:
    """Walk tensors of one size side by side in flat pieces that fit a cache; what is contiguous can be written to."""
    return zip(*(x.reshape(-1).split(size) for x in tensors), strict=True)


def combined(tensors: Sequence[Tensor], numbers: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return `sum_i c_i x_i`, summed in float32 or wider piece by piece, and rounded once to `dtype`.

    Example:
        >>> combined([torch.ones(2), torch.arange(2.0)], [0.5, 2.0], torch.bfloat16).tolist()
        [0.5, 2.5]
    """
    kind = torch.float32
    for x in tensors:
        kind = torch.promote_types(kind, x.dtype) if x.itemsize > 1 else kind  # float8 promotes to nothing
    out = torch.empty(tensors[0].shape, dtype=dtype)
    for into, first, *rest in pieces(out, *tensors):
        total = torch.mul(first.to(kind), numbers[0])
        for part, c in zip(rest, numbers[1:], strict=True):
            total.add_(part.to(kind), alpha=c)
        into.copy_(total)
    return out


def dot_product(x: Tensor, y: Tensor) -> float:
    """Return the inner product of two tensors of one shape, in float64.

    Example:
        >>> dot_product(torch.ones(3), torch.arange(3.0))
        3.0
    """
    return math.fsum(float(torch.dot(a.double(), b.double())) for a, b in pieces(x, y))


def slerp(a: Tensor, b: Tensor, t: float, *, straight: float = 0.9995) -> Tensor:
    """Spherical linear interpolation (Shoemake 1985) of two tensors taken as vectors, lengths included.

    `sin((1-t) θ)/sin θ a + sin(t θ)/sin θ b` with θ the angle between them; where `|cos θ|` exceeds `straight` (or one
    is zero), the straight line.

    Example:
        >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5) ** 2
        tensor([0.5000, 0.5000])
    """
    lengths = math.sqrt(dot_product(a, a)), math.sqrt(dot_product(b, b))
    # a vector shorter than 1e-8 has no direction; it is divided by 1, so that its cosine is about 0
    divisors = [length if length > 1e-8 else 1.0 for length in lengths]
    cosine = min(max(dot_product(a, b) / divisors[0] / divisors[1], -1.0), 1.0)  # in this order NaN stays NaN
    if abs(cosine) > straight:
        return torch.lerp(a, b, t) if a.dtype == b.dtype else (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (a * (math.sin((1 - t) * angle) / math.sin(angle))).add_(b, alpha=math.sin(t * angle) / math.sin(angle))
