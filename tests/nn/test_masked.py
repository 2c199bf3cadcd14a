"""Masks of groups, masked layers, their packed form, and rewiring."""

import copy
import math

import pytest
import torch
from torch import nn

from lineament import models, train
from lineament._base.errors import InputError
from lineament._base.seeds import generator, seeded
from lineament.nn import (
    MaskedConv2d,
    MaskedLinear,
    PackedLinear,
    Rewiring,
    between_for,
    group_mask,
    rewired,
)
from lineament.nn.masked import PATTERNS


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("groups", "inside", "between"), [(5, 1.0, 0.0625), (8, 0.9, 0.143), (1, 0.25, 0.0), (4, 1, 0)]
)
@pytest.mark.parametrize("assign", ["contiguous", "random"])
def test_the_density_is_the_one_drawn(groups, inside, between, assign):
    mask = group_mask(203, 160, groups, inside=inside, between=between, assign=assign, seed=3)
    for same, p in ((mask.same_group, inside), (~mask.same_group, between)):
        count = int(same.sum())
        assert abs(int((mask.edges & same).sum()) - p * count) <= 3 * math.sqrt(p * (1 - p) * count) + 1e-9
    assert [int((mask.outputs == g).sum()) for g in range(groups)] == [
        sum(u * groups // 203 == g for u in range(203)) for g in range(groups)
    ]


def test_units_of_a_group_hear_the_same_inputs_at_the_same_density():
    mask = group_mask(60, 4000, 5, between=0.0625, pattern="units", seed=1)
    for g in range(5):
        assert (mask.edges[mask.outputs == g] == mask.edges[mask.outputs == g][:1]).all()
    assert mask.density == pytest.approx(0.25, abs=0.01)


def test_any_graph_of_groups_and_no_output_without_an_edge():
    ring = torch.eye(4).roll(1, 1)
    mask = group_mask(8, 8, 4, graph=ring)
    for o in range(8):
        assert mask.edges[o].nonzero().flatten().tolist() == [2 * ((o // 2 + 1) % 4), 2 * ((o // 2 + 1) % 4) + 1]
    assert (group_mask(50, 40, 1, inside=0.0).edges.sum(1) == 1).all()


def test_modularity_and_the_share_inside_are_their_sums():
    mask = group_mask(12, 9, 3, inside=0.8, between=0.2, seed=2)
    m, total, kept = int(mask.edges.sum()), 0.0, 0
    for o in range(12):
        for i in range(9):
            if mask.outputs[o] == mask.inputs[i]:
                total += float(mask.edges[o, i]) - float(mask.edges[o].sum() * mask.edges[:, i].sum()) / m
                kept += int(mask.edges[o, i])
    assert mask.modularity == pytest.approx(total / m)
    assert mask.inside == pytest.approx(kept / m)


@pytest.mark.parametrize(("groups", "density"), [(5, 0.25), (8, 0.25), (4, 0.5)])
def test_the_probability_between_groups_gives_the_density(groups, density):
    p = between_for(density, groups)
    assert 1 / groups + p * (1 - 1 / groups) == pytest.approx(density)


def test_a_mask_of_ones_is_a_linear_layer_to_the_bit():
    layer = MaskedLinear(group_mask(5, 7, 1))
    plain = nn.Linear(7, 5)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = torch.randn(3, 7)
    assert torch.equal(layer(x), plain(x))
    conv, plain = MaskedConv2d(group_mask(4, 2, 1), 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)
    plain.load_state_dict({"weight": conv.weight, "bias": conv.bias})
    image = torch.randn(2, 2, 5, 6)
    assert torch.equal(conv(image), plain(image))


def test_it_is_the_sum_over_its_edges_forward_and_backward():
    layer = MaskedLinear(group_mask(6, 9, 3, between=0.3)).double()
    with torch.no_grad():
        layer.weight.copy_(draw(6, 9, seed=1))  # also off the mask
    x = draw(4, 9).requires_grad_()
    expected = torch.zeros(4, 6, dtype=torch.float64)
    for o in range(6):
        for i in range(9):
            if layer.mask[o, i]:
                expected[:, o] += layer.weight[o, i].detach() * x[:, i].detach()
    torch.testing.assert_close(layer(x), expected)
    assert torch.autograd.gradcheck(layer, (x,))
    layer(x).square().sum().backward()
    assert (layer.weight.grad[~layer.mask] == 0).all()
    assert (layer.weight.grad[layer.mask] != 0).all()


def test_in_a_block_diagonal_layer_a_group_hears_its_partner_only():
    layer = MaskedLinear(group_mask(10, 15, 5))
    x = torch.randn(1, 15)
    for g in range(5):
        other = x + (layer.input_groups == g)
        changed = (layer(other) != layer(x)).flatten()
        assert torch.equal(changed, layer.output_groups == g)


def test_activations_keep_the_variance_of_a_dense_layer():
    with seeded(0):
        masked = MaskedLinear(group_mask(2000, 400, 5, between=0.0625, seed=1), bias=False)
        x = torch.randn(500, 400)
    assert float(masked(x).detach().var()) == pytest.approx(2.0, rel=0.1)  # 2 / fan_in times fan_in


def test_weights_and_mask_of_one_seed_are_independent():
    with seeded(7):
        full = torch.empty(300, 300).normal_()
        uniform = torch.rand(300, 300)
    edges = group_mask(300, 300, 1, inside=0.25, seed=7).edges
    for x in (full, uniform):
        assert abs(float(torch.corrcoef(torch.stack([x.flatten(), edges.flatten().float()]))[0, 1])) < 0.015


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sizes", [(203, 160), (100, 100), (7, 5)])
@pytest.mark.parametrize("assign", ["contiguous", "random"])
def test_the_packed_layer_is_the_masked_one(pattern, sizes, assign):
    layer = MaskedLinear(group_mask(*sizes, 5, between=0.1, pattern=pattern, assign=assign, seed=1)).double()
    nn.init.normal_(layer.bias)
    packed = PackedLinear(layer).eval()
    for x in (draw(1, sizes[1]), draw(2, 3, sizes[1])):
        torch.testing.assert_close(packed(x), layer(x))
    y = draw(4, sizes[1]).requires_grad_()
    ours, theirs = (torch.autograd.grad(f(y).square().sum(), y)[0] for f in (packed, layer))
    torch.testing.assert_close(ours, theirs)


def test_a_packed_layer_of_units_trains_like_the_masked_one():
    with seeded(0):
        layer = MaskedLinear(group_mask(11, 12, 3, between=0.3, pattern="units", seed=2)).double()
    packed, x, y = PackedLinear(layer), draw(8, 12), draw(8, 11, seed=1)
    optimizers = [torch.optim.Adam(f.parameters(), 0.1) for f in (layer, packed)]
    for _ in range(5):
        for f, optimizer in zip((layer, packed), optimizers, strict=True):
            optimizer.zero_grad()
            (f(x) - y).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(packed(x), layer(x))
    edges = PackedLinear(MaskedLinear(group_mask(20, 20, 4, between=0.1)))
    with pytest.raises(InputError, match="edges outside the tiles don't learn"):
        edges(torch.zeros(1, 20))


def problem(seed=0):
    x = torch.randn(256, 20, generator=generator(seed))
    return x, (x[:, :3].sum(1) > 0).long()


def net(seed=0, **mask):
    with seeded(seed):
        return models.masked_classifier((20, 30, 30, 2), 5, **{"between": 0.1, **mask})


def taught(model, rule, steps=30, out=None, stop=None, optimizer="adamw"):
    data = problem()
    config = train.FitConfig(steps=steps, lr=1e-2, weight_decay=0.1, schedule="constant", optimizer=optimizer,
                             checkpoint_every=5)  # fmt: skip

    def loss(model, rows):
        return nn.functional.cross_entropy(model(data[0][rows]), data[1][rows]), {}

    def each(step, numbers):
        for layer in model.modules():
            if isinstance(layer, MaskedLinear):
                assert (layer.weight[~layer.mask] == 0).all()
        if step == stop:
            raise KeyboardInterrupt

    with rewired(model, rule) as log:
        train.fit(
            model, lambda i: torch.randint(256, (64,), generator=generator(i)), loss, config, out=out, on_step=each
        )
    return log


@pytest.mark.parametrize("grow", ["random", "gradient", "hebbian"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_edges_move_and_their_number_stays(grow, optimizer):
    model = net()
    before = copy.deepcopy(model)
    log = taught(model, Rewiring(every=5, until=26, start=6, grow=grow), optimizer=optimizer)
    middle, was = model[3], before[3]
    assert middle.mask.sum() == was.mask.sum()
    assert not torch.equal(middle.mask, was.mask)
    assert {row["step"] for row in log} == {10, 15, 20, 25}
    moved = [row["moved"] for row in log if row["layer"] == "3"]
    live = int(was.mask.sum())
    assert moved == [int(0.15 * (1 + math.cos(math.pi * s / 26)) * live) for s in (10, 15, 20, 25)]
    assert log[-1]["inside"] <= 1
    assert set(model.state_dict()) == set(before.state_dict())
    assert not middle._forward_hooks
    assert not middle._forward_pre_hooks


def test_blocks_keep_their_numbers_when_asked():
    for per_block in (True, False):
        model = net()
        inside = [int((model[3].mask & model[3].groups().same_group).sum())]
        taught(model, Rewiring(every=5, until=30, per_block=per_block))
        inside.append(int((model[3].mask & model[3].groups().same_group).sum()))
        assert (inside[0] == inside[1]) == per_block


def test_a_bonus_for_the_own_group_keeps_modularity():
    found = []
    for bonus in (0.0, 2.0):
        model = net(inside=0.6)
        log = taught(model, Rewiring(every=3, until=40, share=0.5, bonus=bonus))
        found.append([row["modularity"] for row in log if row["layer"] == "3"][-1])
    assert found[1] > found[0] + 0.1


def test_moved_edges_start_at_zero_without_momentum():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x, y = problem()
    with rewired(model, Rewiring(every=3, until=10, grow="random")):
        for _ in range(3):
            was = model[3].mask.clone()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    grown, layer = model[3].mask & ~was, model[3]
    changed = model[3].mask ^ was
    assert grown.any()
    assert (layer.weight[grown] == 0).all()
    assert all((optimizer.state[layer.weight][k][changed] == 0).all() for k in ("exp_avg", "exp_avg_sq"))


def test_growth_by_gradient_takes_the_largest_dense_gradients():
    layer = MaskedLinear(group_mask(6, 8, 1, inside=0.4, seed=2)).double()
    x, y = draw(16, 8), draw(16, 6, seed=1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-9)
    dense = (layer.masked_weight().detach()).requires_grad_()
    (x @ dense.T + layer.bias.detach() - y).square().mean().backward()
    was = layer.mask.clone()
    with rewired(layer, Rewiring(every=1, until=100, share=0.3, grow="gradient")):
        (layer(x) - y).square().mean().backward()
        optimizer.step()
    grown = layer.mask & ~was
    best = dense.grad.abs().masked_fill(was, -1).flatten().topk(int(grown.sum())).indices
    assert set(grown.flatten().nonzero().flatten().tolist()) == set(best.tolist())


def test_hebbian_growth_finds_the_one_planted_pair():
    mask = group_mask(4, 6, 1, inside=0.5, seed=5)
    mask.edges[2, 3] = mask.edges[2, 5] = False
    mask.edges[2, 4] = mask.edges[0, 1] = True
    layer = MaskedLinear(mask, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[2, 4], layer.weight[0, 1] = 1.0, 1.0
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    edges = int(layer.mask.sum())
    with rewired(layer, Rewiring(every=20, until=1000, share=1.01 / edges, grow="hebbian")) as log:
        for i in range(20):
            x = torch.randn(200, 6, generator=generator(i))
            x[:, 3] = 0.9 * x[:, 4] + 0.1 * x[:, 3]  # output 2 follows input 4, and with it input 3
            x[:, 0] = 7.0  # a dead unit: its correlation is 0/0
            layer(x).sum().backward()
            optimizer.step()
    assert log[0]["moved"] == 1
    assert layer.mask[2, 3]


def test_correlations_are_those_of_a_plain_loop():
    layer = MaskedLinear(group_mask(3, 4, 1)).train()
    rule = Rewiring(every=1000, until=2000, grow="hebbian", momentum=0.0)
    x = torch.randn(50, 4, generator=generator(0))
    with rewired(layer, rule):
        y = layer(x).relu().detach()
        found = layer.coactivity.correlation()
    for o in range(3):
        for i in range(4):
            expected = torch.corrcoef(torch.stack([y[:, o], x[:, i]]))[0, 1]
            assert float(found[o, i]) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("grow", ["random", "gradient", "hebbian"])
def test_an_interrupted_run_goes_on_to_the_same_bits(grow, tmp_path):
    rule = Rewiring(every=5, until=28, grow=grow)
    whole, cut, again = net(), net(), net()
    taught(whole, rule)
    with pytest.raises(KeyboardInterrupt):
        taught(cut, rule, out=tmp_path, stop=15)
    taught(again, rule, out=tmp_path)
    state = again.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in whole.state_dict().items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: group_mask(4, 4, 5), "5 groups of 4 outputs and 4 inputs"),
        (lambda: group_mask(4, 4, 2, between=1.5), "expected probabilities"),
        (lambda: group_mask(4, 4, 2, graph=torch.eye(3)), "the graph is"),
        (lambda: group_mask(4, 4, 2, pattern="rows"), "unknown pattern 'rows'"),
        (lambda: group_mask(4, 4, 2, assign="rnd"), "unknown assign 'rnd'"),
        (lambda: between_for(0.1, 5), "can't have a density of 0.1"),
        (lambda: between_for(0.1, 1), "one group has no edges between groups"),
        (lambda: Rewiring(every=0, until=3), "every 0"),
        (lambda: Rewiring(every=1, until=3, grow="hebb"), "unknown growth 'hebb'"),
        (lambda: rewired(nn.Linear(2, 2), Rewiring(every=1, until=3)).__enter__(), "has no MaskedLinear layer"),
        (lambda: PackedLinear(MaskedLinear(group_mask(4, 4, 2)))(torch.zeros(1, 3)), "x is 3 wide"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
