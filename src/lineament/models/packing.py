"""A cache layer as named tensors and a JSON value, and back: what `StudentCache.save` writes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lineament._base.errors import InputError
from lineament.nn import CountedState, DeltaState, KeyValues
from lineament.nn.blocks import BlockState
from lineament.nn.lightnet import LightNetState
from lineament.ops.window import WindowState

AROUND = {"tail", "count"}  # of a MixerCache
AXES = {"keys": 2, "values": 2, "valid": 1}  # of the columns of KeyValues
STATES: dict[str, Any] = {
    cls.__name__: cls for cls in (WindowState, CountedState, DeltaState, BlockState, LightNetState)
}


def _parted(state: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Return a state's tensors by path, and its tree: null, "tensor", or [class name, parts].

    Of keys and values the tree holds the length and the width of the values ("KeyValues").
    """
    if state is None or isinstance(state, Tensor):
        return ({}, None) if state is None else ({prefix or "0": state}, "tensor")
    if isinstance(state, KeyValues):
        held, length = _buffer(state)
        return {_path(prefix, name): x for name, x in held.items()}, ["KeyValues", [length, state.value_width]]
    names = getattr(state, "_fields", None) or range(len(state))
    parts = [_parted(part, _path(prefix, name)) for name, part in zip(names, state, strict=True)]
    return {name: x for held, _ in parts for name, x in held.items()}, [type(state).__name__, [s for _, s in parts]]


def _path(prefix: str, name: str | int) -> str:
    return f"{prefix}.{name}" if prefix else str(name)


def _rebuild(shape: Any, tensors: Mapping[str, Tensor], prefix: str = "") -> Any:
    if shape is None:
        return None
    if shape == "tensor":
        return tensors[prefix or "0"]
    name, inside = shape
    if name == "KeyValues":
        own = {part: tensors[_path(prefix, part)] for part in AXES if _path(prefix, part) in tensors}
        return _fill(own, inside[0], inside[1])
    fields = range(len(inside)) if name == "tuple" else STATES[name]._fields
    parts = [_rebuild(s, tensors, _path(prefix, n)) for n, s in zip(fields, inside, strict=True)]
    return tuple(parts) if name == "tuple" else STATES[name](*parts)


def flatten(layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a layer's tensors, cut to what is in use, and what else it must remember."""
    about: dict[str, Any] = {"class": type(layer).__name__}
    if hasattr(layer, "state"):
        filling, shape = _parted(layer.state.filling)
        held = {f"filling.{name}": x for name, x in filling.items()}
        full, length = _buffer(layer.state.full)
        held |= {f"full.{name}": x for name, x in full.items()}
        held |= {name: x for name in AROUND if (x := getattr(layer.state, name, None)) is not None}
        return held, {**about, "seen": layer.seen, "length": length, "state": shape}
    if hasattr(layer, "buffer"):
        held, length = _buffer(layer.buffer)
        return held, {**about, "length": length}
    held = {name: x for name in ("keys", "values") if isinstance(x := getattr(layer, name, None), Tensor)}
    return held, {**about, "seen": getattr(layer, "cumulative_length", None)}


def _buffer(buffer: KeyValues | None) -> tuple[dict[str, Tensor], int | None]:
    if buffer is None:
        return {}, None
    return {n: x.narrow(AXES[n], 0, buffer.length) for n, x in buffer.tensors().items()}, buffer.length


def _fill(tensors: Mapping[str, Tensor], length: int | None, value_width: int | None = None) -> KeyValues | None:
    if length is None:
        return None
    buffer = KeyValues(value_width)
    buffer.keys, buffer.values, buffer.valid = (tensors.get(n) for n in AXES)
    buffer.length = length
    return buffer


def unflatten(layer: Any, tensors: Mapping[str, Tensor], about: Mapping[str, Any], source: str) -> None:
    """Put what `flatten` returned into a fresh layer."""
    if about.get("class") != type(layer).__name__:
        raise InputError(f"{source} has a {about.get('class')} where this model needs a {type(layer).__name__}")
    if hasattr(layer, "state"):
        parts = {name.removeprefix("filling."): x for name, x in tensors.items() if name.startswith("filling.")}
        full = {name.removeprefix("full."): x for name, x in tensors.items() if name.startswith("full.")}
        layer.state.filling = _rebuild(about["state"], parts)
        layer.state.full = _fill(full, about["length"])
        for name in AROUND & tensors.keys():
            setattr(layer.state, name, tensors[name])
        layer.seen = int(about["seen"])
    elif hasattr(layer, "buffer"):
        layer.buffer = _fill(tensors, about["length"]) or KeyValues()
        if "keys" in tensors:
            layer.dtype, layer.device, layer.is_initialized = tensors["keys"].dtype, tensors["keys"].device, True
            layer.keys, layer.values = tensors["keys"], tensors["values"]
    elif "keys" in tensors:
        layer.lazy_initialization(tensors["keys"], tensors["values"])
        layer.keys, layer.values = tensors["keys"], tensors["values"]
        if about["seen"] is not None:
            layer.cumulative_length = int(about["seen"])
