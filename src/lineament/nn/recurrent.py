"""A head mixer is what it makes of q, k, v and x; the recurrence of `ops` does the rest."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lineament.nn.config import MixerConfig
from lineament.nn.state import State
from lineament.nn.windowed import stepping
from lineament.ops.gates import check_gates
from lineament.ops.recurrence import decayed_attention, decayed_step_, delta_rule, delta_step_


class Terms(NamedTuple):
    """What the recurrence is given: shapes as in `ops.decayed_attention`, or with beta as in `ops.delta_rule`."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    beta: Tensor | None = None


def recur(
    terms: Terms, *, state: Tensor | None = None, cu_seqlens: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a block, or one token of it in place; returns o and the state."""
    q, k, v, log_decay, beta = terms
    if cu_seqlens is None and state is not None and stepping(q.shape[1], state):
        q, k, v = q.select(1, 0), k.select(1, 0), v.select(1, 0)
        log_decay = None if log_decay is None else log_decay.select(1, 0)
        if beta is None:
            return decayed_step_(q, k, v, log_decay, state).unsqueeze(1), state
        return delta_step_(q, k, v, beta.select(1, 0), log_decay, state).unsqueeze(1), state
    if beta is None:
        return decayed_attention(q, k, v, log_decay, state=state, cu_seqlens=cu_seqlens, backend=backend)
    return delta_rule(q, k, v, beta, log_decay, state=state, cu_seqlens=cu_seqlens, backend=backend)


class Recurrent(nn.Module):
    """The frame of such mixers: a subclass says its `terms`.

    Attributes:
        backend: of the operator. strongest: the largest beta that `config.check` lets pass.
    """

    backend = "auto"
    strongest = 1.0

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.config = config

    def terms(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Terms:
        """Make what the recurrence takes."""
        raise NotImplementedError

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, cu_seqlens: Tensor | None = None, state: State = None
    ) -> tuple[Tensor, State]:
        """See `HeadMixer`."""
        terms = self.terms(q, k, v, x)
        if self.config.check:
            check_gates(terms.log_decay, terms.beta, most=self.strongest)
        return recur(terms, state=state, cu_seqlens=cu_seqlens, backend=self.backend)


def spread_rates(like: Tensor) -> Tensor:
    """Draw biases whose softplus spreads evenly, on a log scale, from 1e-3 to 0.1 (Mamba-2's and Gated DeltaNet's)."""
    step = torch.empty_like(like).uniform_(-6.907755, -2.302585).exp().clamp(min=1e-4)
    return step + (-torch.expm1(-step)).log()
