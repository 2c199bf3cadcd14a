"""Self-attention that sees a random part of its sources while it trains, and all of them afterwards."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament._base.shapes import bind
from lineament.ops.subsampled import check_subsampling, subsampled_attention


@dataclass(frozen=True, kw_only=True)
class Subsampling:
    """How attention is subsampled (see `ops.subsampled_attention`).

    Attributes:
        mode: "local" or "unbiased".
        reduction: one source in this many; 4 to 8 in the paper, 1 is dense.
        sigma: noise of the local shuffle in tokens, the block's width if None.
        grid: (rows, columns) of images, for windows in two dimensions.
    """

    mode: str = "local"
    reduction: float = 4.0
    sigma: float | None = None
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_subsampling(self.mode, self.reduction, self.sigma)


DENSE = Subsampling(mode="unbiased", reduction=1)


def fresh_seed() -> int:
    """Draw a seed from torch's global generator, as dropout does; so activation checkpointing replays the same one."""
    return int(torch.randint(2**31, ()))


class SubsampledAttention(nn.Module):
    """Multi-head self-attention, subsampled in training (a new draw each call) and dense in eval mode.

    Args:
        width: D, of input and output. heads: divides D.
        subsampling: how. causal: see only oneself and what came before.

    Example:
        >>> layer = SubsampledAttention(16, 2, Subsampling(reduction=2))
        >>> layer(torch.randn(3, 9, 16)).shape
        torch.Size([3, 9, 16])
    """

    def __init__(
        self, width: int, heads: int, subsampling: Subsampling | None = None, *, causal: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise InputError(f"width {width} can't be shared by {heads} heads; it must be a multiple")
        self.heads, self.causal, self.subsampling = heads, causal, subsampling or Subsampling()
        self.qkv_proj = nn.Linear(width, 3 * width, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)

    def forward(
        self, x: Tensor, *, seed: int | None = None, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Mix [B, T, D] over the tokens.

        Args:
            seed: of the draw; given, it subsamples in eval mode too (a member of an ensemble). None: drawn from
                torch's generator in training, dense in eval mode.
            key_mask: [B, T], nonzero for real tokens. bias: [1 or B, 1 or H, T, T].
        """
        bind("x: B T D, key_mask: B T", x, key_mask)
        how = self.subsampling if seed is not None or self.training else DENSE
        seed = fresh_seed() if seed is None and self.training else seed or 0
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        out = subsampled_attention(
            q * q.shape[-1] ** -0.5, k, v, mode=how.mode, reduction=how.reduction, sigma=how.sigma, grid=how.grid,
            causal=self.causal, seed=seed, key_mask=key_mask, bias=bias,
        )  # fmt: skip
        return self.o_proj(out.flatten(2))
