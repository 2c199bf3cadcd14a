"""A report in one HTML file: pictures embedded, no script, nothing fetched, readable on a phone and in the dark."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from lineament._base.errors import InputError
from lineament.io import write_text
from lineament.report.evidence import Evidence
from lineament.report.heat import HeatText
from lineament.report.tables import cell, columns_of, numeric


@dataclass(frozen=True)
class Text:
    """Paragraphs, parted by empty lines; `code=True` keeps every space and breaks no line."""

    text: str
    code: bool = False


@dataclass(frozen=True)
class Tiles:
    """The few numbers to see first: label -> value, or (value, note)."""

    numbers: Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """A table; the first column names the line."""

    rows: Sequence[Mapping[str, Any]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG with the words for those who can't see it, and one for dark pages if there is one."""

    png: bytes
    alt: str
    caption: str = ""
    dark: bytes | None = None


@dataclass(frozen=True)
class Drawing:
    """An SVG with the words for those who can't see it; it minds dark pages by itself."""

    svg: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Samples:
    """Texts side by side: what was given, and who went on how."""

    prompt: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Details:
    """Parts behind a line that opens when touched."""

    title: str
    parts: Sequence[Any] = field(default_factory=tuple)


@dataclass(frozen=True)
class Section:
    """A heading with parts below it."""

    title: str
    parts: Sequence[Any] = field(default_factory=tuple)


def page(title: str, sections: Sequence[Any], path: str | Path, *, lead: str = "", footer: str = "") -> Path:
    """Write a report as one HTML file.

    Everything given is escaped: it is text, never markup.

    Args:
        title: of the page.
        sections: `Section`s, or parts directly: `Text` or a string, `Tiles`, `Rows` or a list of mappings, `Picture`,
            `Drawing`, `Samples`, `HeatText`, `Details`, `Evidence`.
        path: the file; it appears complete or not at all.
        lead: a paragraph under the title.
        footer: the last line.

    Returns:
        The path.

    Raises:
        InputError: a part of another kind, or a picture that is no PNG (a drawing that is no SVG) or has no words.

    Example:
        >>> import tempfile
        >>> parts = ["1 < 2", [{"model": "teacher", "perplexity": 21.04}]]
        >>> path = page("Hello", parts, Path(tempfile.mkdtemp()) / "a.html")
        >>> "1 &lt; 2" in path.read_text()
        True
    """
    shown = [_section(each) for each in sections]
    linked = [each for each in shown if each["title"]]
    html = _template().render(title=title, lead=lead, footer=footer, sections=shown, linked=linked)
    return write_text(path, html)


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = cell
    return environment.from_string(files("lineament.report").joinpath("page.html.j2").read_text("utf-8"))


def _section(given: Any) -> dict[str, Any]:
    if isinstance(given, Section):
        return {"title": given.title, "parts": [_part(each) for each in given.parts]}
    return {"title": "", "parts": [_part(given)]}


def _part(given: Any) -> dict[str, Any]:
    """What the template needs to know of a part, with its kind."""
    match given:
        case str():
            return _part(Text(given))
        case Text():
            texts = [given.text] if given.code else [each for each in given.text.split("\n\n") if each.strip()]
            return {"kind": "code" if given.code else "text", "texts": texts}
        case Tiles():
            pairs = {label: x if isinstance(x, tuple) else (x, "") for label, x in given.numbers.items()}
            return {"kind": "tiles", "tiles": [(label, cell(value), note) for label, (value, note) in pairs.items()]}
        case Rows():
            return _rows(given)
        case Picture():
            return _picture(given)
        case Drawing():
            return _drawing(given)
        case HeatText():
            return {"kind": "heat", "tokens": given.shades(), "caption": given.caption}
        case Samples():
            return {"kind": "samples", "prompt": given.prompt, "texts": given.texts}
        case Details():
            return {"kind": "details", "title": given.title, "parts": [_part(each) for each in given.parts]}
        case Evidence():
            return _evidence(given)
        case list() if all(isinstance(each, Mapping) for each in given):
            return _part(Rows(given))
    expected = "text, rows, Tiles, Picture, Drawing, Samples, Details, Evidence or Section"
    raise InputError(f"a page can't show a {type(given).__name__}; expected {expected}")


def _rows(given: Rows) -> dict[str, Any]:
    columns = [(name, name.replace("_", " "), numeric(given.rows, name)) for name in columns_of(given.rows)]
    lines = [[(cell(row.get(name)), right, _tone(row.get(name))) for name, _, right in columns] for row in given.rows]
    return {"kind": "rows", "caption": given.caption, "columns": columns, "lines": lines}


def _tone(value: Any) -> str:
    """Verdicts are seen by colour as well as read."""
    if value is True or (isinstance(value, str) and value.lower() in ("pass", "passed", "held", "ok")):
        return "good"
    return (
        "bad"
        if isinstance(value, str) and value.lower() in ("miss", "missed", "fail", "failed", "did not hold")
        else ""
    )


def _picture(given: Picture) -> dict[str, Any]:
    if not given.alt.strip():
        raise InputError(f"the picture {given.caption!r} has no alt text; say in words what it shows")
    for png in (given.png, given.dark or given.png):
        if png[:8] != b"\x89PNG\r\n\x1a\n":
            raise InputError(f"the picture {given.alt!r} is not a PNG")
    size = [int.from_bytes(given.png[at : at + 4], "big") * 5 // 8 for at in (16, 20)]  # 1.6 pixels for one of the page
    return {
        "kind": "picture",
        "alt": given.alt,
        "caption": given.caption,
        "png": base64.b64encode(given.png).decode(),
        "dark": base64.b64encode(given.dark).decode() if given.dark else "",
        "width": size[0],
        "height": size[1],
    }


def _drawing(given: Drawing) -> dict[str, Any]:
    if not given.alt.strip() or not given.svg.startswith("<svg"):
        raise InputError(f"the drawing {given.caption!r} is no SVG or has no alt text; say in words what it shows")
    svg = base64.b64encode(given.svg.encode()).decode()
    return {"kind": "drawing", "alt": given.alt, "caption": given.caption, "svg": svg}


def _evidence(given: Evidence) -> dict[str, Any]:
    about = {"seeds": ", ".join(map(str, given.seeds)), "seconds": given.seconds, **given.versions, **given.machine}
    return {
        "kind": "evidence",
        "name": given.name,
        "verdict": given.verdict,
        "tone": {True: "good", False: "bad", None: "none"}[given.passed],
        "claim": given.claim,
        "threshold": given.threshold,
        "notes": given.notes,
        "rows": _rows(Rows(given.rows)),
        "about": [(key.replace("_", " "), cell(value)) for key, value in about.items()],
    }
