"""The energy features climb, and the gradient that reaches them through a ridge top layer (arXiv:2509.21519).

`E(w) = |Y~^T s(X w)|^2 / 2` with Y~ the one-hot products less their mean over samples. On all pairs of a group and
s(x) = x^2 its maxima are `w = [u; u']`, both of one irreducible representation. X is given by pairs of elements, Y by
their products; all is computed in float64.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from lineament._base.errors import InputError
from lineament._base.seeds import generator
from lineament.data import Group

Activation = Callable[[Tensor], Tensor]


def targets(labels: Tensor, order: int) -> Tensor:
    """Return Y~ [n, M]: one-hot labels less their mean over samples."""
    Y = one_hot(labels, order).double()
    return Y - Y.mean(0)


def responses(w: Tensor, pairs: Tensor) -> Tensor:
    """Return X w [n, K] for weights [2 M, K] and pairs [n, 2]."""
    if w.shape[0] % 2 or int(pairs.max()) >= w.shape[0] // 2:
        raise InputError(f"weights are {list(w.shape)} and elements go up to {int(pairs.max())}; expected [2 M, K]")
    return w[pairs[:, 0]] + w[w.shape[0] // 2 + pairs[:, 1]]


def energy(w: Tensor, pairs: Tensor, labels: Tensor, activation: Activation = torch.square) -> Tensor:
    """Return E of every unit [K].

    Args:
        w: [2 M, K]. pairs: [n, 2]. labels: [n], their products.

    Example:
        >>> from lineament.data import load_group
        >>> group, w = load_group("Z3"), torch.eye(6, 1).double()
        >>> round(float(energy(w, group.pairs, group.table.flatten())), 6)  # one element tells nothing of a product
        0.0
    """
    Y = targets(labels, w.shape[0] // 2)
    return 0.5 * (Y.T @ activation(responses(w.double(), pairs))).square().sum(0)


def energy_gradient(w: Tensor, pairs: Tensor, labels: Tensor, activation: Activation = torch.square) -> Tensor:
    """Return `X^T (s'(X w) * Y~ Y~^T s(X w))` [2 M, K], the direction of feature learning."""
    M = w.shape[0] // 2
    with torch.enable_grad():
        z = responses(w.double().detach(), pairs).requires_grad_()
        F = activation(z)
    Y = targets(labels, M)
    (g,) = torch.autograd.grad(F, z, Y @ (Y.T @ F.detach()))  # s' * (Y~ Y~^T F)
    found = torch.zeros_like(w, dtype=torch.float64)
    return found.index_add(0, pairs[:, 0], g).index_add(0, M + pairs[:, 1], g)


def ascend(
    group: Group, *, units: int = 64, steps: int = 3000, rate: float = 0.05, activation: Activation = torch.square,
    pairs: Tensor | None = None, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Climb the energy from random unit weights, `w <- normalised(w + rate * gradient)`; return them [2 M, units].

    Args:
        pairs: the known ones [n, 2]; all if None.
    """
    pairs = group.pairs if pairs is None else pairs
    labels = group.table[pairs[:, 0], pairs[:, 1]]
    w = normalize(torch.randn(2 * len(group), units, generator=generator(seed), dtype=torch.float64), dim=0)
    for _ in range(steps):
        w = normalize(w + rate * energy_gradient(w, pairs, labels, activation), dim=0)
    return w


def ridge_top(F: Tensor, labels: Tensor, order: int, eta: float) -> Tensor:
    """Return `V = (F~^T F~ + eta I)^-1 F~^T Y~` [K, M] by singular values, exact for the smallest eta."""
    U, s, Vh = torch.linalg.svd(F.double() - F.double().mean(0), full_matrices=False)
    return Vh.T @ ((s / (s.square() + eta))[:, None] * (U.T @ targets(labels, order)))


def feature_gradient(F: Tensor, labels: Tensor, V: Tensor) -> Tensor:
    """Return `G_F = -dJ/dF = P (Y - F V) V^T` [n, K]."""
    F, V = F.double(), V.double()
    return (targets(labels, V.shape[1]) - (F - F.mean(0)) @ V) @ V.T


def ridge_gradient(F: Tensor, labels: Tensor, order: int, eta: float) -> tuple[Tensor, Tensor]:
    """Return G_F at the ridge top layer in closed form [n, K], and its B [K, K].

    `G_F = P_eta Y~ Y~^T F~ B`, `P_eta = eta (F~ F~^T + eta I)^-1`, `B = (F~^T F~ + eta I)^-1`: units j and l repel
    each other where `b_jl < 0` and attract where it is positive.
    """
    if eta <= 0:
        raise InputError(f"eta is {eta}; without decay the gradient fades and there is no closed form, give eta > 0")
    F = F.double() - F.double().mean(0)
    Y = targets(labels, order)
    U, s, Vh = torch.linalg.svd(F, full_matrices=False)
    kept = s.square() / (s.square() + eta)
    B = (torch.eye(F.shape[1], dtype=F.dtype) - Vh.T @ (kept[:, None] * Vh)) / eta
    R = Y @ (Y.T @ F)
    return (R - U @ (kept[:, None] * (U.T @ R))) @ B, B
