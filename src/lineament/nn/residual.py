"""Residual layers one after another, side by side, and in groups between the two (Bermeitinger et al. 2023)."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError


class Residual(nn.Module):
    """`x + scale * branch(x)`.

    Args:
        branch: maps [B, ...] to the same shape. scale: 1/sqrt(n) keeps a sum of n branches at the size of one.

    Example:
        >>> Residual(nn.Linear(4, 4))(torch.zeros(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(self, branch: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.branch, self.scale = branch, scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.update(x)

    def update(self, x: Tensor) -> Tensor:
        """Return what is added to x."""
        return self.branch(x) if self.scale == 1 else self.scale * self.branch(x)


class SideBySide(nn.Module):
    """`x + sum_i (layer_i(x) - x)`: residual layers that read the same input.

    Layers of transformers work as well as `Residual`: they may take further arguments (each gets them all, its own
    place in the cache included) and return a tuple whose first entry are the hidden states; what else they return is
    the last one's. One layer alone is that layer, to the bit.

    Example:
        >>> layers = [Residual(nn.Linear(4, 4)), Residual(nn.Linear(4, 4))]
        >>> x = torch.ones(2, 4)
        >>> together = SideBySide(layers)(x)
        >>> bool(torch.allclose(together, x + layers[0].branch(x) + layers[1].branch(x)))
        True
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if not len(self.layers):
            raise InputError("there are no layers to put side by side; give at least one")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(self.layers) == 1:
            return self.layers[0](x, *args, **kwargs)
        total, output = x, None
        for layer in self.layers:
            if isinstance(layer, Residual):
                output = total = total + layer.update(x)
                continue
            output = layer(x, *args, **kwargs)
            total = total + (_hidden(output) - x)
        return (total, *output[1:]) if isinstance(output, tuple) else total


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class Through(nn.Module):
    """Pass the hidden states on as they are: what stands where a layer has moved into a group before it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


class Fused(nn.Module):
    """Branches of one shape as one wide map: `sum_i act(W_i x + b_i)` by one matmul or convolution.

    Parameters and outputs are those of the branches; `scale` multiplies the sum.

    Args:
        wide: `nn.Linear` or `nn.Conv2d` with `count` times as many output channels as its input has. act: between the
            map and the sum; None for none.
    """

    def __init__(self, wide: nn.Module, act: nn.Module | None, count: int) -> None:
        super().__init__()
        self.wide, self.act, self.count = wide, act, count

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x)
        axis = -1 if isinstance(self.wide, nn.Linear) else 1
        y = y.unflatten(axis, (self.count, -1))
        y = y if self.act is None else self.act(y)
        return y.sum(-2 if axis == -1 else 1)


def fuse(layers: Iterable[nn.Module]) -> Residual:
    """Return residual layers side by side as one wide layer; their parameters are copied.

    Args:
        layers: `Residual` whose branches are a `Linear` or `Conv2d` of equal settings, or that and one activation that
            acts on every number alone.

    Raises:
        InputError: other branches, or branches, activations or scales that differ.

    Example:
        >>> layers = [Residual(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())) for _ in range(4)]
        >>> fuse(layers).branch.wide
        Conv2d(3, 12, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    layers = list(layers)
    parts = [_parts(layer) for layer in layers]
    first = layers[0] if layers else None
    if first is None or not isinstance(first, Residual) or any(part is None for part in parts):
        raise InputError("only Residual layers of a Linear or Conv2d and at most one activation are fused")
    maps, acts = zip(*(part for part in parts if part is not None), strict=True)
    kinds = {(str(m), m.bias is None, str(a), layer.scale) for m, a, layer in zip(maps, acts, layers, strict=True)}
    if len(kinds) > 1:
        raise InputError(f"branches that differ can't be fused: {', '.join(sorted(k[0] for k in kinds))}")
    out = len(maps[0].weight)
    if maps[0].weight.shape[1] != out:
        raise InputError(f"{maps[0]} changes the number of channels; a residual branch keeps it")
    wide = _widened(maps)
    with torch.no_grad():
        wide.weight.copy_(torch.cat([m.weight for m in maps]))
        if maps[0].bias is not None:
            wide.bias.copy_(torch.cat([m.bias for m in maps]))
    return Residual(Fused(wide, acts[0], len(maps)), first.scale)


def _parts(layer: nn.Module) -> tuple[Any, nn.Module | None] | None:
    if not isinstance(layer, Residual):
        return None
    inner = list(layer.branch) if isinstance(layer.branch, nn.Sequential) else [layer.branch]
    if not 1 <= len(inner) <= 2 or not isinstance(inner[0], nn.Linear | nn.Conv2d):
        return None
    if len(inner) == 2 and (any(True for _ in inner[1].parameters()) or isinstance(inner[1], nn.Softmax)):
        return None
    return inner[0], inner[1] if len(inner) == 2 else None


def _widened(maps: tuple[Any, ...]) -> Any:
    like, count = maps[0], len(maps)
    options = {"bias": like.bias is not None, "device": like.weight.device, "dtype": like.weight.dtype}
    if isinstance(like, nn.Linear):
        return nn.Linear(like.in_features, count * like.out_features, **options)
    if like.groups != 1:
        raise InputError(f"{like} has groups; side by side they would not be one convolution")
    return nn.Conv2d(like.in_channels, count * like.out_channels, like.kernel_size, like.stride, like.padding,
                     like.dilation, padding_mode=like.padding_mode, **options)  # fmt: skip


def check_groups(groups: Sequence[Sequence[int]], count: int) -> None:
    """Refuse groups that are not runs of neighbouring layers, each layer in one of them at most."""
    seen: set[int] = set()
    for group in groups:
        if not group or list(group) != list(range(group[0], group[0] + len(group))):
            raise InputError(f"group {list(group)} is no run of neighbouring layers, such as [3, 4]")
        if group[0] < 0 or group[-1] >= count:
            raise InputError(f"group {list(group)} is outside layers 0 to {count - 1}")
        if twice := seen.intersection(group):
            raise InputError(f"layer {min(twice)} is in two groups")
        seen.update(group)
