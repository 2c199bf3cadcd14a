"""The shape of a catalogue entry: plain data about one paper, checked when it is made.

Standard library only, so that listing the catalogue never loads torch. A record says what the paper claims and how
far its numbers could be checked; the measurement itself is `experiment(scale)` beside the record, once it works, and
the sizes it may be asked for are a `Scales`.
"""

import re
from dataclasses import dataclass
from typing import Any, Never

from .._base.errors import unknown

ROOMS = (
    "convert", "weights", "explain", "quant", "tasks", "models", "nn", "ops", "graph", "train", "data", "report", "io"
)  # fmt: skip
STATUSES = ("planned", "works")
FIGURE_STATUSES = {
    "abstract": "stated in the paper's abstract",
    "paper": "read in the paper's text or report",
    "repository": "read in the authors' repository, README or released results",
    "secondary": "read in a review, summary or copy by others",
    "derived": "recomputed from the paper's definitions",
    "unverified": "could not be checked",
}

_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_ARXIV = re.compile(r"(\d{2})(0[1-9]|1[0-2])\.\d{4,5}")


class Scales(dict[str, Any]):
    """The sizes of an experiment by the name of its scale; looking up a name that is none says which there are.

    Example:
        >>> Scales(small=(3, 30), full=(10, 30))["smal"]
        Traceback (most recent call last):
            ...
        lineament._base.errors.InputError: unknown scale 'smal'. Did you mean 'small'? Known: full, small.
    """

    def __missing__(self, scale: str) -> Never:
        raise unknown("scale", scale, self)


@dataclass(frozen=True)
class Figure:
    """One headline number of a paper, with how it is known.

    Args:
        setting: model, data and measure.
        value: the number or finding, as text.
        status: a key of `FIGURE_STATUSES`.

    Raises:
        ValueError: a text is empty or the status is unknown.
    """

    setting: str
    value: str
    status: str

    def __post_init__(self) -> None:
        _need_text("figure", setting=self.setting, value=self.value)
        _need_choice(f"status of figure {self.setting!r}", self.status, FIGURE_STATUSES)


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What the catalogue knows about one paper.

    Args:
        slug: the name in the catalogue, lower case with hyphens; the module is the same with underscores.
        title: the title of the paper, in the version the record describes.
        authors: surnames or full names in order, separated by commas.
        year: of the venue if there is one, else of the preprint.
        venue: conference, workshop or journal; None for a preprint.
        arxiv: the identifier without version, or None.
        room: the rooms of the library where the system lives, the main one first.
        status: "planned", or "works" once its experiment runs.
        summary: what it is, at most three sentences.
        claim: what the paper claims and the experiment tests, at most two sentences.
        figures: the paper's headline numbers, each with how it is known.
        experiment: what the small experiment does and the threshold fixed before it, at most two sentences.
        code: the official repository and its licence, or None if there is none.
        keywords: terms to search for.
        related: slugs of neighbours in the catalogue.

    Raises:
        ValueError: a field breaks these rules; the message names the slug and the field.
    """

    slug: str
    title: str
    authors: str
    year: int
    venue: str | None
    arxiv: str | None
    room: tuple[str, ...]
    status: str
    summary: str
    claim: str
    figures: tuple[Figure, ...]
    experiment: str
    code: str | None
    keywords: tuple[str, ...]
    related: tuple[str, ...]

    def __post_init__(self) -> None:
        if not _SLUG.fullmatch(self.slug):
            raise ValueError(f"slug is {self.slug!r}; expected lower-case words joined by single hyphens")
        who = f"paper {self.slug!r}"
        _need_text(who, title=self.title, authors=self.authors, summary=self.summary)
        _need_text(who, claim=self.claim, experiment=self.experiment)
        optional = {"venue": self.venue, "code": self.code}
        _need_text(who, **{name: value for name, value in optional.items() if value is not None})
        _need_words(who, room=self.room, keywords=self.keywords)
        _need_words(who, empty=True, related=self.related)
        _need_choice(f"status of {who}", self.status, STATUSES)
        for room in self.room:
            _need_choice(f"room of {who}", room, ROOMS)
        if not isinstance(self.figures, tuple) or not all(isinstance(figure, Figure) for figure in self.figures):
            raise ValueError(f"{who}: figures is {self.figures!r}; expected a tuple of Figure")
        if self.slug in self.related:
            raise ValueError(f"{who}: related names the paper itself; list only its neighbours")
        _need_dates(who, self.year, self.arxiv)


def _need_text(who: str, **fields: str) -> None:
    """Refuse a field that is no text, is blank, or has stray white space at its ends."""
    for name, value in fields.items():
        if not isinstance(value, str) or not value or value != value.strip():
            raise ValueError(f"{who}: {name} is {value!r}; expected text without white space at its ends")


def _need_words(who: str, *, empty: bool = False, **fields: tuple[str, ...]) -> None:
    """Refuse a field that is no tuple of texts; a lone string is the usual slip."""
    for name, value in fields.items():
        if not isinstance(value, tuple) or not (value or empty):
            raise ValueError(f"{who}: {name} is {value!r}; expected a tuple of texts, such as ('a', 'b') or ('a',)")
        _need_text(who, **{f"{name}[{i}]": word for i, word in enumerate(value)})
        if len(set(value)) < len(value):
            raise ValueError(f"{who}: {name} is {value!r}; expected each entry once")


def _need_choice(what: str, value: str, known: tuple[str, ...] | dict[str, str]) -> None:
    """Refuse a value that is not among the known ones."""
    if value not in known:
        raise ValueError(f"{what} is {value!r}; expected one of {', '.join(known)}")


def _need_dates(who: str, year: int, arxiv: str | None) -> None:
    """Refuse a year that is no year, a malformed identifier, and a paper older than its preprint."""
    if isinstance(year, bool) or not isinstance(year, int) or not 1950 <= year <= 2100:
        raise ValueError(f"{who}: year is {year!r}; expected an integer such as 2024")
    if arxiv is None:
        return
    match = _ARXIV.fullmatch(arxiv)
    if not match:
        raise ValueError(f"{who}: arxiv is {arxiv!r}; expected YYMM.NNNNN without version, such as '2402.04347'")
    if year < 2000 + int(match[1]):
        raise ValueError(f"{who}: year {year} lies before its preprint {arxiv} of {2000 + int(match[1])}")
