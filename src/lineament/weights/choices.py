"""Merges that decide entry by entry or tensor by tensor what to take from whom."""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from lineament._base.errors import InputError
from lineament.weights.geometry import PIECE, dot_product, pieces
from lineament.weights.task_vectors import top_mask

QUANTILE_SAMPLE = 1_000_000


def passthrough(tensors: Sequence[Tensor], base: None, *, scale: Sequence[float | None]) -> Tensor:
    """Take the one tensor as it is, or times `scale`."""
    return tensors[0] if scale[0] is None else tensors[0].float() * scale[0]


def nearswap(tensors: Sequence[Tensor], base: Tensor, *, t: float) -> Tensor:
    """Move each entry of the base towards the other model by at most `t`: entries closer than `t` are swapped whole."""
    delta = tensors[0].float() - base
    share = (t / delta.abs().clamp_min_(1e-6)).clamp_(0, 1)
    return delta.mul_(share).add_(base)


def model_stock(tensors: Sequence[Tensor], base: Tensor, *, filter_wise: bool) -> Tensor:
    """Interpolate between base and mean by the angle between task vectors (Jang et al. 2024, arXiv 2403.19522).

    `t = N cos / (1 + (N - 1) cos)` with the mean cosine of all pairs, for the whole tensor or for each row.
    """
    deltas = [x.float() - base for x in tensors]
    rows = [d.reshape(1, -1) if d.dim() < 2 or not filter_wise else d for d in deltas]
    lengths = [row.norm(dim=-1) for row in rows]
    cosines = [
        ((rows[i] * rows[j]).sum(-1) / (lengths[i] * lengths[j]).clamp_min(1e-6)).clamp(-1, 1)
        for i, j in combinations(range(len(rows)), 2)
    ]
    cosine, n = torch.stack(cosines).mean(0)[..., None], len(rows)
    divisor = 1 + (n - 1) * cosine
    lost = divisor.abs() < 1e-6  # exactly opposing updates say nothing about where to go
    t = torch.where(lost, 0.0, n * cosine / torch.where(lost, 1.0, divisor))
    total = rows[0].clone()
    for row in rows[1:]:
        total.add_(row)
    return total.mul_(t / n).view(base.shape).add_(base)


def sce(tensors: Sequence[Tensor], base: Tensor, *, select_topk: float) -> Tensor:
    """Select the entries of highest variance, weigh by squared updates, erase minority signs (Wan 2024, 2408.07990)."""
    deltas = [x.float() - base for x in tensors]
    if select_topk < 1:
        variance = torch.empty(base.shape)
        for into, *parts in pieces(variance, *deltas):
            torch.var(torch.stack(parts), 0, unbiased=False, out=into)
        keep = top_mask(variance, int(int(variance.count_nonzero()) * select_topk))
        del variance
        deltas = [d.mul_(keep) for d in deltas]
    energy = [dot_product(d, d) / max(1, d.numel()) for d in deltas]
    total = sum(energy)
    weight = [e / total for e in energy] if total >= 1e-6 else [1 / len(deltas)] * len(deltas)
    out = torch.empty(base.shape)
    for into, start, *parts in pieces(out, base, *deltas):
        d = torch.stack(parts)
        agrees = torch.where(d.sum(0) >= 0, d > 0, d < 0) * torch.tensor(weight)[:, None]
        torch.add(start, (d * agrees).sum(0) / agrees.sum(0).clamp_min(1e-6), out=into)
    return out


def ram(
    tensors: Sequence[Tensor], base: Tensor, *, epsilon: float, r: float | None = None, alpha: float = 0.2
) -> Tensor:
    """Average updates where several models changed an entry, keep them whole where one did (2601.13572).

    With `r` (RAM+) what is a model's own grows by `1 + r min(shared / own, alpha)`, counted in entries.
    """
    inputs, gains = list(tensors), torch.ones(len(tensors))
    if r is not None:
        shared, own = torch.zeros(len(inputs)), torch.zeros(len(inputs))
        for start, *parts in pieces(base, *inputs):
            changed = torch.stack([(part.float() - start).abs_() > epsilon for part in parts])
            count = changed.sum(0)
            shared += (changed & (count > 1)).sum(1)
            own += (changed & (count == 1)).sum(1)
        gains = 1 + r * (shared / own.clamp_min(epsilon)).clamp(0, alpha)
    out = torch.empty(base.shape)
    for into, start, *parts in pieces(out, base, *inputs):
        d = torch.stack([part.float() - start for part in parts])
        changed = d.abs() > epsilon
        count = changed.sum(0)
        share = torch.where(count == 1, gains[:, None], 1 / count.clamp_min(1))
        torch.add(start, d.mul_(changed).mul_(share).sum(0), out=into)
    return out


def arcee_fusion(tensors: Sequence[Tensor], base: Tensor, *, generators: Sequence[torch.Generator]) -> Tensor:
    """Take the other model's entries where |difference| * KL(row softmaxes) is above median + 1.5 quartile ranges.

    Quartiles of tensors above a million entries come from a sample.
    """
    other = tensors[0].float()
    if not base.dim():
        raise InputError("arcee_fusion needs tensors with at least one axis")
    delta, importance = other - base, torch.empty(base.shape)
    for into, change, a, b in zip(*(_rows(x) for x in (importance, delta, other, base)), strict=True):
        p, q = a.softmax(-1) + 1e-8, b.float().softmax(-1) + 1e-8
        torch.mul(change.abs(), (p * (p / q).log()).sum(-1, keepdim=True), out=into)
    flat = importance.reshape(-1)
    if flat.numel() > QUANTILE_SAMPLE:
        flat = flat[torch.randint(flat.numel(), (QUANTILE_SAMPLE,), generator=generators[0])]
    ordered = flat.sort().values
    first, median, third = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    return delta.mul_(importance >= median + 1.5 * (third - first)).add_(base)


def _rows(x: Tensor) -> Sequence[Tensor]:
    """Cut a tensor into groups of whole rows of about a piece."""
    return x.view(-1, x.shape[-1]).split(max(1, PIECE // x.shape[-1]))
