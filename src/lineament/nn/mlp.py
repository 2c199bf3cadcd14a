"""The feed-forward half of a block: gated or not."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from lineament._base.errors import InputError, unknown

GATED: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": silu, "geglu": gelu, "sglu": lambda x: x}
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "relu2": lambda x: x.relu().square()}
MLPS = (*GATED, *PLAIN)


class MLP(nn.Module):
    """`W_down(act(W_gate x) * W_up x)`, or `W_down act(W_up x)` without a gate; no biases.

    Args:
        width: D. hidden: inner width. kind: "swiglu", "geglu" or "sglu" (a gate without activation, as in TransNormer),
            "gelu" or "relu2" without a gate.

    Example:
        >>> import torch
        >>> MLP(8, 12, "swiglu")(torch.ones(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, width: int, hidden: int, kind: str = "swiglu") -> None:
        super().__init__()
        if kind not in MLPS:
            raise unknown("mlp", kind, MLPS)
        if hidden < 1:
            raise InputError(f"the MLP is {hidden} wide; expected at least 1")
        self.act = (GATED | PLAIN)[kind]
        self.gate_proj = nn.Linear(width, hidden, bias=False) if kind in GATED else None
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
