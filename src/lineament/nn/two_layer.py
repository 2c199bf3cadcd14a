"""Two-layer nets on pairs of symbols, several at a time: what grokking is studied on (arXiv:2509.21519)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, relu, silu

from lineament._base.errors import InputError, unknown

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "square": torch.square, "relu": relu, "silu": silu, "relu2": lambda x: relu(x).square(),
}  # fmt: skip


class TwoLayer(nn.Module):
    """`Y = s(X W) V`, X the one-hot pairs `[e_g, e_h]`, no biases; S nets of the same shape side by side.

    With `residual` layers in between, `F <- s(F + F W_l)`.

    Args:
        symbols: M. width: K. activation: s, of `ACTIVATIONS`. seeds: one net for each.
        top: what V is multiplied by at the start; 0 leaves out the noise of a random top layer.
        residual: how many layers in between.

    Attributes:
        W: S matrices [2 M, K]. V: S matrices [K, M]; matrices of their own, as some optimisers want them.

    Raises:
        InputError: an unknown activation, or no width.

    Example:
        >>> TwoLayer(5, 8, seeds=(0, 1))(torch.tensor([[1, 2], [0, 4], [3, 3]])).shape
        torch.Size([2, 3, 5])
    """

    def __init__(
        self, symbols: int, width: int, *, activation: str = "square", seeds: tuple[int, ...] = (0,), top: float = 1.0,
        residual: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        if min(symbols, width, len(seeds)) < 1:
            raise InputError(f"{symbols} symbols, width {width}, {len(seeds)} seeds; expected at least 1 of each")
        self.symbols, self.activation = symbols, ACTIVATIONS[activation]

        def drawn(rows: int, columns: int, offset: int) -> nn.ParameterList:
            """Draw as `nn.Linear` does, each net from its own seed."""
            made = []
            for seed in seeds:
                random = torch.Generator().manual_seed(seed * 1009 + offset)
                made.append(nn.Parameter((2 * torch.rand(rows, columns, generator=random) - 1) / rows**0.5))
            return nn.ParameterList(made)

        self.W, self.V = drawn(2 * symbols, width, 0), drawn(width, symbols, 1)
        self.between = nn.ModuleList(drawn(width, width, 2 + layer) for layer in range(residual))
        with torch.no_grad():
            for v in self.V:
                v.mul_(top)

    def features(self, pairs: Tensor) -> Tensor:
        """Return F [S, n, K] of pairs [n, 2], or [S, n, 2] with pairs of its own for each net."""
        S, W = len(self.W), torch.cat(list(self.W))
        start = torch.arange(S, device=pairs.device)[:, None] * 2 * self.symbols
        g, h = (pairs if pairs.dim() == 3 else pairs.expand(S, -1, -1)).unbind(-1)
        F = self.activation(embedding(start + g, W) + embedding(start + self.symbols + h, W))
        for layer in self.between:
            F = self.activation(F + F @ torch.stack(list(layer)))  # pyright: ignore[reportArgumentType]
        return F

    def forward(self, pairs: Tensor) -> Tensor:
        """Map pairs to scores [S, n, M]."""
        return self.features(pairs) @ torch.stack(list(self.V))
