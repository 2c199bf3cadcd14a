"""Saving tensors as safetensors: whole or not at all, one tensor in memory at a time."""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lineament._base.errors import InputError
from lineament.io.files import need_space, replacing, sync_folder, write_json
from lineament.io.header import DTYPES
from lineament.io.weights import Weights

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MARGIN = 1 << 20  # bytes left on the disk beside the tensors


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Save named tensors as one safetensors file, in one step.

    Views and tensors that share memory are written out, each on its own. A mapping that loads late (`open_weights`) is
    read one tensor at a time.

    Args:
        tensors: name -> tensor, any dtype the format has, on any device.
        path: the file; until all is on the disk it keeps what it held before.
        metadata: text to keep in the header.

    Returns:
        The path.

    Raises:
        InputError: a tensor can't be saved (sparse, quantised, without data), or the disk is too small.
        DiskFullError: the disk filled up on the way.

    Example:
        >>> import tempfile
        >>> path = save_tensors({"w": torch.ones(2, 3)}, Path(tempfile.mkdtemp()) / "w.safetensors", {"format": "pt"})
        >>> path.stat().st_size
        120
    """
    names = sorted(tensors, key=lambda name: (-_about(tensors, name)[0].itemsize, name))  # keeps every tensor aligned
    header, at = {}, 0
    if metadata:
        header["__metadata__"] = {str(key): str(text) for key, text in sorted(metadata.items())}
    for name in names:
        dtype, shape, size = _about(tensors, name)
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    need_space(path, at + len(raw) + _MARGIN)
    with replacing(path) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in names:
            file.write(_bytes(tensors[name]))
    return Path(path)


def save_sharded(
    tensors: Mapping[str, Tensor],
    folder: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    stem: str = "model",
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Save named tensors the way transformers does: `model.safetensors`, or shards and an index when they are larger.

    Args:
        tensors: name -> tensor.
        folder: made if missing. The index is written last, so a folder with an index has all its shards.
        max_shard_size: bytes, or text such as "500MB"; one tensor larger than that gets a shard of its own.
        stem: the beginning of the files' names.
        metadata: text for every header; `{"format": "pt"}` if None, which transformers asks for.

    Returns:
        The files of tensors written.

    Raises:
        InputError, DiskFullError: as `save_tensors`.
    """
    folder = Path(folder)
    metadata = {"format": "pt"} if metadata is None else metadata
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    shards = _shards(tensors, parse_bytes(max_shard_size))
    total = sum(_about(tensors, name)[2] for name in tensors)
    need_space(folder, total + _MARGIN)
    if len(shards) <= 1:
        files = [save_tensors(tensors, single, metadata)]
        stale = [index]
    else:
        files, homes = [], {}
        for number, names in enumerate(shards, 1):
            file = folder / f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            files.append(save_tensors(_Part(tensors, names), file, metadata))
            homes |= dict.fromkeys(names, file.name)
        weight_map = dict(sorted(homes.items()))
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
        stale = [single]
    for file in stale:  # readers would find the older form first
        file.unlink(missing_ok=True)
    sync_folder(folder)
    return files


def parse_bytes(size: int | str) -> int:
    """Read a size: a number of bytes, or text with a unit (kB, MB, GB, TB; KiB, MiB, GiB).

    Example:
        >>> parse_bytes("1.5GB"), parse_bytes("2 MiB"), parse_bytes(7)
        (1500000000, 2097152, 7)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", str(size).lower())
    if not match or float(match[1]) <= 0:
        raise InputError(
            f"size {size!r} is not understood; expected a number of bytes or text such as '500MB' or '5GB'"
        )
    return int(float(match[1]) * (1024 if match[3] else 1000) ** ("kmgt".find(match[2]) + 1 if match[2] else 0))


class _Part(Mapping[str, Tensor]):
    """Some names of a mapping, still loaded late."""

    def __init__(self, whole: Mapping[str, Tensor], names: list[str]) -> None:
        self.whole, self.names = whole, names

    def __getitem__(self, name: str) -> Tensor:
        return self.whole[name]

    def __iter__(self):
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _shards(tensors: Mapping[str, Tensor], largest: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = largest
    for name in tensors:
        size = _about(tensors, name)[2]
        if size > room and shards[-1]:
            shards.append([])
            room = largest
        shards[-1].append(name)
        room -= size
    return shards


def _about(tensors: Mapping[str, Tensor], name: str) -> tuple[torch.dtype, tuple[int, ...], int]:
    """Dtype, shape and bytes of a tensor, without loading it where that can be avoided."""
    if isinstance(tensors, _Part):
        return _about(tensors.whole, name)
    if isinstance(tensors, Weights):
        return tensors.dtype(name), tensors.shape(name), tensors.nbytes(name)
    tensor = tensors[name]
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name!r} is a {type(tensor).__name__}; only tensors can be saved")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.dtype not in _CODES:
        kind = "has no data (meta device)" if tensor.is_meta else f"is {tensor.layout}, {tensor.dtype}"
        raise InputError(f"{name!r} {kind}; make it a dense tensor of an ordinary dtype before saving")
    return tensor.dtype, tuple(tensor.shape), tensor.numel() * tensor.itemsize


def _bytes(tensor: Tensor) -> memoryview:
    if sys.byteorder != "little":
        raise RuntimeError("safetensors are little endian; saving from a big-endian machine is not supported")
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
