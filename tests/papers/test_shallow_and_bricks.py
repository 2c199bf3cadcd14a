"""The experiments on depth for breadth and on bricks: their mechanics at a reduced scale."""

import pytest

from lineament import papers

pytestmark = pytest.mark.usefixtures("digits")


@pytest.mark.slow
def test_both_forms_of_a_stack_are_trained_and_no_verdict_is_given():
    evidence = papers.experiment("shallow-parallel")("smoke")
    assert evidence.passed is None
    rows = [row for row in evidence.rows if "layers" in row]
    assert [row["layers"] for row in rows] == [2, 4]
    assert all(row["explained by orders to 1"] < row["explained by orders to 2"] <= 1 for row in rows)


@pytest.mark.slow
def test_specialists_and_experts_are_measured_and_no_verdict_is_given():
    evidence = papers.experiment("configurable-bricks")("smoke")
    assert evidence.passed is None
    dense, sparse = (row for row in evidence.rows if "net" in row)
    assert sparse["active"] < dense["active"]
    assert all(0 <= value <= 1 for key, value in dense.items() if "oracle" in key or "router" in key)
