"""Matching: laws of the ascent, planted elements, and the other methods on small nets that were trained apart."""

import pytest
import torch
from architectures import KINDS
from torch import nn

from lineament import train, weights
from lineament._base.seeds import generator, seeded
from lineament.graph import InDouble
from lineament.io import save_tensors
from lineament.weights.ascent import Ascent
from lineament.weights.repair import _statistics
from lineament.weights.straight_through import straight_through

WIDTH = 24


def blobs(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes on two noisy rings: not linearly separable."""
    draw = generator(seed)
    labels = torch.randint(0, 4, (n,), generator=draw)
    angle = torch.rand(n, generator=draw) * 3.14 + 3.14 * (labels % 2)
    radius = 1.0 + 1.0 * (labels // 2) + 0.1 * torch.randn(n, generator=draw)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1), labels


DATA = blobs(512, 0)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))


def batches(seed: int):
    return lambda step: tuple(x[torch.randperm(512, generator=generator(seed * 7919 + step))[:64]] for x in DATA)


@pytest.fixture(scope="module")
def pair():
    """Two nets trained from different beginnings in different orders."""
    nets = []
    for seed in (1, 2):
        with seeded(seed):
            net = mlp()
        config = train.FitConfig(steps=300, lr=1e-2, schedule="cosine")
        train.fit(net, batches(seed), weights.prediction_loss, config)
        nets.append(net.eval())
    group = weights.symmetry(nets[0], torch.zeros(512, 2))
    return nets[0], nets[0].state_dict(), nets[1].state_dict(), group


def distance(a, b):
    return sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5


def test_matching_lowers_the_distance_and_the_barrier(pair):
    model, a, b, group = pair
    moved = weights.match([a, b], group)[1].apply(b)
    torch.testing.assert_close(
        torch.func.functional_call(model, moved, DATA[0]), torch.func.functional_call(model, b, DATA[0])
    )
    assert distance(a, moved) < 0.9 * distance(a, b)
    before, after = (weights.path(model, a, other, [DATA]).barrier for other in (b, moved))
    assert after < before / 2
    assert weights.alignment(a, moved).leading > weights.alignment(a, b).leading


def test_the_objective_never_falls(pair):
    _, a, b, group = pair
    names = {name: group.axes.tensors[name] for name in a}
    ascent = Ascent(group.classes, names, a, b)
    seen = [ascent.objective]
    for _ in range(6):
        ascent.sweep(ascent.units)
        seen.append(ascent.objective)
    assert seen == sorted(seen)
    direct = sum(float((a[name].double() * group.element(ascent.total.perms).apply(b)[name]).sum()) for name in a)
    assert seen[-1] == pytest.approx(direct, rel=1e-6)


@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_a_planted_element_is_found_in_noise(noise):
    kind = KINDS["Llama"]
    group = weights.symmetry(kind.model(), *kind.args, check=0, **kind.kwargs)
    a = {n: torch.randn(p.shape, generator=generator(i)) for i, (n, p) in enumerate(kind.model().named_parameters())}
    planted = group.random(5)
    near = {n: x + noise * torch.randn(x.shape, generator=generator(i + 99)) for i, (n, x) in enumerate(a.items())}
    b = planted.inverse().apply(near)
    for without in (None, lambda name: "embed" in name or "lm_head" in name):
        found = weights.match([a, b], group, without=without, restarts=1)[1]
        assert distance(found.apply(b), near) == 0


def test_activations_find_a_planted_element(pair):
    _, a, _, group = pair
    b = group.random(3).apply(a)
    found = weights.match([a, b], group, method="activations", inputs=[(DATA[0],)])[1]
    # units that are dead or duplicates may be exchanged: the function at the midpoint tells
    assert weights.path(pair[0], a, found.apply(b), [DATA]).barrier < 1e-4


def test_activations_match_heads_and_their_channels():
    kind = KINDS["Llama"]
    model = kind.model()
    group = weights.symmetry(model, *kind.args, check=0, **kind.kwargs)
    a = dict(model.state_dict())
    with seeded(0):
        a = {n: x + 0.3 * torch.randn(x.shape) for n, x in a.items()}
    b = group.random(3).inverse().apply(a)
    inputs = [(torch.randint(0, 19, (1, 4), generator=generator(i)),) for i in range(64)]
    moved = weights.match([a, b], group, method="activations", inputs=inputs)[1].apply(b)
    assert all(torch.equal(moved[name], x) for name, x in a.items())


def test_straight_through_makes_the_midpoint_good(pair):
    model, a, b, group = pair
    config = train.FitConfig(steps=40, lr=1e-2, schedule="constant", optimizer="sgd", betas=(0.9, 0.999), clip=None)
    found = straight_through(a, b, group, batches(5), None, model=model, config=config)
    before = weights.path(model, a, b, [DATA]).barrier
    assert weights.path(model, a, found.apply(b), [DATA]).barrier < before


def test_many_models_come_onto_each_other(pair):
    _, a, _, group = pair
    points = [group.random(seed).apply(a) for seed in range(3)]
    moved = [e.apply(p) for e, p in zip(weights.match(points, group), points, strict=True)]
    assert max(distance(moved[0], other) for other in moved[1:]) == 0


def test_a_point_stays_lazy(pair):
    _, a, b, group = pair
    read = []

    def load(name):
        read.append(name)
        return b[name]

    point = weights.Point.open(b)
    moved = group.random(0).apply(point.computed("counted", point.specs, [point], load))
    assert isinstance(moved, weights.Point)
    assert not read
    plain = group.random(0).apply(b)
    assert all(torch.equal(moved[name], plain[name]) for name in b)
    assert (moved - weights.Point.open(a)).norm() > 0


def test_two_elements_make_two_points_of_one_file(pair, tmp_path):
    _, _, b, group = pair
    save_tensors(b, tmp_path / "model.safetensors")
    point = weights.Point.open(tmp_path / "model.safetensors")
    one, other = (group.random(seed).apply(point) for seed in (0, 1))
    assert (one - other).norm() == pytest.approx(sum(float((one[n] - other[n]).square().sum()) for n in b) ** 0.5)
    assert (one - other).norm() > 0.1


def test_repair_brings_the_deviations_back(pair):
    model, a, b, _ = pair
    merged = weights.repair(model, a, b, [DATA])
    names = ("0", "2")
    stats = [_statistics(load(state), [DATA]) for state in (a, b, merged)]
    for name in names:
        for part in (0, 1):
            torch.testing.assert_close(
                stats[2][name][part], (stats[0][name][part] + stats[1][name][part]) / 2, rtol=1e-3, atol=1e-4
            )


def load(state):
    net = mlp().eval()
    net.load_state_dict(state)
    return net


def test_batch_norm_reset_is_one_plain_mean():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).train()
    data = [torch.randn(8, 1, 3, 3, generator=generator(i)) for i in range(5)]
    weights.reset_batch_norm(net, data)
    y = torch.cat([net[0](x) for x in data])
    torch.testing.assert_close(net[1].running_mean, y.mean((0, 2, 3)))
    assert net.training
    assert net[1].training
    assert net[1].momentum == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "weight"}, "unknown method 'weight'"),
        ({"method": "activations"}, "needs inputs"),
        ({"method": "straight-through"}, "needs inputs"),
    ],
)
def test_mistakes_are_named(pair, change, message):
    _, a, b, group = pair
    with pytest.raises(ValueError, match=message):
        weights.match([a, b], group, **change)
    with pytest.raises(ValueError, match="at least two"):
        weights.match([a], group)
    with pytest.raises(ValueError, match=r"'0\.weight' holds NaN"):
        weights.match([a, {**b, "0.weight": b["0.weight"] * float("nan")}], group)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_planted_element_of_smollm2_is_found(noise):
    from lineament.models import load_teacher

    model, _ = load_teacher("smollm2")
    group = weights.symmetry(model, input_ids=torch.tensor([[1, 2, 3, 4]]), use_cache=False, check=0)
    a = {name: p.detach() for name, p in model.named_parameters()}
    planted, draw = group.random(3), generator(1)
    added, b = 0.0, {}
    for name, x in a.items():
        z = torch.randn(x.shape, generator=draw) * (noise * x.std())
        added += float(z.square().sum())
        b[name] = planted.inverse().act(name, x + z)
    found = weights.match([a, b], group, restarts=1)[1]
    gap = sum(float((found.act(name, x) - a[name]).double().square().sum()) for name, x in b.items())
    assert gap**0.5 <= 1.02 * added**0.5
    del a
    outputs, wide = [], model.double()
    for moved in (False, True):  # c computes what b computes
        wide.load_state_dict({name: found.act(name, x) if moved else x for name, x in b.items()}, strict=False)
        with torch.no_grad(), InDouble():  # transformers' norms would cast to float32
            outputs.append(wide(input_ids=torch.arange(1, 17)[None], use_cache=False).logits)
    assert float((outputs[1] - outputs[0]).abs().max()) <= 1e-6 * float(outputs[0].abs().max())
