"""Attention over pairs of keys in near-linear time, while scores stay small: the polynomial method.

Alman and Song 2024 (arXiv:2310.04064), with a factorisation of our own of rank r = C(K + g, g). Replace exp by a
polynomial of degree g; each power of the score `sum_c q_c a_c b_c` is a sum over monomials m, `prod_c q_c^m_c` times
`prod_c a_c^m_c` times `prod_c b_c^m_c`. So the sum over all pairs becomes a product of two sums over single keys.
Useful for small K or small scores: the rank is 70 for K = 4, g = 4, and 4845 for K = 16, g = 4.
"""

import math
from collections.abc import Sequence
from functools import cache, reduce
from itertools import combinations_with_replacement
from typing import NamedTuple

import torch
from torch import Tensor

from lineament._base.autocast import without_autocast
from lineament._base.backends import widest
from lineament._base.errors import InputError, unknown
from lineament.ops.tensor_attention import check_combination

METHODS = ("taylor", "chebyshev")
LARGEST_RANK = 20_000


def polynomial_tensor_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    degree: int = 4,
    radius: float | None = None,
    method: str = "taylor",
    key_mask: Tensor | None = None,
) -> Tensor:
    """Approximate `tensor_attention` in time and memory O((T + m S) r V), r = C(K + degree, degree).

    Args:
        q: [B, T, Hq, K]. keys: m tensors [B, S, H, K]. values: m tensors [B, S, H, V]; H divides Hq.
        degree: g >= 1 of the polynomial.
        radius: no score is larger than this in size. None: a bound of each query's own, from the largest keys.
        method: "taylor" expands exp at 0, where most scores are; "chebyshev" interpolates it on [-radius, radius]: a
            better guarantee, mostly a larger error (tenfold on uniform entries).
        key_mask: [B, S], nonzero for real tokens.

    Returns:
        [B, T, Hq, V] in q's dtype; zeros where there is no key. `polynomial_error` bounds how far off. Its gradient is
        that of the polynomial form, at the same cost.

    Raises:
        InputError: axes, degree or method; a rank above 20,000; or the polynomial's weights are no longer positive,
        because scores are too large for the degree.

    Example:
        >>> from lineament.ops import tensor_attention
        >>> q, k, v = (torch.rand(1, 9, 1, 3) for _ in range(3))
        >>> near = polynomial_tensor_attention(q, [k, k], [v, v], degree=12)
        >>> torch.allclose(near, tensor_attention(q, [k, k], [v, v]), atol=1e-5)
        True
    """
    n = check_combination(q, keys, values, key_mask)
    if key_mask is not None:  # what padding holds must not come in, not even times zero
        keys = [k.masked_fill(~key_mask.bool()[..., None, None], 0.0) for k in keys]
    left, maps = _mapped(q, keys, degree, method, radius)
    with without_autocast(q.device):
        sums = [phi.transpose(-1, -2) @ v for phi, v in zip(maps, _with_ones(values, left, key_mask), strict=True)]
        both = left @ reduce(torch.mul, sums).repeat_interleave(n["Hq"] // n["H"], 1)  # [B, Hq, T, V + 1]
    return _normalised(both, sums, degree).to(q.dtype)


class TensorState(NamedTuple):
    """What `polynomial_tensor_scan` carries: per key the sum of its map times (value, 1), [B, H, r, V + 1]."""

    sums: tuple[Tensor, ...]


def polynomial_tensor_scan(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    radius: float,
    degree: int = 4,
    method: str = "taylor",
    state: TensorState | None = None,
    chunk: int = 16,
) -> tuple[Tensor, TensorState]:
    """The causal form as a recurrence: pairs (j, k), both at or before i, in O(T r V) time and a state of fixed size.

    Arguments as `polynomial_tensor_attention` (T = S), with a `radius` that holds for the whole stream. A stream may be
    cut anywhere: `state` is what the last call returned.

    Returns:
        o [B, T, Hq, V] and the state after the last token, in float32 or wider.
    """
    n = check_combination(q, keys, values, None)
    if n["T"] != n["S"]:
        raise InputError(f"q has {n['T']} tokens and the keys have {n['S']}; the causal form needs as many")
    left, maps = _mapped(q, keys, degree, method, radius)
    ones, groups = _with_ones(values, left, None), n["Hq"] // n["H"]
    zero = left.new_zeros(n["B"], n["H"], left.shape[-1], n["V"] + 1)
    sums = (zero,) * len(keys) if state is None else state.sums
    out = []
    with without_autocast(q.device):
        for at in range(0, n["T"], chunk):
            cut = slice(at, at + chunk)
            added = [phi[:, :, cut, :, None] * v[:, :, cut, None] for phi, v in zip(maps, ones, strict=True)]
            running = [before[:, :, None] + new.cumsum(2) for before, new in zip(sums, added, strict=True)]
            both = left[:, :, cut, None] @ reduce(torch.mul, running).repeat_interleave(groups, 1)
            out.append(_normalised(both[:, :, :, 0], running, degree))
            sums = tuple(x[:, :, -1] for x in running)
    return torch.cat(out, 1).to(q.dtype), TensorState(sums)


def polynomial_error(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    degree: int = 4,
    radius: float | None = None,
    method: str = "taylor",
) -> Tensor:
    """Bound the error of each output of `polynomial_tensor_attention`, in exact arithmetic: [B, T, Hq].

    `2 d / (1 - d) max |v1| max |v2|`, d = `kernel_error` at the query's radius; infinite where d >= 1.
    """
    check_combination(q, keys, values, None)
    wide = widest(q.device)
    size = _radius(q, keys, radius).to(wide)
    d = kernel_error(size, degree, method)
    largest = reduce(torch.mul, [v.detach().to(wide).abs().amax(1) for v in values]).amax(-1)  # [B, H]
    largest = largest.repeat_interleave(q.shape[2] // largest.shape[1], 1)[:, None]
    return torch.where(d < 1, 2 * d / (1 - d).clamp_min(torch.finfo(wide).tiny) * largest, math.inf)


def kernel_error(radius: Tensor | float, degree: int, method: str = "taylor") -> Tensor:
    """Bound the relative error of the polynomial against exp on [-radius, radius].

    `R^(g+1) e^R / (g+1)!` for Taylor, `2^-g R^(g+1) e^2R / (g+1)!` for Chebyshev interpolation.

    Example:
        >>> tuple(f"{kernel_error(0.5, 4, method).item():.1e}" for method in ("taylor", "chebyshev"))
        ('4.3e-04', '4.4e-05')
    """
    if method not in METHODS:
        raise unknown("method of the polynomial", method, METHODS)
    size = torch.as_tensor(radius, dtype=widest(radius.device) if isinstance(radius, Tensor) else torch.float64)
    # Taylor's remainder is at most R^(g+1) / (g+1)! below 0, and e^x times that above; Chebyshev's is spread evenly
    growth = size.exp() if method == "taylor" else (2 * size).exp() * 2.0**-degree
    return growth * size ** (degree + 1) / math.factorial(degree + 1)


class Cost(NamedTuple):
    """Multiply-adds of both forms for one head, and the rank of the polynomial one."""

    exact: int
    polynomial: int
    rank: int


def tensor_cost(tokens: int, width: int, *, degree: int = 4, keys: int = 2, value_width: int | None = None) -> Cost:
    """Count what `tensor_attention` and its polynomial form cost for T = S tokens.

    Example:
        >>> tensor_cost(512, 4, degree=2), tensor_cost(512, 16, degree=4).polynomial > tensor_cost(64, 16).exact
        (Cost(exact=1073741824, polynomial=138240, rank=15), True)
    """
    V, rank = value_width or width, math.comb(width + degree, degree)
    return Cost(tokens ** (keys + 1) * (width + V), rank * tokens * (keys + 1) * (V + 2), rank)


class _Monomials(NamedTuple):
    """Monomials of `width` channels up to a degree: level by level the parent and the channel it is multiplied by."""

    levels: tuple[tuple[Tensor, Tensor], ...]
    degree: Tensor  # [r]
    count: Tensor  # [r], p! / m!


@cache
def _monomials(width: int, degree: int) -> _Monomials:
    rank = math.comb(width + degree, degree)
    if degree < 1 or rank > LARGEST_RANK:
        raise InputError(
            f"degree {degree} of {width} channels has rank {rank}; expected a degree of 1 or more and a rank of at "
            f"most {LARGEST_RANK}: lower the degree, narrow the heads, or use the exact form"
        )
    levels, before, sizes, counts = [], [()], [0], [1.0]
    for p in range(1, degree + 1):
        now = list(combinations_with_replacement(range(width), p))
        place = {m: i for i, m in enumerate(before)}
        levels.append((torch.tensor([place[m[:-1]] for m in now]), torch.tensor([m[-1] for m in now])))
        sizes += [p] * len(now)
        counts += [math.factorial(p) / math.prod(math.factorial(m.count(c)) for c in set(m)) for m in now]
        before = now
    return _Monomials(tuple(levels), torch.tensor(sizes), torch.tensor(counts, dtype=torch.float64))  # on the CPU


def _powers(x: Tensor, plan: _Monomials) -> Tensor:
    """Return all monomials of x [..., K]: [..., r]."""
    level, out = torch.ones_like(x[..., :1]), [torch.ones_like(x[..., :1])]
    for parent, channel in plan.levels:
        level = level[..., parent.to(x.device)] * x[..., channel.to(x.device)]
        out.append(level)
    return torch.cat(out, -1)


def _radius(q: Tensor, keys: Sequence[Tensor], radius: float | None) -> Tensor:
    """Return a bound of |score| for each query, [B, T, Hq]: given, or sum_c |q_c| max |k1_c| max |k2_c|."""
    if radius is not None:
        if not 0 < radius < math.inf:
            raise InputError(f"radius is {radius}; expected a positive bound on the size of the scores")
        return torch.full(q.shape[:3], float(radius), device=q.device)
    with torch.no_grad():
        largest = reduce(torch.mul, [k.abs().amax(1) for k in keys])  # [B, H, K]
        return (q.abs() * largest.repeat_interleave(q.shape[2] // largest.shape[1], 1)[:, None]).sum(-1)


def _coefficients(size: Tensor, degree: int, method: str) -> Tensor:
    """Return c_0 ... c_g of the polynomial in the score for each radius [...]: [..., g + 1], wide."""
    if method not in METHODS:
        raise unknown("method of the polynomial", method, METHODS)
    wide = widest(size.device)
    power = torch.arange(degree + 1, dtype=wide, device=size.device)
    if method == "taylor":
        return (-torch.lgamma(power + 1)).exp().expand(*size.shape, -1)
    size = size.to(wide).clamp_min(1e-2)[..., None]  # below that, 0 / 0
    nodes = (math.pi * (power + 0.5) / (degree + 1)).cos()
    inverse = torch.linalg.inv(nodes[:, None] ** power)
    return (size * nodes).exp() @ inverse.T / size**power


def _mapped(q, keys, degree, method, radius) -> tuple[Tensor, list[Tensor]]:
    """Return the queries' map [B, Hq, T, r] with the polynomial in it, and the keys' maps [B, H, S, r]."""
    plan = _monomials(q.shape[-1], degree)
    dtype = torch.promote_types(q.dtype, torch.float32)
    c = _coefficients(_radius(q, keys, radius), degree, method)[..., plan.degree.to(q.device)]
    with without_autocast(q.device):
        left = _powers(q.to(dtype), plan) * (c * plan.count.to(c.dtype).to(q.device)).to(dtype)
        maps = [_powers(k.to(dtype), plan).transpose(1, 2) for k in keys]
    return left.transpose(1, 2), maps


def _with_ones(values: Sequence[Tensor], like: Tensor, key_mask: Tensor | None) -> list[Tensor]:
    """Append a one to every value, for the normaliser: [B, H, S, V + 1]; padding is zero throughout."""
    wide = [torch.nn.functional.pad(v.to(like.dtype), (0, 1), value=1.0) for v in values]
    if key_mask is not None:
        wide = [v.masked_fill(~key_mask.bool()[..., None, None], 0.0) for v in wide]
    return [v.transpose(1, 2) for v in wide]


def _normalised(both: Tensor, sums: Sequence[Tensor], degree: int) -> Tensor:
    """Divide by the last channel: [B, H, T, V + 1] -> [B, T, H, V]; zeros where no key has been."""
    total = both[..., -1:]
    some = sums[0].detach()[..., :1, -1].ne(0)  # the constant monomial counts the keys
    some = some[..., None] if some.dim() < total.dim() else some
    some = some.repeat_interleave(both.shape[1] // some.shape[1], 1)
    if not bool(((total > 0) | ~some).all()):
        raise InputError(
            f"a polynomial of degree {degree} gives weights that are not positive here: scores are too large for it; "
            "raise the degree, bound q and the keys, or use the exact form"
        )
    return torch.where(some, both[..., :-1] / torch.where(some, total, 1.0), 0.0).transpose(1, 2)
