"""What the command line says: one line for a mistake, JSON for machines, tables for people."""

import json
from typing import Any

import click
from rich.console import Console

from lineament._base.errors import InputError, LineamentError

STDOUT = Console(soft_wrap=True)


def describe(error: Exception) -> tuple[int | None, str]:
    """Return the exit code and the line for an error; (None, "") for one of our own bugs, which keeps its trace."""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code, ""
    if isinstance(error, click.exceptions.Abort):
        return 1, "aborted"
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        hint = f"\nTry '{context.command_path} --help'." if context else ""
        return error.exit_code, f"error: {error.format_message()}{hint}"
    if isinstance(error, InputError):
        return 2, f"error: {one_line(error)}"
    if isinstance(error, LineamentError | NotImplementedError):
        return 1, f"error: {one_line(error)}"
    if isinstance(error, OSError):
        return 1, f"error: {one_line(error)}"
    return None, ""


def one_line(error: Exception) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split())


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout, for machines."""
    print(json.dumps(value, indent=2, default=str))


def show(*parts: Any) -> None:
    """Print text or rich tables on stdout, for people."""
    for part in parts:
        STDOUT.print(part)
