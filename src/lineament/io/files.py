"""Small files written whole or not at all, and a clear word when the disk is full."""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lineament._base.errors import InputError, LineamentError

WINDOWS = os.name == "nt"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
TEMPORARY = ".tmp"  # suffix of files that are being written; whatever carries it after a crash may be deleted


class DiskFullError(LineamentError, OSError):
    """No space is left; what stood there before is untouched."""


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file that takes `path`'s place only when the block ends well, and survives a power cut from then on.

    The bytes go to a temporary neighbour, are forced to the disk, and replace `path` in one step. After an error `path`
    is what it was.

    Args:
        path: where the file shall stand; missing parent folders are made.

    Yields:
        A binary file, open for writing.

    Raises:
        DiskFullError: no space is left on the device.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with clear_disk_errors(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)  # closed by now: Windows renames no open file
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write bytes so that `path` holds either all of them or what it held before. Returns the path."""
    with replacing(path) as file:
        file.write(data)
    return Path(path)


def write_text(path: str | Path, text: str) -> Path:
    """Write text (UTF-8) so that `path` holds either all of it or what it held before. Returns the path."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any, *, indent: int | None = 2) -> Path:
    """Write a JSON file in one step. Returns the path.

    Raises:
        ValueError: the value holds NaN or infinity, which JSON does not have. TypeError: it is not JSON at all.
    """
    return write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: missing, unreadable or not JSON; the message names the file.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; expected a JSON file") from None
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None


def free_bytes(path: str | Path) -> int:
    """Return the bytes free for us on the disk that `path` is on, or would be on."""
    return shutil.disk_usage(_existing(Path(path))).free


def need_space(path: str | Path, needed: int) -> None:
    """Check before the first step that `needed` bytes fit where `path` is.

    Raises:
        InputError: they don't; the message says how much is missing.
    """
    free = free_bytes(path)
    if free < needed:
        raise InputError(
            f"{path} needs {human_bytes(needed)} of disk, {human_bytes(free)} are free; "
            f"free {human_bytes(needed - free)} or choose another disk"
        )


def human_bytes(count: float) -> str:
    """Write a number of bytes for people.

    Example:
        >>> human_bytes(532), human_bytes(269_060_000)
        ('532 B', '269 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


@contextmanager
def clear_disk_errors(path: str | Path) -> Iterator[None]:
    """Turn the system's "no space left" into an error that names the path and the space there is.

    Raises:
        DiskFullError: in place of the OSError.
    """
    try:
        yield
    except DiskFullError:
        raise
    except OSError as error:
        if error.errno not in _FULL:
            raise
        message = (
            f"no space left while writing {path}: {human_bytes(free_bytes(path))} free; what stood there is untouched"
        )
        raise DiskFullError(f"{message}. Free some space and run the same command again") from error


def sync_folder(folder: str | Path) -> None:
    """Force a folder's list of names to the disk, so that a rename survives a power cut."""
    if WINDOWS:  # folders can't be opened there, and renames are journalled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: str | Path) -> str:
    """Return the SHA-256 of a file, or of a folder: its relative names and contents, in order.

    Two folders with the same digest hold the same files, bit for bit. Times and permissions don't count.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; expected a file or a folder")
    whole = hashlib.sha256()
    if path.is_file():
        return _digest_file(path)
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        name = file.relative_to(path).as_posix()
        whole.update(f"{len(name)} {name} {_digest_file(file)}\n".encode())
    return whole.hexdigest()


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
