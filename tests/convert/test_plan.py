"""A plan is a value: JSON through and through, checked field by field."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineament._base.errors import InputError
from lineament.convert.plan import MIXERS, Plan, parse_budget, parse_keep
from lineament.convert.plans import PLANS, plan
from lineament.nn import BUILDERS


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_survives_json(name):
    once = json.loads(json.dumps(PLANS[name].to_json()))
    assert Plan.from_json(once) == PLANS[name]
    assert Plan.from_json(once).digest() == PLANS[name].digest()
    assert PLANS[name].name == name


@settings(max_examples=25, deadline=None)
@given(
    window=st.integers(0, 512),
    lengths=st.lists(st.integers(2, 8192), min_size=1, max_size=4),
    rate=st.floats(1e-6, 1.0),
    keep=st.sampled_from(["none", "every:4", "0,7,15", "auto:3", "auto-heads:0.5"]),
)
def test_any_plan_survives_json(window, lengths, rate, keep):
    one = Plan(window=window, distil_lengths=tuple(lengths), transfer_lr=rate, keep=keep)
    assert Plan.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_known_mixers_are_those_that_can_be_built():
    assert set(MIXERS) == set(BUILDERS) - {"linear"}


def test_digest_tells_plans_apart():
    assert len({one.digest() for one in PLANS.values()}) == len(PLANS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windw": 3}, "no field 'windw'. Did you mean 'window'"),
        ({"window": -1}, "window is -1; expected at least 0"),
        ({"window": "wide"}, "can't read 'wide' as a whole number"),
        ({"window": 1.5}, "window is 1.5; expected a whole number"),
        ({"mixer": "hedghog"}, "Did you mean 'hedgehog'"),
        ({"distil": "lorra"}, "Did you mean 'lora'"),
        ({"keep": "evry:4"}, "Did you mean 'every'"),
        ({"keep": "auto-heads:1.5"}, "share of the key-value heads"),
        ({"budget": "soon"}, "expected a time such as"),
        ({"transfer_lengths": ()}, "expected lengths of at least 2"),
        ({"data": ""}, "data is empty"),
        ({"distil_retrieval": 2.0}, "expected a share from 0 to 1"),
        ({"distil_kl": 0.0, "distil_next": 0.0}, "nothing would be learned"),
        ({"options": {"x": {1}}}, "not JSON"),
    ],
)
def test_a_wrong_field_is_named(changes, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        plan("default", changes)


def test_texts_are_read_as_the_field_s_type():
    read = plan("default", {"distil_lengths": "256, 512", "sinks": "2", "options": '{"decay": true}', "budget": "none"})
    assert (read.distil_lengths, read.sinks, read.options, read.budget) == ((256, 512), 2, {"decay": True}, None)


def test_a_plan_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(Plan(window=7).to_json()))
    assert plan(str(path)).window == 7
    with pytest.raises(InputError, match="no plan file"):
        plan(str(tmp_path / "other.json"))
    path.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        plan(str(path))
    with pytest.raises(InputError, match=r"unknown plan 'defalt'\. Did you mean 'default'"):
        plan("defalt")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("none", ("none", ())),
        ("all", ("all", ())),
        ("every:4", ("every", (4,))),
        ("7, 0,7", ("layers", (0, 7))),
        ("auto:2", ("auto", (2,))),
        ("auto-heads:.25", ("auto-heads", (0.25,))),
    ],
)
def test_keep_rules(text, rule):
    assert parse_keep(text) == rule


@pytest.mark.parametrize("text", ["", "every:0", "auto", "1;2", "-1", "auto-heads:x"])
def test_keep_rules_that_are_none(text):
    with pytest.raises(InputError, match="keep"):
        parse_keep(text)


def test_budgets():
    assert [parse_budget(one) for one in (None, 60, "2min", "1.5h", "30s")] == [None, 60, 120, 5400, 30]
    with pytest.raises(InputError):
        parse_budget("0")
