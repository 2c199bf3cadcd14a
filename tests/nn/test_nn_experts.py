"""Experts: a plain loop over tokens and experts says the same, and what isn't chosen contributes nothing."""

import pytest
import torch

from lineament._base.errors import InputError
from lineament._base.seeds import seeded
from lineament.nn import Experts, ExpertsConfig
from lineament.nn.experts import ACTS, runs


def layer(**changes):
    fields = {"width": 6, "hidden": 12, "experts": 4, "active": 2, **changes}
    with seeded(0):
        made = Experts(ExpertsConfig(**fields)).double()
        for p in made.parameters():
            torch.nn.init.normal_(p, std=0.5)
    return made


def by_hand(made, x):
    """Token by token, expert by expert, unit by unit."""
    config, out = made.config, []
    for token in x.reshape(-1, x.shape[-1]):
        logits = made.router(token[None])[0].detach()
        chosen = sorted(range(config.experts), key=lambda e: -float(logits[e]))[: made.active]
        total = torch.zeros(made.outer.shape[-1]).double() if made.outer_bias is None else made.outer_bias
        for e in chosen:
            for i in range(config.hidden // config.experts):
                pre = [made.inner[e, m, i] @ token for m in range(made.inner.shape[1])]
                if made.inner_bias is not None:
                    pre = [p + made.inner_bias[e, m, i] for m, p in enumerate(pre)]
                unit = ACTS[config.act](pre[0]) * (pre[1] if config.gated else 1)
                total = total + unit * made.outer[e, i]
        out.append(total)
    return torch.stack(out).unflatten(0, x.shape[:-1])


@pytest.mark.parametrize("changes", [{}, {"gated": False, "act": "relu", "bias": True, "out": 3}, {"active": 4}])
@pytest.mark.parametrize("shape", [(1, 1, 6), (5, 6), (2, 3, 6)])
def test_a_plain_loop_says_the_same_forward_and_backward(changes, shape):
    made, x = layer(**changes), torch.randn(shape, dtype=torch.double, requires_grad=True)
    found, expected = made(x), by_hand(made, x)
    torch.testing.assert_close(found, expected)
    wanted = [x, made.inner, made.outer]
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), wanted), torch.autograd.grad(expected.square().sum(), wanted)
    )
    with torch.no_grad():  # here experts that nobody wants are not even read
        torch.testing.assert_close(made(x), expected)


@torch.no_grad()
def test_experts_that_are_not_chosen_are_never_read():
    made, x = layer(), torch.randn(1, 6).double()
    expected, mask = made(x), made.chosen(x)[0]
    made.inner[~mask], made.outer[~mask] = torch.nan, torch.nan
    torch.testing.assert_close(made(x), expected)


@torch.no_grad()
def test_a_bias_of_minus_infinity_keeps_an_expert_out():
    made, x = layer(active=3), torch.randn(50, 6).double()
    made.router.bias[1] = -torch.inf
    assert not made.chosen(x)[:, 1].any()
    assert made.chosen(x).sum(1).eq(3).all()


@torch.no_grad()
def test_an_oracle_chooses_those_that_say_most():
    made, x = layer(), torch.randn(9, 6).double()
    made.oracle = True
    said = torch.stack([(made.units(x)[:, e].abs() * made.outer[e].norm(dim=1)).sum(1) for e in range(4)], 1)
    assert torch.equal(made.chosen(x).nonzero()[:, 1].view(9, 2), said.topk(2, 1).indices.sort(1).values)
    assert made.skipped == 0.5


def test_runs_of_neighbours():
    assert list(runs([])) == []
    assert list(runs([False, True, True, False, True])) == [(1, 3), (4, 5)]


@pytest.mark.parametrize(
    ("changes", "said"), [({"experts": 5}, "12 units"), ({"active": 0}, "0 active"), ({"act": "rely"}, "'relu'")]
)
def test_shapes_that_do_not_fit_are_named(changes, said):
    with pytest.raises(InputError, match=said):
        layer(**changes)
