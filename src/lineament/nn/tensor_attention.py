"""Self-attention over pairs of keys: one layer that can find triples of tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament._base.shapes import bind
from lineament.ops.tensor_attention import tensor_attention
from lineament.ops.tensor_polynomial import (
    kernel_error,
    polynomial_tensor_attention,
    polynomial_tensor_scan,
    tensor_cost,
)


class TensorAttention(nn.Module):
    """Multi-head attention of each query over combinations of `keys` keys (Alman and Song 2024; the layer is ours).

    Scores are `scale sum_c q_c k1_c k2_c`. They grow with the cube of the activations: `norm` or `bound` holds them.

    Args:
        width: D, of input and output. heads: divides D; the head width is D / heads.
        keys: 2 for pairs (1 is ordinary attention).
        causal: combine only oneself and what came before. windows: one width per key, for long texts (causal).
        degree: None for the exact form, else of the polynomial one, which needs `bound`.
        bound: B; q and the keys pass through B tanh(x / B), so no score exceeds head_width scale B^(keys + 1).
        norm: RMS norm with a learned weight on q and the keys, before the bound.
        scale: 1 / head_width if None, as in the paper.

    Example:
        >>> layer = TensorAttention(8, 2, degree=4, bound=1.0)
        >>> layer(torch.randn(2, 5, 8)).shape, layer.error < 0.05
        (torch.Size([2, 5, 8]), True)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        keys: int = 2,
        causal: bool = False,
        windows: Sequence[int] | None = None,
        degree: int | None = None,
        bound: float | None = None,
        norm: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads or keys < 1:
            raise InputError(
                f"width {width}, heads {heads}, keys {keys}; expected heads that divide width and keys >= 1"
            )
        if bound is not None and not bound > 0:
            raise InputError(f"bound is {bound}; expected a positive number")
        if degree is not None and (bound is None or windows is not None):
            raise InputError("the polynomial form (degree) needs a bound on q and the keys, and has no windows")
        K = width // heads
        self.heads, self.keys, self.causal, self.windows = heads, keys, causal, windows
        self.degree, self.bound, self.scale = degree, bound, 1 / K if scale is None else scale
        self.in_proj = nn.Linear(width, (1 + 2 * keys) * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(K) for _ in range(1 + keys)) if norm else None
        with torch.no_grad():
            for part in self.in_proj.weight.view(1 + 2 * keys, width, width):
                nn.init.xavier_uniform_(part)
        nn.init.xavier_uniform_(self.o_proj.weight)

    @property
    def radius(self) -> float | None:
        """The largest size a score can have; None without a bound."""
        K = self.o_proj.in_features // self.heads
        return None if self.bound is None else K * self.scale * self.bound ** (self.keys + 1)

    @property
    def error(self) -> float:
        """The largest relative error of a weight in the polynomial form; 0 in the exact one."""
        return 0.0 if self.degree is None or self.radius is None else kernel_error(self.radius, self.degree).item()

    def cheaper(self, tokens: int) -> str:
        """Say which form costs less at a length, "exact" or "polynomial", by multiply-adds."""
        cost = tensor_cost(tokens, self.o_proj.in_features // self.heads, degree=self.degree or 4, keys=self.keys)
        return "exact" if cost.exact <= cost.polynomial else "polynomial"

    def extra_repr(self) -> str:
        form = "exact" if self.degree is None else f"polynomial of degree {self.degree}, error {self.error:.1e}"
        return f"heads={self.heads}, keys={self.keys}, {form}"

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """Mix [B, T, D]; key_mask [B, T] is nonzero for real tokens."""
        bind("x: B T D, key_mask: B T", x, key_mask)
        q, *rest = self.in_proj(x).unflatten(-1, (1 + 2 * self.keys, self.heads, -1)).unbind(2)
        q, *keys = self._held([q, *rest[: self.keys]])
        q, values, degree, radius = q * self.scale, rest[self.keys :], self.degree, self.radius
        if degree is None or radius is None:
            out = tensor_attention(q, keys, values, causal=self.causal, windows=self.windows, key_mask=key_mask)
        elif not self.causal:
            out = polynomial_tensor_attention(q, keys, values, degree=degree, radius=radius, key_mask=key_mask)
        elif key_mask is None:
            out, _ = polynomial_tensor_scan(q, keys, values, degree=degree, radius=radius)
        else:
            raise InputError("the causal polynomial form takes no key_mask: run padded rows apart, or use degree=None")
        return self.o_proj(out.flatten(2))

    def _held(self, parts: list[Tensor]) -> list[Tensor]:
        """Norm and bound q and the keys."""
        if self.norms is not None:
            parts = [norm(part) for norm, part in zip(self.norms, parts, strict=True)]
        return parts if self.bound is None else [self.bound * torch.tanh(part / self.bound) for part in parts]
