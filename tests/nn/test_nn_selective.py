"""A feed-forward layer that reads only the neurons that speak: the same as masking them, one token or many."""

import pytest
import torch
from torch.nn.functional import silu

from lineament._base.errors import InputError
from lineament._base.seeds import generator, seeded
from lineament.nn import SelectiveConfig, SelectiveMLP
from lineament.nn.selective import WAYS


def layer(by="gate"):
    with seeded(0):
        return SelectiveMLP(SelectiveConfig(width=6, hidden=20, by=by)).double()


def tokens(*shape):
    return torch.randn(*shape, 6, generator=generator(1), dtype=torch.double)


def by_hand(made, x):
    """Neuron by neuron."""
    out = []
    for token in x.reshape(-1, 6):
        total = torch.zeros(6).double()
        for i in range(20):
            g, u = silu(made.gate_proj.weight[i] @ token), made.up[i] @ token
            loud = (g * u if made.config.by == "product" else g).abs() * made.worth[i]
            total = total + (g * u * made.down[i] if loud > made.threshold else 0)
        out.append(total)
    return torch.stack(out).view(x.shape)


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("shape", [(1, 1), (5,), (2, 3)])
def test_the_same_as_neuron_by_neuron_forward_and_backward(by, shape):
    made, x = layer(by), tokens(*shape).requires_grad_()
    made.calibrate_(tokens(200), 0.6)
    expected = by_hand(made, x)
    torch.testing.assert_close(made(x), expected)
    wanted = [x, made.up, made.down, made.gate_proj.weight]
    torch.testing.assert_close(
        torch.autograd.grad(made(x).square().sum(), wanted), torch.autograd.grad(expected.square().sum(), wanted)
    )
    with torch.no_grad():  # here one token reads only some rows
        torch.testing.assert_close(made(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("by", WAYS)
def test_rows_of_silent_neurons_are_never_read(by):
    made, x = layer(by), tokens(1)
    made.calibrate_(tokens(200), 0.5)
    expected, held = made(x), silu(made.gate_proj(x)) * (1 if by == "gate" else x @ made.up.T)
    silent = (held.abs() * made.worth <= made.threshold)[0]
    assert 0 < silent.sum() < 20
    made.down[silent] = torch.nan
    if by == "gate":
        made.up[silent] = torch.nan
    torch.testing.assert_close(made(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("by", WAYS)
def test_calibration_hits_its_share_and_none_is_the_dense_layer(by):
    made, x = layer(by), tokens(300)
    dense = (silu(made.gate_proj(x)) * (x @ made.up.T)) @ made.down
    assert made.calibrate_(x, 0.0) == 0.0
    torch.testing.assert_close(made(x), dense)
    assert made.calibrate_(x, 0.7) == pytest.approx(0.7, abs=1e-3)


@torch.no_grad()
def test_a_token_for_which_nobody_speaks_gets_nothing():
    made = layer()
    made.threshold.fill_(1e9)
    assert not made(tokens(1)).any()
    assert not made(tokens(3)).any()


def test_what_does_not_fit_is_named():
    with pytest.raises(InputError, match="unknown way"):
        SelectiveConfig(width=2, hidden=2, by="luck")
    with pytest.raises(InputError, match="unknown activation"):
        SelectiveConfig(width=2, hidden=2, act="sulu")
    with pytest.raises(InputError, match="share is 1"):
        layer().calibrate_(tokens(4), 1)
