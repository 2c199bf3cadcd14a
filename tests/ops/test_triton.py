"""The Triton kernels under Triton's interpreter, in a process of its own: a kernel reads the switch when defined."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recurrence_problems import GATES, everything, problem, worst

from lineament.ops.recurrence import BACKENDS_DECAYED, decayed_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that interprets the kernels")
pytest.importorskip("triton")


def same(p, tolerance, **options):
    errors = worst(everything(p, "triton", **options), everything(p.map(torch.Tensor.double), "reference"))
    assert max(errors.values()) < tolerance, errors


@pytest.mark.skipif(INTERPRETED, reason="starts the process that interprets the kernels")
def test_the_kernels_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels can run here")
def test_without_a_gpu_the_reason_is_given():
    x = torch.zeros(1, 1, 1, 1)
    assert "need a GPU" in (BACKENDS_DECAYED["triton"].usable(x) or "")
    with pytest.raises(RuntimeError, match="need a GPU"):
        decayed_attention(x, x, x, backend="triton")


@interpreted
@pytest.mark.parametrize("T", [1, 16, 17, 33])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_kernels_equal_the_reference_with_gradients(delta, gate, T):
    same(problem(T, (1, 1, 1), B=1, gate=gate, delta=delta), 1e-9, chunk_size=16)


@interpreted
@pytest.mark.parametrize("heads", [(4, 2, 2), (2, 4, 2), (2, 1, 2)])
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_heads_repeat_consecutively(delta, heads):
    same(problem(18, heads, B=2, delta=delta, K=17, V=4), 1e-9, chunk_size=16)


@interpreted
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_float32_and_gates_of_any_strength(delta, gate):
    same(problem(40, (1, 1, 1), B=1, gate=gate, delta=delta, strength=30.0, dtype=torch.float32), 1e-4)


@interpreted
def test_many_value_blocks_and_half_precision():
    p = problem(20, (1, 1, 1), B=1, K=32, V=100, gate="head", dtype=torch.float32)
    same(p, 1e-4)
    low = p.map(lambda x: x.bfloat16())
    wanted = everything(low.map(torch.Tensor.double), "reference")["o"]
    got = everything(low, "triton")["o"].double()
    assert (got - wanted).norm() / wanted.norm() < 1e-2
