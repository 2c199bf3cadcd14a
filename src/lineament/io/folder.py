"""An output folder that appears complete or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lineament._base.errors import InputError
from lineament.io.files import TEMPORARY, WINDOWS, clear_disk_errors, sync_folder


def partial_path(out: str | Path) -> Path:
    """Return the folder that the work for `out` happens in.

    Example:
        >>> partial_path("runs/student").name
        'student.partial'
    """
    out = Path(os.path.abspath(out))
    return out.with_name(out.name + ".partial")


@contextmanager
def building_folder(out: str | Path, *, resume: bool = True, scratch: str | None = None) -> Iterator[Path]:
    """Build a folder in `OUT.partial`; `OUT` appears by one rename when the block ends well.

    After an error, Ctrl-C or a kill the partial folder is kept, and the same call finds it again. An error that passes
    through gets a note naming it; a partial folder with nothing in it is removed. Only one process at a time may build;
    in a run of several processes this is the main one's business.

    Args:
        out: the folder to make.
        resume: True goes on with a partial folder left by an earlier run; False refuses it.
        scratch: name of a subfolder for checkpoints and the like. It is kept with the partial folder, also across a
            kill at any moment, and does not become part of `out`.

    Yields:
        The partial folder, empty or as the earlier run left it.

    Raises:
        InputError: `out` exists; or the partial folder does and `resume` is False; or another process is at work in it.
    """
    out = Path(os.path.abspath(out))
    partial, aside = partial_path(out), out.with_name(out.name + ".partial.scratch")
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists already; choose another folder or remove it first")
    if partial.exists() and not resume:
        raise InputError(f"{partial} is left from an earlier run; go on with it (resume) or remove it first")
    if not partial.exists():  # then scratch left beside it belongs to a run that was complete
        shutil.rmtree(aside, ignore_errors=True)
    with clear_disk_errors(partial):
        partial.mkdir(parents=True, exist_ok=True)
    with locked(partial):
        try:
            if out.exists():  # another process has finished between the first look and the lock
                raise InputError(f"{out} exists already; choose another folder or remove it first")
            _tidy(partial, aside, scratch)
            with clear_disk_errors(partial):
                yield partial
                _finish(partial, aside, out, scratch)
        except BaseException as error:
            if not _remove_if_empty(partial):
                error.add_note(f"the work so far is kept in {partial}; the same command goes on from there")
            raise
    shutil.rmtree(aside, ignore_errors=True)


def _tidy(partial: Path, aside: Path, scratch: str | None) -> None:
    """Undo half-finished steps of a run that was killed: files being written, scratch being taken out."""
    for leftover in partial.rglob(f".*{TEMPORARY}"):
        leftover.unlink(missing_ok=True)
    if scratch is None:
        return
    if aside.exists() and not (partial / scratch).exists():
        os.rename(aside, partial / scratch)
    (partial / scratch).mkdir(exist_ok=True)


def _finish(partial: Path, aside: Path, out: Path, scratch: str | None) -> None:
    if scratch is not None:
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(partial / scratch, aside)
    _sync_tree(partial)
    if out.exists():
        raise InputError(f"{out} was made by somebody else in the meantime; remove or rename it")
    os.rename(partial, out)
    sync_folder(out.parent)


def _sync_tree(folder: Path) -> None:
    """Libraries that saved into the folder did not force their bytes to the disk; a rename must not outrun them."""
    way = os.O_RDWR if WINDOWS else os.O_RDONLY  # there only what may be written can be forced to the disk
    for parent, _, names in os.walk(folder):
        for name in names:
            handle = os.open(Path(parent) / name, way)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(parent)


def _remove_if_empty(partial: Path) -> bool:
    """Remove a partial folder that holds no file. Says whether it is gone."""
    if not partial.exists():
        return True
    if any(path.is_file() for path in partial.rglob("*")):
        return False
    shutil.rmtree(partial, ignore_errors=True)
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes; the system lets go when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows; there the rename at the end is the only guard
        yield
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # renamed by the process that has just finished it
        raise InputError(f"{folder} is in use by another process; wait for it or choose another folder") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder} is in use by another process; wait for it or choose another folder") from None
        yield
    finally:
        os.close(handle)
