"""Several optimisers in one run: each steps its own, it resumes to the bit, and Muon is torch's."""

import pytest
import torch
from torch import nn

from lineament._base.errors import InputError
from lineament.train import FitConfig, fit


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(step):
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(step))


def loss(model, batch):
    return (model(batch) - batch[:, :3]).square().mean(), {}


MIXED = {"0.weight": "muon", "2.*": "sgd", "*": "adamw"}


def test_each_optimizer_steps_its_own_parameters_as_it_would_alone():
    model, config = net(), FitConfig(steps=3, schedule="constant", optimizer=MIXED, betas=(0.9, 0.99), clip=None)
    other = net()
    parts = [
        torch.optim.Muon([other[0].weight], lr=1e-3, weight_decay=0.0, momentum=0.9, nesterov=False),
        torch.optim.AdamW([other[0].bias], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0),
        torch.optim.SGD(other[2].parameters(), lr=1e-3, momentum=0.9),
    ]
    fit(model, batches, loss, config)
    for step in range(3):
        loss(other, batches(step))[0].backward()
        for part in parts:
            part.step()
            part.zero_grad()
    for mine, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)


def test_a_run_that_is_cut_goes_on_to_the_same_end(tmp_path):
    config = FitConfig(steps=6, optimizer=MIXED, checkpoint_every=3)
    whole, cut = net(), net()
    fit(whole, batches, loss, config)

    def killed(step, numbers):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(cut, batches, loss, config, out=tmp_path, on_step=killed)
    again = net()
    fit(again, batches, loss, config, out=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_a_run_ends_where_its_caller_has_enough():
    assert fit(net(), batches, loss, FitConfig(steps=9), on_step=lambda step, numbers: step == 4).steps == 5
    assert fit(net(), batches, loss, FitConfig(steps=9), on_step=lambda step, numbers: None).steps == 9


def test_muon_makes_a_rectangular_step_nearly_orthogonal():
    """Of torch's five steps of one polynomial, in bfloat16; Tian's five polynomials would keep within .85 to 1.2."""
    layer = nn.Linear(128, 32, bias=False)
    nn.init.zeros_(layer.weight)
    config = FitConfig(steps=1, lr=1.0, schedule="constant", optimizer="muon", betas=(0.0, 0.9), clip=None)
    random = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    fit(layer, lambda step: random, lambda model, batch: ((model.weight * batch).sum(), {}), config)
    values = torch.linalg.svdvals(layer.weight.detach())
    assert 0.6 < values.min() < values.max() < 1.25


@pytest.mark.parametrize(
    ("optimizer", "match"),
    [
        ("muom", "Did you mean 'muon'"),
        ({"*": "adam"}, "unknown optimizer 'adam'"),
        ("muon", "0.bias is \\[8\\]; Muon is for matrices"),
        ({"*.weight": "muon"}, "no optimizer for 0.bias"),
    ],
)
def test_an_optimizer_that_is_none_or_does_not_fit_is_named(optimizer, match):
    with pytest.raises(InputError, match=match):
        fit(net(), batches, loss, FitConfig(steps=1, optimizer=optimizer))
