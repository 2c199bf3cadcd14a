"""The norm behind a head mixer."""

import torch
from torch import Tensor, nn

from lineament.nn.state import widened

OVER = ("head", "full", "group", "simple")


class OutputNorm(nn.Module):
    """`o / sqrt(mean o^2 + eps)` over a head, the full width or a group of heads, times a weight.

    Args:
        heads, width: H and V. over: "head" (weight [V]), "full" (weight [H V]), "group" (weight [H V]), or "simple":
            the full width and no weight. groups: of "group". eps: inside the root, in the unit of o squared.

    Example:
        >>> o = OutputNorm(2, 4, over="simple")(torch.randn(1, 3, 2, 4))
        >>> o.square().mean((2, 3)).allclose(torch.ones(1, 3), atol=1e-3)
        True
    """

    def __init__(self, heads: int, width: int, *, over: str = "head", groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.parts, self.eps = {"head": heads, "group": groups}.get(over, 1), eps
        wide = width if over == "head" else heads * width
        self.weight = None if over == "simple" else nn.Parameter(torch.empty(wide))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to 1."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, o: Tensor) -> Tensor:
        """Norm o [B, T, H, V]."""
        wide = widened(o).flatten(2).unflatten(2, (self.parts, -1))
        wide = (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).view(o.shape)
        if self.weight is not None:
            wide = wide * self.weight.view(-1, o.shape[3])
        return wide.to(o.dtype)
