import json
import os
import signal
import subprocess
import sys
import textwrap
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import nn

from lineament._base.errors import InputError
from lineament.io import open_weights
from lineament.train import FitConfig, TrainingError, fit, to_device
from lineament.train.loop import _rows

CONFIG = FitConfig(steps=10, lr={"*.bias": 1e-1, "*": 1e-2}, warmup=2, checkpoint_every=5, weight_decay=0.1, seed=3)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2)).train()


def batches(step):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    return {"x": x, "y": x[:, :2].sin()}


def loss(model, batch):
    error = (model(batch["x"]) - batch["y"]).square().mean()
    return error, {"error": error.item()}


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_lowers_the_loss_and_logs_every_step(tmp_path):
    seen = []
    fitted = fit(network(), batches, loss, CONFIG, out=tmp_path, on_step=lambda step, n: seen.append(n["loss"]))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10))
    assert [line["loss"] for line in lines] == seen
    assert fitted.steps == 10
    assert sum(seen[-3:]) < sum(seen[:3])


def test_gradients_left_from_before_are_not_of_the_run():
    model, fresh = network().eval(), network().eval()
    loss(model, batches(99))[0].backward()
    for net in (model, fresh):
        fit(net, batches, loss, FitConfig(steps=1, optimizer="sgd", clip=None))
    assert torch.equal(weights(model), weights(fresh))


def test_batches_may_be_named_tuples():
    class Batch(NamedTuple):
        x: torch.Tensor
        parts: list[torch.Tensor]

    found = to_device(Batch(torch.ones(2), [torch.ones(1)]), torch.device("meta"))
    assert isinstance(found, Batch)
    assert found.x.is_meta
    assert found.parts[0].is_meta
    half = _rows(Batch(torch.arange(4), [torch.arange(2)]), 1, 2)
    assert (half.x.tolist(), half.parts[0].tolist()) == ([2, 3], [1])


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_run_alone_is_the_plain_loop_to_the_bit(clip):
    model, plain = network().eval(), network().eval()
    config = FitConfig(steps=6, lr=1e-2, schedule="constant", weight_decay=0.1, clip=clip)
    fit(model, batches, loss, config)
    groups = [[p for p in plain.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], lr=1e-2,
        betas=config.betas, eps=config.eps,
    )  # fmt: skip
    for step in range(6):
        loss(plain, batches(step))[0].backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(plain.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(weights(model), weights(plain))


class Stop(Exception):
    pass


def test_the_optimizer_and_running_means_come_back_to_the_bit(tmp_path):
    def normed():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).train()

    def interrupt(step, numbers):
        if step == 6:
            raise Stop

    whole, again = normed(), normed()
    fit(whole, batches, loss, CONFIG, out=tmp_path / "whole")
    with pytest.raises(Stop):
        fit(normed(), batches, loss, CONFIG, out=tmp_path / "again", on_step=interrupt)
    fit(again, batches, loss, CONFIG, out=tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    one, two = (open_weights(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "again"))
    assert one.names == two.names
    assert {n.split(":")[1] for n in one.names if n.startswith("state:")} == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(one.load(n), two.load(n)) for n in one.names)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    config = FitConfig(steps=1)
    one, five = nn.Linear(4, 1, bias=False), nn.Linear(4, 5, bias=False)
    fit(one, batches, lambda model, batch: (model(batch["x"]).mean(), {}), config, out=tmp_path)
    with pytest.raises(InputError, match="holds weight in another shape"):  # and not one row for all five
        fit(five, batches, lambda model, batch: (model(batch["x"]).mean(), {}), config, out=tmp_path)


@pytest.mark.parametrize("at", [5, 7, 9])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, at):
    whole = network()
    fit(whole, batches, loss, CONFIG)

    def interrupt(step, numbers):
        if step == at:
            raise Stop

    with pytest.raises(Stop):
        fit(network(), batches, loss, CONFIG, out=tmp_path, on_step=interrupt)
    again = network()
    fit(again, batches, loss, CONFIG, out=tmp_path)
    assert torch.equal(weights(whole), weights(again))
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(10))


def test_a_run_that_on_step_ended_is_over_when_called_again(tmp_path):
    ended, again, longer, whole = (network() for _ in range(4))
    assert fit(ended, batches, loss, CONFIG, out=tmp_path, on_step=lambda step, n: step == 3).steps == 4
    seen = []
    assert fit(again, batches, loss, CONFIG, out=tmp_path, on_step=lambda step, n: seen.append(step)).steps == 4
    assert not seen
    assert torch.equal(weights(ended), weights(again))
    assert fit(longer, batches, loss, CONFIG, out=tmp_path).steps == 10  # without a reason to end it goes on
    fit(whole, batches, loss, CONFIG)
    assert torch.equal(weights(whole), weights(longer))


def test_without_resume_the_run_starts_anew(tmp_path):
    fit(network(), batches, loss, CONFIG, out=tmp_path)
    seen = []
    fit(network(), batches, loss, CONFIG, out=tmp_path, resume=False, on_step=lambda step, n: seen.append(step))
    assert seen == list(range(10))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    fit(network(), batches, loss, CONFIG, out=tmp_path)
    with pytest.raises(InputError, match="other settings"):
        fit(network(), batches, loss, FitConfig(steps=10, lr=0.5), out=tmp_path)
    with pytest.raises(InputError, match="other parameters"):
        fit(nn.Sequential(nn.Linear(4, 2)), batches, loss, CONFIG, out=tmp_path)


def test_accumulation_equals_one_large_batch():
    config = {"lr": 1e-2, "clip": None, "steps": 3, "optimizer": "sgd"}
    small, large = network().eval(), network().eval()
    fit(small, batches, loss, FitConfig(accumulate=2, **config))

    def pairs(step):
        parts = batches(2 * step), batches(2 * step + 1)
        return {name: torch.cat([part[name] for part in parts]) for name in ("x", "y")}

    fit(large, pairs, loss, FitConfig(**config))
    torch.testing.assert_close(weights(small), weights(large))


def test_only_what_requires_a_gradient_learns_and_globs_set_its_rate():
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    fit(model, batches, loss, FitConfig(steps=2, lr={"2.weight": 1e-2, "2.bias": 0.0}))
    assert torch.equal(before, model[0].weight)
    with pytest.raises(InputError, match=r"no learning rate for 2\.bias"):
        fit(model, batches, loss, FitConfig(steps=2, lr={"*weight": 1e-2}))
    with pytest.raises(InputError, match="nothing can learn"):
        fit(model.requires_grad_(False), batches, loss, CONFIG)


def test_a_loss_that_is_no_number_names_its_step():
    def broken(model, batch):
        value, numbers = loss(model, batch)
        return value * float("nan"), numbers

    with pytest.raises(TrainingError, match="the loss is not a number at step 0"):
        fit(network(), batches, broken, CONFIG)


def test_bf16_keeps_float32_weights():
    model = network()
    fit(model, batches, loss, FitConfig(steps=2, precision="bf16"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("schedule", "cosin", "Did you mean 'cosine'"),
        ("steps", -1, "at least 0"),
        ("precision", "fp8", "unknown"),
        ("lr", {"*.bias": 0.1, "*": -1e-3}, "expected at least 0"),
        ("lr", float("nan"), "expected at least 0"),
        ("weight_decay", -0.1, "expected at least 0"),
        ("clip", 0.0, "above 0"),
        ("clip", -1.0, "above 0"),
    ],
)
def test_wrong_settings_are_named(field, value, said):
    with pytest.raises(InputError, match=said):
        FitConfig(**{"steps": 1, field: value})


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_schedules_rise_to_one_and_end_low(schedule):
    factors = [FitConfig(steps=20, schedule=schedule, warmup=4).factor(step) for step in range(20)]
    assert max(factors) == 1.0
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(a >= b for a, b in pairwise(factors[4:]))
    assert (factors[-1] < 0.4) is (schedule != "constant")


SCRIPT = """
    import os, signal, sys, torch
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_fit import batches, loss, network, weights
    from lineament.train import FitConfig, fit
    config = FitConfig(steps=12, lr=1e-2, checkpoint_every=2, seed=3)
    def act(step, numbers):
        if step == {at}:
            os.kill(os.getpid(), {number})
    model = network()
    fit(model, batches, loss, config, out={out!r}, on_step=act)
    torch.save(weights(model), {out!r} + "/weights.pt")
"""


def launch(tmp_path, at, number):
    here = os.path.dirname(__file__)
    code = textwrap.dedent(SCRIPT).format(tests=here, at=at, number=int(number), out=str(tmp_path))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=290, check=False)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_interrupted_the_same_call_goes_on_to_the_same_bits(tmp_path, number):
    whole = network()
    fit(whole, batches, loss, FitConfig(steps=12, lr=1e-2, checkpoint_every=2, seed=3))
    first = launch(tmp_path, 6, number)
    assert first.returncode != 0
    second = launch(tmp_path, -1, 0)
    assert second.returncode == 0, second.stderr
    assert torch.equal(torch.load(tmp_path / "weights.pt", weights_only=True), weights(whole))
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in first.stderr
