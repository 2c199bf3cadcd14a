"""Kar3 against its equations, and inside the loop."""

import pytest
import torch
from torch import nn

from lineament._base.errors import InputError
from lineament.train import FitConfig, Kar3, fit


def test_three_steps_are_the_equations():
    p = nn.Parameter(torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64))
    optimizer, wanted, fast, slow = Kar3([p], lr=0.1), p.detach().clone(), 0.0, 0.0
    for g in torch.tensor([[1.0, -2.0, 0.0], [-0.1, 1.0, 0.0], [-5.0, 1.0, 2.0]], dtype=torch.float64):
        p.grad = g
        optimizer.step()
        wanted = wanted - 0.1 * (g.sign() + torch.as_tensor(fast).sign() + torch.as_tensor(slow).sign())
        fast, slow = 0.5 * fast + 0.5 * g, 0.95 * slow + 0.05 * g
        torch.testing.assert_close(p.detach(), wanted)


def test_the_loop_takes_it_by_name_and_resumes(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Linear(3, 2)

    def batch(step):
        return torch.randn(8, 3, generator=torch.Generator().manual_seed(step))

    def loss(m, x):
        return (m(x) - x[:, :2]).square().mean(), {}

    def stop(step, numbers):
        if step == 6:
            raise KeyError

    config = FitConfig(steps=12, lr=1e-2, optimizer="kar3", betas=(0.5, 0.95), checkpoint_every=5)
    whole, again, seen = net(), net(), []
    fit(whole, batch, loss, config, on_step=lambda step, numbers: seen.append(numbers["loss"]))
    with pytest.raises(KeyError):
        fit(net(), batch, loss, config, out=tmp_path, on_step=stop)
    fit(again, batch, loss, config, out=tmp_path)
    assert torch.equal(whole.weight, again.weight)
    assert seen[-1] < seen[0]


def test_wrong_settings_are_named():
    with pytest.raises(InputError, match="betas"):
        Kar3([nn.Parameter(torch.zeros(1))], betas=(0.5, 1.0))
