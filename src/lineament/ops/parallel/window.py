"""What windowed attention remembers when a stretch begins: sinks and window fetched, the far state carried."""

import torch
from torch import Tensor

from lineament._base.backends import widest
from lineament.ops.parallel.collectives import Span, carried, exchange, only_if, tied
from lineament.ops.parallel.part import Part
from lineament.ops.window_state import WindowState, empty_state, expanded

BLOCK = 1024  # keys whose features are multiplied out at once


def entering_state(
    part: Part, k: Tensor, v: Tensor, phi_k: Tensor, log_decay: Tensor | None, rows: int, *, window: int, sinks: int,
    outer: int,
) -> tuple[WindowState, tuple[Tensor, ...]]:  # fmt: skip
    """Return the memory before this rank's first token, and the tensors whose collectives must stay in the graph.

    Args:
        k: [B, T, Hk, K]. v: [B, T, Hk, V]. phi_k: [B, T, Hk, F]. rows: of the state, B or the local documents.
    """

    def wants(rank: int) -> list[Span]:
        start, first = part.starts[rank], part.document_start(rank)
        return [(first, min(first + sinks, start)), (max(first + sinks, start - window), start)]

    Hk, widths = k.shape[2], [x.shape[-1] for x in (k, v, phi_k)]
    halo = exchange(part, torch.cat([k, v, phi_k], dim=-1).flatten(2), wants, kind="halo")
    fetched = [
        x.to(like.dtype) for x, like in zip(halo.unflatten(2, (Hk, -1)).split(widths, -1), (k, v, phi_k), strict=True)
    ]
    state = empty_state(rows, Hk, *widths, window=window, sinks=sinks, like=k, outer=outer)
    held = min(sinks, part.before)  # sinks among the tokens fetched
    positions = torch.arange(part.before - (halo.shape[1] - held), part.before, device=k.device)
    slots = torch.cat([torch.arange(held, device=k.device), (positions - sinks) % max(window, 1) + sinks])
    parts = [
        torch.cat([x[: len(new)].index_copy(2, slots, new.transpose(1, 2)), x[len(new) :]])
        for x, new in zip(state[1:4], fetched, strict=True)
    ]
    count = part.counts(rows, k.device)
    if not phi_k.shape[-1]:
        return WindowState(state.far, parts[0], parts[1], parts[2], count), (halo,)
    begun = part.documents is None or len(part.borders) == 2  # the document that leaves is the one that enters
    here = slice(0 if begun else part.borders[-2], None)
    before, past = (part.before, [x[:, held:] for x in fetched]) if begun else (0, [x[:, :0] for x in fetched])
    gate = None if log_decay is None else log_decay[:, here]
    feature, value = (torch.cat([old, new[:, here]], dim=1) for old, new in ((past[2], phi_k), (past[1], v)))
    far, moved = _left_behind(feature, value, gate, state.far, before, past[1].shape[1], window, sinks, outer)
    reached = carried(part, only_if(part.goes_on, far), only_if(begun and part.goes_on, moved))
    whole = reached if len(reached) == rows else torch.cat([reached, state.far[1:]])
    return WindowState(whole, parts[0], parts[1], parts[2], count), (halo, reached)


def _left_behind(
    phi_k: Tensor, v: Tensor, log_decay: Tensor | None, like: Tensor, before: int, past: int, window: int, sinks: int,
    outer: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what a document's tokens add to the far state here, [R, Hk, F, V + 1], and the decay [R, Hk, F] of it.

    Keys phi_k [R, past + T, Hk, F'] begin at position before - past; key p enters at the step of token p + window.
    """
    total = phi_k.shape[1] - past
    first = max(0, sinks - (before - past))
    last = phi_k.shape[1] - window  # keys from here on are still in the window at the end
    R, Hk = phi_k.shape[0], phi_k.shape[2]
    wide = widest(like.device)
    clock = like.new_zeros(R, total, Hk, dtype=wide) if log_decay is None else log_decay.to(wide).cumsum(1)
    far = tied(like.new_zeros(R, *like.shape[1:]), phi_k, v)  # in the graph also where no key leaves the window
    for start in range(first, last, BLOCK):
        keys = slice(start, min(start + BLOCK, last))
        step = torch.arange(keys.start, keys.stop, device=v.device) - past + window
        decay = (clock[:, -1:] - clock.index_select(1, step)).to(like.dtype).exp()
        feature = expanded(phi_k[:, keys].to(like.dtype), outer) * decay[..., None]
        value = torch.nn.functional.pad(v[:, keys].to(like.dtype), (0, 1), value=1.0)
        far = far + torch.einsum("bthf,bthv->bhfv", feature, value)
    return far, clock[:, -1].to(like.dtype).exp()[..., None].expand(-1, -1, like.shape[2])
