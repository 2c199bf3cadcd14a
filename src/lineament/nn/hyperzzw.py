"""One block of the Terminator: ten branches on hyper-kernels, concentrated by a bottleneck. No residuals, no attention.

Zhang 2024 (arXiv:2401.17948). x is [N, C, n, n], or [N, C, n] for sequences (where the product over space is a long
convolution: `ops.hyper_product`). Activations are products of products: keep them in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.nn.hyper_kernel import HyperKernel, LocalKernel
from lineament.nn.standardization import ByBatch, GroupedStandardization, by_sample
from lineament.ops.hyper import hyper_product, local_product


@dataclass(frozen=True, kw_only=True)
class HyperConfig:
    """What the blocks of one network share.

    Attributes:
        size: n, of each axis. axes: 2 for images, 1 for sequences.
        kernels: widths of the four local branches, odd.
        global_hidden, local_hidden, channel_hidden, gate_hidden, space_hidden: widths of the slow networks (of the
            global kernel, the local ones, HCI's, and HI's over channels and space).
        local_layers: depth of the local ones.
        omega: of all of them.
        context: of the local kernels, and statistics: of the standardisation by batch. The published ones ("batch"
            for both) make a sample's result depend on its batch mates, in eval mode too.
        gated: weights are Z * W; False leaves W alone, for comparison.
    """

    size: int
    axes: int = 2
    kernels: tuple[int, int, int, int] = (3, 9, 5, 7)
    global_hidden: int = 64
    local_hidden: int = 32
    channel_hidden: int = 32
    gate_hidden: int = 16
    space_hidden: int = 64
    local_layers: int = 2
    omega: float = 10.0
    context: str = "batch"
    statistics: str = "batch"
    gated: bool = True

    def __post_init__(self) -> None:
        if self.axes not in (1, 2):
            raise InputError(f"axes is {self.axes}; expected 2 (images) or 1 (sequences)")
        if len(self.kernels) != 4:
            raise InputError(f"kernels is {self.kernels}; a block has four local branches")


def pointwise(axes: int, inputs: int, outputs: int) -> nn.Module:
    """Make a 1 x 1 convolution for a linear sequel: Kaiming-uniform with gain 1, biases 0."""
    made = (nn.Conv1d if axes == 1 else nn.Conv2d)(inputs, outputs, 1)
    nn.init.kaiming_uniform_(made.weight, nonlinearity="linear")
    nn.init.zeros_(made.bias)  # pyright: ignore[reportArgumentType]
    return made


class RecursiveGate(nn.Module):
    """RGU: `k = W_k x`, `v = W_v x`, `y = W_y (GELU(IS(k * W_q v)) + p)`, p one learned map."""

    def __init__(self, channels: int, config: HyperConfig) -> None:
        super().__init__()
        self.k, self.v, self.q, self.y = (pointwise(config.axes, channels, channels) for _ in range(4))
        self.shift = nn.Parameter(torch.zeros([config.size] * config.axes))

    def forward(self, x: Tensor) -> Tensor:
        return self.y(nn.functional.gelu(by_sample(self.k(x) * self.q(self.v(x)))) + self.shift)


class ChannelInteraction(nn.Module):
    """HCI: channel means y, `x * sigmoid((y * W_gc) * y)`, W_gc a hyper-kernel over the channels."""

    def __init__(self, channels: int, config: HyperConfig) -> None:
        super().__init__()
        self.kernel = HyperKernel(channels, axes=1, hidden=config.channel_hidden, omega=config.omega)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).mean(2)
        return x * torch.sigmoid(y * self.kernel()[0] * y).view(*y.shape, *[1] * (x.dim() - 2))


class Interaction(nn.Module):
    """HI: gate x by the channel scores and the space scores of a high-level map o."""

    def __init__(self, channels: int, config: HyperConfig) -> None:
        super().__init__()
        self.channel = HyperKernel(channels, axes=1, hidden=config.gate_hidden, omega=config.omega)
        self.space = HyperKernel(config.size, axes=config.axes, hidden=config.space_hidden, omega=config.omega)

    def forward(self, o: Tensor, x: Tensor) -> Tensor:
        c, s = o.flatten(2).mean(2), o.mean(1, keepdim=True)
        by_channel = (c * self.channel()[0] * c).view(*c.shape, *[1] * (x.dim() - 2))
        return x * torch.sigmoid(s * self.space() * s * by_channel)


class LocalBranch(nn.Module):
    """HyperZZW_L: a small kernel made of one map, applied to another: `GELU(BS(W_1x1 (kernel conv x))) + bias`."""

    def __init__(self, channels: int, width: int, config: HyperConfig) -> None:
        super().__init__()
        self.kernel = LocalKernel(
            width, channels, axes=config.axes, channels=channels, hidden=config.local_hidden,
            layers=config.local_layers, omega=config.omega, context=config.context,
        )  # fmt: skip
        self.mix, self.standardize = pointwise(config.axes, channels, channels), ByBatch(channels, config.statistics)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, source: Tensor, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.standardize(self.mix(local_product(x, self.kernel(source))))) + self.bias


class HyperBlock(nn.Module):
    """SFNE: slow networks make the kernels, ten fast branches use them, a bottleneck concentrates.

    Args:
        channels: C. factor: f; C f channels come out, a multiple of 12.
        config: of the network. layers: depth of the global slow network. dropout: of whole channels.
        before: channels of earlier blocks' outputs that are joined in; each divides C.

    Example:
        >>> block = HyperBlock(3, 4, HyperConfig(size=8))
        >>> out, kernel = block(torch.rand(2, 3, 8, 8))
        >>> out.shape, kernel.shape
        (torch.Size([2, 12, 8, 8]), torch.Size([3, 8, 8]))
    """

    def __init__(
        self, channels: int, factor: int, config: HyperConfig, *, layers: int = 2, dropout: float = 0.0,
        before: Sequence[int] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        if any(channels % c for c in before):
            raise InputError(f"earlier outputs of {list(before)} channels can't be repeated to {channels}")
        self.config = config
        self.kernel = HyperKernel(
            config.size, axes=config.axes, channels=channels, hidden=config.global_hidden, layers=layers,
            omega=config.omega,
        )  # fmt: skip
        self.on_context, self.on_input = RecursiveGate(channels, config), RecursiveGate(channels, config)
        self.mix, self.channel = pointwise(config.axes, channels, channels), ChannelInteraction(channels, config)
        self.interaction = Interaction(channels, config)
        self.local = nn.ModuleList(LocalBranch(channels, width, config) for width in config.kernels)
        self.bottleneck = pointwise(config.axes, (10 + len(before)) * channels, channels * factor)
        self.standardize = GroupedStandardization(channels * factor, config.statistics)
        self.bias = nn.Parameter(torch.zeros(()))
        self.dropout = (nn.Dropout1d if config.axes == 1 else nn.Dropout2d)(dropout)

    def forward(self, x: Tensor, before: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """Return the output [N, C f, ...] and the global kernel [C, n, ...], for the loss on kernels."""
        self.kernel.check(x)
        w = self.kernel()
        z = x if self.config.gated else torch.ones_like(x)
        fast = by_sample(self.on_context(z * w) + self.on_input(x))
        mixed, channel = by_sample(self.mix(x)), by_sample(self.channel(x))
        o, o_mixed, o_channel = (hyper_product(z, w, other) for other in (fast, mixed, channel))
        one, two, three, four = self.local
        joined = [
            o, two(channel, x), fast, o_mixed, one(x, channel), torch.sigmoid(o) * o, three(mixed, x), o_channel,
            four(x, mixed), self.interaction(o, x),
        ]  # fmt: skip
        joined += [y.repeat(1, x.shape[1] // y.shape[1], *[1] * (x.dim() - 2)) for y in before]
        y = self.standardize(self.bottleneck(torch.cat(joined, 1)))
        return self.dropout(nn.functional.gelu(y) + self.bias), w
