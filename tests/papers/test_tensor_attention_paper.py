"""The experiment on attention over pairs of keys: its mechanics, and what is true at any scale."""

import pytest

from lineament import papers


def test_the_mechanics_run_and_give_no_verdict():
    evidence = papers.experiment("tensor-attention")("smoke")
    assert evidence.passed is None
    rules = {row["what"]: row for row in evidence.rows if "held" in row}
    assert rules["built by hand, share right"]["held"]
    assert rules["largest error / its bound"]["held"]
    assert rules["error at bound 2 / at 0.5, degree 4"]["held"]


@pytest.mark.slow
def test_only_pairs_of_keys_learn_triples():
    evidence = papers.experiment("tensor-attention")("small")
    rules = {row["what"]: row for row in evidence.rows if "held" in row}
    assert rules["learned, pairs of keys"]["found"] > rules["learned, ordinary"]["found"] + 0.1
