"""Maps of R^D onto itself that can be undone: rotation, subspace, any invertible matrix, reversible network, order.

Each is `z = map(h)` with `h = map.inverse(z, h)`; the second argument is what stood there before, which only a map onto
fewer than D coordinates needs. Compute them in float32 or wider: the inverse of a deep reversible network drifts in
half precision.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lineament._base.errors import InputError

ORTHOGONAL = ("matrix_exp", "cayley", "householder")


class Rotation(nn.Module):
    """`z = h Q`, the columns of Q orthonormal; the inverse changes h along them alone, `h + (z - h Q) Q^T`.

    Args:
        width: D. rank: coordinates of z, D if None. From a few thousand dimensions on take the few that are needed.
        kind: how Q stays orthonormal, of `ORTHOGONAL`, as in `torch.nn.utils.parametrizations.orthogonal`; None lets
            torch choose (Householder reflections for a low rank).

    Raises:
        InputError: more coordinates than dimensions.

    Example:
        >>> rotation, h = Rotation(4), torch.arange(4.0)
        >>> bool(torch.allclose(rotation.inverse(rotation(h), h), h, atol=1e-5))
        True
    """

    def __init__(self, width: int, *, rank: int | None = None, kind: str | None = None) -> None:
        super().__init__()
        rank = width if rank is None else rank
        if not 1 <= rank <= width:
            raise InputError(f"a rotation of {width} dimensions has 1 to {width} coordinates; given rank {rank}")
        linear = nn.Linear(width, rank, bias=False)
        nn.init.orthogonal_(linear.weight)
        self.linear = parametrizations.orthogonal(linear, orthogonal_map=kind)

    @property
    def Q(self) -> Tensor:
        """The orthonormal columns [D, rank]."""
        return self.linear.weight.T  # pyright: ignore[reportReturnType]

    def forward(self, h: Tensor) -> Tensor:
        """Map [..., D] to [..., rank]."""
        return h @ self.Q

    def inverse(self, z: Tensor, h: Tensor) -> Tensor:
        """Map [..., rank] back to [..., D], given what stood there."""
        Q = self.Q
        if Q.shape[0] == Q.shape[1]:
            return z @ Q.T
        return h + (z - h @ Q) @ Q.T


class InvertibleLinear(nn.Module):
    """`z = h W` for any invertible W [D, D]; it starts orthogonal and is undone by solving.

    Example:
        >>> linear, h = InvertibleLinear(3), torch.arange(3.0)
        >>> bool(torch.allclose(linear.inverse(linear(h)), h, atol=1e-5))
        True
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(width, width)))

    def forward(self, h: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return h @ self.weight

    def inverse(self, z: Tensor, h: Tensor | None = None) -> Tensor:
        """Map back."""
        return z @ torch.linalg.inv(self.weight)


class Reversible(nn.Module):
    """A reversible network: B times `a <- a + F(b)`, `b <- b + G(a)` on the two halves (a, b) of h.

    F and G are ReLU MLPs; nothing is permuted between blocks (Gomez et al. 2017, arXiv:1707.04585).

    Args:
        width: D, at least 2. blocks: B. hidden: width of F and G, D if None. depth: their hidden layers.

    Raises:
        InputError: a number is out of range.

    Example:
        >>> network, h = Reversible(5, blocks=3), torch.arange(5.0)
        >>> bool(torch.allclose(network.inverse(network(h)), h, atol=1e-5))
        True
    """

    def __init__(self, width: int, *, blocks: int = 10, hidden: int | None = None, depth: int = 1) -> None:
        super().__init__()
        hidden = width if hidden is None else hidden
        if width < 2 or min(blocks, hidden, depth) < 1:
            raise InputError(
                f"width {width}, {blocks} blocks, {hidden} hidden, depth {depth}; expected width >= 2, others >= 1"
            )
        a, b = self.halves = width // 2, width - width // 2
        self.F = nn.ModuleList(_mlp(b, hidden, depth, a) for _ in range(blocks))
        self.G = nn.ModuleList(_mlp(a, hidden, depth, b) for _ in range(blocks))

    def forward(self, h: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        a, b = h.split(self.halves, -1)
        for F, G in zip(self.F, self.G, strict=True):
            a = a + F(b)
            b = b + G(a)
        return torch.cat([a, b], -1)

    def inverse(self, z: Tensor, h: Tensor | None = None) -> Tensor:
        """Map back, block by block from the last."""
        a, b = z.split(self.halves, -1)
        for F, G in zip(reversed(self.F), reversed(self.G), strict=True):
            b = b - G(a)
            a = a - F(b)
        return torch.cat([a, b], -1)


class Reordered(nn.Module):
    """The coordinates of h in another order: nothing is learned, and each coordinate stays a neuron.

    Example:
        >>> Reordered([2, 0, 1])(torch.tensor([5.0, 6.0, 7.0])).tolist()
        [7.0, 5.0, 6.0]
    """

    order: Tensor
    back: Tensor

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        if sorted(order) != list(range(len(order))):
            raise InputError(f"{list(order)[:8]} is no order of {len(order)} coordinates")
        self.register_buffer("order", torch.tensor(list(order)))
        self.register_buffer("back", self.order.argsort())

    def forward(self, h: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return h[..., self.order]

    def inverse(self, z: Tensor, h: Tensor | None = None) -> Tensor:
        """Map back."""
        return z[..., self.back]


BIJECTIONS: dict[str, Callable[[int], nn.Module]] = {
    "rotation": Rotation,
    "linear": InvertibleLinear,
    "reversible": Reversible,
}
"""By name, for a width; `lambda width: Reversible(width, blocks=1, hidden=16)` is as good as a name."""


def _mlp(inputs: int, hidden: int, depth: int, outputs: int) -> nn.Sequential:
    widths = [inputs, *[hidden] * depth]
    layers = [x for a, b in pairwise(widths) for x in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))
