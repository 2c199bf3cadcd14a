"""Attention over pairs of keys (or triples, ...): each query scores every combination, exactly.

Alman and Song 2024 (arXiv:2310.04064). With m keys and values per token the weights of query i are softmax over
(j_1, ..., j_m) of `sum_c q_i,c k1_j1,c ... km_jm,c`, and each combination brings the product of its values. One key is
ordinary attention, two is the paper's tensor attention; time grows with the m + 1-th power of the length.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lineament._base.autocast import without_autocast
from lineament._base.errors import InputError
from lineament._base.shapes import bind, check_heads

SCORES = 1 << 22  # held at once, in one block


def tensor_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    causal: bool = False,
    windows: Sequence[int] | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Softmax attention over all combinations of m keys, exact, a block of queries at a time.

    `o_i = sum_jk A_ijk (v1_j * v2_k) / sum_jk A_ijk`, `A_ijk = exp(sum_c q_ic k1_jc k2_kc)`. No scale is applied: the
    paper's 1/K goes into q. The backward pass computes each block's scores again, so memory is a few times the larger
    of 2^22 and S^m numbers.

    Args:
        q: [B, T, Hq, K]. keys: m tensors [B, S, H, K]. values: m tensors [B, S, H, V]; H divides Hq.
        causal: position i combines only positions <= i (T = S).
        windows: m widths; key a then comes from the last `windows[a]` positions up to i only (T = S, causal). Time
            T w_1 ... w_m: the form for long texts.
        key_mask: [B, S], nonzero for real tokens.

    Returns:
        [B, T, Hq, V] in q's dtype; zeros where nothing may be seen. Softmax is taken in float32 or wider.

    Raises:
        InputError: axes disagree, no keys, or windows that do not fit.

    Example:
        >>> x = torch.zeros(1, 2, 1, 3)
        >>> v1, v2 = (torch.tensor(v).view(1, 2, 1, 1) for v in ([1.0, 3.0], [2.0, 5.0]))
        >>> tensor_attention(x, [x, x], [v1, v2])[0, 0].item()
        7.0
    """
    n = check_combination(q, keys, values, key_mask)
    _check_windows(n, len(keys), causal, windows)
    if key_mask is not None:  # what padding holds must not come in, not even times zero
        padding = ~key_mask.bool()[..., None, None]
        keys, values = ([x.masked_fill(padding, 0.0) for x in of] for of in (keys, values))
    given, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, *rest = (_by_head(x.to(dtype), n["Hq"]) for x in (q, *keys, *values))
    keys, values = rest[: len(keys)], rest[len(keys) :]
    real = None if key_mask is None else key_mask.bool().repeat_interleave(n["Hq"], 0)
    with without_autocast(q.device):
        pairs = _all(keys, values, real) if windows is None else _banded(keys, values, real, windows)
        out = _over(q, pairs, causal and windows is None)
    return out.unflatten(0, (n["B"], n["Hq"])).transpose(1, 2).to(given)


class _Pairs(NamedTuple):
    """Two sides of a combination: all keys but the last multiplied out (J of them), and the last (k of them).

    Keys and values are [G, 1 or T, J, .] and [G, 1 or T, k, .]; `left`, `right` say what is real, [G or 1, 1 or T, .],
    or None; `at` is the last position that a left combination holds, [J].
    """

    left_key: Tensor
    left_value: Tensor
    right_key: Tensor
    right_value: Tensor
    left: Tensor | None
    right: Tensor | None
    at: Tensor | None = None


def _by_head(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2).flatten(0, 1)


def _kron(a: Tensor, b: Tensor) -> Tensor:
    """Multiply rows of a [..., J, K] with rows of b [..., k, K], all combinations: [..., J k, K]."""
    return (a.unsqueeze(-2) * b.unsqueeze(-3)).flatten(-3, -2)


def _all(keys: Sequence[Tensor], values: Sequence[Tensor], real: Tensor | None) -> _Pairs:
    position = torch.arange(keys[0].shape[1], device=keys[0].device)
    one = keys[0].new_ones(len(keys[0]), 1, 1)
    left_key = reduce(_kron, keys[:-1], one.expand(-1, -1, keys[0].shape[-1]))[:, None]
    left_value = reduce(_kron, values[:-1], one.expand(-1, -1, values[0].shape[-1]))[:, None]
    none = position.new_zeros(1)
    at = reduce(lambda a, b: torch.maximum(a[:, None], b).flatten(), [position] * (len(keys) - 1), none)
    left = None
    if real is not None:
        left = reduce(
            lambda a, b: (a[:, :, None] & b[:, None]).flatten(1), [real] * (len(keys) - 1), real[:, :1] | True
        )
        left, real = left[:, None], real[:, None]
    return _Pairs(left_key, left_value, keys[-1][:, None], values[-1][:, None], left, real, at)


def _banded(keys: Sequence[Tensor], values: Sequence[Tensor], real: Tensor | None, windows: Sequence[int]) -> _Pairs:
    T = keys[0].shape[1]
    index = [torch.arange(T, device=keys[0].device)[:, None] - torch.arange(w, device=keys[0].device) for w in windows]
    there = [(i >= 0)[None] if real is None else (i >= 0) & real[:, i.clamp_min(0)] for i in index]
    keys, values = ([x[:, i.clamp_min(0)] for x, i in zip(of, index, strict=True)] for of in (keys, values))
    one, yes = keys[0].new_ones(len(keys[0]), T, 1, 1), there[0].new_ones(len(there[0]), T, 1)
    left = reduce(lambda a, b: (a[..., None] & b[..., None, :]).flatten(-2), there[:-1], yes)
    left_key = reduce(_kron, keys[:-1], one.expand(-1, -1, -1, keys[0].shape[-1]))
    left_value = reduce(_kron, values[:-1], one.expand(-1, -1, -1, values[0].shape[-1]))
    return _Pairs(left_key, left_value, keys[-1], values[-1], left, there[-1])


def _over(q: Tensor, pairs: _Pairs, causal: bool) -> Tensor:
    """Go over heads and queries by blocks of about `SCORES` scores."""
    J, k = pairs.left_key.shape[2], pairs.right_key.shape[2]
    rows = min(max(1, SCORES // (J * k)), q.shape[1])
    heads = max(1, SCORES // (J * k * rows))
    blocks = math.ceil(len(q) / heads) * math.ceil(q.shape[1] / rows)
    recompute = blocks > 1 and torch.is_grad_enabled() and any(x.requires_grad for x in (q, *pairs[:4]))
    out = []
    for g in range(0, max(len(q), 1), heads):  # (no rows: one block of nothing)
        part = [None if x is None else x[g : g + heads] if len(x) > 1 else x for x in pairs[:6]]
        line = []
        for i in range(0, q.shape[1], rows):
            now = [None if x is None else x[:, i : i + rows] if x.shape[1] > 1 else x for x in part]
            place = torch.arange(i, min(i + rows, q.shape[1]), device=q.device) if causal else None
            now = _until(now, pairs.at, i + rows, place)
            arguments = (q[g : g + heads, i : i + rows], *now)
            line.append(
                checkpoint(_block, *arguments, use_reentrant=False, preserve_rng_state=False)
                if recompute
                else _block(*arguments)
            )
        out.append(torch.cat(line, 1))
    return torch.cat(out)


def _until(now: list, at: Tensor | None, end: int, place: Tensor | None) -> list:
    """Add causality to what is real, and drop positions that no query of the block may see."""
    if place is None or at is None:
        return now
    left_key, left_value, right_key, right_value, left, right = now
    if len(at) == right_key.shape[2]:  # two keys: the left ones lie in order as well
        left_key, left_value, at = left_key[:, :, :end], left_value[:, :, :end], at[:end]
        left = None if left is None else left[:, :, :end]
    right_key, right_value = right_key[:, :, :end], right_value[:, :, :end]
    position = torch.arange(right_key.shape[2], device=place.device)
    seen_left, seen_right = (at <= place[:, None])[None], (position <= place[:, None])[None]
    left = seen_left if left is None else seen_left & left
    right = seen_right if right is None else seen_right & right[:, :, :end]
    return [left_key, left_value, right_key, right_value, left, right]


def _block(q, left_key, left_value, right_key, right_value, left, right) -> Tensor:
    """Attend for some queries: q [G, I, K] -> [G, I, V]."""
    joined = q[:, :, None] * left_key  # [G, I, J, K]
    if right_key.shape[1] == 1:  # shared by the queries: one large product
        scores = (joined.flatten(1, 2) @ right_key[:, 0].transpose(1, 2)).unflatten(1, joined.shape[1:3])
    else:
        scores = joined @ right_key.transpose(2, 3)
    seen = None
    for mask, axis in ((left, 3), (right, 2)):
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(axis), -1e30)  # finite: an empty row must not become NaN
            some = mask.any(-1, keepdim=True)
            seen = some if seen is None else seen & some
    weight = scores.flatten(2).softmax(-1).view_as(scores)
    if right_value.shape[1] == 1:
        inner = (weight.flatten(1, 2) @ right_value[:, 0]).unflatten(1, weight.shape[1:3])
    else:
        inner = weight @ right_value
    out = (inner * left_value).sum(2)
    return out if seen is None else out * seen


def check_combination(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], key_mask: Tensor | None
) -> dict[str, int]:
    """Check the axes of q, m keys and m values (InputError) and return their sizes."""
    if isinstance(keys, Tensor) or isinstance(values, Tensor) or not keys or len(keys) != len(values):
        counts = [None if isinstance(x, Tensor) else len(x) for x in (keys, values)]
        raise InputError(
            f"got {counts[0]} keys and {counts[1]} values; expected two lists of the same length, 1 or more"
        )
    names = [f"keys[{i}]: B S H K" for i in range(len(keys))] + [f"values[{i}]: B S H V" for i in range(len(values))]
    n = bind(f"q: B T Hq K, {', '.join(names)}, key_mask: B S", q, *keys, *values, key_mask)
    if check_heads(q=n["Hq"], keys=n["H"]) != n["Hq"]:
        raise InputError(f"q has {n['Hq']} heads and the keys have {n['H']}; the queries need at least as many heads")
    return n


def _check_windows(n: dict[str, int], count: int, causal: bool, windows: Sequence[int] | None) -> None:
    if (causal or windows is not None) and n["T"] != n["S"]:
        raise InputError(f"q has {n['T']} tokens and the keys have {n['S']}; causal attention needs as many")
    if windows is not None and (len(windows) != count or min(windows) < 1):
        raise InputError(f"windows is {list(windows)}; expected {count} widths of 1 or more, one for each key")
    if windows is None and count > 2 and n["S"] ** (count - 1) > SCORES:
        raise InputError(
            f"{count} keys of {n['S']} tokens are {n['S']}^{count} combinations for each query; give windows, or fewer "
            f"than {math.floor(SCORES ** (1 / (count - 1)))} tokens"
        )
