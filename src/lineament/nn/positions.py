"""Positions in queries and keys: rotations with fixed or learned angles."""

import torch
from torch import Tensor, nn

from lineament._base.backends import widest


def speeds(half: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Return the angles per token of `half` pairs of channels, `theta^(-j/half)`, as wide as can be."""
    device = device or torch.device("cpu")
    return theta ** (-torch.arange(half, device=device, dtype=widest(device)) / half)


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Turn x [B, T, H, K] by angles [B, T, 1, K/2] (halves convention)."""
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rotate(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Turn x [B, T, H, K] by rotary positions [B, T]."""
    rate = speeds(x.shape[-1] // 2, theta, x.device)
    return turned(x, (position[..., None].to(rate.dtype) * rate)[:, :, None])


class LearnedRotation(nn.Module):
    """LRPE "1d3": a fixed random reflection, then rotary positions with learned angles (arXiv:2210.10340).

    It keeps lengths, and products of a query and a key depend on their distance alone.

    Args:
        width: K, even. theta: where the angles start.
    """

    reflected: Tensor

    def __init__(self, width: int, theta: float = 1e4) -> None:
        super().__init__()
        self.theta = theta
        self.register_buffer("reflected", torch.empty(width))
        self.speed = nn.Parameter(torch.empty(width // 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the reflection and set the angles of RoPE."""
        with torch.no_grad():
            self.reflected.copy_(nn.functional.normalize(torch.randn(len(self.reflected)), dim=0))
            self.speed.copy_(speeds(len(self.speed), self.theta))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Turn x [B, T, H, K] by positions [B, T]."""
        direction = nn.functional.normalize(self.reflected.to(x.dtype), dim=0)  # unit in whatever dtype
        x = x - 2 * (x @ direction)[..., None] * direction
        wide = widest(x.device)
        return turned(x, (position[..., None].to(wide) * self.speed.to(wide))[:, :, None])
