"""The header of a safetensors file, read and checked before anything is believed.

A file is 8 bytes of header length (little endian), that many bytes of JSON, then the tensors. The checks here catch
what a broken download, a full disk or a bad tool leaves behind, so that the reader above can trust every offset.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from lineament._base.errors import InputError, near_miss

LARGEST_HEADER = 100_000_000  # bytes; the limit of the format's own reader

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype and shape, and the bytes it occupies, counted from the start of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds; `data_start` is where the first tensor's bytes begin."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: str | Path) -> Header:
    """Read and check the header of one safetensors file; no tensor is touched.

    Args:
        path: a `.safetensors` file.

    Returns:
        The tensors' dtypes, shapes and places, each checked against the size of the file.

    Raises:
        InputError: the file is missing, truncated, a pickle, or its header does not agree with its size or with itself.
    """
    path = Path(path)
    size, raw = _read_raw(path)
    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        _broken(path, f"its header is not valid JSON ({error})")
    if not isinstance(table, dict):
        _broken(path, f"its header is a JSON {type(table).__name__}, not an object")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        _broken(path, "its __metadata__ is not a map of strings")
    entries = {name: _entry(path, name, given) for name, given in table.items()}
    _check_layout(path, entries, size - 8 - len(raw))
    return Header(entries, metadata, 8 + len(raw))


def _read_raw(path: Path) -> tuple[int, bytes]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            if len(first) < 8:
                _broken(path, f"it is truncated: {size} bytes, shorter than the 8 bytes every file starts with")
            length = int.from_bytes(first, "little")
            if length > size - 8 or length > LARGEST_HEADER:
                # asked only here: a sound header of 384 bytes also begins with a pickle's first byte
                if first[:1] == b"\x80" or first[:4] == b"PK\x03\x04":
                    _broken(path, "its bytes are a pickle or a zip archive, whatever its name says")
                _broken(path, f"its header claims to be {length} bytes long, but only {size - 8} bytes follow")
            return size, file.read(length)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; expected a safetensors file") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; expected a safetensors file") from None
    except PermissionError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from None


def _entry(path: Path, name: str, given: Any) -> Entry:
    try:
        code, shape, (begin, end) = given["dtype"], given["shape"], given["data_offsets"]
    except (TypeError, KeyError, ValueError):
        _broken(path, f"the header's entry for {name!r} lacks dtype, shape or data_offsets")
    if code not in DTYPES:
        _broken(path, f"{name!r} has the unknown dtype {code!r}.{near_miss(str(code), DTYPES)}")
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        _broken(path, f"{name!r} has shape {shape} and offsets {begin}, {end}; all must be whole numbers >= 0")
    needed = math.prod(shape) * DTYPES[code].itemsize
    if end - begin != needed:
        _broken(
            path, f"{name!r} of shape {shape} and dtype {code} needs {needed} bytes, its offsets give {end - begin}"
        )
    return Entry(DTYPES[code], tuple(shape), begin, end)


def _check_layout(path: Path, entries: Mapping[str, Entry], available: int) -> None:
    """Tensors must fill the data from the first byte to the last, each byte once."""
    last, at = "the header", 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < at:
            _broken(path, f"{name!r} begins at byte {entry.begin} and overlaps {last!r}, which ends at {at}")
        if entry.begin > at:
            _broken(path, f"{entry.begin - at} bytes before {name!r} belong to no tensor")
        last, at = name, entry.end
    if at > available:
        _broken(path, f"it is truncated: the header promises {at} bytes of tensors, the file holds {available}")
    if at < available:
        _broken(path, f"its header lies about its size: {at} bytes of tensors are listed, {available} bytes are there")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(_repeated(names))!r} is listed twice")
    return table


def _repeated(names: list[str]) -> Iterator[str]:
    return (name for i, name in enumerate(names) if name in names[:i])


def _broken(path: Path, what: str) -> NoReturn:
    raise InputError(f"{path} is not a sound safetensors file: {what}; get the file again or save the model again")
