"""Feature maps phi of linear attention: [..., H, K] -> [..., H, F], with weights per head.

`phi(q) . phi(k)` stands for `exp(q . k)`, so both sides get inputs whose product is the teacher's logit: the mixers
hand them `q K^-1/4` and `k K^-1/4`. All maps but cosFormer's are non-negative functions of one token alone.
"""

import math

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError, unknown
from lineament.ops.window_state import code_shares, expanded


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply every head by its own matrix: [..., H, K] x [H, K, F] -> [..., H, F]."""
    flat = x.reshape(-1, x.shape[-2], x.shape[-1]).transpose(0, 1)
    return torch.bmm(flat, weight).transpose(0, 1).unflatten(0, x.shape[:-2])


def _eye(heads: int, width: int, features: int) -> Tensor:
    return torch.eye(width, features).expand(heads, -1, -1).clone()


class Hedgehog(nn.Module):
    """Learned spiky map: `phi(x) = [softmax(y), softmax(-y)]`, `y = e^tau (x W + b)`, W = identity at the start.

    Args:
        heads: H. width: K. features: D', columns of W (K if None); the map has 2 D' features.
        form: "softmax" (each half on its own), "exp" (`[e^y, e^-y]`, exponents cut at 30) or "joint" (one softmax over
            `[2y, -2y]`, as flash-linear-attention has it).
        temperature: learn one tau per head. bias: learn b.

    Example:
        >>> Hedgehog(2, 4)(torch.randn(1, 3, 2, 4)).sum(-1).allclose(torch.tensor(2.0))
        True
    """

    def __init__(
        self,
        heads: int,
        width: int,
        *,
        features: int | None = None,
        form: str = "softmax",
        temperature: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if form not in ("softmax", "exp", "joint"):
            raise unknown("form of the hedgehog map", form, ["softmax", "exp", "joint"])
        half = features or width
        self.shape, self.form, self.features = (heads, width, half), form, 2 * half
        self.weight = nn.Parameter(torch.empty(heads, width, half))
        self.bias = nn.Parameter(torch.empty(heads, half)) if bias else None
        self.temperature = nn.Parameter(torch.empty(heads)) if temperature else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set W to the identity, b and tau to 0."""
        with torch.no_grad():
            self.weight.copy_(_eye(*self.shape))
            for p in (self.bias, self.temperature):
                if p is not None:
                    p.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., H, K] to [..., H, 2 D']."""
        y = per_head(x, self.weight.to(x.dtype))
        if self.bias is not None:
            y = y + self.bias
        if self.temperature is not None:
            y = y * self.temperature.exp()[:, None]
        if self.form == "exp":
            y = y.clamp(-30, 30)
            return torch.cat([y.exp(), (-y).exp()], dim=-1).to(x.dtype)
        if self.form == "joint":
            return torch.cat([2 * y, -2 * y], dim=-1).softmax(-1).to(x.dtype)
        return torch.stack([y, -y], dim=-2).softmax(-1).flatten(-2).to(x.dtype)


class Product(nn.Module):
    """Two learned codebooks multiplied out, `phi(x) = softmax(x A + a) (x) softmax(x B + b)`: C^2 features.

    A key falls into one of C^2 cells, a query reads the cells it would look at. With e^(sum of both log sums) as the
    scale of a query, `phi(q).phi(k)` is exactly `e^(q . c(k))` where keys fall into their cells wholly (c: the cell's
    centre), so the far part starts on softmax's own scale. `nn.codes.start_codes` sets the codebooks from sample keys.

    Args:
        heads: H. width: K. codes: C of each book.

    Example:
        >>> Product(2, 4, codes=3)(torch.randn(1, 5, 2, 4)).sum(-1).allclose(torch.tensor(1.0))
        True
    """

    def __init__(self, heads: int, width: int, *, codes: int = 16) -> None:
        super().__init__()
        if codes < 1:
            raise InputError(f"codes={codes}; a codebook needs at least one code")
        self.codes, self.features = codes, codes * codes
        self.weight = nn.Parameter(torch.empty(heads, width, 2 * codes))
        self.bias = nn.Parameter(torch.empty(heads, 2 * codes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the codes, zero the biases."""
        with torch.no_grad():
            self.weight.normal_(std=self.weight.shape[1] ** -0.25)
            self.bias.zero_()

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map [..., H, K] to both factors side by side [..., H, 2 C], and the sum of both log sums [..., H]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        parts, total = code_shares(per_head(x, self.weight.to(x.dtype)).to(wide) + self.bias.to(wide), self.codes)
        return parts.to(x.dtype), total

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., H, K] to [..., H, C^2]."""
        return expanded(self.factors(x)[0], self.codes)


class Elu(nn.Module):
    """`1 + elu(x)`."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.features = width

    def forward(self, x: Tensor) -> Tensor:
        return 1 + nn.functional.elu(x)


class Relu(nn.Module):
    """`relu(x)`."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.features = width

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


class Constant(nn.Module):
    """`1`: no map at all. What is left is a (gated) running mean of the values, the control a learned map must beat."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.features = 1

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., H, K] to [..., H, 1]."""
        return x.new_ones(*x.shape[:-1], 1)


class T2R(nn.Module):
    """`relu(x W + b)`, learned; W starts orthogonal with random signs, b = 0."""

    def __init__(self, heads: int, width: int, *, features: int | None = None) -> None:
        super().__init__()
        self.features = features or width
        self.weight = nn.Parameter(torch.empty(heads, width, self.features))
        self.bias = nn.Parameter(torch.empty(heads, self.features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W, zero b."""
        with torch.no_grad():
            for w in self.weight:
                nn.init.orthogonal_(w)
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return (per_head(x, self.weight.to(x.dtype)) + self.bias.to(x.dtype)).relu()


class Performer(nn.Module):
    """Positive random features `exp(x w - |x|^2/2) / sqrt(F)` with fixed orthogonal w; exponents cut at 30."""

    weight: Tensor

    def __init__(self, heads: int, width: int, *, features: int | None = None, seed: int = 0) -> None:
        super().__init__()
        self.features, self.seed = features or 2 * width, seed
        self.register_buffer("weight", torch.empty(heads, width, self.features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the directions from the map's own seed."""
        heads, width, features = self.weight.shape
        if self.weight.device.type == "meta":
            return
        g = torch.Generator().manual_seed(self.seed)
        blocks = [torch.randn(heads, width, width, generator=g) for _ in range(-(-features // width))]
        turned = [q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None] for q, r in map(torch.linalg.qr, blocks)]
        directions = torch.cat(turned, dim=-1)[..., :features]  # the signs make them uniform: QR alone is biased
        norms = torch.randn(heads, features, width, generator=g).norm(dim=-1)
        with torch.no_grad():
            self.weight.copy_(directions * norms[:, None])

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        power = per_head(wide, self.weight.to(wide.dtype)) - wide.square().sum(-1, keepdim=True) / 2
        return (power.clamp(max=30).exp() / math.sqrt(self.features)).to(x.dtype)


class Taylor(nn.Module):
    """`[1, x, vec(x x^T)/sqrt(2)]`, so that phi(q).phi(k) = 1 + s + s^2/2. F = 1 + K + K^2: mind the state's size."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.features = 1 + width + width * width

    def forward(self, x: Tensor) -> Tensor:
        square = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2)
        return torch.cat([torch.ones_like(x[..., :1]), x, square], dim=-1)


class CosFormer(nn.Module):
    """`relu(x) (cos, sin)(pi n / 2M)`: weights fall with the distance i - j up to M tokens. Needs positions."""

    needs_positions = True

    def __init__(self, heads: int, width: int, *, reach: int = 32768) -> None:
        super().__init__()
        if reach < 1:
            raise InputError(f"reach={reach}; cosFormer's weight must fall over at least 1 token")
        self.features, self.reach = 2 * width, reach

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Map x [B, T, H, K] at positions [B, T]."""
        angle = (position.to(torch.float32) * (math.pi / 2 / self.reach))[..., None, None]
        r = x.relu()
        return torch.cat([r * angle.cos().to(x.dtype), r * angle.sin().to(x.dtype)], dim=-1)


FEATURE_MAPS = {
    "hedgehog": Hedgehog,
    "product": Product,
    "elu": Elu,
    "t2r": T2R,
    "relu": Relu,
    "constant": Constant,
    "performer": Performer,
    "taylor": Taylor,
    "cosformer": CosFormer,
}
