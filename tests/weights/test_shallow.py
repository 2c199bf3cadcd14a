"""Stacks put side by side: what equals what, what is dropped, and how it scales."""

import itertools
import math

import pytest
import torch
from torch import nn

from lineament import weights
from lineament._base.errors import InputError
from lineament._base.seeds import generator, seeded
from lineament.graph import swapped
from lineament.models import residual_classifier, tiny_teacher, widen
from lineament.nn import Residual
from lineament.weights import shallow

IDS = torch.arange(1, 13)[None]


def stack(count, width=6, *, scale=1.0, act=nn.Tanh):
    with seeded(3):
        layers = [Residual(nn.Sequential(nn.Linear(width, width), act()), scale) for _ in range(count)]
    return nn.Sequential(*layers).double()


def names(count):
    return [str(i) for i in range(count)]


def inputs(width=6, rows=5):
    return torch.randn(rows, width, generator=generator(1), dtype=torch.double)


@pytest.mark.parametrize("groups", [1, 2, 3, 4, [(1, 2)], [(0, 1), (2, 3)]])
def test_groups_follow_a_plain_loop(groups):
    model, x = stack(4), inputs()
    runs = weights.groups_of(4, groups) if isinstance(groups, int) else groups
    named = {i for run in runs for i in run}
    expected = x
    for run in sorted([*runs, *((i,) for i in range(4) if i not in named)]):
        expected = expected + sum(model[i].branch(expected) for i in run)
    with swapped(model, weights.side_by_side(model, names(4), groups)):
        torch.testing.assert_close(model(x), expected)


def test_as_many_groups_as_layers_is_sequential():
    model = stack(3)
    assert weights.side_by_side(model, names(3), 3) == {}
    assert weights.parallel_error(model, names(3), 3, inputs()) == 0.0


def test_one_layer_is_the_same_in_both_forms():
    deep, parallel = (
        residual_classifier(64, 8, 1, 10, side_by_side=form).requires_grad_(False) for form in (False, True)
    )
    parallel.load_state_dict(dict(zip(parallel.state_dict(), deep.state_dict().values(), strict=True)))
    x = torch.randn(3, 1, 8, 8, generator=generator(0))
    assert torch.equal(deep(x), parallel(x))


def test_linear_branches_without_products_are_equal():
    u = torch.linalg.qr(torch.randn(6, 6, generator=generator(0), dtype=torch.double)).Q
    model = stack(3, act=nn.Identity)
    with torch.no_grad():
        for i, layer in enumerate(model):  # W_j W_i = u_2j u_2j+1^T u_2i u_2i+1^T = 0
            layer.branch[0].weight.copy_(torch.outer(u[:, 2 * i], u[:, 2 * i + 1]))
            layer.branch[0].bias.zero_()
    assert weights.parallel_error(model, names(3), 1, inputs()) < 1e-6


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_all_terms_of_the_expansion_sum_to_the_stack(count):
    model, x = stack(count, act=nn.Identity, scale=0.5), inputs()
    with torch.no_grad():
        for layer in model:
            layer.branch[0].bias.zero_()
    found = weights.orders(list(model), x, most=count)
    maps = [0.5 * layer.branch[0].weight.detach() for layer in model]
    for order in range(1, count + 1):  # every product of `order` layers, one by one
        expected = torch.zeros_like(x)
        for chosen in itertools.combinations(range(count), order):
            y = x
            for i in chosen:
                y = y @ maps[i].T
            expected = expected + y
        torch.testing.assert_close(found.terms[order], expected)
    torch.testing.assert_close(found.partial(count), model(x).detach(), rtol=0, atol=1e-10)


def test_what_is_dropped_is_of_the_second_order_and_with_the_correction_of_the_third():
    x, sizes = inputs(), [0.02, 0.01]
    errors = [weights.orders(list(stack(4, scale=e)), x) for e in sizes]
    for order, slope in ((1, 2), (2, 3)):
        logs = [math.log(found.error(order)) for found in errors]
        assert (logs[0] - logs[1]) / math.log(sizes[0] / sizes[1]) == pytest.approx(slope, abs=0.1)


def test_the_second_order_term_is_the_jacobian_times_what_came_before():
    model, x = stack(3), inputs()
    expected = torch.zeros_like(x)
    for j, layer in enumerate(model):
        before = sum((model[i].branch(x) for i in range(j)), torch.zeros_like(x)).detach()
        full = torch.autograd.functional.jacobian(layer.branch, x)
        expected = expected + torch.einsum("abcd,cd->ab", full, before)
    torch.testing.assert_close(weights.orders(list(model), x).terms[2], expected)


def test_the_bound_holds_and_is_exact_for_multiples_of_the_identity():
    model, x = stack(4, act=nn.ReLU, scale=0.3), inputs()
    with torch.no_grad():
        for layer in model:
            layer.branch[0].bias.zero_()
        sizes = [0.3 * float(torch.linalg.matrix_norm(layer.branch[0].weight, 2)) for layer in model]
        y = model(x)
        with swapped(model, weights.side_by_side(model, names(4))):
            gap = (y - model(x)).norm(dim=1) / x.norm(dim=1)
    assert float(gap.max()) <= weights.parallel_bound(sizes)
    assert weights.parallel_bound([0.1, 0.2]) == pytest.approx(1.1 * 1.2 - 1.3)


@torch.no_grad()
def test_a_decoder_runs_with_layers_side_by_side_and_its_cache():
    model = tiny_teacher("llama")
    layers = [f"model.layers.{i}" for i in range(3)]
    with swapped(model, weights.side_by_side(model, layers, [(1, 2)])):
        whole = model(IDS).logits
        cut = model(IDS[:, :7], use_cache=True)
        rest = model(IDS[:, 7:], past_key_values=cut.past_key_values).logits
        torch.testing.assert_close(torch.cat([cut.logits, rest], 1), whole, rtol=1e-4, atol=1e-5)
    caught = {}
    handle = model.model.layers[1].register_forward_pre_hook(
        lambda m, a, k: caught.update(h=a[0], k=k), with_kwargs=True
    )
    model(IDS, use_cache=False)
    handle.remove()
    both = sum(model.model.layers[i](caught["h"], **caught["k"]) - caught["h"] for i in (1, 2))
    expected = model.lm_head(model.model.norm(caught["h"] + both))
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)


def test_the_orders_of_a_decoder_end_in_its_own_hidden_states():
    model = tiny_teacher("llama").double().requires_grad_(False)
    for layer in model.model.layers:  # small branches, or the expansion says nothing
        layer.self_attn.o_proj.weight *= 0.05
        layer.mlp.down_proj.weight *= 0.05
    found = weights.decoder_orders(model, ["model.layers.0", "model.layers.1"], IDS)
    states = model.model(IDS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found.terms[0], states[0])
    torch.testing.assert_close(found.output, states[2])
    assert found.error(2) < found.error(1) < found.error(0)
    assert [row["order"] for row in found.rows()] == [0, 1, 2]


@pytest.mark.parametrize(
    ("groups", "said"),
    [([(0, 2)], "no run"), ([(2, 3)], "outside"), ([(0, 1), (1, 2)], "two groups"), (0, "0 groups"), (9, "9 groups")],
)
def test_groups_that_are_none_are_named(groups, said):
    with pytest.raises(InputError, match=said):
        weights.side_by_side(stack(3), names(3), groups)


def test_over_determination_counts_samples_outputs_and_parameters():
    assert weights.over_determination(100, 10, nn.Linear(9, 10)) == 10.0
    with pytest.raises(InputError, match="at least one layer"):
        weights.orders([], inputs())


def test_the_cheapest_groups_are_those_of_a_full_search():
    costs = {(i, i + 1): cost for i, cost in enumerate([0.3, 0.1, 0.25, 0.2, 0.05, 0.4])}
    for count in (1, 2, 3):
        every = [
            picked for picked in itertools.combinations(costs, count)
            if len({layer for pair in picked for layer in pair}) == 2 * count
        ]  # fmt: skip
        best = min(every, key=lambda picked: sum(costs[pair] for pair in picked))
        assert shallow.cheapest(costs, count) == list(best)
    with pytest.raises(InputError, match="no 4 groups"):
        shallow.cheapest(costs, 4)


@torch.no_grad()
def test_the_cost_of_a_pair_is_the_loss_it_adds():
    model = tiny_teacher("llama")
    windows = torch.randint(1, 60, (5, 16), generator=generator(0))
    costs = shallow.pair_costs(model, windows, [(0, 1), (1, 2)])
    for pair, cost in costs.items():
        losses = [float(each(windows, labels=windows).loss) for each in (widen(model, [pair]), model)]
        assert cost == pytest.approx(losses[0] - losses[1], abs=1e-5)


def test_tuning_brings_a_wide_model_nearer_and_moves_its_wide_layers_only():
    model = tiny_teacher("llama").requires_grad_(False)
    wide = widen(model, [(1, 2)])
    ids = torch.randint(1, 60, (8, 16), generator=generator(0))
    before = {name: p.clone() for name, p in wide.named_parameters()}

    @torch.no_grad()
    def distance():
        p, q = (each(ids).logits.log_softmax(-1) for each in (model, wide))
        return float((p.exp() * (p - q)).sum(-1).mean())

    far = distance()
    shallow.distilled(wide, model, lambda step: ids, steps=30, lr=3e-3)
    assert distance() < 0.9 * far
    moved = {name for name, p in wide.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(name.startswith("model.layers.1.") for name in moved)
