"""Hedgehog's experiment: its mechanics at a reduced scale; the claim itself takes minutes."""

import math

import pytest

from lineament import papers


def test_the_mechanics_run_and_give_no_verdict():
    evidence = papers.experiment("hedgehog")("smoke")
    assert evidence.passed is None
    rows = {row["map"]: row for row in evidence.rows if "map" in row}
    assert {"teacher", "1+ELU", "T2R", "Hedgehog", "Hedgehog, exp form"} <= set(rows)
    assert all(math.isfinite(row["loss after swap"]) for row in rows.values() if "loss after swap" in row)
    # transfer is the method: even a few steps bring the rows nearer to the teacher's
    assert rows["Hedgehog"]["row KL, nats"] < rows["Hedgehog"]["row KL, nats, untrained"]


@pytest.mark.slow
def test_distillation_makes_the_swap_cheaper():
    evidence = papers.experiment("hedgehog")("small")
    rules = {row["what"]: row for row in evidence.rows if "held" in row}
    assert rules["divergence after transfer / before"]["held"]
    assert rules["divergence after transfer / 1+ELU's"]["held"]
    assert evidence.seconds > 0
