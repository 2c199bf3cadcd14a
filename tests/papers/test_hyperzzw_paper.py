"""HyperZ.Z.W's experiment: its mechanics at a reduced scale; the claim itself takes minutes."""

import pytest

from lineament import papers

pytestmark = pytest.mark.usefixtures("digits")


def test_the_mechanics_run_and_give_no_verdict():
    evidence = papers.experiment("hyperzzw")("smoke")
    assert evidence.passed is None
    rows = {row.get("arm") or row["what"]: row for row in evidence.rows}
    assert abs(rows["CNN"]["parameters"] / rows["Z * W"]["parameters"] - 1) < 0.05
    assert rows["largest channel mean after standardisation"]["held"]
    assert rows["Z * W"]["accuracy"] > 0.2  # after one epoch, of ten classes


@pytest.mark.slow
def test_the_full_operator_learns_digits():
    evidence = papers.experiment("hyperzzw")("small")
    assert {row.get("arm"): row for row in evidence.rows}["Z * W"]["accuracy"] > 0.9
