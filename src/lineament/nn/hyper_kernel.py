"""Slow networks: small networks of coordinates whose outputs are the kernels of fast ones.

Zhang 2024 (arXiv:2401.17948), after the multiplicative filters of Fathony et al. 2021.
"""

import math

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError, unknown

CONTEXTS = ("batch", "sample")


def coordinates(size: int, axes: int) -> Tensor:
    """Return the grid [size, ..., axes] of positions from -1 to 1."""
    line = torch.linspace(-1, 1, size)
    return torch.stack(torch.meshgrid(*[line] * axes, indexing="ij"), -1)


def linear(inputs: int, outputs: int, *, bias: float = 0.0) -> nn.Linear:
    """Make a linear layer for a linear sequel: Kaiming-uniform weights with gain 1, constant biases."""
    made = nn.Linear(inputs, outputs)
    nn.init.kaiming_uniform_(made.weight, nonlinearity="linear")
    nn.init.constant_(made.bias, bias)
    return made


class HyperKernel(nn.Module):
    """A kernel as a function of position: `h_0 = g_0`, `h_i = g_i * (A_i h_(i-1) + a_i) + p`, `W = A_o h_L + a_o`.

    `g_i(c) = sin(W_i c + b_i)` are waves of the coordinates; p is one learned map for all layers and channels.

    Args:
        size: n, of each axis. axes: 1 or 2. channels: C of the kernel. hidden: h. layers: L.
        omega: scale of the waves' frequencies.

    Example:
        >>> HyperKernel(8, axes=2, channels=3)().shape
        torch.Size([3, 8, 8])
    """

    grid: Tensor

    def __init__(
        self, size: int, *, axes: int = 2, channels: int = 1, hidden: int = 24, layers: int = 2, omega: float = 10.0
    ) -> None:
        super().__init__()
        if min(size, axes, channels, hidden, layers) < 1:
            raise InputError(
                f"size {size}, axes {axes}, channels {channels}, hidden {hidden}, layers {layers}; all >= 1"
            )
        self.size, self.axes = size, axes
        self.register_buffer("grid", coordinates(size, axes), persistent=False)
        self.waves = nn.ModuleList(nn.Linear(axes, hidden) for _ in range(layers + 1))
        self.layers = nn.ModuleList(linear(hidden, hidden, bias=1.0) for _ in range(layers))
        self.out = linear(hidden, channels)
        self.shift = nn.Parameter(torch.zeros([size] * axes))
        with torch.no_grad():
            for i, wave in enumerate(self.waves):
                assert isinstance(wave, nn.Linear)
                gamma = torch._standard_gamma(torch.full_like(wave.weight, 6.0 / (i + 1)))
                wave.weight.mul_(2 * math.pi * omega * gamma)
                wave.bias.zero_()
            self.out.weight.mul_(size ** (-axes / 2))

    def forward(self) -> Tensor:
        """Return the kernel [C, n, ...]."""
        return self.out(self.hidden(self.grid)).movedim(-1, 0)

    def hidden(self, grid: Tensor) -> Tensor:
        """Return the last hidden map [n, ..., h]."""
        h = torch.sin(self.waves[0](grid))
        for wave, layer in zip(list(self.waves)[1:], self.layers, strict=True):
            h = torch.sin(wave(grid)) * layer(h) + self.shift[..., None]
        return h

    def check(self, x: Tensor) -> None:
        """Refuse a map of another size (InputError): its positions have learned shifts of their own."""
        if any(side != self.size for side in x.shape[2:]) or x.dim() != self.axes + 2:
            raise InputError(
                f"x has the shape {list(x.shape)}, but this layer was made for {self.axes} axes of {self.size}; resize "
                "the input, or build the layer for its size"
            )


class LocalKernel(HyperKernel):
    """A small kernel that also depends on what is seen: after each layer `h <- renormed(h) * (B_i z + b)`.

    z is made of the input, averaged down to the kernel's size.

    Args:
        size: k, odd. inputs: channels of the map it looks at. context: "batch" averages z over the batch, as published
            (one kernel for all, which depends on the batch mates); "sample" makes one for each.
    """

    def __init__(
        self, size: int, inputs: int, *, axes: int = 2, channels: int = 1, hidden: int = 24, layers: int = 2,
        omega: float = 10.0, context: str = "batch",
    ) -> None:  # fmt: skip
        super().__init__(size, axes=axes, channels=channels, hidden=hidden, layers=layers, omega=omega)
        if size % 2 == 0:
            raise InputError(f"the local kernel is {size} wide; expected an odd width")
        if context not in CONTEXTS:
            raise unknown("context", context, CONTEXTS)
        self.context = context
        self.reduce, self.mix = linear(inputs, hidden), linear(hidden, hidden)
        self.gates = nn.ModuleList(linear(hidden, hidden, bias=1.0) for _ in range(layers))
        self.kept, self.renewed = (
            nn.Parameter(torch.ones(layers, hidden)),
            nn.Parameter(torch.full((layers, hidden), 0.1)),
        )

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Look at x [N, inputs, ...] and return the kernel, [C, k, ...] or [N, C, k, ...]."""
        pool = nn.functional.adaptive_avg_pool1d if self.axes == 1 else nn.functional.adaptive_avg_pool2d
        z = self.reduce(pool(x, self.size).movedim(1, -1))
        z = nn.functional.gelu(self.mix(z.mean(0) if self.context == "batch" else z))
        h = torch.sin(self.waves[0](self.grid))
        parts = (list(self.waves)[1:], self.layers, self.gates, self.kept, self.renewed)
        for wave, layer, gate, kept, renewed in zip(*parts, strict=True):
            h = torch.sin(wave(self.grid)) * layer(h) + self.shift[..., None]
            h = renormed(h, kept, renewed, self.axes) * gate(z)
        return self.out(h).movedim(-1, -1 - self.axes)


def renormed(h: Tensor, kept: Tensor, renewed: Tensor, axes: int) -> Tensor:
    """s-renormalise h [..., k, ..., hidden]: `kept * stopgrad(h) + renewed * h / |h|`, the norm taken over space.

    So what made h learns through the second part alone.
    """
    norm = h.square().sum(tuple(range(-1 - axes, -1)), keepdim=True).clamp_min(1e-24).sqrt()
    return kept * h.detach() + renewed * h / norm
