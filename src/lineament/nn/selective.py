"""A gated feed-forward layer that reads, for every token, only the neurons that speak."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament._base.errors import InputError, unknown
from lineament.nn.experts import ACTS

WAYS = ("gate", "product")


@dataclass(frozen=True, kw_only=True)
class SelectiveConfig:
    """The shape of a `SelectiveMLP`.

    Args:
        width: D. hidden: neurons. act: of the gate, a key of `nn.experts.ACTS`.
        by: "gate": who speaks is guessed from the gate, and rows of two maps are saved. "product": it is known from the
            gate and the up map together, and rows of the last map alone are saved.
    """

    width: int
    hidden: int
    act: str = "silu"
    by: str = "gate"

    def __post_init__(self) -> None:
        if self.by not in WAYS:
            raise unknown("way to tell who speaks", self.by, WAYS)
        if self.act not in ACTS:
            raise unknown("activation", self.act, ACTS)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


class SelectiveMLP(nn.Module):
    """`sum_i g_i u_i W_out,i` with `g = act(W_g x)`, `u = W_u x`, over the neurons that are loud enough.

    Loud is `|g_i| worth_i > threshold` with `by="gate"`, worth being `||W_out,i||` times the usual size of u_i, and
    `|g_i u_i| ||W_out,i|| > threshold` with `by="product"`. Of the maps not needed to tell, a decoded token reads only
    the rows of the neurons that speak; several tokens at once cost what the dense layer costs. A threshold below 0 is
    the dense layer.

    Args:
        config: the shape.

    Example:
        >>> layer = SelectiveMLP(SelectiveConfig(width=8, hidden=12))
        >>> layer(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    worth: Tensor
    threshold: Tensor

    def __init__(self, config: SelectiveConfig) -> None:
        super().__init__()
        self.config = config
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Parameter(torch.empty(config.hidden, config.width))
        self.down = nn.Parameter(torch.empty(config.hidden, config.width))
        self.register_buffer("worth", torch.ones(config.hidden))
        self.register_buffer("threshold", torch.tensor(-1.0))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights with variance 1 / (inputs of the map), and let every neuron speak."""
        nn.init.normal_(self.up, std=self.config.width**-0.5)
        nn.init.normal_(self.down, std=self.config.hidden**-0.5)
        nn.init.ones_(self.worth)
        nn.init.constant_(self.threshold, -1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        held = ACTS[self.config.act](self.gate_proj(x))
        whole = self.config.by == "product"
        held = held * F.linear(x, self.up) if whole else held
        speaks = held.abs() * self.worth > self.threshold
        if held.numel() == self.config.hidden and not torch.is_grad_enabled():
            index = speaks.flatten().nonzero().flatten()
            said = held.flatten()[index]
            said = said if whole else said * (self.up.index_select(0, index) @ x.flatten())
            # weighted rows are summed where they lie, instead of being copied first
            start = index.new_zeros(1)
            return F.embedding_bag(index, self.down, start, mode="sum", per_sample_weights=said).view(x.shape)
        return (held * speaks * (1 if whole else F.linear(x, self.up))) @ self.down

    @torch.no_grad()
    def calibrate_(self, inputs: Tensor, share: float) -> float:
        """Measure `worth` and set the threshold so that this share of all neurons stays silent; in place.

        Args:
            inputs: [N, D] tokens that reach the layer. share: 0 to below 1; 0 lets all speak.

        Returns:
            The share of neurons that stays silent on these tokens.
        """
        if not 0 <= share < 1:
            raise InputError(f"the share is {share}; expected 0 to below 1")
        x = inputs.to(self.up)
        up, held = F.linear(x, self.up), ACTS[self.config.act](self.gate_proj(x))
        whole = self.config.by == "product"
        self.worth.copy_(self.down.norm(dim=1) * (1 if whole else up.square().mean(0).sqrt()))
        loud = ((held * up if whole else held).abs() * self.worth).flatten()
        cut = round(share * loud.numel())
        self.threshold.fill_(float(loud.kthvalue(cut).values) if cut else -1.0)
        return float((loud <= self.threshold).float().mean())
