"""What is finished of a long piece of work, kept in a folder so that the same call goes on after it."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lineament._base.errors import InputError
from lineament.io.files import read_json, write_json
from lineament.io.folder import locked
from lineament.io.save import raw_bytes, save_tensors
from lineament.io.weights import open_weights

ASKED = "asked.json"


class Parts:
    """Parts of a piece of work, each in a file of its own, whole or not there; without a folder nothing is kept.

    Example:
        >>> Parts().value("first", lambda: {"seconds": 1.5})
        {'seconds': 1.5}
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)

    def value(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a part that JSON can hold, made now unless it is there."""
        path = self._path(name, "json")
        if path is None:
            return make()
        if not path.exists():
            write_json(path, make(), indent=None)
        return read_json(path)

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return a part of named tensors, made now unless it is there."""
        path = self._path(name, "safetensors")
        if path is None:
            return dict(make())
        if not path.exists():
            save_tensors(make(), path)
        found = open_weights(path)
        return {key: found.load(key) for key in found}

    def _path(self, name: str, suffix: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.{suffix}"


@contextmanager
def kept_parts(folder: str | Path | None, asked: Mapping[str, Any]) -> Iterator[Parts]:
    """Keep parts in a folder until the block ends well; after an error or a kill, the same call finds them there.

    A folder without any part is removed after an error too.

    Args:
        folder: made if it isn't there, and removed in the end. None keeps nothing.
        asked: what the work is, of JSON; parts of other work are not gone on with.

    Raises:
        InputError: the folder holds other things, or parts of other work (what differs is named); another process is at
            work in it.
    """
    if folder is None:
        yield Parts()
        return
    folder = Path(folder)
    others = folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())
    if others and not (folder / ASKED).exists():
        raise InputError(f"{folder} holds other things; give a folder that does not exist")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _same(folder / ASKED, asked)
        try:
            yield Parts(folder)
        except BaseException as error:
            if not any(path.name != ASKED for path in folder.iterdir()):
                shutil.rmtree(folder)
                raise
            error.add_note(f"the work so far is kept in {folder}; the same command goes on from there")
            raise
        shutil.rmtree(folder)


def stamp(folder: str | Path) -> dict[str, list[int]]:
    """Return size and time of change of a folder's files by name: equal as long as nobody writes there."""
    found = sorted(path for path in Path(folder).iterdir() if path.is_file())
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in found}


def digest_of(*tensors: Tensor) -> str:
    """Return the SHA-256 of tensors' shapes and values."""
    whole = hashlib.sha256()
    for x in tensors:
        whole.update(f"{list(x.shape)} {x.dtype}".encode())
        whole.update(raw_bytes(x))
    return whole.hexdigest()


def _same(path: Path, asked: Mapping[str, Any]) -> None:
    """Refuse parts of other work."""
    if not path.exists():
        write_json(path, asked)
    before, asked = read_json(path), json.loads(json.dumps(asked))
    changed = [name for name in {*asked, *before} if asked.get(name) != before.get(name)]
    if changed:
        raise InputError(
            f"{path.parent} was begun with other {', '.join(sorted(changed))}; remove it or give another folder"
        )
