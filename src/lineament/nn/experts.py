"""A feed-forward layer cut into groups of its own units, of which a router lets some work per token (MoEfication)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament._base.errors import InputError, unknown

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "relu": F.relu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The shape of an `Experts` layer.

    Args:
        width: D of the input. hidden: units in all, a multiple of `experts`. out: width of the output; None for D.
        experts: E groups of hidden / E units. active: how many of them work on a token, 1 to E.
        act: a key of `ACTS`. gated: `act(W_g x) * W_u x` instead of `act(W_u x)`. bias: the maps have biases.

    Raises:
        InputError: an unknown activation, or numbers that do not fit.
    """

    width: int
    hidden: int
    experts: int
    active: int
    out: int | None = None
    act: str = "silu"
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        if self.act not in ACTS:
            raise unknown("activation", self.act, ACTS)
        if self.experts < 1 or self.hidden % self.experts:
            raise InputError(f"{self.hidden} units don't fall into {self.experts} experts of equal size")
        if not 1 <= self.active <= self.experts:
            raise InputError(f"{self.active} active experts of {self.experts}; expected 1 to {self.experts}")

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `ExpertsConfig(**them)` is this config again."""
        return asdict(self)


class Router(nn.Module):
    """Scores of experts from a token: `second(tanh(first(x / |x|))) + bias`; logits of how much each has to say.

    A bias of -inf keeps an expert out: one that was just added.
    """

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden, bias=False)
        self.second = nn.Linear(hidden, experts, bias=False)
        self.bias = nn.Parameter(torch.zeros(experts))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, D] to [N, E]."""
        return self.second(self.first(F.normalize(x, dim=-1)).tanh()) + self.bias


class Experts(nn.Module):
    """`sum over chosen experts e of W_out,e act(W_in,e x)`; the others contribute exactly nothing.

    With all experts active it is the dense layer. Experts that no token of a call has chosen are not read, so a decoded
    token costs the share of experts that are active; for a long text nearly every expert is wanted by some token, and
    the call costs what the dense layer costs.

    Args:
        config: the shape.

    Example:
        >>> layer = Experts(ExpertsConfig(width=8, hidden=12, experts=4, active=2))
        >>> layer(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__()
        self.config, self.active = config, config.active
        count, size, maps = config.experts, config.hidden // config.experts, 2 if config.gated else 1
        out = config.out or config.width
        self.inner = nn.Parameter(torch.empty(count, maps, size, config.width))  # the gate's map first, if there is one
        self.outer = nn.Parameter(torch.empty(count, size, out))
        self.inner_bias = nn.Parameter(torch.zeros(count, maps, size)) if config.bias else None
        self.outer_bias = nn.Parameter(torch.zeros(out)) if config.bias else None
        self.router = Router(config.width, count, count)
        self.oracle = False  # choose by what the experts would really say: costs more than the dense layer
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights with variance 1 / (inputs of the map)."""
        nn.init.normal_(self.inner, std=self.config.width**-0.5)
        nn.init.normal_(self.outer, std=self.config.hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., out]."""
        flat = x.reshape(-1, x.shape[-1])
        mask = self.chosen(flat)
        total = flat.new_zeros(len(flat), self.outer.shape[-1]) if self.outer_bias is None else self.outer_bias
        for first, last in self._runs(mask):
            units = self.units(flat, first, last)
            if mask is not None and len(flat) > 1:  # one token has chosen every expert of its runs
                units = units * mask[:, first:last, None]
            total = total + units.flatten(1) @ self.outer[first:last].flatten(0, 1)
        return total.expand(len(flat), -1).unflatten(0, x.shape[:-1]) if x.dim() > 1 else total.view(-1)

    def units(self, x: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Return the units' activations for tokens [N, D] in some neighbouring experts: [N, experts, size]."""
        weight = self.inner[first:last]
        bias = None if self.inner_bias is None else self.inner_bias[first:last].flatten()
        y = F.linear(x, weight.flatten(0, 2), bias).unflatten(-1, weight.shape[:3])
        act = ACTS[self.config.act]
        return act(y[..., 0, :]) * y[..., 1, :] if self.config.gated else act(y[..., 0, :])

    def scores(self, x: Tensor) -> Tensor:
        """Return what each expert has to say, [N, E]: the summed magnitude `sum_i |a_i| ||W_out,i||` of its units."""
        return torch.einsum("nem,em->ne", self.units(x).abs(), self.outer.norm(dim=-1))

    def chosen(self, x: Tensor) -> Tensor | None:
        """Return which experts work on which token, bool [N, E]; None where all do."""
        if self.active >= self.inner.shape[0]:
            return None
        logits = self.scores(x) if self.oracle else self.router(x)
        return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(self.active, -1).indices, True)

    def _runs(self, mask: Tensor | None) -> Iterator[tuple[int, int]]:
        """Cut the experts that some token wants into runs of neighbours, each a slice of the weights and no copy."""
        if mask is None:
            return iter([(0, self.inner.shape[0])])
        return runs(mask.any(0).tolist())

    @property
    def skipped(self) -> float:
        """The share of units that a token does not use."""
        return 1 - self.active / self.inner.shape[0]


def runs(wanted: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of every run of True.

    Example:
        >>> list(runs([True, True, False, True]))
        [(0, 2), (3, 4)]
    """
    at = 0
    for want, group in groupby(wanted):
        length = sum(1 for _ in group)
        if want:
            yield at, at + length
        at += length
