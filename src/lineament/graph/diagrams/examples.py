"""One attention in several spellings, which a diagram must not tell apart, and a U-Net: for tests and the paper."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention, with its inside written by views, by the fused operator or by einsum.

    Args:
        spelling: "view", "sdpa", "causal" (sdpa, another algorithm) or "einsum".
        width, heads: of the model.
    """

    def __init__(self, spelling: str, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.spelling, self.heads = spelling, heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Attend over [B, T, D]."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        scale = q.shape[-1] ** 0.5
        if self.spelling == "einsum":
            weights = torch.einsum("bqhd,bkhd->bhqk", q / scale, k).softmax(-1)
            return self.o(torch.einsum("...hqk,...khd->...qhd", weights, v).flatten(2))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self.spelling == "view":
            found = (q @ k.transpose(-1, -2) / scale).softmax(-1) @ v
        else:
            found = F.scaled_dot_product_attention(q, k, v, is_causal=self.spelling == "causal")
        return self.o(found.transpose(1, 2).reshape(x.shape))


class TorchAttention(nn.Module):
    """The same by `nn.MultiheadAttention`, whose three projections are packed into one matrix."""

    def __init__(self, width: int = 24, heads: int = 4, weights: bool = False) -> None:
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(width, heads, batch_first=True), weights

    def forward(self, x: Tensor) -> Tensor:
        """Attend over [B, T, D]."""
        return self.attention(x, x, x, need_weights=self.weights)[0]


class UNet(nn.Module):
    """Two levels, joined by a copy: dilated, grouped and transposed convolutions, group norm, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=2, dilation=2)
        self.norm, self.up = nn.GroupNorm(4, 12), nn.ConvTranspose2d(12, 6, 3, 2, 1, 1)
        self.join, self.out = nn.Conv2d(14, 10, 3, padding=1, groups=2), nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures [B, 1, Y, X] of even sides to [B, 2, Y, X]."""
        a = F.relu(self.down1(x))
        b = F.relu(self.norm(self.down2(F.max_pool2d(a, 2))))
        return self.out(F.silu(self.join(torch.cat([a, self.up(b)], 1))))


def attention(spelling: str) -> nn.Module:
    """Return attention of width 24 with 4 heads: view, sdpa, causal, einsum, module, or module with weights."""
    if spelling.startswith("module"):
        return TorchAttention(weights=spelling.endswith("weights")).eval()
    return Attention(spelling).eval()
