"""The experiments on task vectors and signatures: their mechanics at a reduced scale."""

import math

import pytest

from lineament import papers

pytestmark = pytest.mark.usefixtures("digits")


@pytest.mark.slow
def test_the_composition_runs_and_gives_no_verdict():
    evidence = papers.experiment("atlas")("smoke")
    assert evidence.passed is None
    arms = [row for row in evidence.rows if "arm" in row]
    assert all(0 <= row["accuracy"] <= 1 for row in arms[:-1])
    assert arms[-1]["accuracy"] == evidence.rows[-1]["found"]  # the lead of the learned coefficients


@pytest.mark.slow
def test_the_signatures_run_and_give_no_verdict():
    evidence = papers.experiment("rws")("smoke")
    assert evidence.passed is None
    rows = {(row["corruption"], row["arm"]): row for row in evidence.rows if "corruption" in row}
    assert len(rows) == 12
    assert all(math.isfinite(row["clean"]) for row in rows.values())
