"""Multi-head latent attention without positions: softmax over a compressed cache."""

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.nn.config import MixerConfig
from lineament.nn.rows import Rows
from lineament.nn.softmax import KeyValues, causal_softmax
from lineament.nn.state import State


class LatentHeads(nn.Module):
    """Keys and values of all heads come from one latent c = norm(W_down x); only [c, r] is kept (DeepSeek-V3, NoPE).

    `k_h = [W_k,h c, r]`, `v_h = W_v,h c`, `o = softmax(q k^T) v`. Over a cache W_k is folded into q and W_v into o
    ("absorbed"), so that keys and values are never formed.

    Args:
        config: the shape; q is [B, T, H, K] with K - shared channels for W_k c; k and v are not read.
        rank: width of c, 8/3 K if None. shared: width of r, the part of the key that all heads share, K / 3 if None.
    """

    keeps_keys = True

    def __init__(self, config: MixerConfig, *, rank: int | None = None, shared: int | None = None) -> None:
        super().__init__()
        rank = config.key_width * 8 // 3 if rank is None else rank
        shared = config.key_width // 3 if shared is None else shared
        if not 0 <= shared < config.key_width:
            raise InputError(
                f"shared={shared}; a key of width {config.key_width} can share 0 to {config.key_width - 1}"
            )
        self.config, self.rank, self.own = config, rank, config.key_width - shared
        self.down = nn.Linear(config.model_width, rank + shared, bias=False)
        self.norm = nn.RMSNorm(rank, eps=1e-6)
        self.up = nn.Linear(rank, config.heads * (self.own + config.value_width), bias=False)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, rows: Rows | None = None, state: State = None
    ) -> tuple[Tensor, State]:
        """See `HeadMixer`; padding and packing come as `rows`."""
        c, r = self.down(x).split([self.rank, self.config.key_width - self.own], dim=-1)
        latent = torch.cat([self.norm(c), r], dim=-1)[:, :, None]
        past = state if state is not None else KeyValues(value_width=self.rank)
        if past.length:
            weight = self.up.weight.to(x.dtype).unflatten(0, (self.config.heads, -1))
            q = torch.cat([torch.einsum("bthk,hkc->bthc", q[..., : self.own], weight[:, : self.own]),
                           q[..., self.own :]], dim=-1)  # fmt: skip
            o = causal_softmax(q, latent, latent[..., : self.rank], rows=rows, past=past)
            return torch.einsum("bthc,hvc->bthv", o, weight[:, self.own :]), past
        both = self.up(latent[:, :, 0, : self.rank]).unflatten(-1, (self.config.heads, -1))
        key = torch.cat([both[..., : self.own], r[:, :, None].expand(-1, -1, self.config.heads, -1)], dim=-1)
        past.append(latent.transpose(1, 2), latent.transpose(1, 2), rows.valid if rows is not None else None)
        return causal_softmax(q, key, both[..., self.own :], rows=rows), past
