"""Recall tasks: every answer is found again by reading the tokens one by one, without the code that drew them."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lineament import train
from lineament._base.errors import InputError
from lineament._base.seeds import seeded
from lineament.tasks import FACTS, RECALLS, Recall, make_prompts, recall_loss, score_recall

SIZES = [(64, 40, 4, 4), (129, 64, 8, 16), (300, 200, 5, 3)]  # length, vocab, pairs, queries


def read_mqar(row, task):
    """Remember every key's value; wherever a known key stands again, its value must follow."""
    known, asked = {}, {}
    for i in range(0, 2 * task.pairs, 2):
        assert row[i] not in known
        known[row[i]] = row[i + 1]
    for i in range(2 * task.pairs, len(row) - 1):
        if row[i] in known:
            asked[i + 1] = known[row[i]]
    assert len(asked) == task.queries
    return asked


def read_needles(row, task):
    """Walk to the first question, noting each fact; then answer from the notes."""
    facts, i, asked = {}, 0, {}
    while row[i] != 1:
        if row[i] == 0:
            facts.setdefault(row[i + 1], []).append(row[i + 2])
            i += 2
        i += 1
    while i < len(row):
        assert row[i] == 1
        for value in facts[row[i + 1]]:
            asked[i + 2] = value
            i += 1
        i += 2
    counts = {"needle": (1, 1), "multi-key": (task.pairs, 1), "multi-value": (1, task.pairs)}
    keys, values = counts.get(task.task, (task.pairs, 1))
    assert (len(facts), {len(of) for of in facts.values()}) == (keys, {values})
    return asked


def read_copying(row, task):
    mark = row.index(0)
    string = row[:mark][-(len(row) - mark - 1) :]
    return dict(enumerate(string, mark + 1))


def read_induction(row, task):
    assert row.count(0) == 2
    return {len(row) - 1: row[row.index(0) + 1]}


def read_palindrome(row, task):
    mark = row.index(0)
    string = row[:mark][-(len(row) - mark - 1) :]
    return dict(enumerate(reversed(string), mark + 1))


def read_overwrite(row, task):
    """Write twice as many facts as there are keys, forgetting what a key held; then every key is asked for."""
    known, begin = {}, len(row) - 6 * task.pairs
    for i in range(begin, begin + 4 * task.pairs, 2):
        assert known.get(row[i]) != row[i + 1]
        known[row[i]] = row[i + 1]
    asked = range(begin + 4 * task.pairs, len(row), 2)
    assert sorted(row[i] for i in asked) == sorted(known)
    assert len(known) == task.pairs
    return {i + 1: known[row[i]] for i in asked}


READERS = {
    "mqar": read_mqar,
    "copying": read_copying,
    "induction": read_induction,
    "palindrome": read_palindrome,
    "overwrite": read_overwrite,
}


@pytest.mark.parametrize(("length", "vocab", "pairs", "queries"), SIZES)
@pytest.mark.parametrize("name", RECALLS)
def test_answers_are_what_a_reader_finds(name, length, vocab, pairs, queries):
    task = Recall(task=name, length=length, vocab=vocab, pairs=pairs, queries=queries)
    ids, answer = task.batch(3, 20)
    assert ids.shape == answer.shape == (20, length)
    assert 0 <= ids.min() <= ids.max() < vocab
    for row, marked in zip(ids.tolist(), answer, strict=True):
        expected = READERS.get(name, read_needles)(row, task)
        assert expected == {i: row[i] for i in marked.nonzero()[:, 0].tolist()}


@pytest.mark.parametrize("name", RECALLS)
def test_examples_are_repeatable_different_and_never_end(name):
    task = Recall(task=name)
    many = task.batches(4)
    assert torch.equal(many(10**9)[0], task.batch(10**9, 4)[0])
    others = [many(1)[0], Recall(task=name, seed=1).batch(0, 4)[0]]
    assert not any(torch.equal(many(0)[0], other) for other in others)


def test_facts_lie_anywhere():
    ids, _ = Recall(task="needle", length=100, vocab=30).batch(0, 2000)
    place = (ids[:, :-3] == 0).int().argmax(1).double()
    assert place.min() <= 2
    assert place.max() >= 92
    assert abs(place.mean() - 47) < 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "mqarr"}, "Did you mean 'mqar'"),
        ({"length": 20}, "needs 48 tokens; length=20"),
        ({"vocab": 16, "length": 200}, "needs 8 keys"),
        ({"pairs": 0}, "at least 1"),
        ({"task": "multi-value", "vocab": 16}, "8 values"),
    ],
)
def test_what_does_not_fit_is_said_at_once(given, message):
    with pytest.raises(InputError, match=message):
        Recall(**given)


def llama(vocab):
    with seeded(0):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
            )
        )


def test_scores_count_answer_tokens_and_a_model_learns_them():
    task, model = Recall(task="mqar", length=32, vocab=16, pairs=4, queries=12), llama(16)
    ids, answer = task.batch(0, 64)
    logits = model(ids).logits[:, :-1]
    right = (logits.argmax(-1) == ids[:, 1:]) & answer[:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * answer[:, 1:]
    first = score_recall(model, task, count=64, size=64)
    assert torch.equal(first.right, right.sum(1))
    torch.testing.assert_close(first.nll.float(), nll.sum(1).detach())
    assert first.total.tolist() == [12] * 64
    assert torch.equal(score_recall(model, task, count=50, size=64).right, first.right[:50])
    assert (first.distance >= 0).all()
    loss, numbers = recall_loss(model, (ids, answer))
    torch.testing.assert_close(loss.item(), first.loss, rtol=1e-4, atol=0)
    assert numbers["right"] == pytest.approx(first.token_accuracy)
    train.fit(model, task.batches(32), recall_loss, train.FitConfig(steps=60, lr=3e-3))
    after = score_recall(model, Recall(task="mqar", length=32, vocab=16, pairs=4, queries=12, seed=1), count=64)
    assert after.loss < 0.8 * first.loss


@pytest.mark.parametrize("kind", ["multi-key", "multi-value", "multi-query"])
def test_four_needles_in_real_text_are_asked_for(letters, filler, kind):
    assert kind in FACTS
    for prompt in make_prompts(letters, kind, 1500, 5, filler=filler, beyond=200):
        text = "".join(map(chr, prompt.ids.tolist()))
        context, question = text[: -prompt.tail], text[-prompt.tail :]
        codes = [code for code in question.replace(".", " ").replace(",", " ").split() if code.isdigit()]
        assert len(codes) == (1 if kind == "multi-key" else 4)
        at = [context.index(f" {code}") for code in codes]
        if kind == "multi-value":
            assert at == sorted(at)
        last = context[context.rindex("\n\n") :].strip()  # the question's first words stand before the right code
        assert context[: at[0]].endswith(last)
        said = sum(context[i : i + 4].isdigit() for i in range(len(context) - 4))
        assert said >= 4
