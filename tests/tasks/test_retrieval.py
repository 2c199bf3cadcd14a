"""Prompts of exact length with facts where they should be, and their scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lineament._base.errors import InputError
from lineament.tasks import KINDS, SETS, Haystack, make_prompts, paired_points, score, train_examples
from lineament.tasks.haystack import insert
from lineament.tasks.templates import TEMPLATES


def text_of(prompt):
    return "".join(map(chr, prompt.ids.tolist()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("templates", SETS)
def test_prompts_are_as_long_as_asked_and_hold_their_answer(letters, filler, kind, templates):
    for prompt in make_prompts(letters, kind, 900, 6, filler=filler, templates=templates, beyond=250):
        text = text_of(prompt)
        assert prompt.length == 900
        assert prompt.answer[-1]
        assert not prompt.answer[: -prompt.tail].any()
        assert 250 <= prompt.distance <= 900
        answers = "".join(c if a else "|" for c, a in zip(text, prompt.answer.tolist(), strict=True)).split("|")
        assert all(answer in text[: -prompt.tail] for answer in answers)
        assert sum(map(len, answers)) == prompt.answer.sum() >= 4


def test_two_needles_ask_for_both(letters, filler):
    prompt = make_prompts(letters, "two-needles", 700, 3, filler=filler, beyond=100)[1]
    digits = "".join(map(chr, prompt.answer_ids.tolist()))
    assert len(digits) == 8
    assert all(text_of(prompt)[: -prompt.tail].count(code) == 1 for code in (digits[:4], digits[4:]))


def test_facts_lie_evenly_beyond_the_window(letters, filler):
    prompts = make_prompts(letters, "digits", 2000, 40, filler=filler, beyond=300)
    places = torch.tensor([float(p.distance) for p in prompts])
    assert places.min() >= 300
    counts = torch.histc(places, bins=4, min=300, max=1930)
    assert counts.min() >= 7


def test_sets_share_nothing():
    for name in ("codes", "passwords", "lists", "subjects", "keys", "words"):
        sets = [set(getattr(TEMPLATES[s], name)) for s in SETS]
        assert not any(a & b for i, a in enumerate(sets) for b in sets[i + 1 :])
    everything = [TEMPLATES[s].words + TEMPLATES[s].subjects for s in SETS]
    assert len(set().union(*everything)) == sum(map(len, everything))


def test_prompts_are_lazy_repeatable_and_seeded(letters, filler):
    hay = Haystack(filler, letters)
    many = make_prompts(letters, "words", 600, 10**9, filler=hay, seed=4)
    assert torch.equal(
        many[12345].ids, make_prompts(letters, "words", 600, 1, filler=filler, seed=4, offset=12345)[0].ids
    )
    assert not torch.equal(many[0].ids, many[1].ids)
    assert not torch.equal(many[0].ids, make_prompts(letters, "words", 600, 1, filler=hay, seed=5)[0].ids)
    assert [p.distance for p in many[2:4]] == [many[2].distance, many[3].distance]
    with pytest.raises(IndexError):
        make_prompts(letters, "words", 600, 3, filler=hay)[3]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.lists(st.integers(0, 60), min_size=1, max_size=3))
def test_nothing_is_lost_when_facts_are_put_in(lengths, distances):
    pieces = [[n] * n for n in lengths]
    facts = [([100 + i] * 2, d) for i, d in enumerate(distances)]
    ids, behind = insert(pieces, facts)
    assert [t for t in ids.tolist() if t < 100] == [t for p in pieces for t in p]
    for (fact, wanted), rest in zip(facts, behind, strict=True):
        end = len(ids) - rest
        assert ids[end - 2 : end].tolist() == fact
        filler_behind = sum(t < 100 for t in ids[end:].tolist())
        assert filler_behind >= min(wanted, sum(lengths))


def test_haystacks_are_exact_and_go_on_in_the_next_document(letters):
    hay = Haystack(["One. Two. Three. ", "Four, five and six. "], letters)
    for tokens in (1, 5, 40, 300):
        assert sum(map(len, hay.draw(tokens, torch.Generator().manual_seed(tokens)))) == tokens
    with pytest.raises(InputError, match="list of documents is empty"):
        Haystack(["  "], letters)


def test_scores_are_those_of_the_whole_logits(model, letters, filler):
    prompts = [
        *make_prompts(letters, "digits", 500, 3, filler=filler),
        *make_prompts(letters, "words", 450, 2, filler=filler),
    ]
    found = score(model, prompts, batch_size=2)
    for n, prompt in enumerate(prompts):
        with torch.no_grad():
            logits = model(input_ids=prompt.ids[None]).logits[0, :-1]
        at = prompt.answer[1:]
        assert int(found.right[n]) == int((logits.argmax(-1) == prompt.ids[1:])[at].sum())
        nll = torch.nn.functional.cross_entropy(logits[at], prompt.answer_ids, reduction="sum")
        assert float(found.nll[n]) == pytest.approx(float(nll), rel=1e-4)
    assert found.total.tolist()[:3] == [5, 5, 5]
    assert 0 <= found.exact <= found.token_accuracy <= 1
    assert paired_points(found, found) == (0.0, 0.0, 0.0)
    with pytest.raises(InputError, match="different prompts"):
        paired_points(found, score(model, prompts[:2]))


def test_training_examples_are_a_function_of_the_step(letters, filler):
    examples = train_examples(letters, filler, 700, 4)
    ids, answer = examples(7)
    assert ids.shape == answer.shape == (4, 700)
    assert answer.dtype == torch.bool
    assert torch.equal(ids, train_examples(letters, filler, 700, 4)(7)[0])
    assert not torch.equal(ids, examples(8)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "digit"}, "Did you mean 'digits'"),
        ({"templates": "tset"}, "Did you mean 'test'"),
        ({"length": 200}, "no room beyond 192; give at least"),
    ],
)
def test_bad_requests(letters, filler, change, message):
    given_ = {"kind": "digits", "length": 600, "count": 1, "filler": filler} | change
    with pytest.raises(InputError, match=message):
        _ = make_prompts(letters, given_.pop("kind"), given_.pop("length"), given_.pop("count"), **given_)[0]


def test_a_beginning_token_comes_first_and_blanks_are_not_asked_for(filler, letters):
    class Gemmaish(type(letters)):
        bos_token_id = 2

        def __call__(self, text, add_special_tokens=True, **options):
            found = super().__call__(text)
            return {"input_ids": [2, *found["input_ids"]]} if add_special_tokens else found

    prompt = make_prompts(Gemmaish(), "digits", 600, 1, filler=filler)[0]
    assert prompt.ids[0] == 2
    assert int((prompt.ids == 2).sum()) == 1
    assert prompt.answer.sum() == 5
    assert prompt.length == 600
