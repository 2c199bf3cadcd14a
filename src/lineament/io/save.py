"""Saving tensors as safetensors: whole or not at all, one tensor in memory at a time."""

import glob
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineament._base.errors import InputError
from lineament.io.files import need_space, replacing, sync_folder, write_json
from lineament.io.header import DTYPES

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MARGIN = 1 << 20  # bytes left on the disk beside the tensors


Progress = Callable[[int], None]
"""Called with the bytes of each tensor when it is written, or found written already."""


def save_tensors(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
    *,
    progress: Progress | None = None,
) -> Path:
    """Save named tensors as one safetensors file, in one step.

    Views and tensors that share memory are written out, each on its own. A mapping that loads late (`open_weights`, or
    any other with `dtype(name)`, `shape(name)` and `nbytes(name)`) is read one tensor at a time.

    Args:
        tensors: name -> tensor, any dtype the format has, on any device.
        path: the file; until all is on the disk it keeps what it held before.
        metadata: text to keep in the header.
        progress: told of every tensor's bytes.

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
    names, raw, total = _header(tensors, metadata)
    need_space(path, total + len(raw) + _MARGIN)
    with replacing(path) as file:
        file.write(raw)
        for name in names:
            written = file.write(raw_bytes(tensors[name]))
            if progress:
                progress(written)
    return Path(path)


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> tuple[list[str], bytes, int]:
    """Return the names in the order they are written, the bytes before the first, and the bytes of all tensors."""
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
    return names, len(raw).to_bytes(8, "little") + raw, at


def save_sharded(
    tensors: Mapping[str, Tensor],
    folder: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    stem: str = "model",
    metadata: Mapping[str, str] | None = None,
    keep: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Save named tensors the way transformers does: `model.safetensors`, or shards and an index when they are larger.

    Args:
        tensors: name -> tensor.
        folder: made if missing. The index is written last, so a folder with an index has all its shards; where shards
            of an earlier save are written over, its index goes first.
        max_shard_size: bytes, or text such as "500MB"; one tensor larger than that gets a shard of its own.
        stem: the beginning of the files' names.
        metadata: text for every header; `{"format": "pt"}` if None, which transformers asks for.
        keep: leave a shard that is there already with the same header; the caller knows that its numbers are these.
        progress: told of every tensor's bytes.

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
    count = len(shards)
    files = (
        [folder / f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [single]
    )
    parts = {file: _Part(tensors, names) for file, names in zip(files, shards, strict=True)}
    there = {file for file, part in parts.items() if keep and _holds(file, part, metadata)}
    need_space(folder, total - sum(file.stat().st_size for file in there) + _MARGIN)
    if any(file.exists() for file in parts if file not in there and file != single):
        index.unlink(missing_ok=True)  # else an interrupted save would read as weights that are half old, half new
    for file, part in parts.items():
        if file not in there:
            save_tensors(part, file, metadata, progress=progress)
        elif progress:
            progress(sum(_about(part, name)[2] for name in part))
    shards_here = folder.glob(f"{glob.escape(stem)}-{5 * '[0-9]'}-of-{5 * '[0-9]'}.safetensors")
    stale = [index, *set(shards_here).difference(files)]
    if count > 1:
        homes = {name: file.name for file, part in parts.items() for name in part}
        write_json(index, {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))})
        stale[0] = single
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


def _holds(file: Path, part: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
    """Say whether a finished file has exactly the header that saving would write; files appear whole or not at all."""
    if not file.is_file():
        return False
    _, raw, total = _header(part, metadata)
    with file.open("rb") as stream:
        return file.stat().st_size == len(raw) + total and stream.read(len(raw)) == raw


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
    if hasattr(tensors, "nbytes"):  # Weights, and what else knows without loading
        late: Any = tensors
        return late.dtype(name), late.shape(name), late.nbytes(name)
    tensor = tensors[name]
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name!r} is a {type(tensor).__name__}; only tensors can be saved")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.dtype not in _CODES:
        kind = "has no data (meta device)" if tensor.is_meta else f"is {tensor.layout}, {tensor.dtype}"
        raise InputError(f"{name!r} {kind}; make it a dense tensor of an ordinary dtype before saving")
    return tensor.dtype, tuple(tensor.shape), tensor.numel() * tensor.itemsize


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's numbers as they stand in a file."""
    if sys.byteorder != "little":
        raise RuntimeError("safetensors are little endian; saving from a big-endian machine is not supported")
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
