"""Linear attention whose state only adds: feature maps with a denominator (`hedgehog`), fixed decay (`lightning`)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lineament._base.errors import unknown
from lineament.nn.config import MixerConfig
from lineament.nn.feature_maps import FEATURE_MAPS
from lineament.nn.recurrent import Terms, recur
from lineament.nn.rows import beginnings, positions
from lineament.nn.state import State, widened
from lineament.nn.windowed import stepping
from lineament.ops.linear import linear_attention
from lineament.ops.recurrence import decayed_step_

EPS = 1e-6


class CountedState(NamedTuple):
    """A linear state and how many tokens made it, for maps that need positions."""

    sums: Tensor | None
    count: Tensor


class LinearHeads(nn.Module):
    """`o_n = phi(q_n)^T sum_j phi(k_j) v_j^T / phi(q_n)^T sum_j phi(k_j)`.

    Args:
        config: the shape. map: a key of `FEATURE_MAPS`. decay: learn one log decay per key head.
        map_options: the map's own keyword arguments.
    """

    def __init__(
        self, config: MixerConfig, *, map: str = "hedgehog", decay: bool = False, **map_options: object
    ) -> None:
        super().__init__()
        if map not in FEATURE_MAPS:
            raise unknown("feature map", map, FEATURE_MAPS)
        self.config, self.root = config, config.key_width**0.25
        self.map_q = FEATURE_MAPS[map](config.heads, config.key_width, **map_options)
        self.map_k = FEATURE_MAPS[map](config.key_heads, config.key_width, **map_options)
        self.needs_positions = getattr(self.map_q, "needs_positions", False)
        self.decay = nn.Parameter(torch.empty(config.key_heads)) if decay else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let the state forget 3e-4 nats a token at the start."""
        if self.decay is not None:
            nn.init.constant_(self.decay, -8.0)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, cu_seqlens: Tensor | None = None, state: State = None
    ) -> tuple[Tensor, State]:
        """See `HeadMixer`."""
        log_decay = None
        if self.decay is not None:
            log_decay = -nn.functional.softplus(widened(self.decay)).expand(k.shape[:-1])
        extra: tuple[Tensor, ...] = ()
        if self.needs_positions:
            rows = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
            state = state or CountedState(None, beginnings(rows, q.device))
            extra = (positions(q.shape[1], cu_seqlens, state.count),)
        phi_q, phi_k = self.map_q(q * self.root, *extra), self.map_k(k / self.root, *extra)
        sums = state.sums if self.needs_positions else state
        if cu_seqlens is None and stepping(q.shape[1], sums):
            decay = None if log_decay is None else log_decay[:, 0]
            o = linear_step_(phi_q[:, 0], phi_k[:, 0], v[:, 0], sums, decay)[:, None]
        else:
            o, sums = linear_attention(phi_q, phi_k, v, log_decay=log_decay, eps=EPS, state=sums, cu_seqlens=cu_seqlens)
        if not self.needs_positions:
            return o, sums
        new = cu_seqlens.diff() if cu_seqlens is not None else q.shape[1]
        return o, CountedState(sums, state.count + new)


def linear_step_(phi_q: Tensor, phi_k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None) -> Tensor:
    """One token of normalised linear attention; the state [B, Hk, F, V + 1] is changed in place."""
    o = decayed_step_(phi_q, phi_k, nn.functional.pad(v, (0, 1), value=1.0), log_decay, state)
    return (o[..., :-1] / (o[..., -1:] + EPS)).to(v.dtype)


def slopes(heads: int) -> Tensor:
    """Return the decay rates of H heads, as in ALiBi: powers of 2^(-8/H), odd head counts filled from the next power.

    Example:
        >>> slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    power = 2 ** math.floor(math.log2(heads))
    rates = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    if power < heads:
        rates += [2 ** (-8 * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)][: heads - power]
    return torch.tensor(rates)


class Lightning(nn.Module):
    """`S_t = e^(-s_h) S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t` with a fixed decay per head and no denominator.

    Args:
        config: the shape. layer, layers: the layer's place l of L; upper layers forget more slowly,
            `s_h (1 - l/(L-1) + 1e-5)`. none: no decay at all.
    """

    log_decay: Tensor
    backend = "auto"

    def __init__(self, config: MixerConfig, *, layer: int = 0, layers: int = 1, none: bool = False) -> None:
        super().__init__()
        self.config, self.place, self.none = config, (layer, layers), none
        self.register_buffer("log_decay", torch.empty(config.key_heads))
        self.exact: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the decay of every key head."""
        with torch.no_grad():
            self.log_decay.copy_(self._decays())

    def _decays(self) -> Tensor:
        layer, layers = self.place
        factor = 1.0 if layers == 1 else 1 - layer / (layers - 1) + 1e-5
        return slopes(self.config.key_heads) * (0.0 if self.none else -factor)

    def decays(self) -> Tensor:
        """Return the log decays [key heads] in float32 or wider: by their formula where a cast has rounded them."""
        if self.log_decay.dtype.itemsize >= 4:
            return self.log_decay
        if self.exact is None or self.exact.device != self.log_decay.device:
            self.exact = self._decays().to(self.log_decay.device)
        return self.exact

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, cu_seqlens: Tensor | None = None, state: State = None
    ) -> tuple[Tensor, State]:
        """See `HeadMixer`."""
        terms = Terms(q, k, v, self.decays().expand(k.shape[:-1]))
        return recur(terms, state=state, cu_seqlens=cu_seqlens, backend=self.backend)
