"""The catalogue: 44 records that are complete, plausible, and cheap to read."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lineament import papers
from lineament.papers import Figure, Paper, experiment, record, records, search
from lineament.papers.record import FIGURE_STATUSES, ROOMS

FOLDER = Path(papers.__file__).parent
EVERY = pytest.mark.parametrize("slug", papers.MODULES)
LIMITS = {"summary": 3, "claim": 2, "experiment": 2}


def sentences(text: str) -> int:
    return len(re.findall(r"[.!?](?=\s|$)", text))


def changed(**fields):
    return lambda: dataclasses.replace(record("deltanet"), **fields)


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_there_are_44_and_every_file_is_listed():
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "record"}
    assert len(papers.MODULES) == 44
    assert list(papers.MODULES) == sorted(papers.MODULES)
    assert {module.rpartition(".")[2] for module in papers.MODULES.values()} == files
    assert [paper.slug for paper in records()] == list(papers.MODULES)


@EVERY
def test_slug_and_module_match(slug):
    assert papers.MODULES[slug] == "lineament.papers." + slug.replace("-", "_")
    assert record(slug).slug == slug
    assert record(slug) is record(slug)


@EVERY
def test_facts_are_plausible(slug):
    paper = record(slug)
    assert 2018 <= paper.year <= 2026
    assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv)
    assert 0 <= paper.year - (2000 + int(paper.arxiv[:2])) <= 1
    years = re.findall(r"\b(?:19|20)\d\d\b", paper.venue or "")
    assert all(int(year) == paper.year for year in years)
    assert paper.code is None or re.search(r"\(.*(licence|MIT|Apache|BSD|GPL|CC BY).*\)$", paper.code)
    assert "et al" not in paper.authors
    assert all(name[0].isupper() or name.startswith("van ") for name in paper.authors.split(", "))


@EVERY
def test_texts_keep_their_length(slug):
    paper = record(slug)
    for field, most in LIMITS.items():
        text = getattr(paper, field)
        assert text.endswith("."), field
        assert 1 <= sentences(text) <= most, field
        assert len(text) <= 700, field
        assert "  " not in text, field
    assert re.search(r"\bHolds? if\b|\bLearns if\b|\bmust\b", paper.experiment), "no threshold fixed beforehand"


@EVERY
def test_figures_and_neighbours_exist(slug):
    paper = record(slug)
    assert paper.figures
    assert set(paper.related) <= set(papers.MODULES)
    assert paper.related
    assert all(keyword == keyword.lower() for keyword in paper.keywords)


def test_arxiv_identifiers_and_titles_are_unique():
    for field in ("arxiv", "title"):
        values = [getattr(paper, field) for paper in records()]
        assert len(set(values)) == len(values), field


def test_every_way_of_knowing_a_figure_is_used():
    used = {figure.status for paper in records() for figure in paper.figures}
    assert used == set(FIGURE_STATUSES)


def test_reading_all_records_loads_nothing_but_the_records():
    """So that `lineament papers` answers at once."""
    code = (
        "import sys; before = set(sys.modules); import lineament.papers as p; p.records();"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    assert python(code).split() == ["lineament"]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("hedgehog", "hedgehog"),
        ("DELTA rule", "deltanet"),
        ("csordas", "depth-efficiency"),
        ("Yuandong grokking", "grokking-li2"),
        ("video", "linvideo"),
        ("int4 rotary", "fireq"),
    ],
)
def test_search_finds(text, first):
    assert search(text)[0].slug == first


def test_search_needs_every_word():
    both = {paper.slug for paper in search("fmri ridge")}
    assert both <= {paper.slug for paper in search("fmri")} & {paper.slug for paper in search("ridge")}
    assert search("fmri rotary zebra") == []
    assert search("  ") == records()


def test_a_slug_counts_more_than_a_summary():
    slugs = [paper.slug for paper in search("lora")]
    assert slugs[0] == "i-lora"
    assert len(slugs) > 1


def test_an_unknown_slug_suggests_near_ones():
    with pytest.raises(ValueError, match=r"no paper is called 'hedghog'\. Did you mean 'hedgehog'"):
        record("hedghog")
    with pytest.raises(ValueError, match="lists all 44"):
        record("zzzzzz")
    with pytest.raises(ValueError, match="'kimi-linear'"):
        experiment("kimi-liner")


@EVERY
def test_experiments_agree_with_the_status(slug):
    if record(slug).status == "works":
        assert callable(experiment(slug))
    else:
        with pytest.raises(NotImplementedError, match=f"'{slug}' is planned"):
            experiment(slug)


def test_records_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        record("deltanet").year = 2025
    with pytest.raises(TypeError):
        Paper("deltanet")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (changed(slug="Delta Net"), "slug is 'Delta Net'; expected lower-case words"),
        (changed(title=" "), "paper 'deltanet': title is ' '; expected text"),
        (changed(authors=("Yang",)), "authors is \\('Yang',\\); expected text"),
        (changed(keywords="recall"), "keywords is 'recall'; expected a tuple of texts"),
        (changed(room=()), "room is \\(\\); expected a tuple of texts"),
        (changed(year="2024"), "year is '2024'; expected an integer"),
        (changed(year=2023), "year 2023 lies before its preprint 2406.06484"),
        (changed(venue=""), "venue is ''; expected text"),
        (changed(arxiv="2406.06484v2"), "arxiv is '2406.06484v2'; expected YYMM.NNNNN"),
        (changed(arxiv="2413.06484"), "arxiv is '2413.06484'"),
        (changed(room=("attic",)), "room of paper 'deltanet' is 'attic'; expected one of " + ", ".join(ROOMS)),
        (changed(status="done"), "status of paper 'deltanet' is 'done'; expected one of planned, works"),
        (changed(figures=("16.87",)), "expected a tuple of Figure"),
        (changed(keywords=("recall", "recall")), "expected each entry once"),
        (changed(related=("deltanet",)), "related names the paper itself"),
        (lambda: Figure("perplexity", "16.87", "rumour"), "status of figure 'perplexity' is 'rumour'"),
        (lambda: Figure("perplexity", "", "abstract"), "figure: value is ''"),
    ],
)
def test_a_wrong_field_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_preprint_without_code_or_neighbours_is_fine():
    paper = dataclasses.replace(record("deltanet"), venue=None, arxiv=None, code=None, figures=(), related=())
    assert paper.related == ()
