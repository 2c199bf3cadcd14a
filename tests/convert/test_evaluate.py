"""The measurement of a student: its rows, what is said of thin evidence, and going on after an interruption."""

import io
from collections import Counter
from functools import partial

import pytest
import torch
from convert_helpers import text_folder, tiny_llama, tiny_tokenizer
from rich.console import Console

from lineament.convert.evaluate import concluded, evaluate, shown
from lineament.convert.inherit import mixer_configs
from lineament.convert.parts import parts
from lineament.convert.plan import Plan
from lineament.convert.scores import Scores
from lineament.convert.text import load_documents
from lineament.models import build_student, tiny_teacher
from lineament.report import Evidence
from lineament.tasks.perplexity import context_gain, gain_kept, perplexity

PLAN = Plan(window=16, sinks=2, keep="none", precision="fp32")
LENGTHS = (64, 2048)


class Counted:
    """Counts the forwards of models and says of which, and stops one that comes after `last`."""

    def __init__(self, models, last=None):
        self.calls, self.last, self.of = 0, last, Counter()
        self.hooks = [
            one.model.register_forward_pre_hook(partial(self._count, name))
            for name, one in zip(("student", "teacher", "untrained"), models, strict=True)
        ]

    def _count(self, name, *_):
        self.calls += 1
        self.of[name] += 1
        if self.last is not None and self.calls > self.last:
            raise KeyboardInterrupt

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


@pytest.fixture(scope="module")
def models():
    teacher = tiny_llama(layers=2, max_position_embeddings=4096)
    full = {1: (0, 1)}
    student, untrained = (
        build_student(teacher, mixer_configs(plan, parts(teacher).shapes, full)).eval()
        for plan in (PLAN, PLAN.change({"mixer": "softmax-window"}))
    )
    return student, teacher, untrained


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = text_folder(tmp_path_factory.mktemp("text"), documents=40, words=900)
    return {"text": load_documents([str(folder)])["test"][str(folder)]}


def measured(models, texts, folder=None, said=None, **changes):
    student, teacher, untrained = models
    given = {
        "lengths": LENGTHS, "tokens": 4096, "prompts": 8, "retrieval_lengths": (1500,), "seed": 0, "folder": folder,
        "on_row": None if said is None else said.append, **changes,
    }  # fmt: skip
    return evaluate(student, teacher, tiny_tokenizer(), texts=texts, untrained=untrained, **given)


@pytest.fixture(scope="module")
def whole(models, texts):
    """An undisturbed measurement: (evidence, forwards)."""
    with Counted(models) as counted:
        return measured(models, texts), counted.calls


def row_of(evidence, measure):
    return next(row for row in evidence.rows if row["measure"] == measure)


def test_rows_and_notes(whole):
    evidence, _ = whole
    names = [row["measure"] for row in evidence.rows]
    kinds = [f"retrieval {kind} 1500" for kind in ("digits", "words", "two-needles", "key-value")]
    assert names[:7] == ["perplexity text 64", "perplexity text 2048", *kinds, "retrieval 1500"]
    assert "gain from context text" in names
    total = row_of(evidence, "retrieval 1500")
    assert {"student", "teacher", "state_off", "untrained", "lost", "low", "high"} <= set(total)
    assert total["prompts"] == sum(row_of(evidence, kind)["prompts"] for kind in kinds) == 8
    assert "teacher itself" in total["note"]  # a random model finds nothing
    assert row_of(evidence, "perplexity text 2048")["note"] == "only 2 windows"
    assert "note" not in row_of(evidence, "perplexity text 64")


def test_the_notes_say_which_baselines_the_student_beats():
    rows = [
        {"measure": f"perplexity text {n}", "student": mine, "teacher": 9.0, "state_off": off, "untrained": bare}
        for n, mine, off, bare in ((512, 10.0, 11.0, 9.5), (2048, 10.0, 10.1, 10.5), (8192, 10.0, 9.9, None))
    ]
    said = concluded(rows, bar=None, seed=0, seconds=1.0, precision="float32").notes
    assert "better than with the linear state off in 2 of 3 rows" in said
    assert "better than that of untrained window + sinks in 1 of 2 rows" in said


@torch.no_grad()
def test_numbers_are_those_of_the_tasks(whole, models, texts):
    from lineament.data import windows

    evidence, _ = whole
    ids = windows(texts["text"], tiny_tokenizer(), 2048, max_tokens=4096)
    student, teacher = models[:2]
    assert row_of(evidence, "perplexity text 2048")["student"] == perplexity(student, ids).value
    gain = row_of(evidence, "gain from context text")
    expected = gain_kept(context_gain(student, ids), context_gain(teacher, ids))
    assert [gain["ratio"], gain["low"], gain["high"]] == pytest.approx(expected, rel=1e-4)


def test_a_length_without_room_is_said(models, texts):
    found = measured(models, texts, lengths=(64,), retrieval_lengths=(100,), tokens=128)
    assert "give at least" in row_of(found, "retrieval any kind 100")["note"]


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_nothing_is_read_beyond_the_last_learned_position(texts, family):
    teacher = tiny_teacher(family, vocab_size=256)
    student = build_student(teacher, mixer_configs(PLAN, parts(teacher).shapes, {})).eval()
    found = evaluate(
        student, teacher, tiny_tokenizer(), texts=texts, lengths=(64, 512), tokens=256, prompts=2, speed=True,
        on_row=(rows := []).append,
    )  # fmt: skip
    assert rows == found.rows
    assert [row["measure"] for row in rows] == [
        "perplexity text 64", *(f"cache bytes {n}" for n in (512, 2048, 8192, 32768)), "decode tokens/s 128",
    ]  # fmt: skip


@pytest.mark.parametrize("share", [0.6, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.3, 0.9))])
def test_a_measurement_goes_on_where_it_was_cut_off(models, texts, whole, tmp_path, share):
    evidence, forwards = whole
    said, last = [], int(share * forwards)
    with Counted(models, last), pytest.raises(KeyboardInterrupt):
        measured(models, texts, tmp_path, said)
    assert list(tmp_path.rglob("*.safetensors"))
    with Counted(models) as counted:
        again = measured(models, texts, tmp_path)
    assert again.rows == evidence.rows
    assert again.rows[: len(said)] == said
    assert forwards - last <= counted.calls < forwards
    with Counted(models) as counted:
        assert measured(models, texts, tmp_path).rows == evidence.rows
    assert counted.calls == 0


def test_other_arguments_start_anew(models, texts, tmp_path):
    few = {"lengths": (64,), "prompts": 0, "tokens": 128}
    measured(models, texts, tmp_path, **few)
    with Counted(models) as counted:
        measured(models, texts, tmp_path, **few)
    assert counted.calls == 0
    changed = [{"tokens": 256}, {"seed": 1}, {"precision": "bf16"}]
    for change in changed:
        with Counted(models) as counted:
            measured(models, texts, tmp_path, **{**few, **change})
        assert counted.calls
    with torch.no_grad(), Counted(models) as counted:
        weight = models[0].lm_head.weight
        weight[0, 0] += 1
        measured(models, texts, tmp_path, **few)
        weight[0, 0] -= 1
    assert counted.calls


def test_a_teacher_is_measured_once_for_all_its_students(models, texts, tmp_path):
    few = {"lengths": (64,), "prompts": 0, "tokens": 128}
    first = measured(models, texts, tmp_path, **few)
    weight = models[0].lm_head.weight
    with torch.no_grad():
        weight[0, 0] += 1
    with Counted(models) as counted:
        second = measured(models, texts, tmp_path, **few)
    with torch.no_grad():
        weight[0, 0] -= 1
    assert (counted.of["teacher"], counted.of["untrained"]) == (1, 0)  # one window read by both for their agreement
    assert second.rows[0]["teacher"] == first.rows[0]["teacher"]
    assert second.rows[0]["student"] != first.rows[0]["student"]


def test_scores_survive_numbers_that_are_none(tmp_path):
    numbers = {"a": torch.tensor([float("nan"), float("inf"), 1.0]), "b": torch.tensor(3)}
    Scores(tmp_path, {"x": 1}).once("one/../two", lambda: numbers)
    found = Scores(tmp_path, {"x": 1}).once("one/../two", lambda: {})
    assert found["a"].isnan()[0]
    assert torch.equal(found["a"][1:], numbers["a"][1:])
    assert int(found["b"]) == 3
    assert Scores(tmp_path, {"x": 2}).once("one/../two", lambda: {}) == {}


def test_the_table_fits_a_terminal():
    numbers = {"teacher": 17.57, "student": 17.74, "ratio": 1.01, "low": 1.005, "high": 1.014, "state_off": 18.15}
    row = {"measure": "perplexity wiki-sample 2048", **numbers, "untrained": None, "goal": 1.03, "verdict": "pass"}
    cache = {"measure": "cache bytes 32768", "teacher": 1_509_949_440, "student": 379_369_696, "ratio": 0.251}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(shown(Evidence(name="conversion", rows=[row, cache], passed=True)))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    said = " ".join(" ".join(lines).split())
    for number in ("17.57", "17.74", "1.01", "18.15", "1.03", "pass", "1510", "379"):
        assert number in said
