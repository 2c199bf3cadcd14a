"""A decaying sum per channel: the recurrence of a vector state (HGRN, Toeplitz encodings by exponentials)."""

import torch
from torch import Tensor

from lineament._base.backends import Backend, choose, wants_plain_autograd
from lineament._base.errors import InputError
from lineament.ops.parallel import active
from lineament.ops.parallel.recurrence import scan_parallel
from lineament.ops.recurrence.gates import floored
from lineament.ops.recurrence.packed import checked_lengths, run_packed

CHUNK = 64  # tokens of a chunk: all chunks take their t-th step together, then the state walks over the chunks


def elementwise_scan(
    x: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum what came before, forgetting per channel.

    `o_t = exp(log_decay_t) o_{t-1} + x_t`. HGRN (arXiv:2311.04823) is a case of it, and so are Toeplitz encodings by
    exponentials (arXiv:2405.21022). Decays are multiplied, never divided by, so that any gate is exact.

    Args:
        x: [B, T, ...], one or more axes of channels, any float dtype.
        log_decay: broadcasts to x; <= 0, in nats, -inf allowed. Values under -1e3 count as -1e3 (a factor of exactly
            0) and get the gradient 0.
        state: [B, ...], o before step 0, zeros if None; [N, ...] with cu_seqlens. Not changed.
        cu_seqlens: [N + 1] ints from 0 to T, the borders of N documents packed in one row (B = 1).
        backend: "auto", or a key of `BACKENDS_SCAN` to force one.

    Returns:
        o [B, T, ...] in x's dtype, and the state behind the last step in float32 or wider.

    Raises:
        InputError: the axes disagree (both tensors are named), or there is no such backend.

    Example:
        >>> elementwise_scan(torch.ones(1, 3, 1), torch.full((1,), 0.5).log())[0].flatten().tolist()
        [1.0, 1.5, 1.75]
    """
    wide = torch.promote_types(x.dtype if state is None else torch.promote_types(x.dtype, state.dtype), torch.float32)
    _check(x, log_decay, state)
    part = active()
    if part is not None:
        cu_seqlens = part.check_call(x.shape[1], cu_seqlens)
        if cu_seqlens is not None and state is not None:
            raise InputError("packed documents begin from nothing under sequence_parallel; leave state out")
    lengths = None if cu_seqlens is None else checked_lengths(cu_seqlens, x, "x")
    shape = (x.shape[0] if lengths is None else len(lengths), *x.shape[2:])
    if state is None:
        state = torch.zeros(shape, dtype=wide, device=x.device)
    elif state.shape != shape:
        raise InputError(f"state has shape {list(state.shape)}; x asks for {list(shape)} [rows, channels]")
    if x.shape[1] == 0:
        return x.clone(), state.to(wide, copy=True)
    gate = floored(log_decay, wide).expand(x.shape)
    if backend == "auto" and not torch.compiler.is_compiling() and wants_plain_autograd():
        backend = "reference"
    run = run_chunked if backend in ("auto", "chunked") else choose(BACKENDS_SCAN, backend, x)
    inputs = (x.to(wide).flatten(2), gate.flatten(2))
    flat = state.to(wide).flatten(1)
    own = run if lengths is None else lambda *rows: run_packed(run, rows[:-1], rows[-1], lengths)
    o, last = own(*inputs, flat) if part is None else scan_parallel(part, own, *inputs, flat)
    return o.to(x.dtype).unflatten(2, x.shape[2:]), last.unflatten(1, x.shape[2:])


def scan_step_(x: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    """Advance `state` [B, ...] by one token of `elementwise_scan`, in place: x [B, ...] -> o [B, ...] in x's dtype.

    Example:
        >>> state = torch.ones(1, 2)
        >>> scan_step_(torch.ones(1, 2), torch.zeros(2), state).tolist()
        [[2.0, 2.0]]
    """
    return state.mul_(log_decay.to(state.dtype).exp()).add_(x).to(x.dtype, copy=True)


def run_reference(x: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The equation as a loop: x, log_decay [B, T, D] and state [B, D], float32 or wider."""
    outputs = []
    for x_t, g_t in zip(x.unbind(1), log_decay.unbind(1), strict=True):
        state = g_t.exp() * state + x_t
        outputs.append(state)
    return torch.stack(outputs, dim=1), state


def run_chunked(x: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Chunk by chunk, with its own backward: one more scan, from the end, over the saved result."""
    o = torch.ops.lineament.elementwise_scan(x, log_decay, state)
    return o, o[:, -1].clone()  # a view would keep all of o alive


def _scan(x: Tensor, log_decay: Tensor, state: Tensor, *, reverse: bool = False) -> Tensor:
    """Return h [B, T, D], `h_t = e^{g_t} h_{t-1} + x_t`; in reverse `h_t = e^{g_t} h_{t+1} + x_t`, from the end."""
    B, T, D = x.shape
    size = min(CHUNK, T)
    chunks = -(-T // size)
    missing = chunks * size - T
    pad = (0, 0, missing, 0) if reverse else (0, 0, 0, missing)  # tokens nobody reads, on the far side
    h, g = (torch.nn.functional.pad(y, pad) if missing else y for y in (x.clone(), log_decay))
    h, g = h.view(B, chunks, size, D), g.reshape(B, chunks, size, D)
    decay, since = g.exp(), g.clone()  # sums of logs: products of factors near 1 lose digits
    order = range(size - 1, -1, -1) if reverse else range(size)
    past = order[0]
    for i in order[1:]:  # every chunk from an empty state
        h[:, :, i].addcmul_(decay[:, :, i], h[:, :, past])
        since[:, :, i] += since[:, :, past]
        past = i
    since.exp_()
    for c in range(chunks - 1, -1, -1) if reverse else range(chunks):
        h[:, c].addcmul_(since[:, c], state[:, None])
        state = h[:, c, past]
    h = h.flatten(1, 2)
    return h[:, missing:] if reverse else h[:, :T]


@torch.library.custom_op("lineament::elementwise_scan", mutates_args=())
def _forward(x: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    return _scan(x, log_decay, state).contiguous()


@_forward.register_fake
def _(x, log_decay, state):
    return x.new_empty(x.shape)


@torch.library.custom_op("lineament::elementwise_scan_backward", mutates_args=())
def _backward(grad: Tensor, log_decay: Tensor, o: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, log_decay and the state: `dx_t = do_t + e^{g_{t+1}} dx_{t+1}`, `dg_t = e^{g_t} o_{t-1} dx_t`."""
    after = torch.cat([log_decay[:, 1:], torch.zeros_like(log_decay[:, :1])], dim=1)
    dx = _scan(grad, after, torch.zeros_like(state), reverse=True).contiguous()
    read = log_decay.exp().mul_(dx)
    before = torch.cat([state[:, None], o[:, :-1]], dim=1)
    return dx, before.mul_(read), read[:, 0].clone()


@_backward.register_fake
def _(grad, log_decay, o, state):
    return grad.new_empty(grad.shape), o.new_empty(o.shape), state.new_empty(state.shape)


def _save(ctx, inputs, output) -> None:
    _, log_decay, state = inputs
    ctx.save_for_backward(log_decay, output, state)


_forward.register_autograd(
    lambda ctx, grad: torch.ops.lineament.elementwise_scan_backward(grad.contiguous(), *ctx.saved_tensors),
    setup_context=_save,
)

BACKENDS_SCAN: dict[str, Backend] = {
    "chunked": Backend("lineament.ops.scan:run_chunked"),
    "reference": Backend("lineament.ops.scan:run_reference", plain=True),
}


def _check(x: Tensor, log_decay: Tensor, state: Tensor | None) -> None:
    if x.dim() < 3:
        raise InputError(f"x has shape {list(x.shape)}; expected the axes [B, T, channels]")
    for name, y in (("x", x), ("log_decay", log_decay), ("state", state)):
        if y is not None and not y.is_floating_point():
            raise InputError(f"{name} has dtype {y.dtype}; expected a floating point dtype")
        if y is not None and y.device != x.device:
            raise InputError(f"{name} is on {y.device} and x is on {x.device}; move one of them")
    pairs = zip(reversed(log_decay.shape), reversed(x.shape), strict=False)
    if log_decay.dim() > x.dim() or any(a not in (1, b) for a, b in pairs):
        raise InputError(f"log_decay has shape {list(log_decay.shape)}, which does not broadcast to x, {list(x.shape)}")
