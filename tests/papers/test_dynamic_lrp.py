"""DynamicLRP's experiment: its mechanics at a reduced scale; the claim itself takes minutes."""

import pytest

from lineament import papers


def test_the_mechanics_run_and_give_no_verdict():
    evidence = papers.experiment("dynamic-lrp")("smoke")
    assert evidence.passed is None
    rows = {row["rules"]: row for row in evidence.rows if row.get("test") == "answer's name on top"}
    assert {"attnlrp", "gradient-x-input", "model's accuracy"} <= set(rows)
    coverage = next(row for row in evidence.rows if "nodes" in row)
    assert coverage["with a rule"] == coverage["nodes"] > 1000
    assert coverage["largest gap in a ledger"] < 1e-4


@pytest.mark.slow
def test_relevance_names_the_answer():
    assert papers.experiment("dynamic-lrp")("small").passed
