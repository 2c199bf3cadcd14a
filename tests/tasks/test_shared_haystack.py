"""Texts with several questions: exact, repeatable, and scored as if each question had been asked on its own."""

import copy

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from lineament._base.errors import InputError
from lineament._base.seeds import seeded
from lineament.models import StudentCache, build_student, head_shape
from lineament.nn import MixerConfig
from lineament.tasks import KINDS, SETS, Retrieval, make_bodies, paired_points, score, score_bodies
from lineament.tasks.templates import TEMPLATES


def text_of(ids):
    return "".join(map(chr, ids.tolist()))


def student_of(teacher, kind="hedgehog-window", window=24):
    """Layer 0 mixed, one key-value head softmax; layer 1 softmax as a whole."""
    shape = head_shape(teacher.config)
    options = {"log_scale": -1.0} if kind == "hedgehog-window" else {}
    mixer = MixerConfig(kind=kind, window=window, sinks=2, full_heads=(1,), options=options, **shape)
    with seeded(0):
        return build_student(teacher, {0: mixer}).eval()


@pytest.fixture(scope="module")
def sliding():
    """A teacher with a sliding window in one of its layers."""
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=16, layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    with seeded(0):
        return Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("templates", SETS)
def test_a_text_holds_the_facts_of_all_its_questions(letters, filler, templates):
    bodies = make_bodies(letters, 3000, 20, filler=filler, templates=templates, beyond=250)
    assert [len(body.prompts) for body in bodies] == [8, 8, 8]
    for body in bodies:
        assert sorted(p.kind for p in body.prompts) == sorted(2 * KINDS)
        assert max(p.length for p in body.prompts) == 3000
        text = text_of(body.ids)
        for prompt in body.prompts:
            assert torch.equal(prompt.ids[: body.length], body.ids)
            assert not prompt.answer[: body.length].any()
            assert prompt.answer[-1]
            answers = "".join(
                c if a else "|" for c, a in zip(text_of(prompt.ids), prompt.answer.tolist(), strict=True)
            ).split("|")
            assert all(answer in text for answer in answers)
            assert 250 <= prompt.distance < 3000


def test_subjects_and_names_stand_once_in_a_text(letters, filler):
    for body in make_bodies(letters, 3000, 24, filler=filler):
        text = text_of(body.ids)
        assert sum(text.count(subject) for subject in TEMPLATES["test"].subjects) == 8
        assert sorted(text.count(f"\n{key} ") for key in TEMPLATES["test"].keys) == [0] * 8 + [1] * 12
        questions = [
            text_of(p.ids[body.length : body.length + p.answer[body.length :].int().argmax()]) for p in body.prompts
        ]
        assert len(set(questions)) == 8
        assert all(text.count(question.strip()) == 1 for question in questions)


def test_facts_are_spread_over_the_texts(letters, filler):
    bodies = make_bodies(letters, 4000, 80, filler=filler, beyond=300)
    for kind in (None, "digits", "key-value"):
        places = torch.tensor([float(p.distance) for body in bodies for p in body.prompts if kind in (None, p.kind)])
        assert places.min() >= 300
        assert torch.histc(places, bins=4, min=300, max=4000).min() >= len(places) // 8


def test_short_texts_have_fewer_questions_and_kinds_take_turns(letters, filler):
    sizes = []
    for length in (700, 1000, 1400, 2500):
        bodies = make_bodies(letters, length, 16, filler=filler)
        sizes += {len(body.prompts) for body in bodies}
        kinds = [p.kind for body in bodies for p in body.prompts]
        assert [kinds.count(kind) for kind in KINDS] == [4] * 4
        assert {max(p.length for p in body.prompts) for body in bodies} == {length}
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert sizes[-1] == 8
    with pytest.raises(InputError, match="no room for facts beyond 192; give at least"):
        make_bodies(letters, 200, 1, filler=filler)
    with pytest.raises(InputError, match="Did you mean 'test'"):
        make_bodies(letters, 900, 1, filler=filler, templates="tset")


def test_a_text_depends_on_seed_and_number_only(letters, filler):
    many, few = (make_bodies(letters, 2000, count, filler=filler, seed=3) for count in (24, 8))
    assert torch.equal(many[0].ids, few[0].ids)
    assert not torch.equal(many[0].ids[:1500], many[1].ids[:1500])
    other = make_bodies(letters, 2000, 8, filler=filler, seed=4)
    assert not torch.equal(other[0].ids[:1500], few[0].ids[:1500])


def same(found, expected):
    assert torch.equal(found.right, expected.right)
    assert torch.equal(found.total, expected.total)
    assert torch.equal(found.distance, expected.distance)
    torch.testing.assert_close(found.nll, expected.nll, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", [None, "hedgehog-window", "lolcats", "hedgehog", "kda", "softmax-window"])
def test_scores_are_those_of_whole_prompts(model, letters, filler, kind):
    asked = model if kind is None else student_of(model, kind)
    bodies = make_bodies(letters, 1800, 16, filler=filler)
    found = score_bodies(asked, bodies)
    same(found, score(asked, [p for body in bodies for p in body.prompts]))
    assert found.body is not None
    assert found.body.tolist() == [n for n, body in enumerate(bodies) for _ in body.prompts]


def test_sliding_windows_are_scored_the_same(sliding, letters, filler):
    bodies = make_bodies(letters, 700, 4, filler=filler)
    for asked in (sliding, student_of(sliding)):
        same(score_bodies(asked, bodies), score(asked, [p for body in bodies for p in body.prompts]))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hedgehog-window", "kda", "lightning"])
def test_a_copied_cache_shares_nothing_with_its_original(model, kind):
    student, tokens = student_of(model, kind), torch.randint(3, 100, (1, 90))
    cache = StudentCache(student.config)
    student(tokens[:, :60], past_key_values=cache)
    for block in (tokens[:, 60:75], tokens[:, 60:61]):  # a block, and a step in place
        other = copy.deepcopy(cache)
        before = {name: x.clone() for name, x in cache.tensors().items()}
        first = student(block, past_key_values=other).logits
        assert other.get_seq_length() == 60 + block.shape[1]
        assert cache.get_seq_length() == 60
        assert all(torch.equal(x, before[name]) for name, x in cache.tensors().items())
        ours, theirs = ({x.untyped_storage().data_ptr() for x in c.tensors().values()} for c in (other, cache))
        assert not ours & theirs
        assert torch.equal(student(block, past_key_values=copy.deepcopy(cache)).logits, first)


def test_the_bootstrap_draws_texts():
    right, total = torch.tensor([5, 5, 5, 5, 0, 0, 0, 0]), torch.full((8,), 5)
    nothing = torch.zeros(8)
    alone = Retrieval(right, total, nothing.double(), nothing.long())
    body = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    none = Retrieval(torch.zeros_like(right), total, nothing.double(), nothing.long(), body)
    gap, low, high = paired_points(Retrieval(right, total, nothing.double(), nothing.long(), body), none)
    assert (gap, low, high) == (50.0, 0.0, 100.0)  # two texts: either may be drawn twice
    apart = paired_points(alone, Retrieval(none.right, total, nothing.double(), nothing.long()))
    assert apart[0] == 50.0
    assert apart[1] > 0
    with pytest.raises(InputError, match="different prompts"):
        paired_points(alone, none)
    assert none.take(body == 1).body.tolist() == [1] * 4


def test_nothing_to_score(model):
    with pytest.raises(InputError, match="no texts"):
        score_bodies(model, [])
