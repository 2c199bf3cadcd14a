"""Small nets to study on: deep linear ones, an MLP, plain or masked, a ResNet of ResNet20's size, pixels as tokens."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lineament.nn import MaskedLinear, Residual, SideBySide, group_mask
from lineament.nn.mlp import MLP


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


class GridClassifier(nn.Module):
    """Patches of an image as tokens: embedding, positions, blocks of a mixer over the grid and an MLP, mean, linear.

    Blocks are pre-norm, with a SwiGLU three times as wide as they are.

    Args:
        mixers: one for each block, called as `mixer(x [B, N, D], grid=(Y, X))`: `nn.Field`, `nn.Scanned`.
        width: D. channels: of the image. classes: of the answer. patch: side of a patch, in pixels.
        encode: positions, once behind the embedding: [B, Y, X, D] to the same (`nn.ToeplitzEncoding(D, H, axes=2)`).

    Example:
        >>> from lineament.nn import Field, Mixer, published
        >>> mixers = [Field(Mixer(*published("lightnet", model_width=16, heads=2))) for _ in range(2)]
        >>> GridClassifier(mixers, 16)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        mixers: Iterable[nn.Module],
        width: int,
        *,
        channels: int = 1,
        classes: int = 10,
        patch: int = 1,
        encode: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.embed, self.encode = nn.Conv2d(channels, width, patch, patch), encode
        self.mixers = nn.ModuleList(mixers)
        self.mlps = nn.ModuleList(MLP(width, 3 * width) for _ in self.mixers)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for _ in range(2 * len(self.mixers) + 1))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, Y, X] to logits [B, classes]."""
        x = self.embed(x).movedim(1, -1)
        grid = x.shape[1:3]
        x = (x if self.encode is None else self.encode(x)).flatten(1, 2)
        *norms, last = self.norms
        for mixer, mlp, before, behind in zip(self.mixers, self.mlps, norms[::2], norms[1::2], strict=True):
            x = x + mixer(before(x), grid=grid)
            x = x + mlp(behind(x))
        return self.head(last(x).mean(1))
