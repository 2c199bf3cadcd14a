"""What every experiment keeps to: a scale by name, and numbers held to rules. The claims themselves take minutes."""

import pytest

from lineament import papers

WORKS = [record.slug for record in papers.records() if record.status == "works"]


@pytest.mark.parametrize("slug", WORKS)
def test_a_scale_that_is_none_is_named(slug):
    with pytest.raises(ValueError, match="unknown scale 'smal'"):
        papers.experiment(slug)("smal")


@pytest.mark.usefixtures("digits")
@pytest.mark.slow
@pytest.mark.parametrize(
    "slug",
    [
        "alignment-maps",
        "depth-efficiency",
        "g2gnet",
        "grokking-li2",
        "hourglass-mlp",
        "i-lora",
        "level-set-traversal",
        "lightnet",
        "linear-scope",
        "neural-circuit-diagrams",
        "projection-head",
        "transcoders",
    ],
)
def test_the_mechanics_run_and_give_no_verdict(slug):
    evidence = papers.experiment(slug)("smoke")
    rules = [row for row in evidence.rows if "held" in row]
    assert evidence.passed is None
    assert rules
    assert all(isinstance(row["found"], float) for row in rules)
