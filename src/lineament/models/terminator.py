"""Terminator: a classifier of images or sequences made of hyper-kernel blocks (Zhang 2024, arXiv:2401.17948)."""

import math
import warnings
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.nn.hyper_kernel import linear
from lineament.nn.hyperzzw import HyperBlock, HyperConfig


@dataclass(frozen=True, kw_only=True)
class TerminatorConfig:
    """A Terminator.

    Attributes:
        blocks: of all blocks. channels: of the input. classes: of the answer.
        factors: channels are multiplied by these, block by block.
        layers: depth of each block's slow network. dropout: of each block.
        before: for each block, the earlier blocks whose outputs it joins in.
    """

    blocks: HyperConfig
    channels: int
    classes: int
    factors: tuple[int, ...]
    layers: tuple[int, ...]
    dropout: tuple[float, ...]
    before: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        counts = {name: len(getattr(self, name)) for name in ("factors", "layers", "dropout", "before")}
        if len(set(counts.values())) > 1 or not self.factors:
            raise InputError(f"a Terminator has one entry per block everywhere; given {counts}")
        for i, earlier in enumerate(self.before):
            if any(not 0 <= j < i for j in earlier):
                raise InputError(f"block {i} joins the outputs of blocks {earlier}; expected blocks before it")

    @property
    def widths(self) -> list[int]:
        """Channels before each block, and after the last."""
        return [self.channels * math.prod(self.factors[:i]) for i in range(len(self.factors) + 1)]


TERMINATOR_CIFAR = TerminatorConfig(
    blocks=HyperConfig(size=32), channels=3, classes=10, factors=(4, 3, 2, 2, 2), layers=(3, 2, 2, 2, 2),
    dropout=(0.0, 0.05, 0.05, 0.05, 0.05), before=((), (), (0,), (1,), (2, 1)),
)  # fmt: skip


class Classified(NamedTuple):
    """Logits [N, classes], and how far the hyper-kernels of different blocks are apart (a scalar, to be added)."""

    logits: Tensor
    spread: Tensor


class Terminator(nn.Module):
    """Blocks, the mean over space, a linear head.

    Example:
        >>> config = TerminatorConfig(
        ...     blocks=HyperConfig(size=8, context="sample", statistics="running"), channels=1, classes=10,
        ...     factors=(12, 2), layers=(2, 2), dropout=(0.0, 0.0), before=((), ()),
        ... )
        >>> Terminator(config)(torch.rand(2, 1, 8, 8)).logits.shape
        torch.Size([2, 10])
    """

    def __init__(self, config: TerminatorConfig) -> None:
        super().__init__()
        self.config, widths = config, config.widths
        self.blocks = nn.ModuleList(
            HyperBlock(
                widths[i], factor, config.blocks, layers=config.layers[i], dropout=config.dropout[i],
                before=[widths[j + 1] for j in config.before[i]],
            )
            for i, factor in enumerate(config.factors)
        )  # fmt: skip
        self.head = linear(widths[-1], config.classes)

    def forward(self, x: Tensor) -> Classified:
        """Classify images [N, C, n, n], or sequences [N, C, n]."""
        if x.dim() < 2 or x.shape[1] != self.config.channels:
            raise InputError(
                f"x has the shape {list(x.shape)}; expected {self.config.channels} channels in its second axis"
            )
        made = self.config.blocks
        if not self.training and "batch" in (made.context, made.statistics):
            warnings.warn(
                "as published, a sample's answer depends on the batch it is in; context='sample' and "
                "statistics='running' make it independent",
                stacklevel=2,
            )
        outputs, kernels = [], []
        for block, earlier in zip(self.blocks, self.config.before, strict=True):
            x, kernel = block(x, [outputs[j] for j in earlier])
            outputs.append(x)
            kernels.append(kernel.sum(0))
        return Classified(self.head(x.flatten(2).mean(2)), kernel_spread(kernels))


def kernel_spread(kernels: list[Tensor]) -> Tensor:
    """The slow neural loss: the mean squared difference of summed kernels [n, ...], added over all pairs of blocks."""
    pairs = [(a - b).square().mean() for a, b in combinations(kernels, 2)]
    return torch.stack(pairs).sum() if pairs else kernels[0].new_zeros(())
