"""Residual MLPs of both shapes: what they compute, what they cost, what a fixed lift is."""

import itertools

import pytest
import torch
from scipy.linalg import hadamard as by_scipy
from torch import nn

from lineament._base.errors import InputError
from lineament._base.seeds import generator, seeded
from lineament.nn import ResidualMLP, ResidualMLPConfig, hadamard, matched
from lineament.nn.residual_mlp import ACTS, LIFTS, NORMS


def config(**changes):
    return ResidualMLPConfig(**{"inputs": 6, "outputs": 3, "skip": 10, "hidden": 4, "blocks": 2, "lift": "trained",
                                **changes})  # fmt: skip


def built(shape, seed=0, **options):
    with seeded(seed):
        return ResidualMLP(shape, **options).double()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("lift", ["trained", "fixed"])
@pytest.mark.parametrize("bias", [False, True])
def test_it_computes_its_equation(norm, lift, bias):
    net = built(config(norm=norm, lift=lift, bias=bias, act="silu"))
    for p in net.parameters():
        nn.init.normal_(p, generator=generator(p.numel()))
    x = draw(5, 6)
    z = x @ net.lift.weight.T
    for block in net.blocks:
        centred = z - z.mean(-1, keepdim=True)
        if norm == "layer":
            h = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            h = h * block.norm.weight + block.norm.bias
        elif norm == "rms":
            h = z / (z.square().mean(-1, keepdim=True) + torch.finfo(z.dtype).eps).sqrt() * block.norm.weight
        else:
            h = z
        h = h @ block.up.weight.T + (block.up.bias if bias else 0)
        z = z + (h * torch.sigmoid(h)) @ block.down.weight.T + (block.down.bias if bias else 0)
    torch.testing.assert_close(net(x), z @ net.out.weight.T, atol=1e-6, rtol=1e-6)


def test_without_a_lift_and_with_wide_blocks_it_is_the_conventional_net_bit_for_bit():
    net = built(config(inputs=6, skip=6, hidden=9, lift="identity", act="relu"))
    x = draw(4, 6)
    z = x
    for block in net.blocks:
        z = z + nn.functional.linear(
            torch.relu(nn.functional.linear(block.norm(z), block.up.weight)), block.down.weight
        )
    assert torch.equal(net(x), net.out(z))
    assert net.config.shape == "conventional"


def test_every_gradient_is_that_of_finite_differences():
    for lift, norm in itertools.product(("trained", "fixed", "hadamard"), ("layer", "none")):
        net = built(config(lift=lift, norm=norm))
        x = draw(2, 6).requires_grad_()
        assert torch.autograd.gradcheck(net, (x,))
        net(x).square().sum().backward()
        assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lift", LIFTS)
def test_the_count_of_parameters_is_that_of_the_module(norm, bias, lift):
    shape = config(norm=norm, bias=bias, lift=lift, skip=6 if lift == "identity" else 10)
    net = ResidualMLP(shape)
    assert sum(p.numel() for p in net.parameters()) == shape.trainable
    fixed = sum(b.numel() for b in net.lift.buffers() if b.is_floating_point())
    assert shape.total == shape.trainable + fixed


def test_multiply_adds_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    for lift in ("identity", "trained", "fixed"):
        shape = config(lift=lift, skip=6 if lift == "identity" else 10)
        with FlopCounterMode(display=False) as counter:
            ResidualMLP(shape)(torch.zeros(7, 6))
        assert counter.get_total_flops() == 2 * 7 * shape.multiply_adds


@pytest.mark.parametrize("budget", [60_000, 100_000, 140_000])
@pytest.mark.parametrize("count", ["total", "trainable"])
def test_matched_nets_fill_the_budget_and_one_more_unit_does_not_fit(budget, count):
    for shape, lift in (("conventional", "identity"), ("hourglass", "trained"), ("hourglass", "fixed")):
        options = {"lift": lift, "count": count, "bias": True}
        found = matched(shape, 100, 50, budget, blocks=2, **options)
        used = getattr(found, count)
        assert found.shape == shape
        assert budget - 2 * (2 * found.skip + 1) < used <= budget
        assert used == (sum(p.numel() for p in ResidualMLP(found).parameters())
                        + (found.inputs * found.skip if lift == "fixed" and count == "total" else 0))  # fmt: skip


@pytest.mark.parametrize("lift", ["fixed", "hadamard"])
def test_a_fixed_lift_is_its_seed(lift, tmp_path):
    shape = config(lift=lift, seed=7)
    net, other = built(shape, seed=1), built(shape, seed=2)
    x = draw(3, 6)
    assert not list(net.lift.parameters())
    assert not [name for name in net.state_dict() if name.startswith("lift")]
    assert torch.equal(net.lift(x), other.lift(x))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x), other(x))
    assert not torch.equal(net.lift(x), ResidualMLP(config(lift=lift, seed=8)).double().lift(x))


@pytest.mark.parametrize("lift", ["trained", "fixed", "hadamard"])
def test_a_lift_keeps_lengths_and_inner_products(lift):
    d, wide = 64, 4096
    net = built(config(inputs=d, skip=wide, lift=lift))
    x = draw(8, d)
    z = net.lift(x)
    gram, expected = z @ z.T * d / wide, x @ x.T
    lengths = expected.diagonal().sqrt()
    assert ((gram - expected) / (lengths[:, None] * lengths)).abs().max() < 0.12  # a few times 1 / sqrt(wide)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_fast_hadamard_product_is_the_dense_one(size):
    x = draw(3, size)
    torch.testing.assert_close(hadamard(x), x @ torch.from_numpy(by_scipy(size)).double().T)


def test_the_hadamard_lift_is_a_matrix_of_equal_entries():
    lift = built(config(lift="hadamard", inputs=5, skip=11)).lift
    matrix = lift(torch.eye(5, dtype=torch.float64)).T
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, 5**-0.5), rtol=1e-6, atol=0)
    assert torch.linalg.matrix_rank(matrix) == 5


def test_blocks_that_start_at_zero_leave_a_linear_map():
    net = built(config(lift="fixed"), zero=True)
    x = draw(4, 6)
    torch.testing.assert_close(net(x), x @ net.lift.weight.T @ net.out.weight.T)


def test_the_residual_stream_keeps_its_variance_over_depth():
    spread = []
    for blocks in (2, 32):
        net = built(config(inputs=64, skip=256, hidden=64, blocks=blocks, lift="fixed", act="relu"))
        z = net.lift(draw(500, 64))
        for block in net.blocks:
            z = z + block(z)
        spread.append(float(z.detach().var()))
    assert spread[1] == pytest.approx(spread[0], rel=0.1)


@pytest.mark.parametrize("lift", ["trained", "fixed"])
def test_folding_the_lift_changes_nothing(lift):
    net = built(config(lift=lift, norm="none", bias=True))
    x = draw(5, 6)
    before = net(x)
    net.fold_()
    assert net.folded.shape == (4, 6)
    assert not [name for name in net.state_dict() if "folded" in name]
    torch.testing.assert_close(net(x), before, rtol=1e-9, atol=1e-9)
    net.unfold_()
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("act", ACTS)
def test_one_row_and_many_axes(act):
    net = built(config(act=act))
    x = draw(2, 3, 6)
    torch.testing.assert_close(net(x)[1, 2], net(x[1, 2]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config(lift="randm"), "unknown lift 'randm'"),
        (lambda: config(norm="batch"), "unknown norm 'batch'"),
        (lambda: config(hidden=0), "hidden is 0; expected at least 1"),
        (lambda: config(lift="identity"), "no lift goes from 6 to a skip of 10"),
        (lambda: matched("diamond", 6, 3, 1000, blocks=1), "unknown shape 'diamond'"),
        (lambda: matched("hourglass", 6, 3, 1000, blocks=1, count="all"), "unknown count 'all'"),
        (lambda: matched("conventional", 6, 3, 1000, blocks=1, skip=9), "a conventional net's skip is its input"),
        (lambda: matched("hourglass", 60, 30, 500, blocks=2), "take fewer blocks or a narrower skip"),
        (lambda: matched("hourglass", 6, 3, 90_000, blocks=1), "hourglass is below the skip"),
        (lambda: matched("conventional", 60, 3, 900, blocks=1), "conventional is above the skip"),
        (lambda: ResidualMLP(config())(torch.zeros(1, 5)), "x is 5 wide; this net takes 6"),
        (lambda: ResidualMLP(config()).fold_(), "folding needs norm 'none' and a dense lift"),
        (lambda: hadamard(torch.zeros(3)), "the last axis is 3 wide"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
