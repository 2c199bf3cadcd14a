"""Two gloo processes show the losses of one."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch

from lineament._base.errors import InputError
from lineament.io import open_weights
from lineament.train.sharded import sharded

WORKER = """
    import sys
    from torch import nn
    from accelerate import Accelerator, PartialState
    sys.path.insert(0, {tests!r})
    from test_fit import batches, network
    import test_fit

    def loss(model, batch):  # not through the model's own forward, and not of all that may learn
        error = (nn.functional.linear(model[0](batch["x"]), model[2].weight) - batch["y"]).square().mean()
        return error, {{"error": error.item()}}

    loss = loss if {inside} else test_fit.loss
    from lineament.train import FitConfig, fit
    config = FitConfig(steps=6, lr=1e-2, accumulate={accumulate})
    model = network().eval()
    fit(model, batches, loss, config, out={out!r}, accelerator=None if {inside} else Accelerator(cpu=True))
    PartialState().destroy_process_group()
"""

SHARDED = """
    import sys
    import torch
    from accelerate import PartialState
    sys.path.insert(0, {tests!r})
    from test_fit import batches, loss, network
    from lineament.io import save_tensors
    from lineament.train import FitConfig, fit
    from lineament.train.sharded import gather_, leave_group, sharded

    PartialState(cpu=True)
    config = FitConfig(steps=6, lr=1e-2, accumulate={accumulate}, checkpoint_every=2)

    def stop(step, numbers):
        if step == 4:  # after the checkpoint of step 4, before that of step 6
            raise ValueError

    for interrupted in (True, False):
        model = network().eval()
        model[0].bias.requires_grad_(False)
        twin = sharded(model, [model[0]], torch.device("cpu")) if PartialState().num_processes > 1 else model
        try:
            fit(twin, batches, loss, config, out={out!r}, on_step=stop if interrupted else None)
        except ValueError:
            continue
        gather_(model, twin)
    if PartialState().is_main_process:
        save_tensors({{name: p.detach() for name, p in model.named_parameters()}}, {out!r} + "/end.safetensors")
    leave_group()
"""


LEAVES = """
    import atexit
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from lineament.train import leave_group

    leave_group()  # without a group: nothing
    atexit.register(print, "exit functions run")
    dist.init_process_group("gloo", init_method={store!r}, rank=0, world_size=1)
    print(distribute_tensor(torch.ones(2, 2), init_device_mesh("cpu", (1,)), [Shard(0)]).full_tensor().sum().item())
    leave_group()
    print("never said")
"""


def test_a_process_leaves_its_group_and_ends(tmp_path):
    script = textwrap.dedent(LEAVES).format(store=(tmp_path / "store").as_uri())
    job = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert job.stdout.splitlines() == ["4.0", "exit functions run"]


def run(out, accumulate, world, inside=False, worker=WORKER):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = textwrap.dedent(worker).format(
        tests=os.path.dirname(__file__), accumulate=accumulate, out=str(out), inside=inside
    )
    common = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    if world > 1:
        common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    jobs = []
    for rank in range(world):
        mine = dict(common, RANK=str(rank), LOCAL_RANK=str(rank)) if world > 1 else common
        jobs.append(subprocess.Popen([sys.executable, "-c", code], env=mine, stderr=subprocess.PIPE, text=True))
    for job in jobs:
        _, said = job.communicate(timeout=400)
        assert job.returncode == 0, said[-2000:]
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_show_the_losses_of_one(tmp_path, accumulate):
    one, two = run(tmp_path / "one", accumulate, 1), run(tmp_path / "two", accumulate, 2)
    assert len(one) == len(two) == 6
    assert one == pytest.approx(two, abs=1e-5)


def test_a_loss_may_look_inside_the_model_that_several_processes_train(tmp_path):
    one, two = run(tmp_path / "one", 2, 1, inside=True), run(tmp_path / "two", 2, 2, inside=True)
    assert one == pytest.approx(two, abs=1e-5)


def test_a_model_sharded_over_two_processes_goes_on_after_a_stop_and_ends_as_that_of_one(tmp_path):
    one, two = run(tmp_path / "one", 2, 1, worker=SHARDED), run(tmp_path / "two", 2, 2, worker=SHARDED)
    assert len(one) == len(two) == 6
    assert one == pytest.approx(two, abs=1e-5)
    alone, together = (open_weights(tmp_path / name / "end.safetensors") for name in ("one", "two"))
    for name in alone.names:
        torch.testing.assert_close(together.load(name), alone.load(name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("weight", [torch.zeros(2, 2, dtype=torch.int8), torch.zeros(())], ids=["quantised", "scalar"])
def test_weights_that_fsdp_cannot_take_are_named(monkeypatch, weight):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    model = torch.nn.ParameterDict({"weight": torch.nn.Parameter(weight, requires_grad=False)})
    with pytest.raises(InputError, match=r"weight .* can't be sharded: FSDP takes plain floating-point weights"):
        sharded(model, [], torch.device("cpu"))


def test_weights_that_learn_in_two_dtypes_are_refused(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16())
    with pytest.raises(InputError, match="bfloat16 and float32; FSDP needs one dtype"):
        sharded(model, [], torch.device("cpu"))


def test_one_process_has_nothing_to_shard():
    with pytest.raises(InputError, match="accelerate launch"):
        sharded(torch.nn.Linear(2, 2), [], torch.device("cpu"))
