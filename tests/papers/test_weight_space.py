"""The experiments on weight space: their mechanics at a reduced scale; the claims take minutes."""

import pytest

from lineament import papers


@pytest.mark.usefixtures("digits")
@pytest.mark.slow
@pytest.mark.parametrize("slug", ["weight-matching", "lmc-landscape"])
def test_the_mechanics_run_and_give_no_verdict(slug):
    evidence = papers.experiment(slug)("smoke")
    assert evidence.passed is None
    assert {row["net"] for row in evidence.rows if "held" not in row} == {"MLP", "ResNet"}
    assert all("found" in row for row in evidence.rows if "held" in row)
