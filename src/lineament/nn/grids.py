"""Layers over grids of any axes: LightNet's in one pass, and any causal layer in several scans of the lines."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.nn.lightnet import LightNet, global_field
from lineament.nn.mixer import Mixer


class Field(nn.Module):
    """A LightNet layer in which all tokens of a grid read one sum over all of them (arXiv:2405.21022).

    Parameters are those of the causal layer, which it wraps. The paper's own form for images could not be read; this
    one follows from its recurrence, whose last token sees just this.

    Args:
        mixer: `Mixer(*published("lightnet", ...))`. Its `theta` is of MD-LRPE, None for no positions.

    Example:
        >>> from lineament.nn import published
        >>> layer = Field(Mixer(*published("lightnet", model_width=16, heads=2)))
        >>> layer(torch.randn(3, 12, 16), grid=(3, 4)).shape
        torch.Size([3, 12, 16])
    """

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        filling = mixer.heads.filling
        if not isinstance(filling, LightNet) or filling.start == 0 or mixer.config.full_heads or mixer.slots.conv:
            raise InputError(
                f"a field is made of a LightNet layer without virtual zero, full heads and convolution; given "
                f"{mixer.config.kind!r} with {mixer.config.options}, {mixer.slots}"
            )
        self.mixer, self.theta = mixer, filling.theta

    def forward(self, x: Tensor, *, grid: Sequence[int], mask: Tensor | None = None) -> Tensor:
        """Mix over all tokens.

        Args:
            x: [B, N, D]: tokens of a grid, its last axis the fastest; class tokens stand before them.
            grid: sizes of its axes. mask: [B, N], nonzero for real tokens.
        """
        q, k, v = self.mixer.projected(x)
        scale = self.mixer.config.key_width**-0.5 if self.mixer.slots.scale is None else self.mixer.slots.scale
        where = None if self.theta is None else coordinates(grid, x.shape[1] - math.prod(grid), x.device)[None]
        o = global_field(q * scale, k, v, place=where, theta=self.theta or 1.0, mask=mask)
        return self.mixer.finished(o, x)


class Scanned(nn.Module):
    """A causal layer made to see a whole grid: it runs over the tokens in several orders and the outputs are summed.

    All scans share its parameters, and run as one batch.

    Args:
        mixer: any causal layer. scans: 1 (in order), 2 (and backwards), or twice the number of axes (along every axis,
            both ways).

    Example:
        >>> from lineament.nn import published
        >>> layer = Scanned(Mixer(*published("lightning", model_width=16, heads=2)), scans=4)
        >>> layer(torch.randn(3, 12, 16), grid=(3, 4)).shape
        torch.Size([3, 12, 16])
    """

    def __init__(self, mixer: Mixer, scans: int = 2) -> None:
        super().__init__()
        self.mixer, self.scans = mixer, scans

    def forward(self, x: Tensor, *, grid: Sequence[int]) -> Tensor:
        """Mix over all tokens x [B, N, D] of a grid, its last axis the fastest."""
        coordinates(grid, x.shape[1] - math.prod(grid))
        order = scan_orders(grid, self.scans, x.device)
        y = self.mixer(x[:, order].transpose(0, 1).flatten(0, 1))  # [scans B, N, D]
        back = order.argsort(1)[:, None, :, None].expand(-1, len(x), -1, x.shape[2])
        return y.unflatten(0, (self.scans, -1)).gather(2, back).sum(0)


def coordinates(grid: Sequence[int], before: int = 0, device: torch.device | None = None) -> Tensor:
    """Return where the tokens of a grid stand, [before + N, axes]; `before` class tokens stand at 0.

    Raises:
        InputError: `before` is negative: there are fewer tokens than the grid has.

    Example:
        >>> coordinates((2, 2), 1).tolist()
        [[0, 0], [0, 0], [0, 1], [1, 0], [1, 1]]
    """
    total = math.prod(grid)
    if not grid or total < 1 or before < 0:
        raise InputError(f"a grid of {' x '.join(map(str, grid))} has {total} tokens; x has {total + before}")
    index = torch.arange(total, device=device)
    place = torch.stack([index // math.prod(grid[i + 1 :]) % size for i, size in enumerate(grid)], dim=1)
    return torch.nn.functional.pad(place, (0, 0, before, 0))


def scan_orders(grid: Sequence[int], scans: int, device: torch.device | None = None) -> Tensor:
    """Return the orders of a grid's tokens, [scans, N].

    Example:
        >>> scan_orders((2, 2), 4).tolist()
        [[0, 1, 2, 3], [3, 2, 1, 0], [0, 2, 1, 3], [3, 1, 2, 0]]
    """
    if scans not in (1, 2, 2 * len(grid)):
        raise InputError(f"scans={scans} for {len(grid)} axes; expected 1, 2 or {2 * len(grid)}")
    index = torch.arange(math.prod(grid), device=device).view(*grid)
    lines = [index.movedim(axis, -1).flatten() for axis in range(len(grid) - 1, -1, -1)]
    return torch.stack([way for line in lines for way in (line, line.flip(0))][:scans])
