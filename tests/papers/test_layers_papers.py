"""The experiments on adapters and layer shapes: their mechanics at a reduced scale; the claims take minutes."""

import pytest

from lineament import papers
from lineament._base.extras import available

pytestmark = pytest.mark.skipif(not available("sklearn"), reason="digits and photographs come with scikit-learn")
SLUGS = ["i-lora", "hourglass-mlp", "g2gnet", "projection-head"]


@pytest.mark.slow
@pytest.mark.parametrize("slug", SLUGS)
def test_the_mechanics_run_and_give_no_verdict(slug):
    evidence = papers.experiment(slug)("smoke")
    rules = [row for row in evidence.rows if "held" in row]
    assert evidence.passed is None
    assert rules
    assert all(isinstance(row["found"], float) for row in rules)


@pytest.mark.parametrize("slug", SLUGS)
def test_a_scale_that_is_none_is_named(slug):
    with pytest.raises(ValueError, match="unknown scale 'smal'"):
        papers.experiment(slug)("smal")
