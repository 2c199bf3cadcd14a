"""Other people's models on this library's operators, in place: the same weights, the same outputs, less time.

transformers' linear layers call their recurrence by a name of their module (`torch_chunk_gated_delta_rule`, ...). A
sped up layer runs its own forward with that name bound to an operator of ours; everything around it stays theirs.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from types import CellType, FunctionType, MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lineament._base.errors import InputError
from lineament.nn.mixer import unit
from lineament.nn.state import widened
from lineament.ops import decayed_attention, decayed_step_, delta_rule, delta_step_


def gated_delta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule by transformers' signature, a decay per head or per key channel; `chunk_size` is ours to choose.

    Args:
        query, key: [B, T, Hk, K], not scaled. value: [B, T, Hv, V]. g: [B, T, Hv] or [B, T, Hv, K], log decays.
        beta: [B, T, Hv]. initial_state: [B, Hv, K, V].

    Returns:
        [B, T, Hv, V] in the query's dtype, and the last state if asked for.
    """
    q, k = widened(query), widened(key)
    q, k = (unit(q), unit(k)) if use_qk_l2norm_in_kernel else (q, k)
    q, beta, state = q * q.shape[-1] ** -0.5, widened(beta), initial_state
    if q.shape[1] == 1 and state is not None and cu_seqlens is None and not torch.is_grad_enabled():
        state = widened(state).clone()
        o = delta_step_(q[:, 0], k[:, 0], value[:, 0], beta[:, 0], g[:, 0], state)[:, None]
    else:
        o, state = delta_rule(q, k, value, beta, g, state=state, cu_seqlens=cu_seqlens)
    return o.to(query.dtype), state if output_final_state else None


def ssd(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None = None,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    seq_idx: Tensor | None = None,
    **_: Any,
) -> Any:
    """Mamba-2's scan by transformers' signature: decayed attention with q = C, k = B, v = dt x and log decay dt A.

    Args:
        hidden_states: x [B, T, H, P]. dt: [B, T, H]. A: [H], < 0. B, C: [B, T, G, N]. D: [H].
        initial_states: [B, H, P, N].

    Returns:
        [B, T, H, P] in float32 or wider; with it the last states if asked for.
    """
    if seq_idx is not None:
        raise InputError("Mamba-2's scan takes no packed rows here (seq_idx); run the documents apart")
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = (softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    x, dt = widened(hidden_states), widened(dt)
    state = None if initial_states is None else initial_states.mT
    o, state = decayed_attention(widened(C), widened(B), x * dt[..., None], A.to(dt.dtype) * dt, state=state)
    o = o if D is None else o + D.to(o.dtype)[..., None] * x
    return (o, state.mT) if return_final_states else o


def lightning(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The forward of MiniMax's Lightning attention on `decayed_attention` (its slopes are the log decays)."""
    states = self.act_fn(self.qkv_proj(hidden_states))
    if attention_mask is not None:
        states = states * attention_mask[..., None].to(states.dtype)
    q, k, v = states.unflatten(-1, (self.num_attention_heads, -1)).chunk(3, dim=-1)
    log_decay = -widened(self.slope_rate.flatten())
    state = None if past_key_values is None else past_key_values.get_linear_cache(self.layer_idx)
    if q.shape[1] == 1 and state is not None and not torch.is_grad_enabled():
        state = widened(state).clone()
        o = decayed_step_(q[:, 0], k[:, 0], v[:, 0], log_decay.expand(len(q), -1), state)[:, None]
    else:
        o, state = decayed_attention(q, k, v, log_decay.expand(*q.shape[:3]), state=state)
    o = self.norm(o.flatten(2)) * self.output_gate(hidden_states).sigmoid()
    if past_key_values is not None:
        past_key_values.set_linear_cache(self.layer_idx, state)
    return self.out_proj(o), state


OPERATORS: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": gated_delta,
    "torch_recurrent_gated_delta_rule": gated_delta,
    "chunk_kimi_delta_attention": gated_delta,
    "recurrent_kimi_delta_attention": gated_delta,
    "mamba2_chunk_scan": ssd,
}
"""What a transformers module calls -> ours with the same signature."""

FORWARDS: dict[str, Callable[..., Any]] = {"MiniMaxLightningAttention": lightning}
"""Layers whose recurrence is written into their forward -> the whole forward."""


class SpedUp:
    """What `speed_up_` did; `restore()`, or the end of a `with` block, takes it back.

    Attributes:
        layers: {name of a layer: names of the operators it now uses}.
    """

    def __init__(self, layers: Mapping[str, tuple[str, ...]], modules: list[nn.Module]) -> None:
        self.layers, self._modules = dict(layers), modules

    def restore(self) -> None:
        """Give every layer its own forward back (again and again does no harm)."""
        for module in self._modules:
            module.__dict__.pop("forward", None)
        self._modules = []

    def __enter__(self) -> "SpedUp":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"SpedUp({len(self.layers)} layers)"


def speed_up_(model: nn.Module) -> SpedUp:
    """Let a transformers model's linear layers run on this library's operators, in place.

    Qwen3-Next, Qwen 3.5, OLMo hybrid, Kimi Linear, Mamba-2 and its hybrids, MiniMax, and whatever else calls its
    recurrence by a name in `OPERATORS`. Weights, cache, saving and outputs stay as they are (outputs to rounding);
    training goes through our backward. The operators take packed rows; the short convolutions before them do not.

    Args:
        model: in eval or in training; not one that keeps weights on disk or CPU by accelerate's hooks.

    Returns:
        What was changed, and the way back.

    Raises:
        InputError: no layer has a recurrence known here, or a layer's forward has been replaced already; nothing is
            changed then.

    Example:
        >>> from transformers import Mamba2Config, Mamba2ForCausalLM
        >>> shape = dict(hidden_size=16, num_heads=4, head_dim=8, state_size=8, n_groups=1, vocab_size=32)
        >>> model, ids = Mamba2ForCausalLM(Mamba2Config(num_hidden_layers=1, **shape)).eval(), torch.ones(1, 5).long()
        >>> theirs = model(ids).logits
        >>> with speed_up_(model) as sped:
        ...     bool(torch.allclose(model(ids).logits, theirs, atol=1e-5)), list(sped.layers.values())
        (True, [('mamba2_chunk_scan',)])
    """
    plan: dict[str, tuple[nn.Module, Callable[..., Any], tuple[str, ...]]] = {}
    for name, module in model.named_modules():
        forward, used = _faster(type(module))
        if forward is None:
            continue
        if "forward" in module.__dict__:
            raise InputError(
                f"{name or 'the model'} has a forward of its own already (sped up before, or hooked by accelerate); "
                "restore it first"
            )
        plan[name] = module, forward, used
    if not plan:
        known = ", ".join(sorted({*OPERATORS, *FORWARDS}))
        raise InputError(f"{type(model).__name__} has no layer whose recurrence is known here ({known})")
    for module, forward, _ in plan.values():
        module.forward = MethodType(forward, module)
    return SpedUp({name: used for name, (_, _, used) in plan.items()}, [module for module, _, _ in plan.values()])


def _faster(cls: type[nn.Module]) -> tuple[Callable[..., Any] | None, tuple[str, ...]]:
    """Return the forward of a class on our operators and their names, or None where it uses none of them."""
    if not cls.__module__.startswith("transformers."):
        return None, ()
    for base in cls.__mro__:
        if base.__name__ in FORWARDS and "forward" in base.__dict__:
            return FORWARDS[base.__name__], (base.__name__,)
    inner = inspect.unwrap(cls.forward)
    code = getattr(inner, "__code__", None)
    known = vars(sys.modules[inner.__module__]) if code is not None else {}
    used = tuple(name for name in OPERATORS if code is not None and name in code.co_names and name in known)
    return (_rebound(cls.forward, {name: OPERATORS[name] for name in used}), used) if used else (None, ())


def _rebound(function: Any, names: Mapping[str, Any]) -> Any:
    """Return a copy of a function that sees other objects under some global names; its decorators are kept."""
    inner = getattr(function, "__wrapped__", None)
    scope, closure = function.__globals__, function.__closure__
    if inner is None:
        scope = {**scope, **names}
    else:
        new = _rebound(inner, names)
        closure = tuple(CellType(new) if cell.cell_contents is inner else cell for cell in closure or ())
    made = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__, made.__dict__ = function.__kwdefaults__, {**function.__dict__}
    return made
