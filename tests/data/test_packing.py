"""Splits, rows and windows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lineament._base.errors import InputError
from lineament.data import batches, pack, split_documents, windows


def letters(texts, **options):
    """A tokenizer of one token per character."""
    return {"input_ids": [[ord(c) for c in text] for text in texts]}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(max_size=20), max_size=30), st.integers(0, 5))
def test_a_document_stays_in_its_split_when_others_come(docs, seed):
    fractions = {"train": 0.6, "test": 0.4}
    alone, together = (split_documents(d, fractions, seed) for d in (docs, ["another", *docs, "one more"]))
    for name in fractions:
        assert set(alone[name]) <= set(together[name])
    assert sum(len(p) for p in alone.values()) == len(docs)


def test_splits_depend_on_the_seed_and_are_checked():
    docs = [str(i) for i in range(200)]
    assert split_documents(docs, {"a": 0.5}, 0) != split_documents(docs, {"a": 0.5}, 1)
    assert split_documents(docs, {"a": 0.5}, -1) != split_documents(docs, {"a": 0.5}, 1)
    with pytest.raises(InputError, match="add to at most 1"):
        split_documents(docs, {"a": 0.7, "b": 0.7})


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text("ab", max_size=9), min_size=1, max_size=9), st.integers(1, 7))
def test_rows_hold_the_tokens_in_order_and_positions_restart(docs, length):
    total = sum(map(len, docs))
    if total < length:
        with pytest.raises(InputError, match="at least one row"):
            pack(docs, letters, length)
        return
    packed = pack(docs, letters, length)
    flat = "".join(docs)[: total - total % length]
    assert "".join(map(chr, packed.input_ids.flatten().tolist())) == flat
    for ids, positions, document in zip(packed.input_ids, packed.position_ids, packed.document, strict=True):
        assert len(ids) == length
        starts = (positions == 0).nonzero().flatten().tolist()
        changes = [0] + [t for t in range(1, length) if document[t] != document[t - 1]]
        assert starts == changes
        assert all(positions[t] == positions[t - 1] + 1 for t in range(1, length) if t not in starts)


def test_without_boundaries_positions_run_on_and_an_end_may_be_put():
    packed = pack(["ab", "cd"], letters, 3, boundaries=False, end=0)
    assert packed.input_ids.tolist() == [[97, 98, 0], [99, 100, 0]]
    assert packed.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_windows_lie_inside_documents_and_come_from_many():
    docs = ["a" * 10, "b" * 3, "c" * 8]
    found = windows(docs, letters, 4)
    assert ["".join(map(chr, w)) for w in found.tolist()] == ["aaaa", "cccc", "aaaa", "cccc"]
    assert windows(docs, letters, 4, max_tokens=9).shape == (2, 4)
    assert windows(docs, letters, 4, max_tokens=1).shape == (1, 4)
    with pytest.raises(InputError, match="no document has 11 tokens, the longest has 10"):
        windows(docs, letters, 11)


def test_no_text_is_an_error():
    with pytest.raises(InputError, match="there is no text"):
        windows([], letters, 4)


def test_an_epoch_shows_every_row_once_and_a_step_is_enough_to_continue():
    packed = pack(["abcdefghij"], letters, 2)
    batch = batches(packed, 2, seed=3)
    seen = torch.cat([batch(s)["input_ids"] for s in (0, 1)])
    assert len({tuple(row) for row in seen.tolist()}) == 4
    assert torch.equal(batch(7)["input_ids"], batches(packed, 2, seed=3)(7)["input_ids"])
    with pytest.raises(InputError, match="a batch of 6 rows"):
        batches(packed, 6)
