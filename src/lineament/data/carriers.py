"""Text that installed packages carry: their files are read, their code is never run."""

import ast
import gzip
import html
import json
import re
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_path

from lineament._base.errors import InputError
from lineament._base.extras import folder

DOCUMENTED = ("numpy", "scipy", "torch", "transformers")  # always installed with lineament
SHORTEST = 400  # characters; shorter strings are remarks, not text
_WORTH_PARSING = 0.3  # share of a file inside long triple quotes; parsing the rest would cost more than it gives
_REPEATS = ("models",)  # transformers repeats one docstring per architecture


def docstrings() -> list[str]:
    """Return the docstrings of numpy, scipy, torch and transformers, one document per module, without importing them.

    Only docstrings of more than 400 characters count; tests are left out, and a paragraph of more than 200 characters
    that has been seen before is not repeated (so that held-out documents stay unseen). The order is that of the
    packages and of their files.
    """
    seen: set[str] = set()
    documents = (_module(file, seen) for package in DOCUMENTED for file in _sources(package))
    return [document for document in documents if len(document) > SHORTEST]


def _sources(package: str) -> list[Path]:
    root = folder(package, package=package)
    files = ((file.relative_to(root).parts, file) for file in root.rglob("*.py"))
    return [file for parts, file in sorted(files) if parts[0] not in _REPEATS and not any("test" in p for p in parts)]


def _module(file: Path, seen: set[str]) -> str:
    source = file.read_text(encoding="utf-8", errors="replace")
    quoted = sum(len(text) for text in source.split('"""')[1::2] if len(text) > SHORTEST)
    if quoted < _WORTH_PARSING * len(source) or not quoted:
        return ""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # sources of another Python version or templates; they are not text we can trust
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted((n for n in ast.walk(tree) if isinstance(n, documented)), key=lambda n: getattr(n, "lineno", 0))
    texts = (ast.get_docstring(node) or "" for node in nodes)
    return "\n\n".join(filter(None, (_unseen(text, seen) for text in texts if len(text) > SHORTEST)))


def _unseen(text: str, seen: set[str]) -> str:
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        if len(paragraph) > 200:
            if paragraph in seen:
                continue
            seen.add(paragraph)
        kept.append(paragraph)
    text = "\n\n".join(kept)
    return text if len(text) > SHORTEST else ""


def python_topics() -> list[str]:
    """Return the topics of Python's language reference that `help()` shows (465,000 characters)."""
    spec = find_spec("pydoc_data")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("this Python has no pydoc_data; install the full standard library, or choose other text")
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / "topics.py").read_text(encoding="utf-8"))
    tables = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    return list(dict.fromkeys(text for table in tables for text in ast.literal_eval(table).values()))


def python_source() -> list[str]:
    """Return the top-level modules of Python's standard library as source, those of ASCII alone (4.4M characters)."""
    files = sorted(Path(get_path("stdlib")).glob("*.py"))
    texts = [text.decode("ascii") for text in (file.read_bytes() for file in files) if text.isascii()]
    if not texts:
        raise InputError("this Python has no sources of its standard library; install it in full, or choose other text")
    return texts


def cloud_docs() -> list[str]:
    """Return the texts about cloud services that botocore carries, one document per service: 11 million characters.

    Raises:
        InputError: botocore is not installed; only its files are used, so `--no-deps` is enough.
    """
    root = folder("botocore", package="botocore") / "data"
    newest: dict[str, Path] = {}
    for path in sorted(root.glob("*/*/service-2.json*")):  # versions are dates: the last one wins
        newest[path.parts[-3]] = path
    seen: set[str] = set()
    return [text for path in newest.values() if (text := _service(path, seen))]


def _service(path: Path, seen: set[str]) -> str:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    texts = []
    for quoted in re.findall(r'"documentation"\s*:\s*("(?:[^"\\]|\\.)*")', raw.decode("utf-8")):
        if len(quoted) <= SHORTEST or quoted in seen:
            continue
        seen.add(quoted)
        text = _without_tags(json.loads(quoted))
        if len(text) > SHORTEST:
            texts.append(text)
    return "\n\n".join(texts)


def _without_tags(text: str) -> str:
    text = re.sub(r"</p>|<br/?>|</li>", "\n", text)
    text = html.unescape(re.sub(r"<[^<>]+>", "", text))
    return re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()
