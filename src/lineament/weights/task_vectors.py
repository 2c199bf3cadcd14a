"""One engine for merges of task vectors: which entries survive, which sign is elected, how survivors are averaged.

Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089), TIES (Yadav et al. 2023, 2306.01708), DARE (Yu et al. 2024,
2311.03099), Breadcrumbs (Davari and Belilovsky 2024, 2312.06795) and DELLA (Deep et al. 2024, 2406.11617) are rows.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lineament._base.errors import InputError
from lineament.weights.geometry import PIECE, combined, pieces

SAMPLE = 1 << 15

Trim = Callable[..., Tensor]
"""(delta, options of this model, generator) -> boolean mask of what survives, or None for all."""


def linear(tensors: Sequence[Tensor], base: Tensor | None, *, weight: Sequence[float], normalize: bool) -> Tensor:
    """Weighted average `sum w_i x_i / sum w_i` (model soups, Wortsman et al. 2022, 2203.05482)."""
    total = total_weight(weight) if normalize else 1.0
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return combined(list(tensors), [w / total for w in weight], dtype)


def total_weight(weight: Sequence[float]) -> float:
    """Return the sum of the weights.

    Raises:
        InputError: it is zero, so that there is nothing to divide by.
    """
    total = sum(weight)
    if abs(total) < 1e-12:
        raise InputError(f"the weights {list(weight)} sum to zero; choose others or do not normalise")
    return total


def merge_task_vectors(
    tensors: Sequence[Tensor], base: Tensor, *, trim: Trim | None = None, elect: bool = False, weight: Sequence[float],
    density: Sequence[float], normalize: bool, rescale: bool | str, scale: float, generators: Sequence[torch.Generator],
    **each: Sequence[float],
) -> Tensor:  # fmt: skip
    """`base + scale * sum_i w_i m_i (x_i - base)`, trimmed by `trim`, only entries of the elected sign if `elect`.

    Args:
        normalize: divide by the sum of the weights, with `elect` by those that agree, entry by entry.
        rescale: after trimming, "l1" (or True) restores the sum of magnitudes, "1/density" divides by the density.
        generators: one per model, for random trimming.
    """
    deltas, total = [], sum(weight)
    for i, x in enumerate(tensors):
        wide = torch.promote_types(torch.promote_types(x.dtype, base.dtype), torch.float32)
        delta = combined([x, base], [1.0, -1.0], wide)
        options = {name: values[i] for name, values in each.items()}
        deltas.append(_trimmed(delta, trim, density[i], rescale, generators[i], options).mul_(weight[i]))
        del x, delta
    if normalize and not elect:
        scale = scale / (total if abs(total) >= 1e-8 else 1.0)
    out = torch.empty(base.shape, dtype=deltas[0].dtype)
    for into, start, *parts in pieces(out, base, *deltas, size=PIECE // 4):
        mixed = _elected(parts, weight, normalize) if elect else _sum(parts)
        torch.add(start, mixed, alpha=scale, out=into)
    return out


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    return total


def _elected(parts: Sequence[Tensor], weight: Sequence[float], normalize: bool) -> Tensor:
    """Sum the entries whose sign is that of the sum of all; a sum of zero counts as positive."""
    sign = _sum(parts).ge_(0).mul_(2).sub_(1)
    mixed, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for part, w in zip(parts, weight, strict=True):
        agreed = torch.mul(part, sign).clamp_min_(0)  # its magnitude where it agrees
        mixed.add_(agreed)
        if normalize:
            divisor.add_(agreed.sign_(), alpha=w)
    mixed.mul_(sign)
    return mixed.div_(torch.where(divisor == 0, 1.0, divisor)) if normalize else mixed


def _trimmed(
    delta: Tensor, trim: Trim | None, density: float, rescale: bool | str, generator: torch.Generator, options: dict
) -> Tensor:
    if trim is None or density >= 1:
        return delta
    before = delta.abs().sum() if rescale in (True, "l1") else None
    delta.mul_(trim(delta, density=density, generator=generator, **options))
    if before is not None:
        after = delta.abs().sum()
        return delta.mul_(before / after) if before >= 1e-7 and after >= 1e-7 else delta
    if rescale == "1/density":
        return delta.div_(density) if density else delta
    return delta


def check_trim(options: Mapping[str, Any]) -> None:
    """Refuse shares and rescalings that are none, before a tensor is read.

    Raises:
        InputError: a density outside 0 to 1, an epsilon that leads out of it, or an unknown `rescale`.
    """
    for density in options["density"]:
        if not 0 <= density <= 1:
            raise InputError(f"density is {density}; expected a share from 0 to 1")
    for density, epsilon in zip(options["density"], options.get("epsilon", ()), strict=False):
        if 0 < density < 1 and not 0 < density - abs(epsilon) <= density + abs(epsilon) < 1:
            raise InputError(f"density {density} -/+ epsilon {epsilon} must lie within (0, 1)")
    if options["rescale"] not in (True, False, "l1", "1/density", "none"):
        raise InputError(f"rescale is {options['rescale']!r}; expected l1, 1/density or none")


def largest(delta: Tensor, *, density: float, generator: torch.Generator | None = None) -> Tensor:
    """Keep the share `density` of largest magnitude, at least one entry; of ties the first ones."""
    count = min(max(1, int(density * delta.numel())), delta.numel()) if density > 0 else 0
    return top_mask(delta, count)


def middle(delta: Tensor, *, density: float, gamma: float, generator: torch.Generator | None = None) -> Tensor:
    """Drop the share `gamma` of largest magnitude, then keep the share `density` below it."""
    n = delta.numel()
    kept = int(density * n)
    below = max(0, n - kept - int(gamma * n))
    return top_mask(delta, n - below).logical_and_(top_mask(delta, n - below - kept).logical_not_())


def random(delta: Tensor, *, density: float, generator: torch.Generator) -> Tensor:
    """Keep each entry with probability `density`."""
    return torch.rand(delta.shape, generator=generator) < density


def by_rank(delta: Tensor, *, density: float, epsilon: float, generator: torch.Generator) -> Tensor:
    """Keep each entry with a probability that rises by its magnitude's rank within its row, `density` -/+ `epsilon`."""
    if density <= 0:
        return torch.zeros_like(delta, dtype=torch.bool)
    rows = delta.reshape(len(delta) if delta.dim() > 1 else 1, -1)
    mask = torch.empty(rows.shape, dtype=torch.bool)
    step = max(1, 4 * PIECE // rows.shape[1])
    for start in range(0, len(rows), step):
        rank = rows[start : start + step].abs().argsort(dim=1).argsort(dim=1).float()
        chance = rank.div_(max(1, rows.shape[1] - 1)).mul_(2 * epsilon).add_(density - epsilon)
        mask[start : start + step] = torch.rand(chance.shape, generator=generator) < chance
    return mask.view(delta.shape)


def top_mask(x: Tensor, count: int) -> Tensor:
    """Mark exactly `count` entries of largest magnitude; of equal ones those that stand first.

    Example:
        >>> top_mask(torch.tensor([1.0, -3.0, 1.0, 2.0]), 3).tolist()
        [True, True, False, True]
    """
    if count <= 0 or count >= x.numel():
        return torch.full(x.shape, count > 0, dtype=torch.bool)
    flat = x.reshape(-1)
    threshold, above = kth_magnitude(flat, count)
    mask, quota = torch.empty(flat.shape, dtype=torch.bool), count - above
    for into, piece in pieces(mask, flat):
        size = piece.abs()
        torch.gt(size, threshold, out=into)
        if quota and (found := int((ties := size == threshold).sum())):
            into |= ties if found <= quota else ties & (ties.cumsum(0) <= quota)
            quota -= min(found, quota)
    return mask.view(x.shape)


def kth_magnitude(flat: Tensor, count: int) -> tuple[float, int]:
    """Return the `count`-th largest magnitude and how many are larger.

    A sorted sample brackets it, one pass counts what lies above and collects what lies inside, and only that is sorted.
    """
    stride = max(1, flat.numel() // SAMPLE)
    sample = flat[::stride].abs().sort(descending=True).values
    rank, slack = count / stride, 4 * (len(sample) ** 0.5) * 0.5 + 2
    high = sample[int(rank - slack)].item() if rank - slack >= 0 else float("inf")
    low = sample[int(rank + slack)].item() if rank + slack < len(sample) else 0.0
    while True:
        above, inside = 0, []
        for piece in flat.split(PIECE):
            size = piece.abs()
            more = size > high
            above += int(more.sum())
            inside.append(size[(size >= low) & ~more])
        within = torch.cat(inside)
        if above < count <= above + len(within):
            break
        low, high = 0.0, float("inf")  # the sample misled: take all
    threshold = within.kthvalue(len(within) - (count - above) + 1).values.item()
    return threshold, above + int((within > threshold).sum())


def row(trim: Trim | None = None, elect: bool = False) -> Callable[..., Tensor]:
    """Return a merge of this family."""
    return partial(merge_task_vectors, trim=trim, elect=elect)
