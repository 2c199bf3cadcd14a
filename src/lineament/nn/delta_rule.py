"""The delta rule with its published gates: DeltaNet, Gated DeltaNet and Kimi Delta Attention, to be trained."""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lineament._base.errors import unknown
from lineament.nn.config import MixerConfig
from lineament.nn.recurrent import Recurrent, Terms, spread_rates
from lineament.nn.state import widened

DECAYS = ("none", "head", "channel")


class DeltaRule(Recurrent):
    """`beta = sigma(W_b x)`, `log_decay = -e^A softplus(f + bias)`; the layer's slots give unit keys.

    Args:
        config: the shape.
        decay: "none" (DeltaNet, arXiv:2406.06484), "head" (Gated DeltaNet, arXiv:2412.06464; f = W x) or "channel"
            (KDA, arXiv:2510.26692; f of rank K).
        negative: beta up to 2, so that a step may turn its key's direction round (arXiv:2411.12537).
        erase: False leaves the erasing out, a control: the same layer with a memory that only adds.
        floor: use the gate `floor sigma(e^A (f + bias))` (KDA's safe gate has -5); None for the one above.
    """

    def __init__(
        self,
        config: MixerConfig,
        *,
        decay: str = "none",
        negative: bool = False,
        erase: bool = True,
        floor: float | None = None,
    ) -> None:
        super().__init__(config)
        if decay not in DECAYS:
            raise unknown("decay", decay, DECAYS)
        D, K, heads = config.model_width, config.key_width, config.states
        self.channels, self.floor, self.erase = decay == "channel", floor, erase
        self.strongest = 2.0 if negative else 1.0
        self.strength = nn.Linear(D, heads, bias=False)
        self.decay = self.rate = self.bias = None
        if decay != "none":
            low = nn.Sequential(nn.Linear(D, K, bias=False), nn.Linear(K, heads * K, bias=False))
            self.decay = low if self.channels else nn.Linear(D, heads, bias=False)
            self.rate = nn.Parameter(torch.empty(heads))
            self.bias = nn.Parameter(torch.empty(heads * K if self.channels else heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Spread the gates: time constants by the bias, rates up to 16 by A (1 for the gate with a floor)."""
        if self.rate is None or self.bias is None:
            return
        with torch.no_grad():
            self.bias.copy_(spread_rates(self.bias))
            least = 1.0 if self.channels else 1e-4
            self.rate.uniform_(least, 16.0).log_() if self.floor is None else self.rate.zero_()

    def terms(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Terms:
        """Gate by x."""
        beta = self.strongest * widened(self.strength(x)).sigmoid()
        if self.decay is None or self.rate is None or self.bias is None:
            return self._written(Terms(q, k, v, None, beta))
        f, rate = widened(self.decay(x)) + widened(self.bias), widened(self.rate).exp()
        if self.channels:
            f, rate = f.unflatten(-1, (-1, self.config.key_width)), rate[:, None]
        log_decay = -rate * softplus(f) if self.floor is None else self.floor * (rate * f).sigmoid()
        return self._written(Terms(q, k, v, log_decay, beta))

    def _written(self, terms: Terms) -> Terms:
        if self.erase or terms.beta is None:
            return terms
        return terms._replace(v=terms.v * terms.beta[..., None].to(terms.v.dtype), beta=None)
