"""The two public functions: check once, bring the inputs into the form backends expect, choose a backend."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lineament._base.autocast import without_autocast
from lineament._base.backends import Backend, choose, wants_plain_autograd
from lineament._base.errors import InputError
from lineament._base.shapes import bind, check_heads
from lineament.ops.parallel.part import active
from lineament.ops.parallel.recurrence import run_parallel
from lineament.ops.recurrence import autograd, chunked, reference
from lineament.ops.recurrence.gates import floored
from lineament.ops.recurrence.packed import checked_lengths, run_packed

TORCH_ONLY = {
    "chunked": chunked,
    "chunked-autograd": autograd,
    "reference": reference,
}  # may be traced by torch.compile


def decayed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention whose memory decays: never, per head, or per key channel.

    `S_t = Diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t`. Lightning Attention-2 (arXiv:2401.04658,
    section 3), RetNet, Mamba-2, GLA and HGRN-2 are cases of it. No scale is applied: fold K^-1/2 into q.

    Args:
        q: [B, T, Hq, K], any float dtype.
        k: [B, T, Hk, K]. Head counts divide one another; Hs = max(Hk, Hv) states, heads repeat consecutively.
        v: [B, T, Hv, V].
        log_decay: None (no decay), [B, T, Hs] or [B, T, Hs, K], <= 0, in nats, -inf allowed. Values under -1e3 count
            as -1e3 (a factor of exactly 0) and get the gradient 0.
        state: [B, Hs, K, V] before step 0, zeros if None; [N, Hs, K, V] with cu_seqlens. Not changed.
        cu_seqlens: [N + 1] ints from 0 to T, the borders of N documents packed in one row (B = 1).
        backend: "auto", or a key of `BACKENDS_DECAYED` to force one.
        chunk_size: tokens per chunk, a power of two; the backend's own choice if None.

    Returns:
        o [B, T, max(Hq, Hs), V] in v's dtype, and the state behind the last step in float32 or wider. Feeding that
        state to the next call continues the sequence exactly.

    Raises:
        InputError: axes or head counts disagree (both tensors are named), or there is no such backend.
        RuntimeError: a forced backend can't run here.

    Example:
        >>> q = k = v = torch.ones(1, 3, 1, 1)
        >>> decayed_attention(q, k, v)[0].flatten().tolist()
        [1.0, 2.0, 3.0]
        >>> decayed_attention(q, k, v, torch.full((1, 3, 1), -torch.inf))[0].flatten().tolist()
        [1.0, 1.0, 1.0]
    """
    from lineament.ops.recurrence import BACKENDS_DECAYED

    return _run(BACKENDS_DECAYED, (q, k, v), None, log_decay, state, cu_seqlens, backend, chunk_size)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention whose writes first erase what their key held (DeltaNet, Gated DeltaNet, KDA).

    `S_t = (I - b_t k_t k_t^T) Diag(exp(log_decay_t)) S_{t-1} + b_t k_t v_t^T`, `o_t = S_t^T q_t`. DeltaNet
    (arXiv:2406.06484, section 3) has no decay, Gated DeltaNet (arXiv:2412.06464) one per head, Kimi Delta Attention
    (arXiv:2510.26692) one per key channel. No scale is applied; normalise k (the step is stable for b |k|^2 <= 2).

    Args:
        q: [B, T, Hq, K], any float dtype.
        k: [B, T, Hk, K]. Head counts divide one another; Hs = max(Hk, Hv) states, heads repeat consecutively.
        v: [B, T, Hv, V].
        beta: [B, T, Hs], the strength of the write.
        log_decay: None (no decay), [B, T, Hs] or [B, T, Hs, K], <= 0, in nats, -inf allowed. Values under -1e3 count
            as -1e3 (a factor of exactly 0) and get the gradient 0.
        state: [B, Hs, K, V] before step 0, zeros if None; [N, Hs, K, V] with cu_seqlens. Not changed.
        cu_seqlens: [N + 1] ints from 0 to T, the borders of N documents packed in one row (B = 1).
        backend: "auto", or a key of `BACKENDS_DELTA` to force one.
        chunk_size: tokens per chunk, a power of two; the backend's own choice if None.

    Returns:
        o [B, T, max(Hq, Hs), V] in v's dtype, and the state behind the last step in float32 or wider.

    Raises:
        InputError: axes or head counts disagree (both tensors are named), or there is no such backend.
        RuntimeError: a forced backend can't run here.

    Example:
        >>> k = torch.ones(1, 2, 1, 1)
        >>> v = torch.tensor([3.0, 5.0]).view(1, 2, 1, 1)
        >>> delta_rule(k, k, v, torch.ones(1, 2, 1))[0].flatten().tolist()
        [3.0, 5.0]
    """
    from lineament.ops.recurrence import BACKENDS_DELTA

    return _run(BACKENDS_DELTA, (q, k, v), beta, log_decay, state, cu_seqlens, backend, chunk_size)


def _run(
    table: Mapping[str, Backend],
    qkv: tuple[Tensor, Tensor, Tensor],
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv
    if not torch.compiler.is_compiling():  # (traced sizes may be symbols, which can't be sorted or put in messages)
        _check(q, k, v, beta, log_decay, state, chunk_size)
    Hs, wide = max(k.shape[2], v.shape[2]), torch.float32
    for x in (q, k, v, state):
        wide = wide if x is None else torch.promote_types(wide, x.dtype)
    part = active()
    if part is not None:
        cu_seqlens = part.check_call(q.shape[1], cu_seqlens)
        if cu_seqlens is not None and state is not None:
            raise InputError("packed documents begin from nothing under sequence_parallel; leave state out")
    lengths = None if cu_seqlens is None else checked_lengths(cu_seqlens, q)
    rows = q.shape[0] if lengths is None else len(lengths)
    shape = (rows, Hs, k.shape[3], v.shape[3])
    if state is None:
        state = torch.zeros(shape, dtype=wide, device=q.device)
    elif state.shape != shape:
        raise InputError(f"state has shape {list(state.shape)}; q, k and v ask for {list(shape)} [rows, Hs, K, V]")
    state = state.to(wide)
    if q.shape[1] == 0:
        return v.new_zeros(q.shape[0], 0, max(q.shape[2], Hs), v.shape[3]), state.clone()
    beta = None if beta is None else beta.to(wide)
    gate = None if log_decay is None else floored(log_decay, wide)
    if backend == "auto" and not torch.compiler.is_compiling() and wants_plain_autograd():
        backend = "chunked-autograd"
    if backend == "auto" and (q.device.type == "cpu" or torch.compiler.is_compiling()):
        backend = "chunked"  # the only row that is both fast and possible there
    if backend in TORCH_ONLY:
        run = getattr(TORCH_ONLY[backend], "run_decayed" if beta is None else "run_delta")
    else:
        run = choose(table, backend, q, k, v)

    def here(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        *rows, state = inputs
        rows = [x for i, x in enumerate(rows) if i != 3 or x is not None]  # beta, which decayed attention has not
        if lengths is None:
            return run(*rows, state, chunk_size=chunk_size)
        return run_packed(lambda *rows: run(*rows, chunk_size=chunk_size), rows, state, lengths)  # type: ignore

    with without_autocast(q.device):
        if part is not None:
            return run_parallel(part, here, (q, k, v), beta, gate, state)
        return here(q, k, v, beta, gate, state)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    chunk_size: int | None,
) -> None:
    """Raise if the inputs don't fit together."""
    n = bind("q: B T Hq K, k: B T Hk K, v: B T Hv V", q, k, v)
    Hs = check_heads(k=n["Hk"], v=n["Hv"])
    check_heads(q=n["Hq"], **({"k": Hs} if n["Hk"] == Hs else {"v": Hs}))
    for name, x in (("q", q), ("k", k), ("v", v), ("beta", beta), ("log_decay", log_decay), ("state", state)):
        if x is None:
            continue
        if not x.is_floating_point():
            raise InputError(f"{name} has dtype {x.dtype}; expected a floating point dtype")
        if x.device != q.device:
            raise InputError(f"{name} is on {x.device} and q is on {q.device}; move one of them")
    per_head = (n["B"], n["T"], Hs)
    if beta is not None and beta.shape != per_head:
        raise InputError(f"beta has shape {list(beta.shape)}; k and v ask for {list(per_head)} [B, T, Hs]")
    if log_decay is not None and log_decay.shape not in (per_head, (*per_head, n["K"])):
        wanted = f"{list(per_head)} [B, T, Hs] or {[*per_head, n['K']]} [B, T, Hs, K]"
        raise InputError(f"log_decay has shape {list(log_decay.shape)}; k and v ask for {wanted}")
    if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
        raise InputError(f"chunk_size is {chunk_size}; expected a power of two such as 32 or 64")
