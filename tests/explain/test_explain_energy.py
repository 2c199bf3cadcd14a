"""The energy of features: its gradient, its exact maxima, the ridge gradient against inverses, and what is watched."""

import math

import pytest
import torch

from lineament import explain
from lineament._base.errors import InputError
from lineament.data import irreps, load_group, purity
from lineament.explain.energy import targets
from lineament.nn import TwoLayer
from lineament.nn.two_layer import ACTIVATIONS
from lineament.tasks import GrokConfig, GroupSplit, grok


def problem(name="Z7", units=5, n=None, seed=0):
    group, random = load_group(name), torch.Generator().manual_seed(seed)
    pairs = group.pairs[torch.randperm(len(group) ** 2, generator=random)[:n]]
    w = torch.randn(2 * len(group), units, generator=random, dtype=torch.float64)
    return group, pairs, group.table[pairs[:, 0], pairs[:, 1]], w


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_energy_and_its_gradient_are_the_definition(name):
    s = ACTIVATIONS[name]
    group, pairs, labels, w = problem("S3", n=20)
    M, n = len(group), 20
    X, Y = torch.zeros(n, 2 * M, dtype=torch.float64), torch.zeros(n, M, dtype=torch.float64)
    for i, (g, h) in enumerate(pairs.tolist()):
        X[i, g], X[i, M + h], Y[i, int(labels[i])] = 1, 1, 1
    P = torch.eye(n, dtype=torch.float64) - 1 / n
    torch.testing.assert_close(targets(labels, M), P @ Y)
    torch.testing.assert_close(P @ targets(labels, M), targets(labels, M))
    w.requires_grad_()
    E = 0.5 * ((P @ Y).T @ s(X @ w)).square().sum(0)
    torch.testing.assert_close(explain.energy(w, pairs, labels, s), E)
    (g,) = torch.autograd.grad(E.sum(), w)
    torch.testing.assert_close(explain.energy_gradient(w, pairs, labels, s), g)


@pytest.mark.parametrize("name", ["Z7", "Z8", "S3", "Q8", "A4"])
def test_features_end_in_one_irrep_at_its_exact_energy(name):
    group = load_group(name)
    parts = irreps(group)
    w = explain.ascend(group, units=12, steps=1200)
    u, other = w.chunk(2)
    share, which = purity(u, parts)
    E = explain.energy(w, group.pairs, group.table.flatten())
    torch.testing.assert_close(share, torch.ones(12, dtype=torch.float64), rtol=0, atol=1e-4)
    assert torch.equal(which, purity(other, parts)[1])
    expected = torch.tensor([parts[k].energy for k in which.tolist()], dtype=torch.float64)
    torch.testing.assert_close(E, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(u.norm(dim=0), other.norm(dim=0), rtol=1e-4, atol=0)


def test_a_pure_pair_of_one_frequency_has_a_quarter_of_the_order_whatever_its_phases():
    group, step = load_group("Z11"), 2 * math.pi / 11 * torch.arange(11, dtype=torch.float64)
    for k, a, b in ((1, 0.3, 2.0), (4, 1.0, 0.0)):
        w = torch.cat([(k * step + a).cos(), (k * step + b).cos()])[:, None]
        E = explain.energy(w / w.norm(), group.pairs, group.table.flatten())
        torch.testing.assert_close(E.item(), 11 / 4)


def test_with_a_single_product_known_features_remember_instead():
    group = load_group("Z7")
    known = group.pairs[(group.table.flatten() == 3)][:4]
    known = torch.cat([known, group.pairs[group.table.flatten() == 5][:4]])
    w = explain.ascend(group, units=6, steps=1500, pairs=known)
    assert purity(w[:7], irreps(group))[0].max() < 0.9


@pytest.mark.parametrize("eta", [1e-1, 1e-4])
@pytest.mark.parametrize("units", [6, 60])
def test_the_gradient_at_a_ridge_top_is_the_closed_form(units, eta):
    _, pairs, labels, w = problem(units=units, n=30)
    F = (w[pairs[:, 0]] + w[7 + pairs[:, 1]]).square()
    C, Y, eye = F - F.mean(0), targets(labels, 7), torch.eye
    V = torch.linalg.solve(C.T @ C + eta * eye(units, dtype=torch.float64), C.T @ Y)
    torch.testing.assert_close(explain.ridge_top(F, labels, 7, eta), V, rtol=1e-7, atol=1e-8)
    V.requires_grad_(False)
    G, B = explain.ridge_gradient(F, labels, 7, eta)
    torch.testing.assert_close(G, explain.feature_gradient(F, labels, V), rtol=1e-7, atol=1e-8)
    inverse = torch.linalg.inv(C.T @ C + eta * eye(units, dtype=torch.float64))
    torch.testing.assert_close(B, inverse, rtol=1e-5, atol=1e-5)
    F.requires_grad_()
    J = 0.5 * (Y - (F - F.mean(0)) @ V).square().sum()
    torch.testing.assert_close(-torch.autograd.grad(J, F)[0], G, rtol=1e-6, atol=1e-7)


def test_units_repel_by_the_sign_of_their_overlap():
    _, pairs, labels, w = problem(units=6, n=30)
    F = (w[pairs[:, 0]] + w[7 + pairs[:, 1]]).square()
    C, eta = F - F.mean(0), 0.5
    B = explain.ridge_gradient(F, labels, 7, eta)[1]
    for j, l in ((0, 1), (2, 5), (3, 4)):
        rest = C[:, [k for k in range(6) if k not in (j, l)]]
        P = eta * torch.linalg.inv(rest @ rest.T + eta * torch.eye(30, dtype=torch.float64))
        assert torch.sign(B[j, l]) == -torch.sign(C[:, j] @ P @ C[:, l])


def test_what_is_watched_while_nets_learn():
    group = load_group("Z5")
    split = GroupSplit.random(group, 0.6, seeds=(0, 1))
    config = GrokConfig(width=16, seeds=(0, 1), every=2, fit=GrokConfig().fit)
    found = grok(split, config, until=0.0, watch=explain.Stages(group))
    first = found.rows[0]
    assert (len(found.rows), first["epoch"]) == (2, 2)
    assert math.isnan(first["turn of W"])
    assert 0 <= first["purity"] <= 1
    watch, net = explain.Stages(group), TwoLayer(5, 16, seeds=(0, 1))
    watch(net, split)
    assert [row["turn of V"] for row in watch(net, split)] == pytest.approx([0, 0], abs=1e-6)
    w = explain.ascend(group, units=40, steps=800)
    with torch.no_grad():
        net.W[0].copy_(w[:, :16])
    best = watch(net, split)[0]
    assert (round(best["energy"], 3), round(best["purity"], 3), best["modes"]) == (1.0, 1.0, 1.0)
    assert explain.stages_png(found)[:4] == b"\x89PNG"


def test_without_decay_there_is_no_closed_form():
    with pytest.raises(InputError, match="give eta > 0"):
        explain.ridge_gradient(torch.zeros(3, 2), torch.arange(3), 3, 0.0)
    with pytest.raises(InputError, match=r"expected \[2 M, K\]"):
        explain.energy(torch.zeros(6, 1), torch.tensor([[3, 0]]), torch.tensor([0]))
