"""Evidence and tables: what is written comes back, and people can read it."""

import dataclasses
import io
import json
import os
import platform

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lineament._base.errors import InputError
from lineament.report import Evidence, machine, table, versions

PLAIN = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False) | st.text()


def text_of(renderable, width=200):
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(), PLAIN | st.lists(PLAIN) | st.tuples(PLAIN), max_size=3), max_size=3),
    passed=st.none() | st.booleans(),
    seeds=st.lists(st.integers()),
)
def test_evidence_survives_json(rows, passed, seeds):
    found = Evidence(name="a", rows=rows, passed=passed, seeds=seeds, seconds=1.5)
    assert Evidence.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found
    assert Evidence.from_json(json.dumps(found.to_json())) == found


def test_numbers_of_torch_and_numpy_become_plain():
    found = Evidence(
        name="a", rows=[{"x": torch.tensor(2.0), "y": np.float64(3), "z": (1, np.arange(2)), "n": float("inf")}]
    )
    assert found.rows == [{"x": 2.0, "y": 3.0, "z": [1, [0, 1]], "n": float("inf")}]
    assert found.to_json()["rows"][0]["n"] is None


def test_evidence_is_frozen_and_says_what_it_ran_on():
    found = Evidence(name="a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.passed = True  # type: ignore[misc]
    assert found.versions["torch"] == torch.__version__
    assert found.machine["cores"] >= 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "not valid JSON"),
        ({"rows": []}, "at least a name"),
        ([], "at least a name"),
        ({"name": "a", "row": []}, "no field 'row'. Did you mean 'rows'"),
    ],
)
def test_what_is_no_evidence_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        Evidence.from_json(given)


def test_the_machine_is_described_without_names_and_places():
    described = json.dumps(machine())
    assert platform.node() not in described
    assert os.path.expanduser("~") + "/" not in described
    assert os.getcwd() not in described
    assert set(versions()) <= set(machine())


@pytest.mark.parametrize(("passed", "verdict"), [(True, "held"), (False, "did not hold"), (None, "no verdict")])
def test_the_table_carries_the_verdict_and_every_value(passed, verdict):
    rows = [{"model": "teacher [bold]", "ppl": 21.0437}, {"model": "student", "ppl": 0.00012, "interval": (0.9, 1.0)}]
    shown = text_of(Evidence(name="convert", rows=rows, passed=passed).table())
    for piece in (f"convert: {verdict}", "teacher [bold]", "21.04", "0.00012", "[0.9, 1]", "-"):
        assert piece in shown


def test_columns_can_be_chosen_and_underscores_become_spaces():
    shown = text_of(table([{"state_off": 1, "b": True, "c": 3}], columns=["b", "state_off"]))
    assert "state off" in shown
    assert "yes" in shown
    assert "c" not in shown
    assert table([]).row_count == 0


def test_what_stands_in_brackets_is_no_markup():
    words = [r"\[a]", "[/b]", "[bold]", ":key:", "\\"]
    shown = table([{"[/i]": word} for word in words], title="[/u]")
    console = Console(file=io.StringIO(), width=100, emoji=False)
    console.print(shown)
    text = console.file.getvalue()
    assert all(word in text for word in (*words, "[/i]", "[/u]"))
    assert "\\\\" not in text


def test_rows_of_different_kinds_stand_in_tables_of_their_own():
    rows = [{"arm": "a", "loss": 1.0}, {"arm": "b", "loss": 2.0}, {"rule": "lead", "held": True}]
    first, second = Evidence(name="a", rows=rows, passed=True).tables()
    assert [first.row_count, second.row_count] == [2, 1]
    assert "held" in first.title
    assert second.title is None
