"""Documents packed in one row (cu_seqlens) as rows of their own, grouped by length so that little is padded."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lineament._base.errors import InputError


def checked_lengths(cu_seqlens: Tensor, q: Tensor, name: str = "q") -> list[int]:
    """Return the length of every document.

    Raises:
        InputError: cu_seqlens isn't a rising list of ints from 0 to T, or q (called `name`) has more than one row.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2:
        given = f"shape {list(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}"
        raise InputError(f"cu_seqlens has {given}; expected [N + 1] ints, the borders of N documents")
    if q.shape[0] != 1:
        raise InputError(f"{name} has B={q.shape[0]}, but cu_seqlens packs all documents in one row; expected B=1")
    borders = cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(borders)]
    if borders[0] != 0 or borders[-1] != q.shape[1] or min(lengths) < 0:
        raise InputError(f"cu_seqlens is {borders}; expected a rising list from 0 to T={q.shape[1]} of {name}")
    return lengths


def run_packed(
    run: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor | None],
    state: Tensor,
    lengths: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Call `run(*inputs, state)` on documents of one length class after the other and put the results in order.

    Args:
        run: maps tensors [n, L, ..] and states [n, ..] to (o [n, L, ..], state); zero inputs must leave the state.
        inputs: [1, T, ..] or None.
        state: [N, Hs, K, V].
        lengths: of the N documents.

    Returns:
        o [1, T, ..] and the states [N, Hs, K, V].
    """
    starts = [0]
    for length in lengths[:-1]:
        starts.append(starts[-1] + length)
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length.bit_length(), []).append(index)
    outputs, states, tokens, order = [], [], [], []
    for size, members in sorted(groups.items()):
        order += members
        rows = torch.tensor(members, device=state.device)
        picked = state if len(members) == len(lengths) else state.index_select(0, rows)
        if size == 0:
            states.append(picked)
            continue
        o, after = _run_group(run, inputs, picked, [starts[i] for i in members], [lengths[i] for i in members])
        outputs.append(o)
        states.append(after)
        tokens += [torch.arange(starts[i], starts[i] + lengths[i]) for i in members]
    o, back = torch.cat(outputs), torch.cat(tokens).argsort().to(state.device)
    undo = torch.tensor(order, device=state.device).argsort()
    return o.index_select(0, back)[None], torch.cat(states).index_select(0, undo)


def _run_group(
    run: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor | None],
    state: Tensor,
    starts: list[int],
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Run documents of similar length as padded rows; o comes back as [tokens, H, V] in their order."""
    if len(starts) == 1:
        cut = slice(starts[0], starts[0] + lengths[0])
        o, state = run(*(None if x is None else x[:, cut] for x in inputs), state)
        return o[0], state
    longest = max(lengths)
    place = torch.arange(longest).expand(len(starts), -1)
    real = place < torch.tensor(lengths)[:, None]
    where = torch.where(real, place + torch.tensor(starts)[:, None], 0).flatten().to(state.device)
    real = real.to(state.device)
    rows = []
    for x in inputs:
        if x is not None:
            x = x[0].index_select(0, where).unflatten(0, real.shape)
            padding = ~real.view(*real.shape, *[1] * (x.dim() - 2))
            x = x if min(lengths) == longest else x.masked_fill(padding, 0.0)  # 0 times NaN is NaN
        rows.append(x)
    o, state = run(*rows, state)
    kept = real.flatten().nonzero()[:, 0]
    return o.flatten(0, 1).index_select(0, kept), state
