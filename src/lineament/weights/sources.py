"""Opening models as points: folders, Hub names, GGUF files, safetensors files, modules, state dicts, adapters."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineament import io
from lineament._base.errors import InputError
from lineament.weights import packed
from lineament.weights.point import Point, Source, Spec

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
STALE = ".rotary_emb.inv_freq"
"""Computed from the config since 2023; old folders still carry it, and transformers passes over it, as is done here."""
BUFFERS = (".running_mean", ".running_var", ".num_batches_tracked", ".inv_freq", ".masked_bias", ".position_ids")


def open_point(
    model: Any,
    *,
    base: Any = None,
    lora: str = "merged",
    any_base: bool = False,
    dequantise: bool = False,
    rename: Mapping[str, str] | None = None,
    copy: bool = True,
) -> Point:
    """Open a model as a point; only headers are read.

    Args:
        model: a folder, Hub name, "smollm2", GGUF or safetensors file, module, state dict, or a LoRA adapter's folder.
        base: of an adapter: anything this function opens; default: the base that the adapter names.
        lora: what an adapter becomes: "merged" (base + s B A), "product" (the task vector s B A alone, zero elsewhere)
            or "factors" (A and B apart, as they are stored).
        any_base: accept a base of another name than the adapter's.
        dequantise: unpack float8 and int8 weights with their scales instead of refusing them.
        rename: {old prefix: new prefix} for tensor names, such as {"module.": ""}.
        copy: take a copy of a state dict's or module's tensors, so that later training does not move the point.

    Raises:
        InputError: nothing there; a pickle; a missing or broken shard; packed weights; an adapter that does not fit.
    """
    if isinstance(model, Point):
        point = model
    elif isinstance(model, nn.Module):
        point = _of_module(model, copy)
    elif isinstance(model, Mapping) and not isinstance(model, io.Weights):
        point = _of_tensors(model, copy)
    else:
        point = _of_files(model, base=base, lora=lora, any_base=any_base, dequantise=dequantise)
    return _renamed(point, rename) if rename else point


def split_lora(name: str) -> tuple[str, str | None]:
    """Split `model+lora`; a plus in a path that exists stays.

    Example:
        >>> split_lora("base+adapter"), split_lora("base")
        (('base', 'adapter'), ('base', None))
    """
    if "+" in name and not Path(name).exists():
        model, lora = re.split(r"\+", name, maxsplit=1)
        return model, lora
    return name, None


def open_named(name: str | Path, *, rename: Mapping[str, str] | None = None, **options: Any) -> Point:
    """Open a model by a name of the command line, `model+lora` included; options of `open_point`.

    `rename` is for the names of the whole: an adapter finds its base as it was.

    Raises:
        InputError: as `open_point`.
    """
    model, lora = split_lora(str(name))
    point = open_point(model, **options)
    if lora:
        point = open_point(lora, base=point, any_base=options.get("any_base", False))
    return open_point(point, rename=rename)


def _of_module(model: nn.Module, copy: bool) -> Point:
    state = model.state_dict()
    owners: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, tensor in state.items():
        place = tensor.data_ptr(), tensor.shape, tensor.stride()  # a transpose of the same memory is another tensor
        owner = owners.setdefault(place, name) if tensor.numel() else name
        if owner != name:
            ties[name] = owner
    tensors = {name: tensor for name, tensor in state.items() if name not in ties}
    buffers = frozenset(name for name, _ in model.named_buffers(remove_duplicate=False) if name in tensors)
    return Point(((_held(tensors, copy, type(model).__name__), 1.0),), ties, buffers)


def _of_tensors(tensors: Mapping[str, Any], copy: bool) -> Point:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name!r} is a {type(tensor).__name__}; expected a state dict of names and tensors")
    if not tensors:
        raise InputError("the state dict is empty; expected names and tensors")
    return Point(((_held(tensors, copy, "a state dict"), 1.0),), {}, buffer_names(tensors))


def _held(tensors: Mapping[str, Tensor], copy: bool, label: str) -> Source:
    held = {name: x.detach().clone() if copy else x.detach() for name, x in tensors.items()}
    return Source(label, {name: Spec(x.dtype, tuple(x.shape)) for name, x in held.items()}, held.__getitem__)


def buffer_names(names: Iterable[str]) -> frozenset[str]:
    """Guess from their names which tensors of a file are buffers; a file does not say."""
    return frozenset(name for name in names if f".{name}".endswith(BUFFERS))


def _of_files(model: Any, *, base: Any, lora: str, any_base: bool, dequantise: bool) -> Point:
    if isinstance(model, io.Weights):
        weights, folder = model, None
    else:
        path = Path(model)
        if not path.is_dir() and (path.suffix == ".gguf" or not path.is_file()):
            # only now: the models' room registers classes with transformers, which takes seconds
            from lineament.models.load import find_model

            path = find_model(model)
        if (path / "adapter_config.json").is_file():
            from lineament.weights.lora import open_adapter

            return open_adapter(path, base=base, lora=lora, any_base=any_base)
        weights, folder = io.open_weights(path), path if path.is_dir() else path.parent
    folder = folder if folder and (folder / "config.json").is_file() else None
    config = io.read_json(folder / "config.json") if folder else {}
    source = stored(weights, str(model) if isinstance(model, str | Path) else str(weights.source))
    source = replace(source, specs={n: spec for n, spec in source.specs.items() if not n.endswith(STALE)})
    source, change = packed.unpacked(source, config, dequantise)
    ties = {alias: owner for alias, owner in _ties(config, source.specs).items() if owner in source.specs}
    # transformers ties no two tensors that a folder holds with different numbers, whatever its config says
    apart = [n for n, owner in ties.items() if n in source.specs and not torch.equal(*map(source.load, (n, owner)))]
    tied = {alias: owner for alias, owner in ties.items() if alias not in apart}
    point = Point(((source, 1.0),), tied, buffer_names(source.specs), folder, change)
    return point.untie() if apart else point


def stored(weights: io.Weights, label: str) -> Source:
    """Return a source that reads from files; its fingerprint is the files' names, sizes and times."""
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in weights.files]
    specs = {name: Spec(weights.dtype(name), weights.shape(name)) for name in weights.names}
    mark = hashlib.sha256(repr(states).encode()).hexdigest()
    return Source(label, specs, weights.load, fingerprint=mark, files=tuple(weights.files))


def _ties(config: Mapping[str, Any], there: Iterable[str]) -> dict[str, str]:
    """Alias -> owner, as the model's class in transformers ties them; empty where nothing is tied."""
    names = config.get("architectures") or []
    if not names or config.get("tie_word_embeddings") is False:
        return {}
    if "tie_word_embeddings" not in config and any(name.endswith(HEADS) for name in there):
        return {}  # a head of its own: no need to ask transformers, whose import takes seconds
    import transformers

    kind = getattr(transformers, names[0], None)
    if kind is None:
        return {}
    if "tie_word_embeddings" not in config:  # left out where it is the default of the family
        default = kind.config_class() if kind.config_class else None
        default = default.get_text_config() if default is not None else None
        if not getattr(default, "tie_word_embeddings", False):
            return {}
    keys = getattr(kind, "_tied_weights_keys", None)
    return {alias: owner for alias, owner in keys.items() if "*" not in alias} if isinstance(keys, dict) else {}


def _renamed(point: Point, rename: Mapping[str, str]) -> Point:
    def new(name: str) -> str:
        prefix = next((old for old in rename if name.startswith(old)), None)
        return name if prefix is None else rename[prefix] + name.removeprefix(prefix)

    names = {new(name): name for name in point.specs}
    if len(names) < len(point.specs):
        raise InputError(f"renaming {dict(rename)} makes two tensors of {point.label} share a name")
    specs = {now: point.specs[old] for now, old in names.items()}
    renamed = point.computed(point.label, specs, [point], lambda name: point.read(names[name]), told=dict(rename))
    ties = {new(alias): new(owner) for alias, owner in point.ties.items()}
    return Point(renamed.terms, ties, frozenset(map(new, point.buffers)), point.folder, point.config)
