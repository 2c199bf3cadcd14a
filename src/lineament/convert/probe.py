"""Look inside a teacher's attention: its queries, keys and values, and what it would do with some heads limited.

Nothing of the model is changed: transformers' attention interface is pointed at a function of ours for the time of
a `with` block, and pointed back after it, also after an error.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lineament.ops.window import window_attention

NAME = "lineament-probe"


@dataclass(frozen=True)
class Call:
    """One attention call of the teacher, caught between its projections and its output projection.

    Args:
        module: the attention module. layer: its index.
        hidden: [B, T, D] what the module was given.
        query: [B, T, Hq, K], not scaled, positions applied. key: [B, T, Hk, K]. value: [B, T, Hk, V].
        scaling: what softmax multiplies the products by.
        mask, extra: passed on to the ordinary attention.
    """

    module: nn.Module
    layer: int
    hidden: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    mask: Tensor | None
    extra: dict[str, Any]

    def scaled_query(self) -> Tensor:
        """Return the queries times `scaling`, as mixers and ops expect them."""
        return self.query * self.scaling

    def ordinary(self) -> Tensor:
        """Return what the teacher itself computes, [B, T, Hq, V]."""
        q, k, v = (x.transpose(1, 2) for x in (self.query, self.key, self.value))
        attend = sdpa_attention_forward
        if self.extra.get("softcap") is not None:
            attend = sys.modules[type(self.module).__module__].eager_attention_forward
        return attend(self.module, q, k, v, self.mask, scaling=self.scaling, **self.extra)[0]

    def limited(self, window: int, sinks: int) -> Tensor:
        """Return softmax attention over the last `window` and the first `sinks` tokens only, [B, T, Hq, V]."""
        return window_attention(self.scaled_query(), self.key, self.value, window=window, sinks=sinks)


Handler = Callable[[Call], Tensor]
_HANDLER: ContextVar[Handler] = ContextVar("lineament_probe_handler")
_HIDDEN: ContextVar[dict[int, Tensor]] = ContextVar("lineament_probe_hidden")


def _interface(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **extra: Any):
    scaling = extra.pop("scaling", None)
    extra.pop("dropout", None)
    call = Call(
        module=module,
        layer=int(module.layer_idx),  # pyright: ignore[reportArgumentType]
        hidden=_HIDDEN.get()[id(module)],
        query=query.transpose(1, 2),
        key=key.transpose(1, 2),
        value=value.transpose(1, 2),
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        mask=mask,
        extra=extra,
    )
    return _HANDLER.get()(call), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _interface)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


@contextmanager
def probing(attentions: Sequence[nn.Module], handler: Handler) -> Iterator[None]:
    """Let `handler` compute the attention of these modules for the time of a block.

    Args:
        attentions: attention modules of one model, each with a `config` and a `layer_idx`.
        handler: takes a `Call`, returns [B, T, Hq, V].
    """
    configs: list[Any] = list({id(module.config): module.config for module in attentions}.values())
    before = [config._attn_implementation for config in configs]
    hidden: dict[int, Tensor] = {}

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden[id(module)] = args[0] if args else kwargs["hidden_states"]

    hooks = [module.register_forward_pre_hook(remember, with_kwargs=True) for module in attentions]
    tokens = _HANDLER.set(handler), _HIDDEN.set(hidden)
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation_internal = old
        for hook in hooks:
            hook.remove()
        _HANDLER.reset(tokens[0])
        _HIDDEN.reset(tokens[1])


def limit_heads(limits: dict[int, Sequence[int]], *, window: int, sinks: int) -> Handler:
    """Return a handler under which the key-value heads `limits[layer]` see only the window and the sinks."""

    def handle(call: Call) -> Tensor:
        full = call.ordinary()
        heads = limits.get(call.layer, ())
        if not heads:
            return full
        return mix_heads(full, call.limited(window, sinks), heads, call.key.shape[2])

    return handle


def mix_heads(full: Tensor, limited: Tensor, heads: Sequence[int], key_heads: int) -> Tensor:
    """Take the query heads of the key-value heads `heads` from `limited`, the others from `full` ([B, T, Hq, V])."""
    group = full.shape[2] // key_heads
    pick = torch.zeros(full.shape[2], 1, dtype=torch.bool, device=full.device)
    for head in heads:
        pick[head * group : (head + 1) * group] = True
    return torch.where(pick, limited.to(full.dtype), full)
