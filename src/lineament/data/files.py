"""Text from the user's own files and folders, and from the Hub."""

import json
import re
from pathlib import Path

from lineament._base.errors import InputError
from lineament._base.extras import require

SUFFIXES = (".txt", ".md", ".jsonl")
LONGEST_DOCUMENT = 100_000  # characters; a longer text file is cut at empty lines, so that it can be split and held out


def from_path(path: Path) -> list[str]:
    """Return the documents of a file, or of every text file under a folder in the order of their names.

    A `.txt` or `.md` file is one document (several, cut at empty lines, above 100,000 characters); each line of a
    `.jsonl` file is an object whose field "text" is one.

    Raises:
        InputError: the path is missing, holds no text, or is of a kind that can't be read.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
        if not files:
            raise InputError(f"{path} has no text files; expected {', '.join(SUFFIXES)} somewhere under it")
    elif not path.exists():
        raise InputError(f"{path} does not exist; expected a text file or a folder of them")
    elif path.suffix not in SUFFIXES:
        raise InputError(f"{path} is not a text file; expected one of {', '.join(SUFFIXES)}")
    else:
        files = [path]
    documents = [document for file in files for document in _read(file)]
    if not documents:
        raise InputError(f"{path} holds no text")
    return documents


def _read(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors put a mark in front
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if file.suffix == ".jsonl":
        lines = text.split("\n")  # not splitlines: texts may hold other separators, which JSON need not escape
        return [d for number, line in enumerate(lines, 1) if line.strip() for d in _field(file, number, line)]
    return cut(text)


def _field(file: Path, number: int, line: str) -> list[str]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{file}, line {number}: not JSON ({error.msg})") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise InputError(f'{file}, line {number}: expected an object with a string field "text"')
    return [record["text"]] if record["text"].strip() else []


def cut(text: str, longest: int = LONGEST_DOCUMENT) -> list[str]:
    """Cut a text at empty lines into documents of at most about `longest` characters; nothing is lost but the cuts.

    Example:
        >>> cut("one\\n\\ntwo\\n\\nthree", longest=9)
        ['one\\n\\ntwo', 'three']
    """
    if not text.strip():
        return []
    if len(text) <= longest:
        return [text]
    documents, current, size = [], [], 0
    for paragraph in re.split(r"\n\s*\n", text):
        if current and size + len(paragraph) > longest:
            documents.append("\n\n".join(current))
            current, size = [], 0
        current.append(paragraph)
        size += len(paragraph) + 2
    return [d for d in [*documents, "\n\n".join(current)] if d.strip()]


def from_hub(name: str, split: str) -> list[str]:
    """Return the field "text" of a data set on the Hub: "owner/name", or "owner/name:configuration".

    Raises:
        InputError: the package `datasets` is missing (extra "hub"), there is no such set, configuration or split, the
            Hub can't be reached, or the set has no field "text".
    """
    datasets = require("datasets", extra="hub")
    repository, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, configuration or None, split=split)
    except (ValueError, OSError) as error:  # what `datasets` raises of names, configurations, splits and the network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"hub:{name}, split {split!r}, can't be had: {reason}") from error
    if "text" not in rows.column_names:
        raise InputError(f'hub:{name} has the fields {", ".join(rows.column_names)}; expected one called "text"')
    return [text for text in rows["text"] if text and text.strip()]
