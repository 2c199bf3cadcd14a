"""The students' cache: constant-size states, growing keys and values of what stays softmax, and a way back."""

import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    get_layer_types_and_kwargs,
)

from lineament import io
from lineament._base.errors import InputError
from lineament.models.packing import flatten, unflatten
from lineament.nn import LayerState, MixerCache, Rows
from lineament.nn.softmax import KeyValues
from lineament.nn.state import cloned


class GrowingLayer(DynamicLayer):
    """Keys and values of a softmax layer in buffers that grow by chunks: no concatenation per token."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.buffer = KeyValues()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append and return all keys and values seen, [B, Hk, L, K] views of the buffers."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = self.buffer.append(key_states, value_states)
        return self.keys, self.values

    def _changed(self) -> None:
        kept = self.buffer
        if kept.keys is not None and kept.values is not None:
            self.keys, self.values = kept.keys[:, :, : kept.length], kept.values[:, :, : kept.length]

    def get_seq_length(self) -> int:
        return self.buffer.length

    def reset(self) -> None:
        self.__init__()

    def crop(self, tokens_to_remove: int) -> None:
        self.buffer.crop(abs(tokens_to_remove))
        self._changed()

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.buffer.keys is not None:
            self.buffer.select(torch.arange(len(self.buffer.keys), device=self.device)[indices.to(self.device)])
            self._changed()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.buffer.keys is not None:
            self.buffer.select(torch.arange(len(self.buffer.keys), device=self.device).repeat_interleave(repeats))
            self._changed()

    def tensors(self) -> dict[str, Tensor]:
        return self.buffer.tensors()


class MixerLayer(LinearAttentionCacheLayerMixin):
    """The state of a converted layer; it counts tokens itself, and rolls back by replaying what it recorded."""

    is_compileable = False

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.keys = self.values = None  # what `DynamicCache.__iter__` looks for
        self.state = self._empty()
        self.seen = 0
        self._mixer: weakref.ref[nn.Module] | None = None
        self._before: LayerState | None = None
        self._record: list[tuple[Tensor, ...]] = []

    @staticmethod
    def _empty() -> LayerState:
        return LayerState()

    def _run(self, mixer: nn.Module, inputs: Sequence[Tensor], rows: Rows | None) -> Tensor:
        q, k, v, x = inputs
        o, self.state = mixer(q, k, v, x=x, rows=rows, state=self.state)
        return o

    def advance(self, mixer: nn.Module, *inputs: Tensor, rows: Rows | None) -> Tensor:
        """Run a mixer over the next tokens and keep its state: q, k, v and x, as in `ConvertedHeads.forward`."""
        if self.record_past:
            self._remember(mixer, inputs, rows)
        self.seen += inputs[0].shape[1]
        return self._run(mixer, inputs, rows)

    def _remember(self, mixer: nn.Module, inputs: Sequence[Tensor], rows: Rows | None) -> None:
        if rows is not None:
            raise InputError(
                "a cache that records for crop can't take padded or packed tokens; feed them before recording"
            )
        if self._before is None:
            self._before, self._mixer = self._mark(), weakref.ref(mixer)
        self._record.append(tuple(part.detach() for part in inputs))

    def _mark(self) -> LayerState:
        """Return what to come back to: a copy, but for the softmax heads' buffer, which can be cut to its length."""
        full = None if self.state.full is None else self.state.full.mark()
        return replace(self.state, filling=cloned(self.state.filling), full=full)

    def recorded(self) -> int:
        """Tokens that `crop` can take back."""
        return sum(part[0].shape[1] for part in self._record)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens (a number <= 0): the state before the record, and all but those replayed."""
        remove = -tokens_to_remove
        if remove:
            refused = self.refuses(remove)
            if refused:
                raise InputError(refused)
            keep = self.recorded() - remove
            parts = [torch.cat(part, dim=1)[:, :keep] for part in zip(*self._record, strict=True)]
            assert self._before is not None
            full, self.state = self.state.full, self._before
            if full is not None:
                full.length = 0 if self.state.full is None else self.state.full.length
                self.state.full = full
            self.seen -= remove
            mixer = self._mixer() if self._mixer is not None else None
            if keep and mixer is not None:
                self._run(mixer, parts, None)
        self._before, self._record = None, []

    def refuses(self, remove: int) -> str | None:
        """Say why `remove` tokens can't be taken back, or None."""
        if remove < 0:
            return "crop takes a number <= 0: how many of the newest tokens to take back"
        if remove and not self.record_past and self.seen:
            return (
                "a linear state can't forget tokens it has read; call activate_past_recording() before the tokens "
                "that may be taken back"
            )
        if remove > self.recorded():
            return f"crop({-remove}) reaches behind the {self.recorded()} tokens recorded since the last crop"
        return None

    @property
    def is_croppable(self) -> bool:
        """True: what is recorded can be taken back exactly."""
        return True

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reset(self) -> None:
        record = self.record_past
        self.__init__()
        self.record_past = record

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows (numbers or a mask)."""
        rows = next((len(x) for x in self.state.tensors().values()), 0)
        if self._before is not None:
            raise InputError("rows can't be selected while tokens are recorded; crop(0) first")
        if rows:
            self.state.select(torch.arange(rows, device=indices.device)[indices])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = next((len(x) for x in self.state.tensors().values()), 0)
        self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def offload(self) -> None:
        """Nothing to gain: the state doesn't grow."""

    def prefetch(self) -> None:
        """See `offload`."""

    def tensors(self) -> dict[str, Tensor]:
        """Name every tensor held, the record for crop included."""
        record = {f"record.{i}.{j}": x for i, parts in enumerate(self._record) for j, x in enumerate(parts)}
        before = {} if self._before is None else self._before.tensors()
        return self.state.tensors() | record | {f"before.{name}": x for name, x in before.items()}

    def lazy_initialization(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("a mixer's state is made by its mixer; see MixerLayer.advance")

    update_conv_state = update_recurrent_state = lazy_initialization


class WholeLayer(MixerLayer):
    """The state of a layer made from scratch (`nn.Mixer`): its heads' and that of what stands around them."""

    @staticmethod
    def _empty() -> MixerCache:
        return MixerCache()

    def _run(self, mixer: nn.Module, inputs: Sequence[Tensor], rows: Rows | None) -> Tensor:
        return mixer(inputs[0], cache=self.state, rows=rows)


class StudentCache(DynamicCache):
    """The cache of a student: a `MixerLayer` per converted layer, growing or sliding keys and values elsewhere.

    Args:
        config: the student's config.

    Example:
        >>> from lineament.models import StudentCache, tiny
        >>> model = tiny("llama")
        >>> cache = StudentCache(model.config)
        >>> _ = model(torch.zeros(1, 5, dtype=torch.long), past_key_values=cache)
        >>> cache.get_seq_length()
        5
    """

    def __init__(self, config: Any) -> None:
        Cache.__init__(self, layers=layers_for(config))
        self._shape = _shape_of(config)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen (padding counts)."""
        return self.layers[layer_idx].get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.layers[layer_idx].get_mask_sizes(query_length)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` tokens, exactly; needs `activate_past_recording()` before them.

        Raises:
            InputError: they were not recorded; no layer is changed then.
        """
        for layer in self.layers:
            refused = layer.refuses(-tokens_to_remove) if isinstance(layer, MixerLayer) else None
            if refused:
                raise InputError(refused)
        super().crop(tokens_to_remove)

    def tensors(self) -> dict[str, Tensor]:
        """Name every tensor held: "3.filling.far", "7.keys", ..."""
        found: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            if isinstance(layer, MixerLayer | GrowingLayer):
                own = layer.tensors()
            else:
                own = {n: x for n in ("keys", "values") if isinstance(x := getattr(layer, n, None), Tensor)}
            found |= {f"{i}.{name}": x for name, x in own.items()}
        return found

    def nbytes(self) -> int:
        """Bytes of every tensor held, spare room of growing buffers included."""
        return sum(x.numel() * x.element_size() for x in self.tensors().values())

    def save(self, path: str | Path) -> None:
        """Write the cache to one safetensors file (a prompt's state, to go on from later)."""
        tensors, layers = {}, []
        for i, layer in enumerate(self.layers):
            held, about = flatten(layer)
            tensors |= {f"{i}.{name}": x for name, x in held.items()}
            layers.append(about)
        io.save_tensors(tensors, path, metadata={"lineament-cache": json.dumps(layers), "shape": self._shape})

    @classmethod
    def load(cls, path: str | Path, config: Any, device: str | torch.device = "cpu") -> "StudentCache":
        """Read what `save` wrote for a model of the same config.

        Raises:
            InputError: not a cache file, or one of another model.
        """
        weights = io.open_weights(path)
        cache = cls(config)
        about = json.loads(weights.metadata.get("lineament-cache", "null"))
        if about is None or len(about) != len(cache.layers):
            raise InputError(
                f"{path} is not a cache of this model ({len(cache.layers)} layers); save one with cache.save"
            )
        for i, (layer, own) in enumerate(zip(cache.layers, about, strict=True)):
            held: Mapping[str, Tensor] = {
                name.removeprefix(f"{i}."): weights.load(name).to(device)
                for name in weights.names
                if name.startswith(f"{i}.")
            }
            unflatten(layer, held, own, str(path))
        if weights.metadata.get("shape", cache._shape) != cache._shape:
            raise InputError(f"{path} is a cache of a model with other widths, heads or mixers")
        return cache


def _shape_of(config: Any) -> str:
    """Say what a cache's tensors depend on, as JSON."""
    text = config.get_text_config(decoder=True)
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "lineament")
    return json.dumps({name: getattr(text, name, None) for name in names}, sort_keys=True)


def layers_for(config: Any) -> list[Any]:
    """Return fresh cache layers for a student's config."""
    text = config.get_text_config(decoder=True)
    kinds, keywords = get_layer_types_and_kwargs(text)
    classes = {**DYNAMIC_LAYER_TYPE_MAPPING, "full_attention": GrowingLayer}
    about = text.lineament or {}
    converted, made = {int(i) for i in about.get("layers", {})}, WholeLayer if "slots" in about else MixerLayer
    return [
        made() if i in converted else classes[kind](**own)
        for i, (kind, own) in enumerate(zip(kinds, keywords, strict=True))
    ]


def adopt(cache: Any, config: Any) -> "StudentCache":
    """Return a cache students can use: the one given, or an empty `DynamicCache` turned into one in place.

    Raises:
        InputError: another kind of cache, or a `DynamicCache` that already holds tokens.
    """
    if isinstance(cache, StudentCache):
        return cache
    filled = any(getattr(layer, "is_initialized", True) for layer in getattr(cache, "layers", []))
    if type(cache) is not DynamicCache or cache.offloading or filled:
        raise InputError(
            f"a student can't use this {type(cache).__name__}: its layers keep states, not keys and values. Pass "
            "StudentCache(model.config), an empty DynamicCache(), or nothing"
        )
    cache.__class__ = StudentCache
    taken: Any = cache
    StudentCache.__init__(taken, config)
    return taken
