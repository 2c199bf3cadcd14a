"""Softmax, products of two tracked matrices, and fused attention, by one set of rules."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lineament.explain.structure import is_pattern

if TYPE_CHECKING:
    from lineament.explain.sweep import Step

QUERIES = 256  # rows of the pattern held at once


def softmax(s: "Step") -> None:
    """Take the tangent of s = softmax(x): rho_x = R - s sum R; or the pattern is a constant and R is stopped."""
    R = s.rel()
    if s.rules.softmax == "stop":
        s.absorb("stopped", R)
        return
    dim, p = s.argument("dim"), s.result()
    s.send(0, coef=R - p * R.sum(dim, keepdim=True))
    if s.counting:
        s.absorb("remainder", _remainder(R, s.value(0), p, dim))


def _remainder(R: Tensor, x: Tensor, p: Tensor, dim: int) -> Tensor:
    """R_j (1 - x_j + sum_k p_k x_k) over what is not masked."""
    seen = x > -torch.inf
    x = torch.where(seen, x, 0.0)
    return torch.where(seen, R * (1 - x + (p * x).sum(dim, keepdim=True)), 0.0)


def bilinear(s: "Step", first: int, second: int) -> None:
    """a @ b, both tracked: half each, all to the values, or the gradient (which gives the whole twice)."""
    c, kind = s.coef(), s.rules.attention
    if first == 1 or s.name == "Baddbmm":
        c = c * s.argument("alpha", 1)
    to = {first: c @ s.value(second).mT, second: s.value(first).mT @ c}
    patterns = [i for i in (first, second) if is_pattern(s.tape, s.edges[i][0])]
    if kind == "values" and len(patterns) == 1:
        other = second if patterns[0] == first else first
        s.send(other, coef=to[other])
        return
    for position, found in to.items():
        s.send(position, coef=found if kind == "gradient" else found / 2)
    if kind == "gradient" and s.counting:
        s.absorb("remainder", -(s.value(first) * to[first]))


def fused(s: "Step") -> None:
    """softmax(q k^T scale + mask) v in one node; the pattern is computed again, some rows at a time."""
    if not s.counting and s.rules.softmax == "propagate" and s.rules.attention != "values" and s.half() is None:
        _native(s)
        return
    c, (q, k, v) = s.coef(), (s.value(i) if s.edges[i][0] >= 0 else s.operand(i) for i in range(3))
    groups = q.shape[-3] // k.shape[-3]
    k, v = (x.repeat_interleave(groups, -3) if groups > 1 else x for x in (k, v))
    scale = s.argument("scale")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    to_q, to_k, to_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, q.shape[-2], QUERIES):
        rows = slice(start, start + QUERIES)
        raw = q[..., rows, :] @ k.mT * scale
        found = _rows(s, raw, _mask(s, raw, start), c[..., rows, :], v)
        to_v += found[0].mT @ c[..., rows, :]
        if found[1] is not None:
            to_q[..., rows, :] = found[1] @ k * scale
            to_k += found[1].mT @ q[..., rows, :] * scale
    for position, found in enumerate((to_q, to_k, to_v)):
        found = found.unflatten(-3, (-1, groups)).sum(-3) if groups > 1 and position else found
        if position == 2 or s.rules.softmax == "propagate":
            s.send(position, coef=found)


def pattern(s: "Step") -> Tensor:
    """Return the whole pattern [..., H, T, S] of a fused attention."""
    q, k = s.value(0), s.value(1)
    groups, scale = q.shape[-3] // k.shape[-3], s.argument("scale")
    k = k.repeat_interleave(groups, -3) if groups > 1 else k
    raw = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    mask = _mask(s, raw, 0)
    return torch.nan_to_num((raw if mask is None else raw + mask).softmax(-1))


def _native(s: "Step") -> None:
    """Without a ledger, the node's own derivative and the shares of the two products will do."""
    share = 0.5 if s.rules.attention == "half" else 1.0
    to_q, to_k, to_v = s.vjp(s.coef(), *[None] * (len(s.tape.shapes[s.index]) - 1))[:3]
    for position, found, part in ((0, to_q, share**2), (1, to_k, share**2), (2, to_v, share)):
        if found is not None:
            s.send(position, coef=found * part)


def _mask(s: "Step", raw: Tensor, start: int) -> Tensor | None:
    """Return what is added to the scores of some rows."""
    mask = s.argument("attn_mask", s.argument("attn_bias"))
    if mask is not None:
        mask = mask[..., start : start + raw.shape[-2], :] if mask.shape[-2] > 1 else mask
        if mask.dtype == torch.bool:
            return torch.zeros_like(raw).masked_fill(~mask, -torch.inf)
        return mask.to(raw.dtype)
    if s.argument("is_causal"):
        T, S = raw.shape[-2:]
        future = torch.ones(T, S, dtype=torch.bool, device=raw.device).triu(1 + start)
        return torch.zeros_like(raw).masked_fill(future, -torch.inf)
    return None


def _rows(s: "Step", raw: Tensor, mask: Tensor | None, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the weights for the values (times their share) and the coefficients of the scores, counting the rest."""
    kind, stop = s.rules.attention, s.rules.softmax == "stop"
    scores = raw if mask is None else raw + mask
    p = torch.nan_to_num(scores.softmax(-1))
    if kind == "values":
        return p, None
    share = 0.5 if kind == "half" else 1.0
    R = p * (c @ v.mT) * share
    if kind == "gradient" and s.counting:
        s.absorb("remainder", -R)
    if stop:
        s.absorb("stopped", R)
        return p * share, None
    rho = R - p * R.sum(-1, keepdim=True)
    if s.counting:
        s.absorb("remainder", _remainder(R, scores, p, -1))
        if mask is not None:
            s.absorb("constants", torch.where(rho == 0, 0.0, mask * rho))
        if kind == "gradient":
            s.absorb("remainder", -raw * rho)
    return p * share, rho * share
