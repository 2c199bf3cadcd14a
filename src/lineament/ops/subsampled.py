"""Stochastically subsampled attention: softmax over a random part of the sources, by dense blocks.

Hussain et al. 2023 (arXiv:2306.01705). Only sources (keys and values) are shuffled; targets (queries) stay where they
are. The paper leaves the noise of the local shuffle and the causal case open; here they are so:

- "unbiased": one random set of ceil(S / reduction) sources for all targets and heads.
- "local": sources are ordered by `i + sigma eps_i`, eps ~ N(0, 1); that order, and the targets in theirs, are cut into
  blocks of w = ceil(S / reduction), and a block of targets sees the block of sources at its place: each is used once.
- causal: hidden by original positions; a target whose block hides everything still sees itself.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lineament._base.autocast import without_autocast
from lineament._base.errors import InputError, unknown
from lineament._base.seeds import generator
from lineament._base.shapes import bind, check_heads

MODES = ("unbiased", "local")


def subsampled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mode: str = "local",
    reduction: float = 4.0,
    sigma: float | None = None,
    grid: tuple[int, int] | None = None,
    causal: bool = False,
    seed: int = 0,
    key_mask: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention in which every target sees about one source in `reduction`, drawn anew for each seed.

    Softmax renormalises over what is seen; there is no other weight. `reduction=1` is dense attention. Under
    `causal` or `mask` (T <= S), which may hide a whole block, each target also sees itself, source i + S - T.

    Args:
        q: [B, T, Hq, K], scaled already (no scale is applied), positions applied too.
        k: [B, S, H, K]; H divides Hq (grouped heads). v: [B, S, H, V].
        mode: "local" (needs T = S) or "unbiased".
        reduction: at least 1. sigma: >= 0, in tokens, w if None; 0 is windowed, `math.inf` uniformly random blocks.
        grid: (rows, columns) of an image whose tokens come row by row: noise and windows in two dimensions.
        causal: source j is seen by target i only if j <= i + S - T, by original positions.
        seed: of the draw; another one in every layer and step. The same seed is the same draw.
        key_mask: [B, S], nonzero for real sources; then each sample draws among its own.
        mask: bool [1 or B, 1 or Hq, T, S], True where seen. bias: the same axes, added to the products.

    Returns:
        [B, T, Hq, V] in v's dtype; zeros for a target that sees nothing.

    Raises:
        InputError: axes disagree, an unknown mode, or a number out of range.

    Example:
        >>> x = torch.randn(1, 6, 2, 4)
        >>> dense = torch.nn.functional.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3, scale=1.0)
        >>> torch.allclose(subsampled_attention(x, x, x, reduction=1, seed=3), dense.transpose(1, 2), atol=1e-6)
        True
    """
    n = bind("q: B T Hq K, k: B S H K, v: B S H V, key_mask: B S", q, k, v, key_mask)
    check_subsampling(mode, reduction, sigma)
    _check_axes(n, mode, reduction, grid, causal, key_mask)
    mask, bias = (
        _checked(name, x, [n[a] for a in ("B", "Hq", "T", "S")]) for name, x in (("mask", mask), ("bias", bias))
    )
    draw = _draw(n["T"], n["S"], mode, reduction, sigma, grid, seed, key_mask, q.device)
    with without_autocast(q.device):
        if mask is None and bias is None and not causal and draw.plain:
            out = _attend(_blocks(q, draw.targets), _blocks(k, draw.sources), _blocks(v, draw.sources))
        else:
            out = _masked_blocks(q, k, v, draw, causal, mask, bias)
    out = out.flatten(1, 2)
    back = draw.targets.flatten()[: n["T"]].argsort() if grid is not None else slice(n["T"])
    return out[:, back].to(v.dtype)


def subsampled_connections(length: int, **options) -> Tensor:
    """Return which connections a draw keeps: bool [T, S] for T = S = `length`; options as of `subsampled_attention`.

    Example:
        >>> subsampled_connections(4, mode="local", reduction=2, sigma=0.0).int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """
    zero, one = torch.zeros(1, length, 1, 1), torch.eye(length)[None, :, None]
    return subsampled_attention(zero, zero, one, **options)[0, :, 0] > 0


class _Draw(NamedTuple):
    """Positions of a draw: targets [N, W] and sources [P, N, w] by blocks (P is 1, or B with a key mask).

    Past the end of the tokens `targets` holds 0 (those rows are cut off) and `real` False. `plain` says that all
    sources are real.
    """

    targets: Tensor
    sources: Tensor
    real: Tensor
    plain: bool


def _draw(T, S, mode, reduction, sigma, grid, seed, key_mask, device) -> _Draw:
    keep = math.ceil(S / reduction)
    noise = torch.randn((1 if key_mask is None else len(key_mask), S, 2), generator=generator(seed)).double()
    valid = None if key_mask is None else key_mask.bool().cpu()
    if mode == "unbiased":
        order = _sorted_real(noise[..., 0], valid)[:, :keep]
        share = None if valid is None else (valid.sum(1, keepdim=True) / reduction).ceil()
        real = torch.ones_like(order, dtype=torch.bool) if share is None else torch.arange(keep) < share
        targets, sources, real = torch.arange(T)[None], order[:, None], real[:, None]
    else:
        noise = noise * min(keep if sigma is None else sigma, 1e18)
        if grid is not None:
            targets, order = _windows(grid, reduction, 0 * noise), _windows(grid, reduction, noise)
        else:
            place = torch.arange(S)[None]
            targets, order = place, _sorted_real(place + noise[..., 0], valid)
        if valid is not None:  # real sources change places among themselves, so that a real target's block has some
            slots = (~valid).to(torch.int8).argsort(dim=1, stable=True)
            order = torch.empty_like(order).scatter_(1, slots, order)
        blocks = math.ceil(S / keep)
        real = valid.gather(1, order) if valid is not None else torch.ones_like(order, dtype=torch.bool)
        spare = (0, blocks * keep - S)
        pad = torch.nn.functional.pad
        targets, sources, real = (pad(x, spare).unflatten(1, (blocks, keep)) for x in (targets, order, real))
        targets = targets[0]
    return _Draw(targets.to(device), sources.to(device), real.to(device), bool(real.all()))


def _sorted_real(score: Tensor, valid: Tensor | None) -> Tensor:
    """Return the order of scores [P, S], sources that are not real last."""
    return (score if valid is None else score.masked_fill(~valid, math.inf)).argsort(dim=1, stable=True)


def _windows(grid: tuple[int, int], reduction: float, noise: Tensor) -> Tensor:
    """Order an image's tokens by windows: rows into strips of equal size, then columns within each strip."""
    rows, columns = grid
    blocks = int(reduction)
    # among the ways to cut into strips x windows, the one with the squarest windows
    strips = min(
        (a for a in range(1, blocks + 1) if blocks % a == 0),
        key=lambda a: abs(math.log(rows * blocks / (a * a * columns))),
    )
    y = torch.arange(rows * columns).div(columns, rounding_mode="floor") + noise[..., 0]
    x = torch.arange(rows * columns) % columns + noise[..., 1]
    rank = y.argsort(dim=1, stable=True).argsort(dim=1)
    strip = rank.div(math.ceil(rows * columns / blocks) * (blocks // strips), rounding_mode="floor")
    by_column = x.argsort(dim=1, stable=True)
    return by_column.gather(1, strip.gather(1, by_column).argsort(dim=1, stable=True))


def _blocks(x: Tensor, index: Tensor) -> Tensor:
    """Take tokens of x [B, S, H, K] by index [N, w] or [B, N, w]: [B, N, H, w, K]."""
    if index.dim() == 2 or len(index) == 1:
        return x[:, index if index.dim() == 2 else index[0]].transpose(2, 3)
    return x[torch.arange(len(x), device=x.device)[:, None, None], index].transpose(2, 3)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Dense attention of blocks: q [B, N, Hq, W, K], k, v [B, N, H, w, .], mask [B, N, h, W, w] -> [B, N, W, Hq, V]."""
    blocks = q.shape[1]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    mask = None if mask is None else mask.flatten(0, 1)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    out = sdpa(q, k, v, mask, scale=1.0, enable_gqa=q.shape[1] != k.shape[1])
    return out.unflatten(0, (-1, blocks)).transpose(2, 3)


def _masked_blocks(
    q: Tensor, k: Tensor, v: Tensor, draw: _Draw, causal: bool, mask: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Attend inside each block where it is visible, and to oneself once where a mask may hide all. [B, N, W, Hq, V].

    "Oneself" is another source for each target, which no dense kernel has. It becomes one more column that all share:
    two more channels hold the score q_i . k_i (rounded, and the rest) on the queries' side and ones on the column's;
    one more channel of the values reads the column's weight back.
    """
    # with more targets than sources nobody sees himself (the first place stands in)
    itself = (draw.targets + k.shape[1] - q.shape[1]).clamp_min(0)[None]  # [1, N, W]
    visible, any_seen = _visible(draw, itself, causal, mask, bias)
    q, keys, values = _blocks(q, draw.targets), _blocks(k, draw.sources), _blocks(v, draw.sources)
    K, V, groups = q.shape[-1], values.shape[-1], q.shape[2] // keys.shape[2]
    own_key, own_value = (_blocks(x, itself).repeat_interleave(groups, 2) for x in (k, v))
    score = (q.to(torch.promote_types(q.dtype, torch.float32)) * own_key).sum(-1, keepdim=True)
    rounded = score.to(q.dtype)
    width = max(K + 2, V + 1)  # fused kernels want one width
    pad = torch.nn.functional.pad
    q = pad(torch.cat([q, rounded, (score - rounded).to(q.dtype)], -1), (0, width - K - 2))
    keys, values = pad(keys, (0, width - K, 0, 1)), pad(values, (0, width - V, 0, 1))
    keys[..., -1, K : K + 2] = 1.0
    values[..., -1, V] = 1.0
    out = _attend(q, keys, values, visible.expand(len(q), len(draw.targets), -1, -1, -1))
    out = out[..., :V] + out[..., V : V + 1] * own_value.transpose(2, 3)
    return out * any_seen.transpose(2, 3)


def _visible(
    draw: _Draw, itself: Tensor, causal: bool, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what SDPA adds or hides, [P, N, h, W, w + 1] with oneself in the last column, and who sees anything."""
    rows, columns = draw.targets[None, :, :, None], draw.sources[:, :, None, :]
    here = itself[..., None]
    seen = draw.real[:, :, None, None]  # [P, N, h, W, w], here with h = W = 1
    has_self = causal or (mask is not None and mask.shape[2] <= mask.shape[3])
    alone = torch.full((1, 1, 1, draw.targets.shape[1], 1), has_self, device=itself.device)
    if causal:
        seen = seen & (columns <= here)[:, :, None]
    if has_self:
        seen = seen & (columns != here)[:, :, None]
    if mask is not None:
        seen, alone = seen & _entries(mask, rows, columns), alone & _entries(mask, rows, here)
    seen, alone = _together(seen, alone)
    any_seen = seen.any(-1, keepdim=True) | alone
    visible: Tensor = torch.cat([seen, alone | ~any_seen], dim=-1)  # where nothing is seen, anything but NaN
    if bias is not None:
        added = _together(_entries(bias, rows, columns), _entries(bias, rows, here))
        visible = torch.cat(added, dim=-1).masked_fill(~visible, -math.inf)
    return visible, any_seen


def _together(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Broadcast all axes but the last."""
    shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return a.expand(*shape, -1), b.expand(*shape, -1)


def _entries(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Gather x [b, h, T, S] at rows [1, N, W, 1] and columns [P, N, 1 or W, w]: [max(b, P), N, h, W, w]."""
    x = x.permute(0, 2, 3, 1)
    sample = torch.arange(len(x), device=x.device)[:, None, None, None] if len(x) > 1 else rows.new_zeros(1, 1, 1, 1)
    return x[sample, rows, columns].movedim(-1, 2)


def _checked(name: str, x: Tensor | None, full: list[int]) -> Tensor | None:
    if x is None:
        return None
    if x.dim() != 4 or any(a not in (1, b) for a, b in zip(x.shape, full, strict=True)):
        raise InputError(f"{name} has shape {list(x.shape)}; expected what broadcasts to {full}")
    return x.expand(-1, -1, *full[2:])


def check_subsampling(mode: str, reduction: float, sigma: float | None) -> None:
    """Refuse a mode, reduction or sigma that means nothing (InputError)."""
    if mode not in MODES:
        raise unknown("mode of subsampled attention", mode, MODES)
    if not 1 <= reduction < math.inf:
        raise InputError(f"reduction is {reduction}; expected 1 (dense) or more, the share of sources being 1 in that")
    if sigma is not None and not sigma >= 0:
        raise InputError(f"sigma is {sigma}; expected 0 (windows) or more, in tokens")


def _check_axes(n, mode, reduction, grid, causal, key_mask) -> None:
    if check_heads(q=n["Hq"], k=n["H"]) != n["Hq"]:
        raise InputError(f"q has {n['Hq']} heads and k has {n['H']}; the queries need at least as many heads")
    T, S = n["T"], n["S"]
    if mode == "local" and T != S:
        raise InputError(f"q has {T} tokens and k has {S}; local subsampling needs as many (unbiased does not)")
    if causal and T > S:
        raise InputError(f"q has {T} tokens and k has {S}; causal attention needs at least as many keys")
    if grid is not None:
        if mode != "local" or grid[0] * grid[1] != S or reduction != int(reduction):
            raise InputError(
                f"grid {tuple(grid)} with {S} tokens, mode {mode!r} and reduction {reduction}; expected rows x columns "
                "to be the number of tokens, mode 'local' and a whole reduction"
            )
        if key_mask is not None:
            raise InputError("give grid or key_mask, not both: images have no padding here")
