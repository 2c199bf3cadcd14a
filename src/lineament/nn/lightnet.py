"""LightNet: every key channel is a softmax over what was seen; the state stays bounded and asks for no order."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lineament._base.autocast import without_autocast
from lineament._base.backends import widest
from lineament._base.errors import InputError
from lineament._base.shapes import bind, check_heads
from lineament.nn.config import MixerConfig
from lineament.nn.positions import speeds
from lineament.nn.recurrent import Terms, recur
from lineament.nn.rows import beginnings, positions
from lineament.nn.state import State, widened
from lineament.ops.parallel import Part, active, gathered, tied

NOTHING = -1e30  # the log of an empty sum: finite, so that no gradient becomes NaN


class LightNetState(NamedTuple):
    """S [B, Hk, K or 2K, V], the log sums of exp(k) [B, Hk, K] as wide as can be, and the tokens seen [B]."""

    memory: Tensor
    log_sum: Tensor
    count: Tensor


def log_sums(k: Tensor, before: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the running `log sum exp` of k [B, T, H, K] behind and before each token, and the last ones."""
    if cu_seqlens is None:
        z = torch.cat([before[:, None], k], dim=1).logcumsumexp(1)
        return z[:, 1:], z[:, :-1], z[:, -1]
    bounds = list(pairwise(cu_seqlens.tolist()))
    found = [log_sums(k[:, a:b], before[n : n + 1], None) for n, (a, b) in enumerate(bounds)]
    behind, ahead, last = zip(*found, strict=True)
    return torch.cat(behind, 1), torch.cat(ahead, 1), torch.cat(last)


def reached(part: Part, k: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log sums [rows, H, K] that this rank's rows begin with, and what every rank was asked for.

    Each rank sends the log sum over the document it leaves unfinished: bytes don't depend on the tokens.
    """
    every = gathered(part, k[:, part.borders[-2] :].logsumexp(1))
    entering = 1 if part.documents is not None else len(before)
    first = torch.cat([before[None, :entering], every[part.holders.start : part.holders.stop]]).logsumexp(0)
    return torch.cat([first, before[entering:]]), every


class LightNet(nn.Module):
    """`z_t = log sum_{s<=t} e^{k_s}`, `S_t = Diag(e^{z_{t-1} - z_t}) S_{t-1} + e^{k_t - z_t} v_t^T` (arXiv:2405.21022).

    Args:
        config: the shape; `k` holds logits. theta: of the relative positions (cosine form, twice the key width), put on
            q and on the softmax, never on its logits; None for none.
        virtual_zero: begin with one logit 0 that nobody reads, which damps the first tokens.
    """

    backend = "auto"

    def __init__(self, config: MixerConfig, *, theta: float | None = 1e4, virtual_zero: bool = False) -> None:
        super().__init__()
        self.config, self.theta, self.start = config, theta, 0.0 if virtual_zero else NOTHING

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, cu_seqlens: Tensor | None = None, state: State = None
    ) -> tuple[Tensor, State]:
        """See `HeadMixer`."""
        part, kept = active(), ()
        if part is not None:
            cu_seqlens = part.check_call(q.shape[1], cu_seqlens)
            if state is not None:
                raise InputError("LightNet begins from nothing under sequence_parallel; leave state out")
        wide, logits, memory = widened(k).dtype, k.to(widest(k.device)), None
        if state is None:
            rows = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
            before, count = logits.new_full((rows, *k.shape[2:]), self.start), beginnings(rows, q.device)
            if part is not None:
                before, *kept = reached(part, logits, before)
        else:
            memory, before, count = state
        behind, ahead, last = log_sums(logits, before, cu_seqlens)
        share, log_decay = (logits - behind).exp().to(wide), (ahead - behind).to(wide)
        if self.theta is not None:
            place = positions(q.shape[1], cu_seqlens, count)[..., None]
            q, share = cosines(q, place, self.theta), cosines(share, place, self.theta)
            log_decay = torch.cat([log_decay, log_decay], dim=-1)
        terms = Terms(q, share, v, log_decay)
        o, memory = recur(terms, state=memory, cu_seqlens=cu_seqlens, backend=self.backend)
        seen = q.shape[1] if cu_seqlens is None else cu_seqlens.diff()
        o = tied(o, *kept) if kept else o
        return o, LightNetState(memory, last, count + seen)


def cosines(x: Tensor, place: Tensor, theta: float) -> Tensor:
    """MD-LRPE: x [B, T, H, K] -> [B, T, H, 2K], whose products depend on differences of places [B, T, m] alone.

    The K channels are cut into m slots of `e = ceil(K / m)`, one per axis of the grid; channel j of a slot turns by
    `place theta^(-2 j / e)`.

    Example:
        >>> x = torch.ones(1, 2, 1, 4)
        >>> y = cosines(x, torch.tensor([[[0], [5]]]), 1e4)
        >>> round((y[0, 0] * y[0, 0]).sum().item(), 3), round((y[0, 1] * y[0, 1]).sum().item(), 3)
        (4.0, 4.0)
    """
    width, axes = x.shape[-1], place.shape[-1]
    slot = -(-width // axes)
    rate = speeds(slot, theta, x.device) ** 2
    angle = (place[..., None] * rate).flatten(-2)[..., :width].unsqueeze(-2)
    return torch.cat([x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)], dim=-1)


def global_field(
    q: Tensor, k: Tensor, v: Tensor, *, place: Tensor | None = None, theta: float = 1e4, mask: Tensor | None = None
) -> Tensor:
    """The same for all tokens at once and in any order: `o = q (softmax_N(k)^T v)`, one pass over a grid of any axes.

    Softmax and sums are taken in float32 or wider, under autocast too: a share is of the size 1 / N.

    Args:
        q: [B, N, Hq, K]. k: [B, N, H, K]; H divides Hq. k holds logits, whose softmax runs over the N tokens of each
            channel.
        v: [B, N, H, V].
        place: [B or 1, N, m] coordinates for relative positions (`cosines`); class tokens have 0. None for none.
        mask: [B, N], nonzero for real tokens; a row without any gives 0.

    Returns:
        [B, N, Hq, V] in v's dtype.

    Raises:
        InputError: axes or head counts disagree.

    Example:
        >>> v = torch.tensor([0.0, 3.0, 6.0]).view(1, 3, 1, 1)
        >>> global_field(torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1), v).flatten().tolist()
        [3.0, 3.0, 3.0]
    """
    n = bind("q: B N Hq K, k: B N H K, v: B N H V, mask: B N", q, k, v, mask)
    if check_heads(q=n["Hq"], k=n["H"]) != n["Hq"]:
        raise InputError(f"q has {n['Hq']} heads and k has {n['H']}; the queries need at least as many heads")
    if place is not None and (place.dim() != 3 or place.shape[0] not in (1, n["B"]) or place.shape[1] != n["N"]):
        raise InputError(f"place has shape {list(place.shape)}; expected [1 or {n['B']}, {n['N']}, axes of the grid]")
    logits, value = widened(k), widened(v)
    if mask is not None:
        padded = ~mask.bool()[..., None, None]
        logits, value = logits.masked_fill(padded, NOTHING), value.masked_fill(padded, 0.0)
    with without_autocast(v.device):
        share, q = logits.softmax(1), widened(q)
        if place is not None:
            q, share = cosines(q, place, theta), cosines(share, place, theta)
        field = torch.einsum("bnhk,bnhv->bhkv", share, value)
        return torch.einsum("bnhrk,bhkv->bnhrv", q.unflatten(2, (n["H"], -1)), field).flatten(2, 3).to(v.dtype)
