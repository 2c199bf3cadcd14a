"""Softmax on a window and sinks, a linear-attention state for everything else, one denominator over both.

`windowed_linear_attention` is the form this library converts to, `lolcats_attention` the published one
(arXiv:2410.10254, section 3.2), `window_attention` the baseline with no far part. `window_state` tells how the state
is laid out.
"""

from collections.abc import Iterator
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lineament._base.autocast import without_autocast
from lineament._base.backends import Backend, choose
from lineament._base.errors import InputError
from lineament._base.shapes import bind, check_heads
from lineament.ops import window_traced
from lineament.ops.linear import linear_attention
from lineament.ops.parallel.collectives import tied
from lineament.ops.parallel.part import Part, active, alone
from lineament.ops.parallel.window import entering_state
from lineament.ops.recurrence.packed import checked_lengths
from lineament.ops.window_state import (
    WindowCall,
    WindowState,
    advanced,
    empty_state,
    expanded,
    sink_rows,
    width_of,
    with_past,
)
from lineament.ops.window_step import windowed_step_

__all__ = [
    "BACKENDS", "WindowState", "empty_state", "lolcats_attention", "lolcats_step_", "window_attention",
    "windowed_linear_attention", "windowed_step_",
]  # fmt: skip

BACKENDS = {  # best first
    "blocked": Backend("lineament.ops.window_backward:run"),
    "reference": Backend("lineament.ops.window_reference:run", plain=True),
}


def windowed_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor | None,
    phi_k: Tensor | None,
    log_scale: Tensor | None,
    *,
    window: int,
    sinks: int,
    log_decay: Tensor | None = None,
    outer: int = 0,
    state: WindowState | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, WindowState]:
    """Attend exactly to the last tokens and the first, and through feature maps to the rest.

    `o_n = [sum_E e^(s_i - c) v_i + a S_n^T phi(q_n)] / [sum_E e^(s_i - c) + a z_n . phi(q_n)]`, a = e^(lambda_n - c),
    with s_i = q_n . k_i, E = {n - window < i <= n} U {i < sinks}, and S_n, z_n the sums of phi(k_j) v_j^T and phi(k_j)
    over sinks <= j <= n - window. c = max(max_E s, lambda_n) cancels and only keeps the numbers in range. With a decay
    the far state is multiplied by e^(log_decay_n) before key n - window enters it.

    Args:
        q: [B, T, Hq, K], already multiplied by K^-1/2; any float dtype. Positions count from a row's first token.
        k: [B, T, Hk, K]. Hk divides Hq; heads repeat consecutively.
        v: [B, T, Hk, V].
        phi_q: [B, T, Hq, F], non-negative features of q; None (with phi_k and log_scale) for no far part.
        phi_k: [B, T, Hk, F].
        log_scale: lambda, [B, T, Hq] or [Hq]; -inf switches the far part off exactly.
        window: w >= 0, exact tokens that end with the query's own; 0 leaves the sinks alone exact.
        sinks: s >= 0, first tokens of a row that stay exact for ever. With window = sinks = 0 this is pure normalised
            linear attention, log_scale cancels and is not read.
        log_decay: [B, T, Hk], <= 0, in nats.
        outer: columns of phi_q and phi_k that are the first factor of product features: with A of F' columns the
            features are all A (F' - A) products of one of the first with one of the rest. 0: columns are features.
        state: the memory before token 0, as an earlier call returned it; rows may have seen unequal numbers of tokens.
        cu_seqlens: [N + 1], for B = 1: token offsets of N packed documents; the state then has N rows.
        backend: "auto", or a key of `BACKENDS`.

    Returns:
        o [B, T, Hq, V] in v's dtype, and the state after the last token. Cutting the tokens into several calls gives
        the same o.

    Raises:
        InputError: axes disagree, a negative window or number of sinks, a state of another shape or device, or
            cu_seqlens that doesn't rise from 0 to T.

    Example:
        >>> q = k = phi = torch.zeros(1, 4, 1, 1)
        >>> v = torch.tensor([8.0, 4.0, 2.0, 1.0]).view(1, 4, 1, 1)
        >>> off = torch.tensor([-torch.inf])
        >>> windowed_linear_attention(q, k, v, phi, phi, off, window=1, sinks=1)[0].flatten().tolist()
        [8.0, 6.0, 5.0, 4.5]
        >>> on, one = torch.zeros(1), torch.ones(1, 4, 1, 1)  # every weight is 1: a running mean
        >>> windowed_linear_attention(q, k, v, one, one, on, window=2, sinks=1)[0].flatten()[:2].tolist()
        [8.0, 6.0]
    """
    return _attend(q, k, v, phi_q, phi_k, log_scale, window, sinks, log_decay, state, cu_seqlens, backend, False, outer)


def lolcats_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    log_gamma: Tensor,
    *,
    window: int,
    state: WindowState | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, WindowState]:
    """Attend as LoLCATs publishes it: the window's weights are relative to its own largest one.

    `o_n = [gamma sum_W e^(s_i - c) v_i + S_n^T phi(q_n)] / [gamma sum_W e^(s_i - c) + z_n . phi(q_n)]`, c = max_W s.
    That is `windowed_linear_attention` without sinks and with lambda_n = c - log gamma, which is how it's computed.

    Args:
        q, k, v, phi_q, phi_k, window, state, cu_seqlens, backend: as in `windowed_linear_attention`; window >= 1.
        log_gamma: [Hq] or [B, T, Hq], log of the window's weight, <= 0.

    Returns:
        o [B, T, Hq, V] in v's dtype, and the state after the last token.

    Example:
        >>> x, gamma = torch.ones(1, 3, 1, 1), torch.zeros(1)
        >>> lolcats_attention(x, x, x, x, x, gamma, window=1)[0].flatten().tolist()
        [1.0, 1.0, 1.0]
    """
    if window < 1:
        raise InputError(f"window is {window}; the published form needs a window of at least one token")
    return _attend(q, k, v, phi_q, phi_k, -log_gamma, window, 0, None, state, cu_seqlens, backend, True)


def lolcats_step_(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, log_gamma: Tensor, state: WindowState, *, window: int
) -> Tensor:
    """Do one token of `lolcats_attention`; arguments without the T axis, as in `windowed_step_`."""
    return windowed_step_(q, k, v, phi_q, phi_k, -log_gamma, state, window=window, sinks=0, relative=True)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, sinks: int, cu_seqlens: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Softmax over the last `window` tokens and the first `sinks`: the baseline that a far part must beat.

    Args:
        q: [B, T, Hq, K], already scaled. k: [B, T, Hk, K]. v: [B, T, Hk, V].

    Returns:
        o [B, T, Hq, V]. For a state to go on from, call `windowed_linear_attention` with phi_q = phi_k = None.

    Example:
        >>> x = torch.zeros(1, 3, 1, 1)
        >>> window_attention(x, x, torch.arange(3.0).view(1, 3, 1, 1), window=2, sinks=0).flatten().tolist()
        [0.0, 0.5, 1.5]
    """
    return _attend(q, k, v, None, None, None, window, sinks, None, None, cu_seqlens, backend, False)[0]


class _Segment(NamedTuple):
    """Rows of the batch and tokens that start at one position, and the rows of the state that belong to them."""

    rows: slice
    tokens: slice
    memory: slice
    count: int


def _segments(rows: int, tokens: int, counts: list[int], offsets: list[int] | None) -> Iterator[_Segment]:
    if offsets is None:
        start = 0
        for count, run in groupby(counts):
            stop = start + len(list(run))
            yield _Segment(slice(start, stop), slice(0, tokens), slice(start, stop), count)
            start = stop
        return
    for i, count in enumerate(counts):
        yield _Segment(slice(0, rows), slice(offsets[i], offsets[i + 1]), slice(i, i + 1), count)


def _check(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor | None, phi_k: Tensor | None, log_scale: Tensor | None,
    log_decay: Tensor | None, cu_seqlens: Tensor | None, window: int, sinks: int,
) -> None:  # fmt: skip
    n = bind(
        "q: B T Hq K, k: B T Hk K, v: B T Hk V, phi_q: B T Hq F, phi_k: B T Hk F, log_decay: B T Hk",
        q, k, v, phi_q, phi_k, log_decay,
    )  # fmt: skip
    if check_heads(q=n["Hq"], k=n["Hk"]) != n["Hq"]:
        raise InputError(f"k has {n['Hk']} heads and q has {n['Hq']}; q must have as many heads or a multiple of them")
    if window < 0 or sinks < 0:
        raise InputError(f"window is {window} and sinks is {sinks}; neither may be negative")
    parts = [phi_q is None, phi_k is None, log_scale is None]
    if any(parts) and not all(parts):
        raise InputError("give all of phi_q, phi_k and log_scale, or none of them for no far part")
    if window + sinks == 0 and phi_q is None:
        raise InputError("window and sinks are 0 and there is no far part, so there is nothing to attend to")
    if log_scale is not None and log_scale.dim() != 1:
        bind("q: B T Hq K, log_scale: B T Hq", q, log_scale)
    if cu_seqlens is not None and n["B"] != 1:
        raise InputError(f"q has B={n['B']}, but packed documents (cu_seqlens) need B=1")
    if cu_seqlens is None and n["T"] == 0:
        raise InputError("q has T=0; give at least one token")


def _attend(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor | None, phi_k: Tensor | None, log_scale: Tensor | None,
    window: int, sinks: int, log_decay: Tensor | None, state: WindowState | None, cu_seqlens: Tensor | None,
    backend: str, relative: bool, outer: int = 0,
) -> tuple[Tensor, WindowState]:  # fmt: skip
    if not torch.compiler.is_compiling():  # (traced sizes may be symbols)
        _check(q, k, v, phi_q, phi_k, log_scale, log_decay, cu_seqlens, window, sinks)
        _check_outer(phi_q, outer)
    with without_autocast(q.device):
        return _walk(q, k, v, phi_q, phi_k, log_scale, window, sinks, log_decay, state, cu_seqlens, backend, relative,
                     outer)  # fmt: skip


def _walk(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor | None, phi_k: Tensor | None, log_scale: Tensor | None,
    window: int, sinks: int, log_decay: Tensor | None, state: WindowState | None, cu_seqlens: Tensor | None,
    backend: str, relative: bool, outer: int,
) -> tuple[Tensor, WindowState]:  # fmt: skip
    """Run a backend on rows of one position, or documents, one after the other."""
    B, T, Hq, _ = q.shape
    own = active()
    if own is not None:
        cu_seqlens = own.check_call(T, cu_seqlens)
    if phi_q is None or phi_k is None or log_scale is None:
        phi_q, phi_k = q[..., :0], k[..., :0]
        log_scale = q.new_full((1,), -torch.inf).expand(Hq)
    log_scale = log_scale.expand(B, T, Hq)
    offsets = None if cu_seqlens is None else [0, *accumulate(checked_lengths(cu_seqlens, q))]
    rows = B if offsets is None else len(offsets) - 1
    sizes = {"window": window, "sinks": sinks, "outer": outer}
    state, counts, kept = _memory(own, state, k, v, phi_k, log_decay, rows, sizes)
    if not rows:
        return v.new_empty(B, T, Hq, v.shape[-1]), state
    heads_first = [x.transpose(1, 2) for x in (k, v, phi_k)]
    outs, states = [], []
    traced = backend != "reference" and torch.compiler.is_compiling()
    run = window_traced.run if traced else choose(BACKENDS, backend, q)
    for part in _segments(B, T, counts, offsets):
        here = (part.rows, part.tokens)
        past = WindowState(*(x[part.memory] for x in state))
        if offsets is not None and part.tokens.stop == part.tokens.start:
            states.append(past)
            continue
        keys, values, features = (x[part.rows, :, part.tokens] for x in heads_first)
        at = (part.count, window, sinks)
        call = WindowCall(
            q[here], with_past(keys, past.keys, *at), with_past(values, past.values, *at), phi_q[here],
            with_past(features, past.features, *at), log_scale[here], None if log_decay is None else log_decay[here],
            past.far, sink_rows(keys, past.keys, part.count, sinks), sink_rows(values, past.values, part.count, sinks),
            window, sinks, part.count, relative, outer,
        )  # fmt: skip
        o, far = _pure(call) if window + sinks == 0 else run(call)
        outs.append(o.to(v.dtype))
        slots = [
            advanced(before, new, part.count, window, sinks)
            for before, new in zip(past[1:4], (keys, values, features), strict=True)
        ]
        states.append(WindowState(far, slots[0], slots[1], slots[2], past.count + keys.shape[2]))
    if len(states) == 1:
        return tied(outs[0], *kept) if kept else outs[0], states[0]
    o = torch.cat(outs, dim=0 if offsets is None else 1) if outs else v.new_empty(B, 0, Hq, v.shape[-1])
    return tied(o, *kept) if kept else o, WindowState(*(torch.cat(x) for x in zip(*states, strict=True)))


def _memory(
    own: Part | None, state: WindowState | None, k: Tensor, v: Tensor, phi_k: Tensor, log_decay: Tensor | None,
    rows: int, sizes: dict[str, int],
) -> tuple[WindowState, list[int], tuple[Tensor, ...]]:  # fmt: skip
    """Return the state before token 0, its counts, and what a parallel run must keep in the graph."""
    if own is not None:
        if state is not None:
            raise InputError("documents begin from nothing under sequence_parallel; leave state out")
        state, kept = entering_state(own, k, v, phi_k, log_decay, rows, **sizes)
        return state, state.count.tolist(), kept
    Hk, K = k.shape[2:]
    if state is None:
        return empty_state(rows, Hk, K, v.shape[-1], phi_k.shape[-1], like=k, **sizes), [0] * rows, ()
    slots, F, V = (rows, Hk, sizes["window"] + sizes["sinks"]), phi_k.shape[-1], v.shape[-1]
    wanted = ((rows, Hk, width_of(F, sizes["outer"]), V + 1), (*slots, K), (*slots, V), (*slots, F), (rows,))
    for name, x, shape in zip(state._fields, state, wanted, strict=True):
        if x.shape != shape:
            raise InputError(f"state.{name} has shape {list(x.shape)}; these arguments need {list(shape)}")
        if x.device != k.device:
            raise InputError(f"state.{name} is on {x.device} and k is on {k.device}; move one of them")
    return state, state.count.tolist(), ()


def _check_outer(phi_q: Tensor | None, outer: int) -> None:
    if phi_q is not None and outer and not 0 < outer < phi_q.shape[-1]:
        raise InputError(f"outer is {outer} and phi_q has {phi_q.shape[-1]} columns; both factors need at least one")


def _pure(call: WindowCall) -> tuple[Tensor, Tensor]:
    """No exact token at all: normalised linear attention."""
    phi_q, phi_k = (expanded(x, call.outer) for x in (call.phi_q, call.phi_k.transpose(1, 2)))
    with alone():  # under sequence_parallel the far state has come from the other ranks already
        return linear_attention(phi_q, phi_k, call.v.transpose(1, 2), log_decay=call.log_decay, state=call.far)
