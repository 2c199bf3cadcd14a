"""Between an encoder and a contrastive loss: projection heads, learned, fixed or none (arXiv:2403.11391)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError, unknown

SMALLEST = 1e-6  # of the reweighting; smaller entries would cut features off in float32


class ReweightingHead(nn.Module):
    """`z = D h` with `D = diag(1, 1/k, ..., 1/k^(p-1))`, never trained: the encoder learns to order its features.

    Args:
        width: p. ratio: R, first entry over last; `k = R^(1/(p-1))`. From 10 to 1000 as a rule; entries stop at 1e-6.

    Raises:
        InputError: no width, or a ratio below 1.

    Example:
        >>> ReweightingHead(3, ratio=100.0)(torch.ones(1, 3)).tolist()
        [[1.0, 0.10000000149011612, 0.009999999776482582]]
    """

    scale: Tensor

    def __init__(self, width: int, *, ratio: float = 100.0) -> None:
        super().__init__()
        if width < 1 or ratio < 1:
            raise InputError(f"width is {width} and ratio {ratio}; expected a width >= 1 and a ratio >= 1")
        powers = torch.arange(width, dtype=torch.float64) / max(1, width - 1)
        scale = float(ratio) ** -powers  # of the ratio, never of k: k^(p-1) overflows for p in the hundreds
        self.register_buffer("scale", scale.clamp_min(SMALLEST).float(), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        """Map [..., p] to [..., p]."""
        return h * self.scale.to(h.dtype)


def _mlp(width: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))


HEADS: dict[str, Callable[..., nn.Module]] = {
    "none": lambda width, outputs: nn.Identity(),
    "linear": lambda width, outputs: nn.Linear(width, outputs, bias=False),
    "mlp": _mlp,
    "fixed": lambda width, outputs, **options: ReweightingHead(width, **options),
}


def projection_head(kind: str, width: int, outputs: int | None = None, **options: float) -> nn.Module:
    """Return a head on representations of a width, to be thrown away after training.

    Args:
        kind: a key of `HEADS`: "none", "linear", "mlp" (two layers, ReLU between), or "fixed" (`ReweightingHead`).
        outputs: width of the projection; the same as `width` if None, which "none" and "fixed" need.
        options: of `ReweightingHead`.

    Raises:
        InputError: an unknown kind, or a width that it can't have.
    """
    if kind not in HEADS:
        raise unknown("head", kind, HEADS)
    if kind in ("none", "fixed") and outputs not in (None, width):
        raise InputError(f"the head {kind!r} keeps the width, {width}; {outputs} outputs were asked for")
    return HEADS[kind](width, outputs or width, **options)
