"""The Triton kernels under Triton's interpreter, in a process of its own: a kernel reads the switch when defined."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recurrence_problems import GATES, everything, problem, worst

from lineament.ops.recurrence import BACKENDS_DECAYED, decayed_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that interprets the kernels")
triton = pytest.importorskip("triton")
from lineament.ops.recurrence import triton_decayed, triton_launch  # noqa: E402 (they import triton)


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
@pytest.mark.parametrize("strength", [1.0, 30.0], ids=["mild", "strong"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_chunks_of_64_solve_and_pair_by_four_blocks_of_16(monkeypatch, delta, gate, strength):
    """As bfloat16 goes on a GPU. Strong gates per channel take sixteen rows at a time, mild ones a chunk at once."""
    monkeypatch.setattr(triton_launch, "CHUNK_WIDE", 64)
    same(problem(70, (1, 1, 1), B=1, gate=gate, delta=delta, strength=strength), 1e-9)


@interpreted
@pytest.mark.parametrize("fills", [0.0, math.inf], ids=["one walk", "two launches"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_outputs_from_the_walk_or_from_a_launch_of_their_own(monkeypatch, delta, gate, fills):
    monkeypatch.setattr(triton_decayed, "FILLS", fills)
    same(problem(40, (4, 2, 2), B=1, K=20, V=40, gate=gate, delta=delta), 1e-9)


@interpreted
@pytest.mark.parametrize("strength", [1.0, 30.0], ids=["mild", "strong"])
@pytest.mark.parametrize("fills", [0.0, math.inf], ids=["one walk", "two launches"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_widths_of_whole_blocks_that_are_no_power_of_two(monkeypatch, delta, gate, fills, strength):
    """96 values are three blocks of 32, and a fourth would be the next head's; 48 keys three of 16."""
    monkeypatch.setattr(triton_decayed, "FILLS", fills)
    same(problem(18, (2, 1, 2), B=1, K=48, V=96, gate=gate, delta=delta, strength=strength), 1e-9, chunk_size=32)


@interpreted
def test_keys_that_are_nearly_equal_solve_without_cancellation(monkeypatch):
    """L is then almost all ones: powers of it would grow like binomials and lose every digit."""
    monkeypatch.setattr(triton_launch, "CHUNK_WIDE", 64)
    p = problem(64, (1, 1, 1), B=1, gate="none", dtype=torch.float32)
    p.k.copy_(torch.nn.functional.normalize(torch.ones_like(p.k) + 1e-3 * p.k, dim=-1))
    p.beta.fill_(1.0)
    same(p, 1e-3)


@interpreted
def test_many_value_blocks_and_half_precision():
    p = problem(20, (1, 1, 1), B=1, K=32, V=100, gate="head", dtype=torch.float32)
    same(p, 1e-4)
    low = p.map(lambda x: x.bfloat16())
    wanted = everything(low.map(torch.Tensor.double), "reference")["o"]
    got = everything(low, "triton")["o"].double()
    assert (got - wanted).norm() / wanted.norm() < 1e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fills", [0.0, math.inf], ids=["one walk", "two launches"])
@pytest.mark.parametrize("strength", [0.1, 30.0], ids=["mild", "strong"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_bfloat16_on_a_gpu(monkeypatch, delta, gate, strength, fills):
    monkeypatch.setattr(triton_decayed, "FILLS", fills)
    p = problem(150, (4, 2, 2), K=64, V=96, gate=gate, delta=delta, strength=strength).map(lambda x: x.cuda())
    low = replace(p.map(lambda x: x.bfloat16()), state=p.state.float())
    wanted = everything(low.map(torch.Tensor.double), "reference")
    for name, found in everything(low, "triton").items():
        assert (found.double() - wanted[name]).norm() / wanted[name].norm() < 2e-2, name


@pytest.mark.parametrize(
    ("capability", "ptxas", "newer", "wanted"),
    [((9, 0), "12.8", "13.1", ("TRITON_PTXAS_PATH", "newer")), ((9, 0), "12.8", "12.9", ("DISABLE_MMA_V3", "1")),
     ((9, 0), "12.8", None, ("DISABLE_MMA_V3", "1")), ((9, 0), "13.1", None, None), ((8, 0), "12.8", None, None)],
)  # fmt: skip
def test_hoppers_matrix_instruction_is_assembled_by_a_ptxas_that_gets_it_right_or_left_out(
    monkeypatch, capability, ptxas, newer, wanted
):
    compiler = pytest.importorskip("triton.backends.nvidia.compiler")
    found = {"ptxas": SimpleNamespace(version=ptxas, path="older")}
    if newer is not None:
        found["ptxas_blackwell"] = SimpleNamespace(version=newer, path="newer")
    tools = type("Found", (), found)()  # as Triton's own: found by the class, set on the instance
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton, "knobs", SimpleNamespace(nvidia=tools))
    monkeypatch.setattr(compiler, "get_ptxas_version", lambda arch: ptxas)
    assert triton_launch.setting.__wrapped__(torch.device("cuda")) == wanted
    tools.ptxas = found["ptxas"]  # set by the user, which a path in the environment doesn't change
    if wanted is not None:
        assert triton_launch.setting.__wrapped__(torch.device("cuda")) == ("DISABLE_MMA_V3", "1")


@pytest.mark.parametrize("before", [None, "0"])
def test_the_switch_is_set_for_a_launch_alone(monkeypatch, before):
    """Seen by the compiler itself, so that what it kept of other settings isn't taken for this one."""
    triton_kept = pytest.importorskip("triton._C.libtriton").get_cache_invalidating_env_vars
    monkeypatch.delenv("DISABLE_MMA_V3", raising=False)
    if before is not None:
        monkeypatch.setenv("DISABLE_MMA_V3", before)
    monkeypatch.setattr(triton_launch, "setting", lambda device: ("DISABLE_MMA_V3", "1"))
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    with triton_launch.safe_products(x):
        assert triton_kept()["DISABLE_MMA_V3"] == "true"
    assert os.environ.get("DISABLE_MMA_V3") == before


@interpreted
def test_blocks_that_need_too_much_shared_memory_are_halved(monkeypatch):
    refused, real = [], triton_launch.blocks
    monkeypatch.setattr(triton_launch, "FITTING", {})

    class Small:
        """A card on which only blocks of sixteen values fit."""

        def __init__(self, kernel):
            self.kernel, self.arg_names, self.__name__ = kernel, kernel.arg_names, kernel.__name__

        def __getitem__(self, grid):
            def call(*tensors, **given):
                if given["BV"] > 16 or given["num_stages"] > 1:
                    refused.append(given["BV"])
                    raise triton.OutOfResources(1, 0, "shared memory")
                self.kernel[grid](*tensors, **given)

            return call

    monkeypatch.setattr(triton_decayed, "states_kernel", Small(triton_decayed.states_kernel))
    monkeypatch.setattr(triton_launch, "blocks", lambda name, c: real(name, c) | {"num_stages": 2})
    for _ in range(2):  # the second time it is known
        same(problem(20, (1, 1, 1), B=1, K=4, V=60, gate="head", delta=False), 1e-9)
    assert refused == [32, 32]
    with pytest.raises(RuntimeError, match="shared memory"):
        triton_launch.smaller({"BV": 16, "num_warps": 4, "num_stages": 1})
