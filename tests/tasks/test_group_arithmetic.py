"""Learning tables of groups: nets side by side learn as alone, the losses are their definitions, scans resume."""

import math
from dataclasses import replace

import pytest
import torch

from lineament import tasks, train
from lineament._base.errors import InputError
from lineament.data import load_group
from lineament.nn import TwoLayer
from lineament.tasks import GrokConfig, GroupSplit, grok, group_loss
from lineament.tasks.group_arithmetic import accuracies

FEW = GrokConfig(width=12, every=5, fit=replace(GrokConfig().fit, steps=10))


@pytest.mark.parametrize("residual", [0, 2])
def test_the_net_is_its_formula(residual):
    net, pairs = TwoLayer(4, 6, seeds=(3, 4), residual=residual).double(), load_group("Z4").pairs
    X = torch.zeros(16, 8, dtype=torch.float64)
    X[torch.arange(16), pairs[:, 0]] = 1
    X[torch.arange(16), 4 + pairs[:, 1]] = 1
    for seed in range(2):
        F = (X @ net.W[seed]).square()
        for layer in net.between:
            F = (F + F @ layer[seed]).square()
        torch.testing.assert_close(net(pairs)[seed], F @ net.V[seed])
    torch.testing.assert_close(net(pairs.expand(2, -1, -1)), net(pairs))


def test_losses_are_their_definitions_with_coupled_decay():
    group = load_group("Z5")
    net, pairs = TwoLayer(5, 6, seeds=(0, 1)).double(), group.pairs[:11]
    labels, o = group.table.flatten()[:11].expand(2, -1), net(pairs)
    y = torch.nn.functional.one_hot(labels, 5).double()
    apart = (o - o.mean(-1, keepdim=True)) - (y - 1 / 5)
    weights = sum(p.square().sum() for p in net.parameters())
    expected = {
        "centred": apart.square().sum(-1).mean(1).sum(),
        "cross-entropy": -(o.log_softmax(-1) * y).sum(-1).mean(1).sum(),
    }
    for kind, value in expected.items():
        torch.testing.assert_close(group_loss(kind, 0.0)(net, (pairs, labels))[0], value)
        torch.testing.assert_close(group_loss(kind, 0.3)(net, (pairs, labels))[0], value + 0.15 * weights)


def test_nets_side_by_side_learn_as_alone():
    group = load_group("Z5")
    both = GroupSplit.random(group, 0.6, seeds=(0, 7))
    found = grok(both, replace(FEW, seeds=(0, 7)))
    alone = grok(GroupSplit.random(group, 0.6, seeds=(7,)), replace(FEW, seeds=(7,)))
    torch.testing.assert_close(found.net.W[1], alone.net.W[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.net.V[1], alone.net.V[0], rtol=1e-4, atol=1e-6)


def test_a_split_parts_all_pairs():
    split = GroupSplit.random(load_group("S3"), 0.5, seeds=(0, 1))
    for known, unseen in zip(split.known, split.unseen, strict=True):
        assert len({tuple(p) for p in torch.cat([known, unseen]).tolist()}) == 36
    assert not torch.equal(split.known[0], split.known[1])
    assert split.labels(split.known).shape == (2, 18)


@pytest.mark.slow
def test_modular_addition_is_grokked_with_decay():
    split = GroupSplit.random(load_group("Z13"), 0.8, seeds=(0,))
    found = grok(split, GrokConfig(width=128), until=0.9)
    assert found.epoch(0, share=0.9) < 1500
    assert max(accuracies(found.net, split, split.known)) > 0.9


@pytest.mark.parametrize("optimizer", [{"W.*": "muon", "*": "adamw"}, "adamw"])
def test_it_learns_with_muon_on_the_features(optimizer, tmp_path):
    fit = replace(FEW.fit, optimizer=optimizer, betas=(0.95, 0.999), lr=0.02, steps=150, checkpoint_every=75)
    found = grok(GroupSplit.random(load_group("Z5"), 0.8), replace(FEW, width=32, fit=fit), out=tmp_path)
    assert found.rows[-1]["known"] > 0.6


def test_a_scan_keeps_what_is_done_and_finds_the_smallest_share(tmp_path):
    config = replace(FEW, seeds=(0, 1))
    rows = tasks.sample_scan(["Z3", "S3"], [0.5, 0.7], config, tmp_path)
    assert [(row["group"], row["share"], row["order"]) for row in rows] == [
        ("Z3", 0.5, 3), ("Z3", 0.7, 3), ("S3", 0.5, 6), ("S3", 0.7, 6),
    ]  # fmt: skip
    files = sorted(tmp_path.rglob("result.json"))
    times = [file.stat().st_mtime_ns for file in files]
    assert tasks.sample_scan(["Z3", "S3"], [0.5, 0.7], config, tmp_path) == rows
    assert [file.stat().st_mtime_ns for file in files] == times
    made = [{"group": "a", "share": p, "grokked": n} for p, n in ((0.7, 3), (0.3, 1), (0.5, 2))]
    assert tasks.smallest_shares(made, 2) == {"a": 0.5}
    assert tasks.smallest_shares(made, 4) == {"a": math.inf}


def test_the_law_is_fitted_through_the_finite_points():
    exact = {M: 2 * math.log(M) / M for M in (13, 23, 31)} | {7: math.inf}
    c, fit = tasks.law_fit(exact)
    assert c == pytest.approx(2)
    assert fit == pytest.approx(1)
    assert tasks.critical_share(24, 3) == pytest.approx(1.5 * tasks.critical_share(24))
    with pytest.raises(InputError, match="1 groups reached"):
        tasks.law_fit({7: math.inf, 11: 0.5})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: GroupSplit.random(load_group("Z3"), 1.0), "leaves a part empty"),
        (lambda: GrokConfig(loss="mse"), "unknown loss 'mse'"),
        (lambda: GrokConfig(seeds=()), "seeds \\(\\)"),
        (lambda: TwoLayer(3, 4, activation="cube"), "unknown activation"),
        (lambda: TwoLayer(3, 0), "width 0"),
        (lambda: grok(GroupSplit.random(load_group("Z3"), 0.5, seeds=(0, 1)), FEW), "2 seeds and the nets of 1"),
    ],
)
def test_what_cannot_be_learned_is_refused(make, match):
    with pytest.raises(InputError, match=match):
        make()


def test_the_top_layer_may_start_at_nothing():
    net = TwoLayer(5, 8, top=0.0)
    assert float(net.V[0].detach().abs().max()) == 0
    assert float(net.W[0].detach().abs().max()) > 0
    assert train.FitConfig(steps=1, optimizer={"W.*": "muon", "*": "adamw"}).optimizer_of("V.0") == "adamw"
