"""SSA's experiment: its mechanics at a reduced scale; the claim itself takes minutes."""

import math

import pytest

from lineament import papers

pytestmark = pytest.mark.usefixtures("digits")


def test_the_mechanics_run_and_give_no_verdict():
    evidence = papers.experiment("ssa")("smoke")
    assert evidence.passed is None
    rows = {row["trained"]: row for row in evidence.rows if "held" not in row}
    assert set(rows) == {"dense", "unbiased", "local"}
    for row in rows.values():
        assert all(math.isfinite(row[f"{way}, NLL"]) for way in ("dense pass", "one sub-model", "ensemble"))
        # the mean of probabilities is never worse than the mean of their logs
        assert row["ensemble, NLL"] <= row["one sub-model, NLL"]


@pytest.mark.slow
def test_averaging_sub_models_helps():
    evidence = papers.experiment("ssa")("small")
    rules = [row for row in evidence.rows if "held" in row]
    assert rules[0]["held"]
