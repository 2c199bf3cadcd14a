"""Extreme gates, half precision and wide dtypes."""

from dataclasses import replace

import pytest
import torch
from recurrence_problems import everything, problem, run, worst

TINY = 1e-6
GATES = {
    "all -inf": [-torch.inf],
    "all 0": [0.0],
    "all -1e-6": [-TINY],
    "all -50": [-50.0],
    "62 of -50, then small": [-50.0] * 62 + [-1e-3] * 8,
    "mixture": [0.0, -50.0, -TINY, -torch.inf, -1e-3, -3.0, -1e3, -90.0, 0.0, -2e3],
}


def with_gates(values, gate, *, delta, dtype):
    T = 130
    row = torch.tensor([values[i % len(values)] for i in range(T)], dtype=dtype)
    p = problem(T, gate=gate, delta=delta, dtype=dtype, K=16, V=16, B=1)
    if gate == "head":
        return replace(p, log_decay=row.view(1, T, 1).repeat(1, 1, 2))
    rolled = torch.stack([row.roll(7 * channel) for channel in range(16)], -1)
    return replace(p, log_decay=rolled.view(1, T, 1, 16).repeat(1, 1, 2, 1))


@pytest.mark.parametrize("backend", ["chunked", "chunked-autograd"])
@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
@pytest.mark.parametrize("name", GATES)
def test_extreme_gates_are_exact(name, delta, gate, backend):
    p = with_gates(GATES[name], gate, delta=delta, dtype=torch.float32)
    found = everything(p, backend)
    assert all(x.isfinite().all() for x in found.values())
    errors = worst(found, everything(p.map(torch.Tensor.double), "reference"))
    assert max(errors.values()) < 1e-5, errors  # measured: at most 2e-6


@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_extreme_gates_in_float64(delta, gate):
    p = with_gates(GATES["mixture"], gate, delta=delta, dtype=torch.float64)
    errors = worst(everything(p, "chunked"), everything(p, "reference"))
    assert max(errors.values()) < 1e-12, errors


def test_a_small_sum_behind_large_gates_keeps_its_digits():
    values = torch.tensor([-50.0] * 56 + [-1e-3] * 8).view(1, 64, 1)
    k, v = torch.zeros(1, 64, 1, 1), torch.ones(1, 64, 1, 1)
    k[:, 55] = 1.0
    for gate in (values, values[..., None]):
        o, _ = run(replace(problem(), q=torch.ones(1, 64, 1, 1), k=k, v=v, beta=None, log_decay=gate, state=None))
        torch.testing.assert_close(o[0, 55:, 0, 0], torch.arange(9).mul(-1e-3).exp(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_no_gradient_where_a_gate_was_clamped(gate):
    p = problem(20, gate=gate)
    clamped = torch.zeros_like(p.log_decay, dtype=torch.bool)
    clamped[:, ::3] = True
    p = replace(p, log_decay=torch.where(clamped, -2e3, p.log_decay))
    for backend in ("chunked", "chunked-autograd", "reference"):
        grad = everything(p, backend)["log_decay"]
        assert (grad[clamped] == 0).all()
        assert (grad[~clamped] != 0).any()


@pytest.mark.parametrize("strength", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("gate", ["none", "head", "channel"])
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_float32_stays_close_to_float64(delta, gate, strength):
    p = problem(200, gate=gate, delta=delta, dtype=torch.float32, K=32, V=32, strength=strength)
    errors = worst(everything(p, "chunked"), everything(p.map(torch.Tensor.double), "reference"))
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("gate", ["none", "head", "channel"])
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_half_precision_in_and_out_with_a_float32_state(delta, gate, dtype, bound):
    p = problem(130, gate=gate, delta=delta, dtype=dtype, K=16, V=16)
    found = everything(p, "chunked")
    assert found["o"].dtype == found["q"].dtype == dtype
    assert run(p)[1].dtype == torch.float32
    errors = worst(found, everything(p.map(torch.Tensor.double), "reference"))
    assert max(errors.values()) < bound, errors  # one rounding of the results; the arithmetic is float32


def test_the_state_may_be_wider_than_the_inputs():
    p = problem(20, dtype=torch.float32)
    o, last = run(replace(p, state=p.state.double()))
    assert (o.dtype, last.dtype) == (torch.float32, torch.float64)
