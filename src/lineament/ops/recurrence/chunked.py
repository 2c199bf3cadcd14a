"""The recurrence as matmuls over chunks, with its own backward: the default on a CPU.

One custom operator, so that torch.compile and torch.export see one node with a shape rule and an autograd rule. Saved
for the backward are the inputs and the state at every panel's border; the backward recomputes each chunk from these.
Differentiating twice is refused (use backend="chunked-autograd").
"""

import torch
from torch import Tensor

from lineament.ops.recurrence import chunked_compiled
from lineament.ops.recurrence.layout import tiled
from lineament.ops.recurrence.walk import Sequence, backward, batches, forward, panel_length

CHUNK_DECAYED, CHUNK_DELTA = 32, 16  # measured best with 8 heads of 64, within 10 % of each other

Maybe = Tensor | None


def run_decayed(q: Tensor, k: Tensor, v: Tensor, log_decay: Maybe, state: Tensor, *, chunk_size: int | None = None):
    """Run decayed attention; the protocol of the package's docstring."""
    return _run(q, k, v, None, log_decay, state, chunk_size or CHUNK_DECAYED)


def run_delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Maybe, state: Tensor, *, chunk_size: int | None = None
):
    """Run the delta rule; the protocol of the package's docstring."""
    return _run(q, k, v, beta, log_decay, state, chunk_size or CHUNK_DELTA)


def _run(q: Tensor, k: Tensor, v: Tensor, beta: Maybe, log_decay: Maybe, state: Tensor, size: int):
    inputs = (q, k, v, beta, log_decay, state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, last, _ = torch.ops.lineament.recurrence(*inputs, size, save)
    return o, last


def _slice(x: Maybe, rows: slice) -> Maybe:
    return None if x is None else x[rows]


@torch.library.custom_op("lineament::recurrence", mutates_args=())
def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    size: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return o, the last state, and if `save` the states at the borders of panels [panels + 1, B, Hs, K, V]."""
    o, last, saved = _empty(q, v, state, size, save)
    states = saved if save else last[None]
    states[0].copy_(state)
    if chunked_compiled.refused(q, k, v, beta, log_decay, states) is None:
        chunked_compiled.forward(q, k, v, beta, log_decay, states, o, size)
        return (o, last.copy_(saved[-1]) if save else last, saved)
    for rows in batches(q.shape[0], state.shape[1]):
        cut = (q[rows], k[rows], v[rows], _slice(beta, rows), _slice(log_decay, rows))
        forward(Sequence(*cut, state.shape[1], state), states[:, rows], o[rows], size)
    if save:
        last.copy_(saved[-1])
    return o, last, saved


def _empty(q: Tensor, v: Tensor, state: Tensor, size: int, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, T, heads, _ = q.shape
    o = v.new_empty(B, T, max(heads, state.shape[1]), v.shape[-1])
    panel = panel_length(size)
    count = (T + panel - 1) // panel + 1 if save else 0
    return o, state.new_empty(state.shape), state.new_empty(count, *state.shape)


@recurrence.register_fake
def _(q, k, v, beta, log_decay, state, size, save):
    return _empty(q, v, state, size, save)


@torch.library.custom_op("lineament::recurrence_backward", mutates_args=())
def recurrence_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    states: Tensor,
    grad_o: Tensor,
    grad_state: Tensor,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, beta, log_decay (empty where there is none) and the first state."""
    named = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay}
    made = {name: _empty_grad(x, q) for name, x in named.items()}
    grad = grad_state.clone(memory_format=torch.contiguous_format)
    heads = states.shape[2]
    if chunked_compiled.refused(q, k, v, beta, log_decay, states) is None:
        chunked_compiled.backward(q, k, v, beta, log_decay, states, grad_o, grad, list(made.values()), size)
        return *made.values(), grad  # pyright: ignore[reportReturnType]
    for rows in batches(q.shape[0], heads):
        inputs = Sequence(q[rows], k[rows], v[rows], _slice(beta, rows), _slice(log_decay, rows), heads, states)
        outputs = {name: made[name][rows] for name, x in named.items() if x is not None}
        outputs = {name: tiled(x if x.dim() == 4 else x[..., None], heads) for name, x in outputs.items()}
        backward(inputs, states[:, rows], grad_o[rows], grad[rows].view(-1, *grad.shape[2:]), outputs, size)
    return *made.values(), grad  # pyright: ignore[reportReturnType]


def _empty_grad(x: Maybe, q: Tensor) -> Tensor:
    return q.new_empty(0) if x is None else x.new_empty(x.shape)


@recurrence_backward.register_fake
def _(q, k, v, beta, log_decay, states, grad_o, grad_state, size):
    return *(_empty_grad(x, q) for x in (q, k, v, beta, log_decay)), torch.empty_like(grad_state)


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, _, size, save = inputs
    if not save:
        raise RuntimeError("the recurrence was run without saving states, so it can't be differentiated")
    ctx.size = size
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_o: Maybe, grad_last: Maybe, _):
    *tensors, states = ctx.saved_tensors
    if grad_o is None:
        heads = max(tensors[0].shape[2], states.shape[2])
        grad_o = tensors[2].new_zeros(()).expand(*tensors[0].shape[:2], heads, tensors[2].shape[3])
    if grad_last is None:
        grad_last = states.new_zeros(states.shape[1:])
    grads = torch.ops.lineament.recurrence_backward(*tensors, states, grad_o, grad_last, ctx.size)
    return *(g if x is not None else None for g, x in zip(grads, (*tensors, states), strict=True)), None, None


recurrence.register_autograd(_backward, setup_context=_save_for_backward)
