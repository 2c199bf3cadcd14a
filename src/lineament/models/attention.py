"""The "lineament" attention function, and the two thin classes that bring it what it needs.

A converted attention module runs its teacher's own forward (projections, norms, RoPE, output projection) with the cache
withheld; transformers' attention interface then hands q, k and v to `attend`, which calls the module's `mixer`. The
decoder's forward finds padding and packing once per call, for all layers.
"""

import inspect
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from lineament._base.errors import InputError
from lineament.models.cache import MixerLayer, StudentCache, adopt
from lineament.nn import Rows, causal_softmax
from lineament.nn.rows import stretch_rows
from lineament.ops.parallel import Part, active
from lineament.ops.window import window_attention

NAME = "lineament"


@dataclass(frozen=True)
class Call:
    """What a mixer needs beside q, k and v: the layer's input x [B, T, D], its cache layer, padding and packing."""

    x: Tensor
    memory: MixerLayer | None
    rows: Rows | None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    lineament: Call | None = None,
    lineament_rows: Rows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a student's layer: its mixer, or ordinary softmax where the layer has none.

    Args:
        query: [B, Hq, T, K], positions applied, not scaled. key, value: [B, Hk, T, K].
        attention_mask: transformers' mask, for layers without a mixer.
        scaling: what softmax multiplies the products by.

    Returns:
        [B, T, Hq, V], and None (there are no weights to give).
    """
    mixer, part = getattr(module, "mixer", None), active()
    packed = lineament_rows is not None and lineament_rows.valid is None
    window = getattr(module, "sliding_window", None) or kwargs.get("sliding_window")  # as Mistral and Phi-3 pass it
    sliding = window is not None or kwargs.get("softcap") is not None
    if mixer is None and part is None and (sliding or not packed):
        return ordinary(module, query, key, value, attention_mask, scaling, **kwargs)
    q = query.transpose(1, 2)
    q = q * (query.shape[-1] ** -0.5 if scaling is None else scaling) if scaling != 1.0 else q
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    if part is not None and mixer is None and sliding:
        if kwargs.get("softcap") is not None:
            raise InputError("a layer that squashes its attention logits can't run under sequence_parallel")
        return window_attention(q, k, v, window=window, sinks=0), None  # type: ignore[arg-type]
    if mixer is not None and lineament is None:
        raise InputError(f"the mixer in layer {module.layer_idx} is passed over: something replaced the forward of its "
                         "attention module, hooks of accelerate (device_map) perhaps")  # fmt: skip
    if mixer is None or lineament is None:
        return causal_softmax(q, k, v, rows=lineament_rows), None
    if lineament.memory is not None:
        return lineament.memory.advance(mixer, q, k, v, lineament.x, rows=lineament.rows), None
    return mixer(q, k, v, x=lineament.x, rows=lineament.rows, keep=False)[0], None


def ordinary(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention as the teacher has it: SDPA, or its own eager form where logits are squashed."""
    if kwargs.get("softcap") is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if attention_mask is None and query.shape[2] > 1:
        T, L = query.shape[2], key.shape[2]
        attention_mask = torch.ones(T, L, dtype=torch.bool, device=query.device).tril(L - T)[None, None]
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        low = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, low)
    teacher = next(cls for cls in type(module).__mro__ if cls.__module__.startswith("transformers."))
    eager = sys.modules[teacher.__module__].eager_attention_forward
    return eager(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def mask(config: Any = None, **kwargs: Any) -> Tensor | None:
    """The mask of the layers without a mixer; none is made when every layer has one."""
    text = config.get_text_config(decoder=True)
    layers = (getattr(text, "lineament", None) or {}).get("layers", {})
    return None if len(layers) == text.num_hidden_layers else sdpa_mask(config=config, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)


class _Attention(nn.Module):
    """A teacher's attention module with the cache withheld and a mixer in softmax's place."""

    layer_idx: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name = "layer_past" if "layer_past" in kwargs else "past_key_values"
        past = kwargs.pop(name, None)
        memory = None if past is None else past.layers[self.layer_idx]
        if memory is not None and not isinstance(memory, MixerLayer):
            raise InputError(f"layer {self.layer_idx} got a {type(memory).__name__}; pass StudentCache(model.config)")
        x = args[0] if args else kwargs["hidden_states"]
        if len(args) > 1:  # past_key_values as a position
            raise InputError(f"{type(self).__name__} takes its arguments by name")
        call = Call(x, memory, kwargs.get("lineament_rows"))
        return super().forward(*args, **kwargs, lineament=call)


class Decoder(nn.Module):
    """A teacher's decoder that finds padding and packing once and makes the right cache."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(_parameters(type(self)), args, strict=False))
        return super().forward(**prepared(self, kwargs))


@cache
def _parameters(cls: type) -> list[str]:
    """Names of a decoder's own arguments, for calls that give them by position."""
    base = next(c for c in cls.__mro__ if c.__module__.startswith("transformers."))
    return list(inspect.signature(base.forward).parameters)[1:]


@cache
def attention_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a converted attention module whose teacher is `cls`."""
    return _published(type(f"Lineament{cls.__name__}", (_Attention, cls), {"__module__": __name__}))


@cache
def decoder_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a student's decoder whose teacher is `cls`."""
    made = _published(type(f"Lineament{cls.__name__}", (Decoder, cls), {"__module__": __name__}))
    # transformers looks up what output_hidden_states may record by the class's name, and fills the table in __init__
    dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(made), cls._can_record_outputs)
    return made


def _published(cls: type) -> type:
    """Make a class that was made here findable by name, so that it can be pickled."""
    globals()[cls.__name__] = cls
    return cls


def __getattr__(name: str) -> type:
    """Make the class an unpickler asks for: `LineamentLlamaAttention` from `LlamaAttention`, and so on."""
    base = name.removeprefix("Lineament")
    for path, module in list(sys.modules.items()):
        if base != name and path.startswith("transformers.models.") and vars(module).get(base) is not None:
            cls = vars(module)[base]
            return attention_class(cls) if "Attention" in base else decoder_class(cls)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def prepared(decoder: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Add the cache and the padding and packing to a decoder's arguments."""
    given = kwargs.get("input_ids")
    given = kwargs["inputs_embeds"] if given is None else given
    past, part = kwargs.get("past_key_values"), active()
    if part is not None:
        return _of_stretch(part, kwargs, given)
    if past is not None:
        kwargs["past_key_values"] = past = adopt(past, decoder.config)
    elif kwargs.get("use_cache") is None and decoder.training:
        kwargs["use_cache"] = False
    rows = find_rows(kwargs, given.shape[0], given.shape[1])
    packed = rows is not None and rows.valid is None
    if packed and past is not None:
        raise InputError("position_ids restart inside a call with a cache; give each document its own row or call")
    if packed:
        kwargs["use_cache"] = False
        kwargs["attention_mask"] = None  # all ones; transformers looks for packing only without one
    wants = kwargs.get("use_cache")
    if past is None and (decoder.config.use_cache if wants is None else wants):
        if decoder.training and getattr(decoder, "gradient_checkpointing", False):
            kwargs["use_cache"] = False
        else:
            kwargs["past_key_values"] = StudentCache(decoder.config)
    kwargs["lineament_rows"] = rows
    return kwargs


def _of_stretch(part: Part, kwargs: dict[str, Any], given: Tensor) -> dict[str, Any]:
    """Prepare a call about one rank's stretch: positions of the whole sequence, its documents, no cache."""
    mask = kwargs.get("attention_mask")
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        raise InputError("under sequence_parallel a model keeps no cache; leave past_key_values and use_cache out")
    if mask is not None and not bool(torch.as_tensor(mask).all()):
        raise InputError("under sequence_parallel rows have no padding; pack documents with cu_seqlens instead")
    if kwargs.get("position_ids") is None:
        kwargs["position_ids"] = part.positions(given.device)[None]
    rows = stretch_rows(given.shape[1], given.device)
    kwargs.update(attention_mask=None, use_cache=False, lineament_rows=rows)
    return kwargs


def find_rows(kwargs: dict[str, Any], batch: int, length: int) -> Rows | None:
    """Find padding (attention_mask [B, past + T]) and packing (position_ids that restart) of a call; None for neither.

    With padding in the mask, restarts are not read as packing, as in transformers. With a mask of ones a jump forward
    is a distance, not another document.
    """
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if mask is not None and mask.dim() != 2:
        raise InputError(f"attention_mask has {mask.dim()} axes; a student takes a padding mask [B, T] only")
    exporting = torch.compiler.is_exporting()
    if mask is not None:
        if exporting:
            raise InputError("export a student without attention_mask: which tokens are padding can't be traced")
        mask = mask[:, mask.shape[1] - length :]
        if not bool(mask.all()):
            return Rows.make(mask)
    positions = kwargs.get("position_ids")
    if positions is None or length == 1 or exporting or positions.dim() != 2:
        return None
    steps = positions.diff(dim=-1)
    starts = torch.nn.functional.pad(steps != 1 if mask is None else steps < 1, (1, 0))
    if not bool(starts.any()):
        return None
    return Rows.make(None, starts.expand(batch, -1))
