"""Two gloo processes show the losses of one."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest

WORKER = """
    import sys
    from torch import nn
    from accelerate import Accelerator
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
"""


def run(out, accumulate, world, inside=False):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = textwrap.dedent(WORKER).format(
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
