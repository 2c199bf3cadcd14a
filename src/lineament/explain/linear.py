"""Linear maps z = W x + b and the rules that share relevance out over their terms.

A rule is any callable `rule(linear, relevance, ledger) -> relevance of x`; the ones here are values with parameters.
Sources: Bach et al. 2015 (epsilon, alpha-beta), Montavon et al. 2017 (w2, z+, zB), Montavon et al. 2019 (gamma),
Lapuschkin et al. 2019 (flat).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lineament.explain.ledger import Ledger

TINY = 1e-9  # of the largest |z|: below it a quotient R / z says nothing


def wide(x: Tensor) -> Tensor:
    """Return x in float32 or wider."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def times(z: Tensor, coef: Tensor) -> Tensor:
    """Return z rho, 0 where rho is 0: masked scores are -inf and carry nothing."""
    product = z * coef
    return product if z.dtype == coef.dtype and bool(product.isfinite().all()) else torch.where(coef == 0, 0.0, product)


@dataclass
class Linear:
    """One linear map at work: z = apply(x, weight) + bias."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    z: Tensor
    apply: Callable[[Tensor, Tensor], Tensor]
    """(x, weight) -> the bias-free product."""
    back: Callable[[Tensor, Tensor], Tensor]
    """(t of z's shape, weight) -> its transpose applied to t."""

    def bias_or_zero(self) -> Tensor:
        """The bias, or a 0 that broadcasts."""
        return self.z.new_zeros(()) if self.bias is None else self.bias


LinearRule = Callable[[Linear, Tensor, Ledger], Tensor]


def divide(relevance: Tensor, z: Tensor, ledger: Ledger, epsilon: float | None = None) -> Tensor:
    """Return t = R / z, stabilised; what the stabiliser takes goes to the ledger.

    Args:
        relevance, z: of one shape.
        epsilon: R / (z + epsilon sign(z)), sign(0) = 1. None: R / z, and nothing where |z| is below 1e-9 of the
            largest (the relevance there goes to the column whole).
    """
    if epsilon is not None:
        shift = torch.where(z >= 0, epsilon, -epsilon)
        t = relevance / (z + shift)
        ledger.absorb("epsilon", shift * t)
        return t
    finite = z.isfinite()
    size = torch.where(finite, z, 0.0).abs()
    small = ~finite | (size <= (TINY * size.max()).clamp_min(1e-12) if size.numel() else size > 0)
    ledger.absorb("epsilon", torch.where(small, relevance, 0.0))
    return torch.where(small, 0.0, relevance / torch.where(small, 1.0, z))


def share(
    linear: Linear,
    relevance: Tensor,
    ledger: Ledger,
    terms: Sequence[tuple[Tensor, Tensor]],
    bias: Tensor,
    epsilon: float | None = None,
) -> Tensor:
    """Share relevance out in proportion to terms x_i w_i and a bias, over their own sum."""
    whole = sum((linear.apply(x, w) for x, w in terms), torch.zeros_like(linear.z)) + bias
    t = divide(relevance, whole, ledger, epsilon)
    ledger.absorb("biases", bias * t)
    return sum((x * linear.back(t, w) for x, w in terms), torch.zeros_like(linear.x))


@dataclass(frozen=True)
class Epsilon:
    """R_x = x (W^T (R / (z + epsilon sign z))). Without an epsilon, LRP-0: no stabiliser where none is needed."""

    epsilon: float | None = None

    def __call__(self, linear: Linear, relevance: Tensor, ledger: Ledger) -> Tensor:
        """Share out."""
        terms = [(linear.x, linear.weight)]
        return share(linear, relevance, ledger, terms, linear.bias_or_zero(), self.epsilon)


@dataclass(frozen=True)
class Gamma:
    """Favour the terms that have the sign of z: they are counted (1 + gamma)-fold."""

    gamma: float = 0.25
    epsilon: float | None = None

    def __call__(self, linear: Linear, relevance: Tensor, ledger: Ledger) -> Tensor:
        """Share out."""
        x, w, b, g = linear.x, linear.weight, linear.bias_or_zero(), self.gamma
        up, down = w + g * w.clamp(min=0), w + g * w.clamp(max=0)
        found = torch.zeros_like(x)
        for side, (first, second), bias in (
            (linear.z > 0, (up, down), b + g * b.clamp(min=0)),
            (linear.z < 0, (down, up), b + g * b.clamp(max=0)),
        ):
            terms = [(x.clamp(min=0), first), (x.clamp(max=0), second)]
            found += share(linear, torch.where(side, relevance, 0.0), ledger, terms, bias, self.epsilon)
        ledger.absorb("epsilon", torch.where(linear.z == 0, relevance, 0.0))
        return found


@dataclass(frozen=True)
class AlphaBeta:
    """alpha times the share of the positive terms, minus beta times that of the negative ones; alpha - beta = 1."""

    alpha: float = 2.0
    beta: float = 1.0
    epsilon: float | None = None

    def __post_init__(self) -> None:
        from lineament._base.errors import InputError

        if abs(self.alpha - self.beta - 1) > 1e-9 or self.beta < 0:
            raise InputError(f"alpha is {self.alpha} and beta is {self.beta}; expected alpha - beta = 1 and beta >= 0")

    def __call__(self, linear: Linear, relevance: Tensor, ledger: Ledger) -> Tensor:
        """Share out."""
        b = linear.bias_or_zero()
        (x, y), (v, w) = ((t.clamp(min=0), t.clamp(max=0)) for t in (linear.x, linear.weight))
        found = share(linear, self.alpha * relevance, ledger, [(x, v), (y, w)], b.clamp(min=0), self.epsilon)
        if self.beta:
            found += share(linear, -self.beta * relevance, ledger, [(x, w), (y, v)], b.clamp(max=0), self.epsilon)
        return found


def ZPlus(epsilon: float | None = None) -> AlphaBeta:
    """Return z+: the positive terms alone."""
    return AlphaBeta(1.0, 0.0, epsilon)


@dataclass(frozen=True)
class WSquare:
    """Shares w^2, whatever x is: for an input layer without bounds."""

    epsilon: float | None = None

    def __call__(self, linear: Linear, relevance: Tensor, ledger: Ledger) -> Tensor:
        """Share out."""
        terms = [(torch.ones_like(linear.x), linear.weight**2)]
        return share(linear, relevance, ledger, terms, linear.bias_or_zero() ** 2, self.epsilon)


@dataclass(frozen=True)
class Flat:
    """Equal shares over everything a unit sees: where single inputs mean nothing."""

    epsilon: float | None = None

    def __call__(self, linear: Linear, relevance: Tensor, ledger: Ledger) -> Tensor:
        """Share out."""
        terms = [(torch.ones_like(linear.x), torch.ones_like(linear.weight))]
        return share(linear, relevance, ledger, terms, linear.z.new_zeros(()), self.epsilon)


@dataclass(frozen=True)
class ZBox:
    """Terms x w - low w+ - high w-, for an input layer whose values lie in [low, high]; numbers or tensors like x."""

    low: float | Tensor = 0.0
    high: float | Tensor = 1.0
    epsilon: float | None = None

    def __call__(self, linear: Linear, relevance: Tensor, ledger: Ledger) -> Tensor:
        """Share out."""
        x, w = linear.x, linear.weight
        low, high = (-torch.ones_like(x) * edge for edge in (self.low, self.high))
        terms = [(x, w), (low, w.clamp(min=0)), (high, w.clamp(max=0))]
        return share(linear, relevance, ledger, terms, linear.z.new_zeros(()), self.epsilon)


@dataclass(frozen=True)
class Dynamic:
    """The rule of DynamicLRP (arXiv:2512.07010): the bias is split off by absolute size, the product shared over z."""

    epsilon: float | None = None

    def __call__(self, linear: Linear, relevance: Tensor, ledger: Ledger) -> Tensor:
        """Share out."""
        zero, size = linear.z.new_zeros(()), linear.bias_or_zero().abs()
        product = linear.apply(linear.x, linear.weight)
        t = divide(relevance, product.abs() + size, ledger, self.epsilon)
        ledger.absorb("biases", size * t)
        return share(linear, product.abs() * t, ledger, [(linear.x, linear.weight)], zero, self.epsilon)
