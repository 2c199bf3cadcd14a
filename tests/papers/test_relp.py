"""RelP's experiment: its mechanics at a reduced scale; the claim itself takes minutes."""

import math

import pytest

from lineament import papers


def test_the_mechanics_run_and_give_no_verdict():
    evidence = papers.experiment("relp")("smoke")
    assert evidence.passed is None
    places = [row for row in evidence.rows if "places" in row]
    assert [row["places"] for row in places] == ["residual", "attention", "mlp"]
    assert all(math.isfinite(row["relp"]) for row in places)


@pytest.mark.slow
def test_relevance_patches_better_than_the_gradient():
    rows = papers.experiment("relp")("small").rows
    leads = [row["relp"] - row["attribution"] for row in rows if row.get("places") == "residual"]
    assert sum(leads) > 0
