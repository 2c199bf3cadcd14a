"""What the command line says: one line for a mistake, JSON for machines, tables for people."""

import json
import os
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from lineament._base.errors import InputError, LineamentError

STDOUT = Console(soft_wrap=True, emoji=False)  # ":key:" in a text is text


def describe(error: Exception) -> tuple[int | None, str]:
    """Return the exit code and the line for an error; (None, "") for one of our own bugs, which keeps its trace."""
    if isinstance(error, typer.Exit):
        return error.exit_code, ""
    if isinstance(error, typer.Abort):
        return 1, "aborted"
    if hasattr(error, "format_message"):  # a usage error, of click or of the copy that typer carries
        context, said = getattr(error, "ctx", None), error.format_message()  # pyright: ignore
        hint = f"\nTry '{context.command_path} --help'." if context else ""
        # it says nothing where the help has been printed already
        return getattr(error, "exit_code", 2), f"error: {said}{hint}" if said else ""
    if isinstance(error, InputError):
        return 2, f"error: {one_line(error)}"
    if isinstance(error, LineamentError | NotImplementedError | OSError):
        return 1, f"error: {one_line(error)}"
    return None, ""


def one_line(error: Exception) -> str:
    """Return an error's message and the notes it got on its way up, without line breaks."""
    return " ".join("; ".join((str(error), *notes(error))).split())


def notes(error: BaseException) -> list[str]:
    """Return what was added to an error on its way up: where the work so far is kept."""
    return getattr(error, "__notes__", [])


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout, for machines."""
    print(_json_text(value))


def _json_text(value: Any) -> str:
    try:
        return json.dumps(value, indent=2, default=str, allow_nan=False)
    except ValueError:  # NaN and infinity, which no other reader of JSON takes, become null
        from lineament.report.evidence import finite

        return json.dumps(finite(value), indent=2, default=str, allow_nan=False)


def show(*parts: Any) -> None:
    """Print text or rich tables on stdout, for people. Text is taken literally, brackets too."""
    for part in parts:
        STDOUT.print(part, markup=False)


def answer(
    found: Any, json: bool, *written: Path | None, html: Path | None = None, png: Path | None = None,
    out: Path | None = None,
) -> None:  # fmt: skip
    """Write the files that a command was asked for, and print what it found, as JSON or as its tables and the files.

    Args:
        found: has `to_json` and `tables`, and `write_html` and `write_png` if such files may be asked for.
        written: files that are there already. html, png, out: where a page, a picture and the JSON go.
    """
    from lineament.io import write_text

    made = [found.write_html(html)] if html else []
    made += [found.write_png(png)] if png else []
    made += [write_text(out, _json_text(found.to_json()))] if out else []
    if json:
        print_json(found.to_json())
    else:
        show(*found.tables(), *(f"written: {path}" for path in (*written, *made) if path is not None))


def quiet() -> None:
    """Keep the progress bars and warnings of transformers off the terminal; ours say what is going on."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def work_folder(work: Path | None, *written: Path | None) -> Path | None:
    """Return where unfinished work is kept: the folder asked for, else FILE.partial of the first file to write.

    Example:
        >>> work_folder(None, None, Path("/runs/depth.html")).name
        'depth.html.partial'
    """
    from lineament.io import partial_path

    first = next((path for path in written if path is not None), None)
    return work or (None if first is None else partial_path(first))


def require_writable(*files: Path | None) -> None:
    """Refuse files that could not be written at the end, before any work is done.

    Raises:
        InputError: one is a folder, or lies where nothing can be written.
    """
    for file in (file for file in files if file is not None):
        home = next(folder for folder in file.absolute().parents if folder.exists())
        if file.is_dir() or not home.is_dir() or not os.access(home, os.W_OK):
            what = f"{file} is a folder" if file.is_dir() else f"nothing can be written in {home}"
            raise InputError(f"{file} can't be written: {what}; give another file")


def name_and_value(pair: str, option: str) -> tuple[str, str]:
    """Take NAME=VALUE of an option apart.

    Raises:
        InputError: it is none.
    """
    name, equals, value = pair.partition("=")
    if not equals or not name:
        raise InputError(f"--{option} {pair!r} is not understood; expected NAME=VALUE")
    return name, value


def require_new(out: Path) -> None:
    """Refuse a folder or file that is there already, before any work is done.

    Raises:
        InputError: it exists.
    """
    if out.exists():
        raise InputError(f"{out} exists; give a name that does not")
