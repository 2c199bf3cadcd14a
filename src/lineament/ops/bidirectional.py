"""Linear attention in both directions: every token reads one sum over all keys, so the cost is linear in T.

Under `sequence_parallel` that sum is all that travels: queries, keys and values stay on their ranks.
"""

import torch
from torch import Tensor

from lineament._base.autocast import without_autocast
from lineament._base.errors import InputError
from lineament._base.shapes import bind, check_heads
from lineament.ops.parallel.collectives import summed
from lineament.ops.parallel.part import active


def bidirectional_attention(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, *, mask: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Linear attention of feature-mapped queries over all keys, before and after.

    `o_i = phi_q_i^T (sum_j phi_k_j v_j^T) / (phi_q_i^T sum_j phi_k_j + eps)` (Zhang et al. 2024, arXiv:2402.04347,
    section 3). Sums are taken in float32 or wider.

    Args:
        phi_q: [B, T, Hq, F] mapped queries, >= 0.
        phi_k: [B, S, H, F] mapped keys, >= 0; H divides Hq (grouped heads, repeated consecutively).
        v: [B, S, H, V].
        mask: [B, S], nonzero for real keys; the others contribute exactly nothing, whatever they hold. None: all real.
        eps: added to the denominator, in the unit of phi_q . phi_k.

    Returns:
        o [B, T, Hq, V] in v's dtype; zeros in a row without a real key.

    Raises:
        InputError: axes or head counts disagree; under `sequence_parallel`, packed documents.

    Example:
        >>> ones = torch.ones(1, 3, 1, 2)
        >>> v = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
        >>> bidirectional_attention(ones, ones, v, eps=0.0).flatten().tolist()
        [3.0, 3.0, 3.0]
        >>> bidirectional_attention(ones, ones, v, mask=torch.tensor([[1, 1, 0]]), eps=0.0).flatten().tolist()
        [1.5, 1.5, 1.5]
    """
    q, k, v_wide, groups = _checked(phi_q, phi_k, v, mask)
    with without_autocast(v.device):
        values = torch.nn.functional.pad(v_wide, (0, 1), value=1.0).transpose(1, 2)  # ones: the denominator
        sums = k.permute(0, 2, 3, 1) @ values  # [B, H, F, V + 1]
        part = active()
        if part is not None:
            if part.documents is not None:
                raise InputError("attention in both directions takes no packed documents; pad them and give a mask")
            part.check_call(k.shape[1], None)
            sums = summed(part, sums)
        both = (q.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4) @ sums[:, :, None]).flatten(1, 2).transpose(1, 2)
    return (both[..., :-1] / (both[..., -1:] + eps)).to(v.dtype)


def bidirectional_weights(phi_q: Tensor, phi_k: Tensor, *, mask: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Return the weights [B, Hq, T, S] that `bidirectional_attention` gives its values: for losses and for tests.

    `a_ij = phi_q_i . phi_k_j / (sum_j phi_q_i . phi_k_j + eps)`; quadratic in T. Arguments as there.
    """
    q, k, _, groups = _checked(phi_q, phi_k, phi_k, mask)
    if active() is not None:
        raise NotImplementedError("weights ask for every rank's keys; take them on one process")
    with without_autocast(q.device):
        products = torch.einsum("bihf,bjhf->bhij", q, k.repeat_interleave(groups, dim=2))
    return products / (products.sum(-1, keepdim=True) + eps)


def _checked(phi_q: Tensor, phi_k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, int]:
    """Check the axes; return all in float32 or wider with padded keys and values set to 0, and the group size."""
    n = bind("phi_q: B T Hq F, phi_k: B S H F, v: B S H V, mask: B S", phi_q, phi_k, v, mask)
    if check_heads(phi_q=n["Hq"], phi_k=n["H"]) != n["Hq"]:
        raise InputError(f"phi_q has {n['Hq']} heads and phi_k has {n['H']}; the queries need at least as many heads")
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k, v = phi_q.to(wide), phi_k.to(wide), v.to(wide)
    if mask is not None:
        padded = ~mask.bool()[..., None, None]
        k, v = k.masked_fill(padded, 0.0), v.masked_fill(padded, 0.0)  # values too: 0 times NaN is NaN
    return q, k, v, n["Hq"] // n["H"]
