"""Match3: which tokens belong to a triple that sums to 0; it tells attention over pairs from ordinary attention."""

import math

import torch
from torch import Tensor

from lineament._base.errors import InputError


def match3(x: Tensor, modulus: int, *, distinct: bool = True) -> Tensor:
    """Say for every token whether two others complete it: `x_i + x_j + x_k = 0 mod M` (Sanford et al. 2023).

    Args:
        x: integers [..., T]. modulus: M.
        distinct: i, j and k are three different places; False lets them be one.

    Returns:
        bool [..., T].

    Example:
        >>> match3(torch.tensor([1, 2, 4, 5]), 7).tolist()
        [True, True, True, False]
    """
    if modulus < 1:
        raise InputError(f"modulus is {modulus}; expected 1 or more")
    T = x.shape[-1]
    zero = (x[..., :, None, None] + x[..., None, :, None] + x[..., None, None, :]) % modulus == 0
    if distinct:
        i, j, k = torch.meshgrid(*[torch.arange(T, device=x.device)] * 3, indexing="ij")
        zero = zero & (i != j) & (j != k) & (i != k)
    return zero.flatten(-2).any(-1)


def match3_batch(
    modulus: int, tokens: int, size: int, *, generator: torch.Generator, distinct: bool = True
) -> tuple[Tensor, Tensor]:
    """Draw uniform tokens [size, tokens] and their labels."""
    x = torch.randint(modulus, (size, tokens), generator=generator)
    return x, match3(x, modulus, distinct=distinct)


def match3_by_hand(x: Tensor, modulus: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return q, two keys and two values with which one `ops.tensor_attention` solves Match3 (any i, j, k), untrained.

    The score of (i, j, k) is t cos(2 pi (x_i + x_j + x_k) / M); a default token whose value is 0 scores half-way
    between the peak and the next value. The output of token i is above 0.5 exactly if a triple exists: at most
    n^2 / 4 (n + 1)^2 without one, at least 1 - n^2 / 4 (n + 1)^2 with one.

    Args:
        x: integers [B, n].

    Returns:
        q and keys [B, n + 1, 1, 5], values [B, n + 1, 1, 1], float64; the last token is the default one.
    """
    n, step = x.shape[1], 2 * math.pi / modulus
    t = 2 * math.log(4 * (n + 1) ** 2) / (1 - math.cos(step))
    c, s, none = (x * step).double().cos(), (x * step).double().sin(), torch.zeros(x.shape, dtype=torch.float64)
    q = t * torch.stack([c, -c, -s, -s, none + (1 + math.cos(step)) / 2], -1)
    default = torch.eye(5, dtype=torch.float64)[4].expand(len(x), 1, 5)
    keys = [torch.cat([torch.stack(k, -1), default], 1)[:, :, None] for k in ((c, s, c, s, none), (c, s, s, c, none))]
    value = torch.cat([none + 1, none[:, :1]], 1)[..., None, None]
    return torch.cat([q, 0 * default], 1)[:, :, None], keys, [value, value]
