"""Residual layers side by side, and the same as one wide layer."""

import pytest
import torch
from torch import nn

from lineament._base.errors import InputError
from lineament._base.seeds import seeded
from lineament.nn import Residual, SideBySide, Through, fuse


def convolutions(count, *, scale=1.0, act=nn.ReLU, bias=True):
    with seeded(0):
        return [
            Residual(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=bias), act()), scale).double()
            for _ in range(count)
        ]


def test_side_by_side_is_the_input_plus_every_branch():
    with seeded(0):
        layers = [Residual(nn.Sequential(nn.Linear(5, 5), nn.Tanh()), 0.5).double() for _ in range(3)]
    x = torch.randn(7, 5, dtype=torch.double, requires_grad=True)
    expected = x + sum(0.5 * torch.tanh(x @ each.branch[0].weight.T + each.branch[0].bias) for each in layers)
    found = SideBySide(layers)(x)
    torch.testing.assert_close(found, expected)
    weights = [each.branch[0].weight for each in layers]
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), [x, *weights], retain_graph=True),
        torch.autograd.grad(expected.square().sum(), [x, *weights]),
    )


def test_one_layer_alone_is_itself_to_the_bit():
    layer = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))  # no Residual: h -> h + F(h) written out
    x = torch.randn(3, 4)
    assert torch.equal(SideBySide([layer])(x), layer(x))


def test_layers_that_return_tuples_and_take_arguments():
    class Layer(nn.Module):
        def forward(self, x, add, *, times):
            return x + times * add, "weights"

    x, add = torch.ones(2), torch.ones(2)
    out = SideBySide([Layer(), Layer()])(x, add, times=3)
    assert torch.equal(out[0], x + 6)
    assert out[1] == "weights"
    assert Through()(x, add, times=3) is x


def test_there_must_be_a_layer():
    with pytest.raises(InputError, match="no layers"):
        SideBySide([])


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_convolutions_equal_the_loop(count, bias):
    layers = convolutions(count, scale=0.7, bias=bias)
    x = torch.randn(2, 3, 5, 4, dtype=torch.double)
    wide = fuse(layers)
    torch.testing.assert_close(wide(x), SideBySide(layers)(x))
    assert sum(p.numel() for p in wide.parameters()) == sum(p.numel() for each in layers for p in each.parameters())


def test_fused_linear_layers_equal_the_loop_for_any_leading_axes():
    with seeded(0):
        layers = [Residual(nn.Linear(6, 6)) for _ in range(3)]
    x = torch.randn(2, 1, 6)
    torch.testing.assert_close(fuse(layers)(x), SideBySide(layers)(x))


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (lambda: [], "only Residual"),
        (lambda: [nn.Linear(3, 3)], "only Residual"),
        (lambda: [Residual(nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1)))], "only Residual"),
        (lambda: [Residual(nn.Sequential(nn.Linear(3, 3), nn.PReLU()))], "only Residual"),
        (lambda: [Residual(nn.Linear(3, 3)), Residual(nn.Linear(3, 3, bias=False))], "differ"),
        (lambda: [Residual(nn.Linear(3, 3)), Residual(nn.Linear(3, 3), 0.5)], "differ"),
        (lambda: [Residual(nn.Conv2d(4, 4, 1, groups=2))], "number of channels|groups"),
    ],
)
def test_what_cannot_be_fused_is_refused(layers, said):
    with pytest.raises(InputError, match=said):
        fuse(layers())
