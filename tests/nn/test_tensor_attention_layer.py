"""The layer over pairs of keys: its forms agree, it stays within its bound, it learns through each of them."""

import pytest
import torch

from lineament._base.errors import InputError
from lineament.nn import TensorAttention

X = torch.randn(2, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def layer(**options):
    torch.manual_seed(1)
    return TensorAttention(8, 2, bound=1.0, **options).double()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [1, 2, 3])
def test_the_polynomial_form_follows_the_exact_one_with_gradients(keys, causal):
    exact, near = (layer(keys=keys, causal=causal, degree=d) for d in (None, 10))
    assert 0 < near.error < 1e-6
    outs = [made(X) for made in (exact, near)]
    torch.testing.assert_close(*outs, rtol=1e-6, atol=1e-7)
    grads = [
        torch.autograd.grad(o.square().sum(), list(m.parameters())) for o, m in zip(outs, (exact, near), strict=True)
    ]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_scores_stay_within_the_radius():
    made = layer(norm=True)
    q, *keys = made._held(list((100 * made.in_proj(X)).unflatten(-1, (5, 2, 4)).unbind(2)[:3]))
    scores = torch.einsum("bihc,bjhc,bkhc->bhijk", made.scale * q, *keys)
    assert scores.abs().max() <= made.radius


def test_a_token_sees_nothing_after_it_and_padding_is_unseen():
    made, changed = layer(causal=True), X.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(made(X)[:, :4], made(changed)[:, :4])
    mask = torch.arange(7) < 4
    torch.testing.assert_close(layer()(X, key_mask=mask.expand(2, -1))[:, :4], layer()(X[:, :4]))


def test_pairs_cost_five_projections_and_the_choice_follows_length():
    made = TensorAttention(8, 2)
    assert sum(p.numel() for p in made.parameters()) == 6 * 64  # 1.5 times ordinary attention
    assert (made.cheaper(4), made.cheaper(400)) == ("exact", "polynomial")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads that divide width"),
        ({"bound": 0.0}, "positive number"),
        ({"degree": 4}, "needs a bound"),
        ({"degree": 4, "bound": 1.0, "windows": (2, 2)}, "has no windows"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(InputError, match=message):
        TensorAttention(**{"width": 8, "heads": 2, **options})


def test_the_causal_polynomial_form_takes_no_mask():
    with pytest.raises(InputError, match="takes no key_mask"):
        layer(causal=True, degree=4)(X, key_mask=torch.ones(2, 7))
