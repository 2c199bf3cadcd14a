"""The recurrence over several ranks: run the stretch from nothing, carry the states, add what they are read as.

Linear in the state, so the outputs of a stretch are those from a zero state plus `q~_t^T S`, with S the state that
reaches the rank and `q~_t = (M_t .. M_1)^T q_t`. With a decay alone q~ is q times a factor. With the delta rule it is
read off the same call: K more value columns that are zero, over a state that begins as the identity.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lineament._base.backends import widest
from lineament.ops.parallel.collectives import carried, moved_by, only_if, tied
from lineament.ops.parallel.part import Part

Run = Callable[..., tuple[Tensor, Tensor]]


def run_parallel(
    part: Part,
    run: Run,
    qkv: tuple[Tensor, Tensor, Tensor],
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run a recurrence whose tokens are spread over the ranks.

    Args:
        run: (q, k, v, beta, log_decay, state) -> (o, states) on this rank's tokens, documents included.
        log_decay: clamped, in the dtype of the state.
        state: [R, Hs, K, V], R rows or local documents. The first rank starts from it, others from what reaches them.

    Returns:
        o [B, T, H, V], and the states behind this rank's last tokens.
    """
    q, k, v = qkv
    packed = part.documents is not None
    entering = slice(0, 1) if packed else slice(None)  # rows of the state that earlier ranks have begun
    leaving = slice(-1, None) if packed else slice(None)
    start = state if part.rank == 0 else torch.zeros_like(state)
    if beta is None:
        o, last = run(q, k, v, None, log_decay, start)
        reach, moved = _decayed(part, q, log_decay, state)
    else:
        o, last, reach, moved = _with_transition(run, q, k, v, beta, log_decay, start, entering)
    ends = len(part.borders) == 2 or not packed  # the document that enters is the one that leaves
    reached = carried(part, only_if(part.goes_on, last[leaving]), only_if(ends and part.goes_on, moved))
    o = tied((o.to(reached.dtype) + _read(reach, reached)).to(v.dtype), reached)
    final = moved_by(moved, reached) + last[entering]
    return o, torch.cat([final, last[1:]]) if packed else final


def scan_parallel(part: Part, run: Run, x: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run a scan over channels whose tokens are spread over the ranks.

    Args:
        run: (x, log_decay, state) -> (o, states) on this rank's tokens, documents included.
        x, log_decay: [B, T, D]. state: [R, D], R rows or local documents; the first rank starts from it.
    """
    packed, first = part.documents is not None, part.borders[1]
    entering, leaving = (slice(0, 1), slice(-1, None)) if packed else (slice(None), slice(None))
    o, last = run(x, log_decay, state if part.rank == 0 else torch.zeros_like(state))
    reach = log_decay[:, :first].to(widest(log_decay.device)).cumsum(1).to(state.dtype).exp()
    moved, ends = reach[:, -1], len(part.borders) == 2 or not packed
    left = only_if(part.goes_on, last[leaving])[:, None, :, None]
    reached = carried(part, left, only_if(ends and part.goes_on, moved)[:, None])[:, 0, :, 0]
    more = torch.nn.functional.pad(reach * reached[:, None], (0, 0, 0, x.shape[1] - first))
    final = moved * reached + last[entering]
    return tied(o + more, reached), torch.cat([final, last[1:]]) if packed else final


def _read(q: Tensor, state: Tensor) -> Tensor:
    """Return `S^T q` for q [B, T, H, K] and a state [B, Hs, K, V] whose heads divide H."""
    q = q.unflatten(2, (state.shape[1], -1))
    return torch.einsum("bthrk,bhkv->bthrv", q, state).flatten(2, 3)


def _decayed(part: Part, q: Tensor, log_decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return q with the decay since the stretch began, 0 behind the first document, and that decay at its end."""
    Hs, K = state.shape[1:3]
    heads = max(q.shape[2], Hs)
    q = q.to(state.dtype).repeat_interleave(heads // q.shape[2], dim=2)
    first = part.borders[1]
    if log_decay is None:
        factor = state.new_ones(q.shape[0], first, Hs, 1)
    else:
        sums = log_decay[:, :first].to(widest(log_decay.device)).cumsum(1)
        factor = (sums if sums.dim() == 4 else sums[..., None]).to(state.dtype).exp()
    reach = (q[:, :first].unflatten(2, (Hs, -1)) * factor[:, :, :, None]).flatten(2, 3)
    rest = q.new_zeros(q.shape[0], q.shape[1] - first, heads, K)
    return torch.cat([reach, rest], dim=1), factor[:, -1].expand(-1, -1, K)


def _with_transition(
    run: Run, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, entering: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return o, the last states, q~ and the composed transition [rows, Hs, K, K] of the rows that enter."""
    K, V = state.shape[2:]
    wide_v = torch.nn.functional.pad(v.to(state.dtype), (0, K))
    begin = torch.nn.functional.pad(state, (0, K))
    eye = torch.eye(K, dtype=state.dtype, device=state.device).expand(*state[entering].shape[:2], K, K)
    first = torch.cat([begin[entering][..., :V], eye], dim=-1)
    begin = torch.cat([first, begin[1:]]) if entering.stop == 1 else first
    o, last = run(q, k, wide_v, beta, log_decay, begin)
    return o[..., :V], last[..., :V], o[..., V:], last[entering][..., V:]
