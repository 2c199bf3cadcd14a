"""Small nets to study on: deep linear ones, an MLP, plain or masked, and a ResNet of the size of ResNet20."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lineament.nn import MaskedLinear, Residual, SideBySide, group_mask


def dense_classifier(sizes: Sequence[int]) -> nn.Sequential:
    """Return flatten, then linear layers of these sizes with ReLU between them.

    Example:
        >>> dense_classifier((64, 32, 10))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for inward, outward in itertools.pairwise(sizes):
        layers += [nn.Linear(inward, outward), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def residual_classifier(
    inputs: int, width: int, layers: int, classes: int, *, side_by_side: bool = False, scale: float = 1.0
) -> nn.Sequential:
    """Return flatten, a linear map to `width`, residual layers `h + scale relu(W h + b)`, and a linear head.

    Both forms have the same parameters and, from the same seed, the same values.

    Args:
        side_by_side: all layers read the same h, and their outputs are summed, instead of one after the other.
        scale: of every branch; 1 / sqrt(layers) for more than some 30 layers.

    Example:
        >>> residual_classifier(64, 32, 4, 10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    stem = nn.Linear(inputs, width)
    stack = [Residual(nn.Sequential(nn.Linear(width, width), nn.ReLU()), scale) for _ in range(layers)]
    head = nn.Linear(width, classes)
    return nn.Sequential(nn.Flatten(), stem, SideBySide(stack) if side_by_side else nn.Sequential(*stack), head)


def masked_classifier(sizes: Sequence[int], groups: int, *, seed: int = 0, **mask: Any) -> nn.Sequential:
    """Return flatten, then linear layers with ReLU between them; all but the first and the last are masked.

    Args:
        sizes: of the layers' units. groups: of every hidden layer; 1 with `inside=p` is a random mask.
        seed: of the masks, counted on from layer to layer. mask: other arguments of `nn.group_mask`.

    Example:
        >>> masked_classifier((64, 32, 32, 10), 4, between=0.1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    layers: list[nn.Module] = [nn.Flatten()]
    last = len(sizes) - 2
    for i, (inward, outward) in enumerate(itertools.pairwise(sizes)):
        how: dict[str, Any] = {"groups": 1} if i in (0, last) else {"groups": groups, "seed": seed + i, **mask}
        layers += [MaskedLinear(group_mask(outward, inward, **how)), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def deep_linear(sizes: Sequence[int], *, scale: float = 1e-2, balanced: bool = False) -> nn.Sequential:
    """Return linear layers without biases or anything between them, small at the start.

    Args:
        scale: standard deviation of the entries; of a balanced net, all singular values.
        balanced: start with `W_{l+1}^T W_{l+1} = W_l W_l^T`, which gradient flow keeps.

    Example:
        >>> deep_linear((6, 16, 8))(torch.zeros(2, 6)).shape
        torch.Size([2, 8])
    """
    net = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)))
    bases = [torch.linalg.qr(torch.randn(n, n)).Q[:, : min(sizes)] for n in sizes]
    with torch.no_grad():
        for layer, (inward, outward) in zip(net, itertools.pairwise(bases), strict=True):
            weight = layer.get_parameter("weight")
            weight.copy_(scale * outward @ inward.T if balanced else scale * torch.randn_like(weight))
    return net


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut (1x1 where the shape changes; He et al. 2016)."""

    def __init__(self, inward: int, outward: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inward, outward, 3, stride, 1, bias=False), nn.BatchNorm2d(outward)
        self.conv2, self.norm2 = nn.Conv2d(outward, outward, 3, 1, 1, bias=False), nn.BatchNorm2d(outward)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inward != outward:
            self.shortcut = nn.Sequential(nn.Conv2d(inward, outward, 1, stride, bias=False), nn.BatchNorm2d(outward))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class ResidualClassifier(nn.Module):
    """A ResNet for small images: a stem, stages of doubling width and halving size, mean, linear.

    The defaults are ResNet20's (16, 32, 64 channels, 3 blocks each) for one input channel.

    Example:
        >>> ResidualClassifier()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, *, channels: int = 1, width: int = 16, stages: int = 3, blocks: int = 3, classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        layers, inward = [], width
        for stage in range(stages):
            for block in range(blocks):
                outward = width * 2**stage
                layers.append(ResidualBlock(inward, outward, 2 if stage and not block else 1))
                inward = outward
        self.blocks, self.head = nn.Sequential(*layers), nn.Linear(inward, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))
