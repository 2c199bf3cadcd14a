"""Text by name, by path, and what goes wrong."""

import json
import sys
from types import SimpleNamespace

import pytest

from lineament._base.errors import InputError
from lineament.data import NAMES, files, load_text
from lineament.data.carriers import _service
from lineament.data.files import cut
from lineament.data.wiki import articles, clean

LONG = "of all the beverages that people brew from leaves it is by far the most widely drunk in the world."


def test_markup_becomes_prose():
    markup = f"""{{{{Infobox | name = {{{{lang|fr|thé}}}} | image = [[File:Tea.jpg]] }}}}
[[File:Cup.jpg|thumb|A cup of [[tea]] on a very long table that nobody would ever call a sentence of the article]]
'''Tea''' (; {{{{IPA|ti}}}}) is ''hot'' [[Camellia|drink]];<ref name="a">{{{{cite book|x=[[y]]}}}}</ref> {LONG}
{{| class="wikitable"
| cell {LONG}
|}}
== History ==
It grew {{{{convert|90|km|mi}}}} from [http://a.b the coast]<ref name="a"/> and cost <math>x^{{2}}</math> &ndash; {LONG}
* [[a list entry]] {LONG}
== See also ==
* [[Coffee]] {LONG}
A sentence after the article {LONG}
[[Category:Drinks]] [[fr:Thé]]""".replace("&ndash;", "–")
    assert clean(markup) == (f"Tea is hot drink; {LONG}\n\nIt grew 90 km from the coast and cost x^ 2 – {LONG}")


def test_redirects_and_stubs_are_left_out():
    page = "<page><title>{}</title><text xml:space='preserve'>{}</text></page>"
    long = f"{LONG}\n" * 20
    dump = page.format("A", "#REDIRECT [[B]] " + long) + page.format("B", "a stub") + page.format("C", long)
    assert len(articles(dump)) == 1


def test_wiki_sample_is_clean():
    try:
        documents = load_text("wiki-sample")
    except InputError as error:
        pytest.skip(str(error))
    text = "\n\n".join(documents)
    assert len(documents) > 85
    assert len(text) > 2_400_000
    assert not any(mark in text for mark in ("{{", "}}", "[[", "]]", "<ref", "{|", "'''", "&nbsp;"))
    assert "gensim" not in sys.modules


def test_topics_come_without_running_anything():
    topics = load_text("python-topics")
    assert len(topics) == len(set(topics)) > 50
    assert sum(map(len, topics)) > 300_000


def test_docstrings_are_stable_long_and_not_repeated(tmp_path, monkeypatch):
    from lineament.data import carriers

    text = "\n\n".join(f"Paragraph {i} " + "says something about a function " * 9 for i in range(3))
    (tmp_path / "tests").mkdir()
    for name in ("b.py", "a.py", "tests/test_a.py"):
        (tmp_path / name).write_text(
            f'class {name[0].upper()}:\n    """{name}: {text}"""\n    def f(self):\n        "x"\n'
        )
    (tmp_path / "broken.py").write_text(f'def (:\n    """{text}"""')
    monkeypatch.setattr(carriers, "DOCUMENTED", ("anything",))
    monkeypatch.setattr(carriers, "folder", lambda module, package: tmp_path)
    documents = carriers.docstrings()
    assert [d[:5] for d in documents] == ["a.py:"]
    assert documents == carriers.docstrings()
    assert sum(d.count("Paragraph 2") for d in documents) == 1


def test_documentation_of_a_service(tmp_path):
    (tmp_path / "service-2.json").write_text(json.dumps({"x": {"documentation": "<p>A &amp; B</p>" + "word " * 100}}))
    assert _service(tmp_path / "service-2.json", set()).startswith("A & B\nword word")


def test_a_folder_in_the_order_of_its_names(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth", "id": 4}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert load_text(tmp_path) == ["first", "second", "third", "fourth"]
    assert load_text(str(tmp_path / "b.txt")) == ["second"]


def test_lines_of_json_end_at_newlines_alone_and_a_mark_in_front_is_no_text(tmp_path):
    texts = ["one\u2028two\x85three\x0cfour", "five"]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in texts)
    (tmp_path / "a.jsonl").write_bytes(lines.replace("\x0c", "\\f").encode("utf-8-sig"))
    (tmp_path / "b.txt").write_bytes("six".encode("utf-8-sig"))
    assert load_text(tmp_path) == [*texts, "six"]


@pytest.mark.parametrize("error", [ValueError("unknown split 'place'"), ConnectionError("no network\ntraces")])
def test_what_the_hub_does_not_give_is_said_in_one_line(error, monkeypatch):
    def load_dataset(*given, **named):
        raise error

    monkeypatch.setattr(files, "require", lambda module, extra: SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match=r"hub:a/b, split 'place', can't be had: (unknown split 'place'|no network)$"):
        load_text("hub:a/b", split="place")


def test_rows_without_text_are_passed_over(monkeypatch):
    class Rows(dict):
        column_names = ("text",)

    given = SimpleNamespace(load_dataset=lambda *_, **__: Rows(text=["a", None, " "]))
    monkeypatch.setattr(files, "require", lambda module, extra: given)
    assert load_text("hub:a/b") == ["a"]


def test_nothing_is_lost_when_a_long_text_is_cut():
    text = "\n\n".join(f"paragraph {i}" for i in range(100))
    pieces = cut(text, longest=200)
    assert "\n\n".join(pieces) == text
    assert max(map(len, pieces)) <= 200


def test_splits_are_disjoint_and_complete():
    whole = load_text("python-topics")
    parts = [load_text("python-topics", split=s) for s in ("train", "place", "test")]
    assert sorted(t for p in parts for t in p) == sorted(whole)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wiki-sampel", "Did you mean 'wiki-sample'"),
        ("./nothing-here.txt", "does not exist"),
        ("hub:someone/something", "lineament\\[hub\\]"),
    ],
)
def test_unknown_names_get_a_clear_error(name, message, monkeypatch):
    monkeypatch.setattr("lineament._base.extras.available", lambda module: False)
    with pytest.raises(InputError, match=message):
        load_text(name)


def test_a_missing_carrier_names_the_pip_line(monkeypatch):
    monkeypatch.setattr("lineament._base.extras.available", lambda module: False)
    for name, package in (("wiki-sample", "gensim"), ("cloud-docs", "botocore")):
        with pytest.raises(InputError, match=f"pip install --no-deps {package}"):
            NAMES[name]()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("x.txt", b"  \n", "holds no text"),
        ("x.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("x.bin", b"abc", "not a text file"),
        ("x.jsonl", b'{"text": "a"}\n{"txt": "b"}', "line 2: expected an object with a string field"),
        ("x.jsonl", b"nonsense", "line 1: not JSON"),
    ],
)
def test_bad_files_are_named(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_text(tmp_path / file)


def test_an_empty_folder_and_a_wrong_split(tmp_path):
    with pytest.raises(InputError, match="no text files"):
        load_text(tmp_path)
    with pytest.raises(InputError, match="Did you mean 'test'"):
        load_text("python-topics", split="tests")


def test_the_standard_librarys_source_is_text_of_few_characters():
    modules = load_text("python-source")
    assert len(modules) > 50
    assert any("def dataclass(" in module for module in modules)
    assert all(module.isascii() for module in modules)
