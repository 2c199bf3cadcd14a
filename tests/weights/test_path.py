"""Paths and the landscape around them: identities that hold exactly, then small nets."""

import copy
import math

import pytest
import torch
from torch import nn

from lineament import train, weights
from lineament._base.seeds import generator


class Quadratic(nn.Module):
    """`L(w) = w' H w / 2 + c.w`, as a model whose output is its loss; two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 1, bias=False), nn.Linear(2, 1, bias=False)
        root = torch.randn(5, 5, generator=generator(1), dtype=torch.float64)
        self.hessian, self.slope = root @ root.T, torch.randn(5, generator=generator(2), dtype=torch.float64)
        self.double()

    def forward(self, x):
        w = torch.cat([self.a.weight.flatten(), self.b.weight.flatten()])
        return 0.5 * w @ self.hessian @ w + self.slope @ w


def value(model, batch):
    return model(batch), {}


def point(seed: int) -> dict[str, torch.Tensor]:
    draw = generator(seed)
    return {
        "a.weight": torch.randn(1, 3, generator=draw, dtype=torch.float64),
        "b.weight": torch.randn(1, 2, generator=draw, dtype=torch.float64),
    }


def flat(p):
    return torch.cat([p["a.weight"].flatten(), p["b.weight"].flatten()])


BATCH = [torch.zeros(1)]


def test_a_path_to_itself_has_no_barrier_and_direction_does_not_matter():
    net, a, b = Quadratic(), point(0), point(1)
    assert weights.path(net, a, a, BATCH, loss=value).barrier == pytest.approx(0, abs=1e-12)
    there, back = (weights.path(net, *ends, BATCH, loss=value) for ends in ((a, b), (b, a)))
    assert there.barrier == pytest.approx(back.barrier, abs=1e-12)
    assert there.values() == pytest.approx(back.values()[::-1])


@pytest.mark.parametrize("t", [0.5, 0.3])
def test_the_second_order_estimate_is_exact_on_a_quadratic(t):
    net, a, b = Quadratic(), point(0), point(1)
    mu = flat(b) - flat(a)
    exact = -t * (1 - t) / 2 * float(mu @ net.hessian @ mu)
    estimate = weights.second_order(net, a, b, BATCH, loss=value, t=t)
    assert estimate.barrier == pytest.approx(exact, rel=1e-6)
    assert estimate.quadratic == pytest.approx(-exact, rel=1e-6)  # without the gradients the sign is wrong


def test_the_estimate_per_block_is_exact_on_a_quadratic():
    net, a, b = Quadratic(), point(0), point(1)
    measured = weights.layerwise(net, a, b, BATCH, loss=value)
    estimate = weights.second_order(net, a, b, BATCH, loss=value, block=lambda name: name.partition(".")[0])
    assert set(measured) == {"a", "b"}
    for name, height in measured.items():
        assert estimate.blocks[name] == pytest.approx(height, rel=1e-6)


def test_curvature_along_the_line_gives_the_rise():
    """phi(t) - (1-t) phi(0) - t phi(1) = - integral of K(t, s) phi''(s), on a loss that is no quadratic."""

    class Wave(Quadratic):
        def forward(self, x):
            w = torch.cat([self.a.weight.flatten(), self.b.weight.flatten()])
            return torch.sin(w @ self.slope) + super().forward(x) * 0.1

    net, a, b = Wave(), point(0), point(1)
    n, t = 2001, 0.4
    s = torch.linspace(0, 1, n, dtype=torch.float64)
    mu = flat(b) - flat(a)
    phi = [float(torch.sin((flat(a) + x * mu) @ net.slope)) for x in s]
    second = [-(float(mu @ net.slope) ** 2) * p + 0.1 * float(mu @ net.hessian @ mu) for p in phi]
    kernel = torch.minimum(s, torch.tensor(t)) * (1 - torch.maximum(s, torch.tensor(t)))
    wanted = -float(torch.trapezoid(kernel * torch.tensor(second), s))
    measured = weights.path(net, a, b, BATCH, loss=value, points=6)
    assert measured._excess("loss", None)[2] == pytest.approx(wanted, abs=1e-4)


def test_pieces_and_curves_pass_where_they_should():
    net, a, b, c = Quadratic(), point(0), point(1), point(2)
    loss_at = {name: weights.score(load(net, p), BATCH, value)["loss"][0] for name, p in (("a", a), ("b", b), ("c", c))}
    pieces = weights.path(net, a, b, BATCH, loss=value, through=[c], points=3)
    assert pieces.t == (0, 0.25, 0.5, 0.75, 1)
    assert [pieces.values()[i] for i in (0, 2, 4)] == pytest.approx([loss_at[k] for k in "acb"])
    curve = weights.path(net, a, b, BATCH, loss=value, bend=c, points=5)
    middle = {n: 0.25 * a[n] + 0.5 * c[n] + 0.25 * b[n] for n in a}
    assert curve.values()[2] == pytest.approx(weights.score(load(net, middle), BATCH, value)["loss"][0])


def load(net, state):
    other = copy.deepcopy(net)
    other.load_state_dict(state)
    return other


def test_a_trained_curve_goes_around_a_hill():
    class Hill(nn.Module):
        """Low at distance 1 from the origin: the straight line between opposite points climbs."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return (self.w.square().sum() - 1) ** 2

    net, a, b = Hill(), {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([-1.0, 0.1])}
    config = train.FitConfig(steps=200, lr=0.05, schedule="cosine")
    control = weights.bent(net, a, b, lambda step: BATCH[0], config, loss=value)
    straight, curved = (weights.path(net, a, b, BATCH, loss=value, bend=bend) for bend in (None, control))
    assert straight.barrier > 0.9
    assert curved.barrier < 0.3


def test_a_plane_holds_its_three_points():
    net, o, a, b = Quadratic(), point(0), point(1), point(2)
    found = weights.plane(net, o, a, b, BATCH, loss=value, size=3, margin=0.0)
    assert found.points[0] == (0, 0)
    assert found.points[1][0] == pytest.approx(float((flat(a) - flat(o)).norm()))
    assert (found.x[0], found.y[0]) == (0, 0)
    for at, corner in ((0, o), (2, a)):
        assert found.loss[0][at] == pytest.approx(weights.score(load(net, corner), BATCH, value)["loss"][0])
    assert found.figure()[:1]


def test_geometry_ignores_scale():
    net, o, a, b = Quadratic(), point(0), point(1), point(2)
    far = [{n: o[n] + 3 * (p[n] - o[n]) for n in p} for p in (a, b)]
    near, scaled = weights.geometry(net, o, a, b), weights.geometry(net, o, *far)
    assert scaled.angle == pytest.approx(near.angle)
    assert scaled.radii[0] == pytest.approx(3 * near.radii[0])
    assert math.isnan(weights.geometry(net, o, o, b).angle)


def test_runs_part_where_they_should():
    net = nn.Linear(2, 2)
    x = torch.randn(64, 2, generator=generator(0))
    data = (x, (x[:, 0] > 0).long())

    def order(seed):
        def batch(step):
            chosen = torch.randperm(64, generator=generator(seed * 100 + step))[:8]
            return tuple(t[chosen] for t in data)

        return batch

    config = train.FitConfig(steps=5, lr=0.1, schedule="constant", optimizer="sgd")
    found = weights.fork(net, order, config, shared=3)
    assert not torch.equal(found.a["weight"], found.b["weight"])
    assert not torch.equal(found.parting["weight"], net.weight)
    same = weights.fork(net, order, config, shared=0, seeds=(1, 1))
    assert torch.equal(same.a["weight"], same.b["weight"])
    assert torch.equal(same.parting["weight"], net.weight)


def test_stale_statistics_are_seen_and_reset():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).train()
    draw = generator(0)
    x = torch.randn(128, 1, 2, 2, generator=draw)
    data = (x, (x.mean((1, 2, 3)) > 0).long())
    train.fit(net, lambda step: data, weights.prediction_loss, train.FitConfig(steps=60, lr=1e-2))
    a = net.eval().state_dict()
    b = {n: -v if n in ("0.weight", "0.bias", "1.running_mean") else v for n, v in a.items()}
    plain, fresh = (weights.path(net, a, b, [data], reset=reset) for reset in (None, [data]))
    assert plain.values()[0] == pytest.approx(fresh.values()[0], abs=0.05)
    assert plain.values()[4] > 1.5 * fresh.values()[4]  # of means of opposite signs hardly anything is left
    assert fresh.values()[4] == pytest.approx(fresh.values()[0], abs=0.01)  # the nets are one function: no barrier
    assert set(fresh.curves["data"]) == {"loss", "accuracy"}
    assert len(fresh.rows()) == 11


def test_a_loss_that_is_nan_is_no_low_barrier():
    found = weights.Path((0.0, 0.5, 1.0), {"test": {"loss": ((1.0, 0.0), (math.nan, 0.0), (1.0, 0.0))}})
    assert math.isnan(found.barrier)
    assert found.peak() == 0.5


def test_statistics_that_could_not_be_reset_leave_the_modes_alone():
    net = nn.Sequential(nn.BatchNorm1d(2)).train()
    with pytest.raises(ValueError, match="expected"):
        weights.reset_batch_norm(net, [torch.zeros(3, 2, 2, 2)])
    assert net.training
    assert net[0].momentum == 0.1


def test_mistakes_are_named():
    net, a, b = Quadratic(), point(0), point(1)
    for corner in (a, {name: 2 * b[name] - a[name] for name in a}):
        with pytest.raises(ValueError, match="lie on one line"):
            weights.plane(net, a, b, corner, BATCH, loss=value)
        with pytest.raises(ValueError, match="lie on one line"):
            weights.plane(net, a, a, b, BATCH, loss=value)
    with pytest.raises(ValueError, match="three places"):
        weights.path(net, a, b, BATCH, loss=value, points=2)
    with pytest.raises(ValueError, match="not both"):
        weights.path(net, a, b, BATCH, loss=value, through=[a], bend=b)
    with pytest.raises(ValueError, match="no batches"):
        weights.path(net, a, b, [], loss=value)
    with pytest.raises(ValueError, match="no number 'accuracy'"):
        weights.path(net, a, b, BATCH, loss=value).values("accuracy")
