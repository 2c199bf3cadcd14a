"""The sentences about who got the object."""

import torch

from lineament.tasks.indirect_object import IndirectObject


def test_the_answer_is_the_name_not_said_twice():
    found = IndirectObject(seed=3).prompts(64)
    for ids, answer, other, at in zip(found.ids, found.answer, found.distractor, found.answer_at, strict=True):
        first, second, giver = ids[1], ids[3], ids[6]
        assert first != second
        assert giver == other
        assert {int(first), int(second)} == {int(answer), int(other)}
        assert ids[at] == answer


def test_the_corrupted_prompt_differs_in_the_giver_alone():
    found = IndirectObject().prompts(32)
    changed = found.ids != found.corrupted
    assert changed.sum(0).tolist() == [0] * 6 + [32] + [0] * 3
    assert torch.equal(found.corrupted[:, 6], found.answer)


def test_batches_are_functions_of_the_seed_and_the_step():
    draw = IndirectObject().batches(8)
    assert torch.equal(draw(2), draw(2))
    assert not torch.equal(draw(2), draw(3))
    assert draw(0).max() < IndirectObject().vocab
