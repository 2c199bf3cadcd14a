"""Circuits: what is kept, how faithful it is, on models trained to do a task and on tiny random ones."""

import json
import math

import pytest
import torch
from test_explain_edges import state
from tiny_families import ids, make

from lineament import explain
from lineament.explain import LogitDifference
from lineament.explain.circuit import alive
from lineament.explain.effects import rows_of
from lineament.tasks.indirect_object import IndirectObject, learned_model


def task(family="llama"):
    model = make(family, torch.float64)[0]
    clean = torch.cat([ids(5), ids(5) + 1])
    return model, {"input_ids": clean}, {"input_ids": (clean + 7) % 58 + 3}, LogitDifference(
        torch.tensor([5, 6, 7, 8]), torch.tensor([9, 2, 3, 4])
    )  # fmt: skip


@pytest.fixture(scope="module")
def learned():
    language = IndirectObject(names=6, places=2, objects=2)
    model = learned_model(language, layers=2, steps=300)
    prompts = language.prompts(40, batch=7)
    return model, {"input_ids": prompts.ids}, {"input_ids": prompts.corrupted}, LogitDifference(
        prompts.answer, prompts.distractor
    )  # fmt: skip


@pytest.mark.parametrize("level", ["edge", "node"])
@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_everything_kept_is_the_whole_model(level, ablation):
    found = explain.circuit(*task(), level=level, ablation=ablation, shares=(0.3, 1.0), faithful=math.inf, rows=3)
    assert found.curve[-1]["faithfulness"] == pytest.approx(1, abs=1e-9)
    assert found.curve[-1]["completeness"] == pytest.approx(0, abs=1e-9)
    assert found.curve[-1]["size"] == len(found.parts) == found.total == (33 if level == "edge" else 10)
    assert 0 < found.curve[0]["share"] < 1
    assert found.prompts == 4


@pytest.mark.parametrize("level", ["edge", "node"])
def test_batches_cut_in_parts_give_the_same_circuit(level):
    one, other = (explain.circuit(*task("gpt2"), level=level, size=7, rows=rows) for rows in (99, 3))
    assert list(one.parts) == list(other.parts)
    assert one.faithfulness == pytest.approx(other.faithfulness)


@pytest.mark.parametrize("level", ["edge", "node"])
def test_a_score_by_patching_is_what_ablating_the_part_costs(level):
    model, clean, corrupt, metric = task()
    found = explain.circuit(model, clean, corrupt, metric, level=level, method="patch", size=10, shares=())
    for name, score in list(found.parts.items())[:4]:
        alone = explain.Circuit(**{**found.__dict__, "parts": {name: score}})
        judged = explain.evaluate_circuit(model, clean, corrupt, metric, alone)
        lost = (1 - judged["completeness"]) * (judged["whole"] - judged["nothing"])
        assert score == pytest.approx(lost, abs=1e-9)


def test_dead_ends_hand_nothing_on():
    model, clean, corrupt, metric = task()
    edges = ["a0.h1->m0", "embed->m0", "m0->a1", "a1.h2->logits", "a1.h0->m1", "embed->a0"]
    assert alive(edges) == ["a0.h1->m0", "embed->m0", "m0->a1", "a1.h2->logits", "embed->a0"]
    whole = explain.circuit(model, clean, corrupt, metric, size=1, shares=())
    pair = [explain.Circuit(**{**whole.__dict__, "parts": dict.fromkeys(x, 0.0)}) for x in (edges, alive(edges))]
    values = [explain.evaluate_circuit(model, clean, corrupt, metric, each)["faithfulness"] for each in pair]
    assert values[0] == pytest.approx(values[1], abs=1e-9)
    assert pair[0].nodes == ["embed", "a0.h1", "m0", "a1.h0", "a1.h2", "m1"]


@pytest.mark.slow
@pytest.mark.parametrize("level", ["edge", "node"])
def test_the_circuit_of_a_learned_task_is_small_and_works_on_other_prompts(learned, level):
    model, clean, corrupt, metric = learned
    halves = [[rows_of(x, *cut) for x in (clean, corrupt)] + [metric.rows(*cut)]
              for cut in ((0, 20), (20, 40))]  # fmt: skip
    found = explain.circuit(model, *halves[0], level=level, shares=(0.1, 0.2, 0.3, 0.5, 0.7), faithful=0.8)
    assert found.faithfulness >= 0.8
    assert len(found.parts) < 0.8 * found.total
    assert found.whole > 0 > found.nothing
    assert explain.evaluate_circuit(model, *halves[1], found)["faithfulness"] > 0.6
    least = explain.circuit(model, *halves[0], level=level, shares=(1.0,), faithful=0.8)
    worst = dict(sorted(least.parts.items(), key=lambda pair: abs(pair[1]))[: len(found.parts)])
    poor = explain.evaluate_circuit(model, *halves[0], explain.Circuit(**{**found.__dict__, "parts": worst}))
    assert poor["faithfulness"] < found.faithfulness / 2


def test_a_circuit_survives_json():
    found = explain.circuit(*task(), size=12, shares=())
    assert explain.Circuit.from_json(json.loads(json.dumps(found.to_json()))) == found
    with pytest.raises(ValueError, match="this is no circuit: it has no 'ablation'"):
        explain.Circuit.from_json({"level": "edge"})


def test_what_makes_no_task_is_refused():
    model, clean, corrupt, metric = task()
    for changes, message in (
        ({"level": "edges"}, "Did you mean 'edge'"), ({"method": "zero"}, "unknown method 'zero'"),
        ({"ablation": "resampled"}, "Did you mean 'resample'"), ({"size": 99}, "the model has 33 edges"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            explain.circuit(model, clean, corrupt, metric, **changes)
    with pytest.raises(ValueError, match="doesn't change the metric"):
        explain.circuit(model, clean, clean, metric)
    with pytest.raises(ValueError, match="pair prompts of equal length"):
        explain.circuit(model, clean, {"input_ids": ids(4)}, metric)
    found = explain.circuit(model, clean, corrupt, metric, size=9, shares=())
    strange = explain.Circuit(**{**found.__dict__, "parts": {"m9": 1}})
    with pytest.raises(ValueError, match="is the circuit of another model"):
        explain.evaluate_circuit(model, clean, corrupt, metric, strange)


@pytest.mark.parametrize("fails", [0, 2, 5])
def test_the_model_comes_back_as_it_was(fails):
    model, clean, corrupt, metric = task()
    before, calls = state(model), []

    def failing(output):
        calls.append(1)
        if fails and len(calls) >= fails:
            raise KeyboardInterrupt
        return metric(output)

    for level in ("edge", "node"):
        calls.clear()
        try:
            explain.circuit(model, clean, corrupt, failing, level=level)
        except KeyboardInterrupt:
            assert fails
        assert state(model) == before
