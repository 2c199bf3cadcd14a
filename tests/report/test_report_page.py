"""Plots are pictures, and the page holds everything, escaped."""

import re
from html.parser import HTMLParser
from io import BytesIO

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.image import imread

from lineament._base.errors import InputError
from lineament.report import (
    Details,
    Drawing,
    Evidence,
    HeatText,
    Picture,
    Rows,
    Samples,
    Section,
    Text,
    Tiles,
    bars,
    curve,
    heat_image,
    heat_text,
    heatmap,
    page,
)

X = [512, 1024, 2048]


def draw(kind, **keywords):
    if kind == "curve":
        series = {"a": (X, [3, 2, 1]), "b": (X, [3, np.nan, 1], [0.1] * 3), "c": (X, [2, 2, 2], [1, 1, 1], [3, 3, 3])}
        return curve(
            series, xlabel="tokens", ylabel="perplexity", title="t", log="xy", levels={"goal": 1.5}, **keywords
        )
    if kind == "bars":
        groups = {"512": {"a": 1.0, "b": (2.0, 1.5, 2.2)}, "1k": {"a": 3.0, "b": None}}
        return bars(groups, ylabel="speed", title="t", levels={"goal": 2.0}, **keywords)
    return heatmap([[0.1, float("nan")], [3.0, 2.0]], xlabel="layer", ylabel="head", marked=[(0, 1)], **keywords)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("kind", ["curve", "bars", "heatmap"])
def test_a_plot_is_a_png_drawn_the_same_each_time_in_nobodys_settings(kind, dark):
    before = dict(mpl.rcParams)
    first = draw(kind, dark=dark)
    assert first == draw(kind, dark=dark)
    assert dict(mpl.rcParams) == before
    pixels = imread(BytesIO(first))
    assert pixels.std() > 0.02
    assert (pixels[0, 0, :3].mean() < 0.5) == dark


def test_many_series_and_groups_still_fit():
    curve({f"series {i}": (X, [i, i, i]) for i in range(9)}, xlabel="x", ylabel="y")
    bars({f"group {i}": {f"s{j}": float(j) for j in range(8)} for i in range(6)}, ylabel="y", log=True)
    heatmap(np.random.default_rng(0).random((30, 40)), xlabel="x", ylabel="y")


def test_names_are_words_and_no_formulas():
    odd = "$$ 5$ a$"  # which matplotlib can't read as a formula
    curve({odd: (X, [1, 2, 3])}, xlabel=odd, ylabel=odd, levels={odd: 1.5})
    curve({f"{odd}{i}": (X, [1, 2, i]) for i in range(9)}, xlabel="x", ylabel="y")
    bars({odd: {odd: 1.0, f"{odd}2": 2.0}}, ylabel="y", levels={odd: 1.5})


def test_one_point_and_numbers_that_are_none_are_drawn():
    nan = float("nan")
    curve({"one": ([1], [2.0]), "none": ([1], [nan])}, xlabel="x", ylabel="y", log="xy")
    curve({"none": (X, [nan, nan, nan])}, xlabel="x", ylabel="y")
    bars({"a": {"x": nan, "y": 1.0}}, ylabel="y")
    heatmap([[nan]], xlabel="x", ylabel="y")
    heat_text(["a", "b"], [nan, 1.0])
    heat_image([[nan, 1.0]], image=[[0.0, 1.0]])
    assert HeatText(["a", "b"], [nan, -2.0]).shades()[0][1].endswith(",0.000)")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: curve({}, xlabel="x", ylabel="y"), "no series to draw"),
        (lambda: curve({"a": ([1, 2], [1])}, xlabel="x", ylabel="y"), r"'a' has parts of shapes \(2,\), \(1,\)"),
        (lambda: bars({"a": {}}, ylabel="y"), "no bar to draw"),
        (lambda: heatmap([[1, 2], [1]], xlabel="x", ylabel="y"), r"rows of one length; given \[2, 1\]"),
        (lambda: heatmap([], xlabel="x", ylabel="y"), "rows of one length"),
    ],
)
def test_a_plot_of_nothing_says_so(call, message):
    with pytest.raises(InputError, match=message):
        call()


class Outline(HTMLParser):
    """Tags that are open at the end, and all attributes."""

    VOID = {"meta", "img", "source", "br", "link"}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.wrong = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


EVIL = "<script>alert('x')</script> & \"quotes\""


def test_a_page_with_everything_is_whole_escaped_and_alone(tmp_path):
    png = draw("heatmap")
    parts = [
        EVIL,
        Text(f"{EVIL}\n\nsecond paragraph"),
        Text(EVIL, code=True),
        Tiles({EVIL: (0.29, EVIL), "plain": "13 min"}),
        [{EVIL: EVIL, "x": 1.0}],
        Rows([{"verdict": "pass"}, {"verdict": "miss"}], EVIL),
        Picture(png, EVIL, EVIL),
        Drawing("<svg xmlns='http://www.w3.org/2000/svg'/>", EVIL, EVIL),
        Picture(png, "two", dark=draw("heatmap", dark=True)),
        Samples(EVIL, {EVIL: EVIL, "student": "x"}),
        Details(EVIL, [EVIL, Details("inner", ["deep"])]),
        Evidence(name=EVIL, rows=[{"a": EVIL}], claim=EVIL, threshold=EVIL, notes=EVIL, passed=False, seeds=[0]),
    ]
    path = page(
        EVIL, [Section(EVIL, parts), *parts, Section("B"), Section("C")], tmp_path / "a.html", lead=EVIL, footer=EVIL
    )
    html = path.read_text("utf-8")
    outline = Outline()
    outline.feed(html)
    assert not outline.open
    assert not outline.wrong
    tags = [tag for tag, _ in outline.seen]
    assert "script" not in tags
    assert all(a["alt"] for tag, a in outline.seen if tag == "img")
    assert not re.search(r'(?:src|href|srcset)="(?!data:image/(?:png|svg\+xml)|#)', html)
    assert "url(" not in html
    assert "@import" not in html
    links = {a["href"][1:] for tag, a in outline.seen if tag == "a"}
    assert links == {a["id"] for tag, a in outline.seen if "id" in a} == {"s1", "s2", "s3"}
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in outline.seen
    assert "prefers-color-scheme:dark" in html
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (3, "can't show a int"),
        (Picture(b"GIF89a", "words"), "is not a PNG"),
        (Drawing("<svg/>", " ", "cap"), "'cap' is no SVG or has no alt text"),
        (Drawing("PNG", "words", "cap"), "is no SVG"),
        (Picture(b"\x89PNG\r\n\x1a\n", " ", "cap"), "'cap' has no alt text"),
    ],
)
def test_what_a_page_can_not_show_is_named(tmp_path, part, message):
    with pytest.raises(InputError, match=message):
        page("a", [part], tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def test_a_page_is_the_same_each_time(tmp_path):
    first, second = (page("a", ["b", Picture(draw("bars"), "c")], tmp_path / name) for name in ("a.html", "b.html"))
    assert first.read_bytes() == second.read_bytes()
