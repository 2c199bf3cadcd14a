"""Contrastive losses against plain loops, the theory of linear features, and probes."""

import math

import pytest
import torch
from torch import nn

from lineament import models, tasks
from lineament._base.errors import InputError
from lineament._base.seeds import generator, seeded
from lineament.nn import ReweightingHead


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def unit(x):
    return x / x.norm()


def test_the_spectral_loss_leaves_out_the_row_itself():
    z, other = draw(5, 3), draw(5, 3, seed=1)
    near = sum(float(z[i] @ other[i]) for i in range(5)) / 5
    apart = [float(z[i] @ other[j]) ** 2 for i in range(5) for j in range(5) if i != j]
    assert float(tasks.spectral_loss(z, other)) == pytest.approx(-2 * near + sum(apart) / len(apart))


def test_info_nce_is_its_sum():
    z, other = draw(4, 3), draw(4, 3, seed=1)
    rows = [unit(x) for x in [*z, *other]]
    total = 0.0
    for i in range(8):
        pair = (i + 4) % 8
        terms = [math.exp(float(rows[i] @ rows[j]) / 0.3) for j in range(8) if j != i]
        total -= float(rows[i] @ rows[pair]) / 0.3 - math.log(sum(terms))
    assert float(tasks.info_nce(z, other, temperature=0.3)) == pytest.approx(total / 8)


def test_supervised_contrast_is_its_sum_and_leaves_lonely_rows_out():
    z, labels = draw(6, 3), torch.tensor([0, 0, 1, 1, 1, 2])
    rows, total = [unit(x) for x in z], []
    for i in range(5):
        below = math.log(sum(math.exp(float(rows[i] @ rows[j]) / 0.2) for j in range(6) if j != i))
        own = [j for j in range(6) if j != i and labels[j] == labels[i]]
        total.append(-sum(float(rows[i] @ rows[p]) / 0.2 - below for p in own) / len(own))
    assert float(tasks.supervised_contrastive(z, labels, temperature=0.2)) == pytest.approx(sum(total) / 5)


@pytest.mark.parametrize("loss", [tasks.spectral_loss, tasks.info_nce])
def test_losses_have_the_gradients_of_finite_differences(loss):
    z, other = draw(4, 3).requires_grad_(), draw(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(loss, (z, other))
    labels = torch.tensor([0, 1, 0, 1])
    assert torch.autograd.gradcheck(lambda z: tasks.supervised_contrastive(z, labels), (z,))


VARIANCE = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5], dtype=torch.float64)


def features(width=7):
    return tasks.LinearFeatures.random(width, VARIANCE, torch.linspace(0.1, 0.5, 5, dtype=torch.float64), seed=3)


def test_moments_are_those_of_the_views():
    of = features()
    x, other = of.views(200_000, seed=5)
    torch.testing.assert_close(x.T @ x / len(x), of.second, atol=0.02, rtol=0)
    torch.testing.assert_close(x.T @ other / len(x), of.cross, atol=0.02, rtol=0)
    clean, u = of.draw(100, seed=1)
    torch.testing.assert_close(clean @ of.directions, u)


def test_the_loss_over_all_views_is_the_mean_over_many():
    of = features()
    with seeded(0):
        net = models.deep_linear((7, 6, 5), scale=0.4).double()
    losses = torch.stack([tasks.spectral_loss(*map(net, of.views(300, seed=i))).detach() for i in range(60)])
    error = losses.std() / 60**0.5
    assert error < 0.1 * losses.mean().abs()
    assert (tasks.population_loss(of)(net, None)[0] - losses.mean()).abs() < 4 * error


def descended(depth, steps=700, lr=0.01, rank=5):
    """Plain gradient descent; the training loop of the library is tested elsewhere."""
    of = features(width=5)  # what lies outside the features would keep its start, and upset the balance
    with seeded(1):
        net = models.deep_linear((5, *[8] * (depth - 1), rank), scale=0.6, balanced=True).double()
    loss = tasks.population_loss(of)
    for _ in range(steps):
        value, _ = loss(net, None)
        gradients = torch.autograd.grad(value, list(net.parameters()))
        with torch.no_grad():
            for p, gradient in zip(net.parameters(), gradients, strict=True):
                p -= lr * gradient
    return of, net, float(loss(net, None)[0].detach())


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_weights_follow_the_power_law_in_depth(depth):
    of, net, loss = descended(depth)
    for layer, weights in enumerate(tasks.feature_weights(net, of.directions), 1):
        torch.testing.assert_close(weights, of.weights ** (layer / depth), rtol=1e-5, atol=0)
    ratio = VARIANCE / (VARIANCE + of.noise)
    assert loss == pytest.approx(-float(ratio.square().sum()), rel=1e-4)


def test_small_steps_keep_the_net_balanced_and_a_narrow_net_keeps_the_best_features():
    _, net, _ = descended(2, steps=300, lr=1e-4)
    assert (net[1].weight.T @ net[1].weight - net[0].weight @ net[0].weight.T).abs().max() < 1e-4
    of, net, loss = descended(2, rank=2)
    ratio = (VARIANCE / (VARIANCE + of.noise)).square().sort(descending=True).values
    assert loss == pytest.approx(-float(ratio[:2].sum()), rel=0.01)


def test_the_ridge_probe_is_the_normal_equations():
    x, y, test, labels = draw(30, 4), torch.arange(30) % 3, draw(20, 4, seed=1), torch.arange(20) % 3
    x = x + nn.functional.one_hot(y, 4)
    target = nn.functional.one_hot(y, 3).double()
    centred = x - x.mean(0)
    for ridge in (0.0, 2.0):
        w = torch.linalg.solve(centred.T @ centred + ridge * torch.eye(4), centred.T @ (target - target.mean(0)))
        chosen = ((test - x.mean(0)) @ w + target.mean(0)).argmax(1)
        expected = float((chosen == labels).double().mean())
        assert tasks.ridge_probe((x, y), (test, labels), ridge=ridge) == expected


def test_the_nearest_neighbours_vote():
    x, y, test, labels = draw(30, 4), torch.arange(30) % 3 + 5, draw(20, 4, seed=1), torch.arange(20) % 3 + 5
    right = 0
    for row, label in zip(test, labels, strict=True):
        near = sorted(range(30), key=lambda i: float((x[i] - row).norm()))[:5]
        votes = [sum(int(y[i]) == c for i in near) for c in (5, 6, 7)]
        right += votes.index(max(votes)) + 5 == int(label)
    assert tasks.knn_probe((x, y), (test, labels)) == right / 20


def test_an_invertible_head_is_seen_by_a_ridge_and_not_without():
    head = ReweightingHead(6, ratio=100.0).double()
    x = draw(60, 6)
    y = (x[:, 5] > 0).long()
    pairs = (x[:20], y[:20]), (x[20:], y[20:])
    after = tuple((head(h), label) for h, label in pairs)
    assert tasks.ridge_probe(*pairs, ridge=0.0) == tasks.ridge_probe(*after, ridge=0.0)
    assert tasks.ridge_probe(*pairs, ridge=1.0) > tasks.ridge_probe(*after, ridge=1.0)
    assert tasks.knn_probe(*pairs) > tasks.knn_probe(*after)


def test_depths_are_probed_where_asked():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    x, y = draw(40, 4), torch.arange(40) % 2
    pairs = (x[:20], y[:20]), (x[20:], y[20:])
    found = tasks.probe_depths(net, lambda name, _: name in ("1", "2"), *pairs, ridge=0.1)
    with torch.no_grad():
        hidden = tuple((net[:2](inputs), labels) for inputs, labels in pairs)
    assert list(found) == ["1", "2"]
    assert found["1"] == tasks.ridge_probe(*hidden, ridge=0.1)
    unit_length = tuple((nn.functional.normalize(h, dim=1), label) for h, label in hidden)
    assert tasks.probe_depths(net, "1", *pairs, normalize=True, probe="knn")["1"] == tasks.knn_probe(*unit_length)
    assert tasks.probe_depths(net, "1", *pairs, project=2)["1"] == tasks.probe_depths(net, "1", *pairs, project=2)["1"]


def test_a_corner_tells_the_label_as_often_as_asked():
    x, y = torch.rand(3000, 1, 4, 4, generator=generator(0)), torch.arange(3000) % 10
    told = tasks.spurious_corner(x, y, 0.8, seed=1)
    right = ((told[:, 0, 0, 0] * 9).round() == y).double().mean()
    assert float(right) == pytest.approx(0.8 + 0.2 / 10, abs=0.02)
    assert torch.equal(told.flatten(1)[:, 1:], x.flatten(1)[:, 1:])


def test_views_are_moved_images_with_noise():
    x = torch.rand(5, 1, 6, 6, generator=generator(0), dtype=torch.float64)
    one, other = tasks.shifted_views(x, sigma=1e-9, seed=4)
    moves = [x.roll((i, j), (2, 3)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    assert all(sum(torch.allclose(view, move, atol=1e-6) for move in moves) == 1 for view in (one, other))
    noisy, again = (tasks.shifted_views(x, seed=4) for _ in range(2))
    assert torch.equal(noisy[0], again[0])
    assert not torch.equal(noisy[0] - one, noisy[1] - other)


def test_rank_and_sensitivity_are_what_they_are_called():
    x = torch.zeros(50, 8, dtype=torch.float64)
    x[:, :3] = torch.linalg.qr(draw(50, 4) - draw(50, 4).mean(0)).Q[:, :3]
    x = x - x.mean(0)
    assert 2.5 < tasks.effective_rank(x) <= 3.0001
    u = draw(20_000, 4)
    other = u.clone()
    other[:, 0] = draw(20_000, seed=9)
    scale = torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert tasks.sensitivity(u * scale, other * scale) == pytest.approx(4 / 7, rel=0.03)
    assert tasks.sensitivity(u[:, :1], other[:, :1]) == pytest.approx(1, rel=0.03)
    assert tasks.sensitivity(u[:, 1:], other[:, 1:]) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tasks.spectral_loss(draw(1, 3), draw(1, 3)), "expected .N, p. twice, N >= 2"),
        (lambda: tasks.info_nce(draw(4, 3), draw(5, 3)), "expected .N, p. twice"),
        (lambda: tasks.supervised_contrastive(draw(2, 3), torch.tensor([0, 1])), "no two rows share a class"),
        (lambda: tasks.supervised_contrastive(draw(2, 3), torch.tensor([0])), "2 rows and there are 1 labels"),
        (lambda: tasks.LinearFeatures.random(3, VARIANCE, VARIANCE), "5 variances and 5 noises in 3 dimensions"),
        (lambda: tasks.knn_probe((draw(3, 2), torch.arange(3)), (draw(3, 2), torch.arange(3))), "k is 5"),
        (
            lambda: tasks.ridge_probe((draw(3, 2), torch.arange(2)), (draw(3, 2), torch.arange(3))),
            "3 rows and 2 labels",
        ),
        (lambda: tasks.probe_depths(nn.Identity(), "", (), (), probe="svm"), "unknown probe 'svm'"),
        (lambda: tasks.spurious_corner(torch.zeros(1, 1, 2, 2), torch.zeros(1), 2.0), "share is 2.0"),
        (lambda: tasks.sensitivity(draw(3, 2), draw(3, 1)), "expected equal shapes"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
