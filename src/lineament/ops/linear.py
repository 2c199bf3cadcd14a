"""Linear attention with feature maps and a running normaliser."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lineament.ops.recurrence import decayed_attention


def linear_attention(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    *,
    normalise: bool = True,
    log_decay: Tensor | None = None,
    eps: float = 1e-6,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention on feature-mapped queries and keys.

    `o_t = sum_{j<=t} (phi_q_t . phi_k_j) v_j / (sum_{j<=t} phi_q_t . phi_k_j + eps)` (Katharopoulos et al. 2020,
    arXiv:2006.16236, equation 9); without `normalise` the numerator alone. The normaliser is one more value column of
    ones, so it decays with the state.

    Args:
        phi_q: [B, T, Hq, K], mapped queries, >= 0 where a normaliser is wanted.
        phi_k: [B, T, Hk, K], mapped keys.
        v: [B, T, Hv, V].
        normalise: divide by the running sum of weights.
        log_decay: as in `decayed_attention`.
        eps: added to the denominator, in the unit of phi_q . phi_k.
        state: [B, Hs, K, V + 1] when normalising (the last column is the normaliser), else [B, Hs, K, V].
        cu_seqlens: [N + 1] borders of packed documents; the state then has N rows.
        backend: "auto", or a key of `BACKENDS_DECAYED`.
        chunk_size: tokens per chunk, a power of two.

    Returns:
        o [B, T, max(Hq, Hs), V] in v's dtype, and the state in float32 or wider.

    Raises:
        InputError: axes or head counts disagree. RuntimeError: a forced backend can't run here.

    Example:
        >>> ones = torch.ones(1, 3, 1, 2)
        >>> v = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
        >>> linear_attention(ones, ones, v, eps=0.0)[0].flatten().tolist()
        [1.0, 1.5, 3.0]
    """
    keywords = {"state": state, "cu_seqlens": cu_seqlens, "backend": backend, "chunk_size": chunk_size}
    if not normalise:
        return decayed_attention(phi_q, phi_k, v, log_decay, **keywords)
    wide = torch.promote_types(v.dtype, torch.float32)
    both, state = decayed_attention(phi_q, phi_k, pad(v.to(wide), (0, 1), value=1.0), log_decay, **keywords)
    return (both[..., :-1] / (both[..., -1:] + eps)).to(v.dtype), state
