"""Contrastive losses, and linear features of known strength on which their minimum is known (arXiv:2403.11391)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament._base.seeds import generator

PairLoss = Callable[[Tensor, Tensor], Tensor]


def spectral_loss(z: Tensor, other: Tensor) -> Tensor:
    """Return `-2 E[f(x)^T f(x+)] + E[(f(x)^T f(x'))^2]`, both without bias: x' is another row, never x itself.

    Args:
        z, other: [N, p], the two views of N inputs, N >= 2.
    """
    _check_pair(z, other)
    products = z @ other.T
    apart = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    return -2 * products.diagonal().mean() + products[apart].square().mean()


def info_nce(z: Tensor, other: Tensor, *, temperature: float = 0.5) -> Tensor:
    """Return SimCLR's loss (NT-Xent): each of the 2N rows is to find its other view among the 2N - 1 others.

    Args:
        z, other: [N, p], normalised here.
    """
    _check_pair(z, other)
    n = len(z)
    both = nn.functional.normalize(torch.cat([z, other]), dim=1)
    logits = both @ both.T / temperature
    logits = logits.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -torch.inf)
    goal = torch.arange(2 * n, device=z.device).roll(n)
    return nn.functional.cross_entropy(logits, goal)


def supervised_contrastive(z: Tensor, labels: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Return the supervised contrastive loss (Khosla et al. 2020, L_out): all rows of a class are each other's views.

    Args:
        z: [N, p], normalised here. labels: [N]; rows alone in their class don't count.

    Raises:
        InputError: no two rows share a class.
    """
    if len(z) != len(labels):
        raise InputError(f"z has {len(z)} rows and there are {len(labels)} labels; expected as many")
    z = nn.functional.normalize(z, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels) & ~itself
    counts = positive.sum(1)
    if not bool(counts.any()):
        raise InputError("no two rows share a class; supervised contrast needs some that do")
    log_p = (z @ z.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    each = torch.where(positive, log_p, 0.0).sum(1)[counts > 0] / counts[counts > 0]
    return -each.mean()


def pair_loss(loss: PairLoss) -> Callable[[nn.Module, Any], tuple[Tensor, Mapping[str, float]]]:
    """Return a loss of two views as a loss for `train.fit`, on batches (view, view)."""
    return lambda model, batch: (loss(model(batch[0]), model(batch[1])), {})


@dataclass(frozen=True)
class LinearFeatures:
    """Inputs `x = Q u` of independent Gaussian features u_i of variance v_i; a view adds noise of variance n_i to u_i.

    Attributes:
        directions: Q [d, m], orthonormal columns.
        variance, noise: v and n, [m].
    """

    directions: Tensor
    variance: Tensor
    noise: Tensor

    @classmethod
    def random(cls, width: int, variance: Tensor, noise: Tensor, *, seed: int = 0) -> "LinearFeatures":
        """Choose random directions for features in R^width."""
        m = len(variance)
        if len(noise) != m or m > width:
            raise InputError(f"{m} variances and {len(noise)} noises in {width} dimensions; expected as many, that fit")
        drawn = torch.randn(width, width, generator=generator(seed), dtype=torch.float64)
        return cls(torch.linalg.qr(drawn).Q[:, :m].to(variance.dtype), variance, noise)

    @property
    def second(self) -> Tensor:
        """`S = E[x x^T]` of a view, [d, d]."""
        return (self.directions * (self.variance + self.noise)) @ self.directions.T

    @property
    def cross(self) -> Tensor:
        """`M = E[x x+^T]` of two views of one input, [d, d]."""
        return (self.directions * self.variance) @ self.directions.T

    @property
    def weights(self) -> Tensor:
        """`w_i = sqrt(c_i) / s_i`, [m]: how the minimum of the spectral loss weights each feature, end to end."""
        return self.variance.sqrt() / (self.variance + self.noise)

    def draw(self, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
        """Return inputs without noise [N, d], and their features [N, m]."""
        u = torch.randn(count, len(self.variance), generator=generator(seed), dtype=self.variance.dtype)
        u = u * self.variance.sqrt()
        return u @ self.directions.T, u

    def views(self, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
        """Return two views of `count` new inputs, [N, d] each."""
        x, u = self.draw(count, seed=2 * seed)
        draw = generator(2 * seed + 1)
        noise = torch.randn(2, *u.shape, generator=draw, dtype=u.dtype) * self.noise.sqrt()
        return x + noise[0] @ self.directions.T, x + noise[1] @ self.directions.T


def population_loss(features: LinearFeatures) -> Callable[[nn.Module, Any], tuple[Tensor, Mapping[str, float]]]:
    """Return the spectral loss of a linear net over all views, for `train.fit`; batches are not looked at.

    `L = -2 tr(W M W^T) + tr((W S W^T)^2)` with W the product of the net's layers.
    """
    second, cross = features.second, features.cross

    def value(model: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, float]]:
        w = model(torch.eye(len(second), dtype=second.dtype)).T
        return -2 * (w @ cross @ w.T).trace() + (w @ second @ w.T).square().sum(), {}

    return value


@torch.no_grad()
def feature_weights(net: nn.Sequential, directions: Tensor) -> list[Tensor]:
    """Return, after each layer of a linear net, how long the image of each feature's direction is: [m] per layer."""
    found, x = [], directions.T
    for layer in net:
        x = layer(x)
        found.append(x.norm(dim=1))
    return found


def shifted_views(pixels: Tensor, *, sigma: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return two views of images [N, C, Y, X]: all moved by up to a pixel a side, then Gaussian noise."""
    draw = generator(seed)
    moves = torch.randint(-1, 2, (2, 2), generator=draw).tolist()
    one, other = (
        pixels.roll(move, (2, 3)) + sigma * torch.randn(pixels.shape, generator=draw, dtype=pixels.dtype)
        for move in moves
    )
    return one, other


def spurious_corner(pixels: Tensor, labels: Tensor, share: float, *, seed: int = 0) -> Tensor:
    """Write into the first pixel of images [N, C, Y, X] a brightness that gives the label away, in a share of them.

    The brightness is label / largest label; in the other images it is that of a random label.
    """
    if not 0 <= share <= 1:
        raise InputError(f"share is {share}; expected from 0 to 1")
    draw, top = generator(seed), int(labels.max())
    honest = torch.rand(len(labels), generator=draw) < share
    told = torch.where(honest, labels, torch.randint(top + 1, (len(labels),), generator=draw))
    pixels = pixels.clone()
    pixels[:, :, 0, 0] = (told / max(1, top)).to(pixels.dtype)[:, None]
    return pixels


def _check_pair(z: Tensor, other: Tensor) -> None:
    if z.shape != other.shape or z.dim() != 2 or len(z) < 2:
        raise InputError(f"views are {list(z.shape)} and {list(other.shape)}; expected [N, p] twice, N >= 2")
