"""The papers about causal mixers: their mechanics at a reduced scale; the claims themselves take minutes."""

import math

import pytest

from lineament import papers

PAPERS = ["lightning-attention-2", "deltanet", "transnormer", "kimi-linear"]


@pytest.mark.parametrize("slug", PAPERS)
def test_the_mechanics_run_and_give_no_verdict(slug):
    evidence = papers.experiment(slug)("smoke")
    assert evidence.passed is None
    judged = [row for row in evidence.rows if "held" in row]
    assert judged
    assert all(math.isfinite(row["found"]) for row in judged)


def test_the_bare_delta_memory_overwrites():
    """The parts of DeltaNet's experiment that need no training hold at any scale."""
    rows = {row["what"]: row for row in papers.experiment("deltanet")("smoke").rows}
    for rule in (
        "error of recent keys, delta / additive",
        "error of orthonormal keys",
        "a key written twice, delta: from its last value",
        "a key written twice, additive: from the sum of both",
    ):
        assert rows[rule]["held"], rule
