"""Linear attention heads of encoders: each token attends to all real tokens of its row."""

from inspect import signature

from torch import Tensor, nn

from lineament._base.errors import InputError, unknown
from lineament.nn.config import MixerConfig
from lineament.nn.feature_maps import FEATURE_MAPS
from lineament.ops.bidirectional import bidirectional_attention, bidirectional_weights

EPS = 1e-6


class BidirectionalHeads(nn.Module):
    """`o_i = phi(q_i)^T sum_j phi(k_j) v_j^T / phi(q_i)^T sum_j phi(k_j)` over all real j.

    Args:
        config: the shape; `config.kind` is a key of `FEATURE_MAPS`, `config.options` are that map's own arguments.

    Example:
        >>> import torch
        >>> config = MixerConfig(kind="hedgehog", heads=2, key_heads=2, key_width=8, value_width=8, model_width=16)
        >>> q = torch.randn(1, 5, 2, 8)
        >>> BidirectionalHeads(config)(q, q, q).shape
        torch.Size([1, 5, 2, 8])
    """

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        if config.kind not in FEATURE_MAPS:
            raise unknown("feature map of an encoder", config.kind, FEATURE_MAPS)
        make = FEATURE_MAPS[config.kind]
        if getattr(make, "needs_positions", False):
            raise InputError(f"the map {config.kind} needs positions, which both directions share; choose another map")
        known = [p.name for p in signature(make).parameters.values() if p.kind is p.KEYWORD_ONLY]
        for name in config.options:
            if name not in known:
                raise unknown(f"option of the map {config.kind}", name, known)
        self.config, self.root = config, config.key_width**0.25
        self.map_q = make(config.heads, config.key_width, **config.options)
        self.map_k = make(config.key_heads, config.key_width, **config.options)

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Map scaled queries [B, T, Hq, K] and keys [B, S, Hk, K], each carrying half of the scale."""
        return self.map_q(q * self.root), self.map_k(k / self.root)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Mix: q [B, T, Hq, K] scaled, k [B, S, Hk, K], v [B, S, Hk, V], mask [B, S] -> [B, T, Hq, V]."""
        return bidirectional_attention(*self.features(q, k), v, mask=mask, eps=EPS)

    def weights(self, q: Tensor, k: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the weights [B, Hq, T, S] themselves (quadratic in T)."""
        return bidirectional_weights(*self.features(q, k), mask=mask, eps=EPS)
