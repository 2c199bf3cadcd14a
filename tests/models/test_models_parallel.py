"""Whole models over several processes: pure and hybrid students, packed rows, DDP, `accelerate launch`."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lineament.models import sequence_parallel_loss, tiny

WORKER = Path(__file__).with_name("parallel_worker.py")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    """What the first process of `accelerate launch` wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    out = tmp_path_factory.mktemp("models") / "found.json"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
              "--num_processes", str(request.param), "--mixed_precision", "no", "--main_process_ip", "127.0.0.1",
              "--main_process_port", port, "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]  # fmt: skip
    mine = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    job = subprocess.run(
        [*launch, str(WORKER), str(out)], env=mine, capture_output=True, text=True, timeout=400, check=False
    )  # fmt: skip
    assert job.returncode == 0, job.stderr[-3000:]
    result = json.loads(out.read_text())
    assert result["processes"] == request.param
    return result


def test_loss_and_every_gradient_are_those_of_one_process(found):
    assert len(found["errors"]) >= 5
    for name, errors in found["errors"].items():
        assert max(errors.values()) < 1e-6, (name, max(errors.items(), key=lambda item: item[1]))


def test_a_cache_and_padding_are_refused(found):
    assert "keeps no cache" in found["refused"][0]
    assert "pack documents" in found["refused"][1]


def test_the_loss_needs_processes():
    with pytest.raises(ValueError, match="accelerate launch"):
        sequence_parallel_loss(tiny("llama", "kda"), torch.zeros(1, 4, dtype=torch.long))
