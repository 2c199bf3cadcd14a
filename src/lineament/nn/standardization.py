"""Standardisation without anything learned: mean 0 and variance 1 by sample, by batch, or by turns."""

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError, unknown

EPS = 1e-5
GROUPS = 12
STATISTICS = ("batch", "running")


def by_sample(x: Tensor) -> Tensor:
    """Standardise every channel of every sample over its space: x [N, C, ...]."""
    axes = tuple(range(2, x.dim()))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) * (variance + EPS).rsqrt()


class ByBatch(nn.Module):
    """Standardise every channel over batch and space.

    Args:
        channels: C. statistics: "batch" uses each batch's own, in eval mode too (then a sample's result depends on its
            batch mates); "running" keeps means from training for eval mode.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int, statistics: str = "batch") -> None:
        super().__init__()
        if statistics not in STATISTICS:
            raise unknown("statistics", statistics, STATISTICS)
        self.running = statistics == "running"
        if self.running:
            self.register_buffer("mean", torch.zeros(channels))
            self.register_buffer("variance", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Standardise [N, C, ...]."""
        mean, variance = (self.mean, self.variance) if self.running else (None, None)
        own = self.training or not self.running
        return nn.functional.batch_norm(x, mean, variance, training=own, momentum=0.1, eps=EPS)


class GroupedStandardization(nn.Module):
    """G-IBS: channels in 12 groups, standardised by batch and by sample in turns.

    Args:
        channels: a multiple of 12. statistics: see `ByBatch`.

    Example:
        >>> GroupedStandardization(24)(torch.rand(3, 24, 4, 4)).mean((0, 2, 3)).abs().max() < 1e-5
        tensor(True)
    """

    def __init__(self, channels: int, statistics: str = "batch") -> None:
        super().__init__()
        if channels % GROUPS:
            raise InputError(f"{channels} channels can't be cut into {GROUPS} groups; expected a multiple of {GROUPS}")
        self.by_batch = ByBatch(channels // 2, statistics)

    def forward(self, x: Tensor) -> Tensor:
        """Standardise [N, C, ...]."""
        groups = x.unflatten(1, (GROUPS, -1))
        even, odd = self.by_batch(groups[:, 0::2].flatten(1, 2)), by_sample(groups[:, 1::2].flatten(1, 2))
        parts = [part.unflatten(1, (GROUPS // 2, -1)) for part in (even, odd)]
        return torch.stack(parts, 2).flatten(1, 3)
