"""Projection heads: the fixed one, and choosing by name."""

import pytest
import torch

from lineament._base.errors import InputError
from lineament.nn import HEADS, ReweightingHead, projection_head


@pytest.mark.parametrize("width", [1, 2, 7, 512])
def test_the_fixed_head_multiplies_by_falling_powers(width):
    head, k = ReweightingHead(width, ratio=50.0).double(), 50.0 ** (1 / max(1, width - 1))
    h = torch.randn(3, width, dtype=torch.float64).requires_grad_()
    scale = torch.tensor([k**-i for i in range(width)], dtype=torch.float64)
    torch.testing.assert_close(head(h), h * scale, rtol=1e-6, atol=0)
    upstream = torch.randn(3, width, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(head(h), h, upstream)
    torch.testing.assert_close(gradient, upstream * scale, rtol=1e-6, atol=0)
    assert not list(head.parameters())
    assert not head.state_dict()


def test_entries_neither_overflow_nor_vanish():
    scale = ReweightingHead(4096, ratio=1e30).scale
    assert scale.min() == pytest.approx(1e-6)
    assert scale.isfinite().all()


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_maps_to_its_outputs(kind):
    assert projection_head(kind, 8)(torch.zeros(2, 8)).shape == (2, 8)
    if kind in ("linear", "mlp"):
        assert projection_head(kind, 8, 3)(torch.zeros(2, 8)).shape == (2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: projection_head("mpl", 8), "unknown head 'mpl'"),
        (lambda: projection_head("fixed", 8, 4), "the head 'fixed' keeps the width, 8; 4 outputs"),
        (lambda: ReweightingHead(8, ratio=0.5), "a ratio >= 1"),
        (lambda: ReweightingHead(0), "a width >= 1"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
