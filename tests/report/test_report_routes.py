"""Chains of nodes as lines in an SVG."""

import re
from xml.etree import ElementTree

import pytest

from lineament.report import routes

SVG = "{http://www.w3.org/2000/svg}"
CHAINS = [
    ([("text", 0, "<a>"), ("m0", 0, "m0"), ("answer", 1, "b & c")], 0.8),
    ([("text", 1, "b"), ("answer", 1, "b & c")], -0.2),
]


def drawn(chains=CHAINS, rows=("text", "m0", "m1", "answer"), columns=("<a>", "b")):
    return ElementTree.fromstring(routes(chains, rows, columns, title="Why <b>", words="in words"))


def test_a_line_per_chain_as_wide_as_its_weight_with_words():
    svg = drawn()
    assert svg.find(f"{SVG}title").text == "Why <b>"
    assert svg.find(f"{SVG}desc").text == "in words"
    lines = {path.get("class"): path for path in svg.iter(f"{SVG}path") if path.get("class") != "r"}
    assert float(lines["f"].get("stroke-width")) == 7
    assert float(lines["a"].get("stroke-width")) == 2.5
    assert lines["f"].find(f"{SVG}title").text == "+0.8: <a> (text) → m0 (m0) → b & c (answer)"
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert "m1" not in texts  # no chain stops there
    assert len(list(svg.iter(f"{SVG}rect"))) == 4


def test_a_line_goes_around_boxes_it_does_not_stop_at():
    chains = [*CHAINS, ([("text", 1, "b"), ("m0", 1, "m0"), ("answer", 1, "b & c")], 0.1)]
    svg = drawn(chains)
    (box,) = [g for g in zip(svg.iter(f"{SVG}rect"), strict=True) if float(g[0].get("x")) > 100][-1:]
    past = next(path for path in svg.iter(f"{SVG}path") if path.get("class") == "a")
    ends = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)(?=C|$)", past.get("d"))]
    assert len(ends) == 3
    assert ends[1][0] > ends[0][0] + float(box[0].get("width")) / 2


def test_what_has_no_column_stands_side_by_side():
    chains = [([("in", None, "in"), ("1", None, f"[{i}]"), ("out", None, "out")], i - 1.5) for i in range(4)]
    svg = drawn(chains, ["in", "1", "out"], [])
    places = {(rect.get("x"), rect.get("y")) for rect in svg.iter(f"{SVG}rect")}
    assert len(places) == 6
    assert all(0 <= float(x) < float(svg.get("width")) for x, _ in places)


def test_strange_rows_and_nothing_to_draw_are_named():
    with pytest.raises(ValueError, match="in no row or column"):
        drawn(rows=["text"])
    with pytest.raises(ValueError, match="in no row or column"):
        drawn(columns=["<a>"])
    with pytest.raises(ValueError, match="no path"):
        drawn([])
