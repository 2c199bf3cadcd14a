"""Token by token equals the whole sequence, in place: by operators and, where numba is, by a compiled loop."""

import pytest
import torch
from recurrence_problems import problem, run

from lineament._base.extras import available
from lineament.ops import compiled
from lineament.ops.recurrence import decayed_step_, delta_step_, step


@pytest.fixture(autouse=True, params=["operators", "loop"])
def way(request, monkeypatch):
    """Do every step of the module in both ways, and see that it was that way."""
    if request.param == "loop" and not available("numba"):
        pytest.skip("numba is not installed")
    calls, run_loop = [], step._looped
    monkeypatch.setattr(compiled, "available", lambda _: request.param == "loop")
    monkeypatch.setattr(step, "_looped", lambda *args: calls.append(1) or run_loop(*args))
    yield
    assert bool(calls) == (request.param == "loop")


@pytest.mark.parametrize("heads", [(2, 2, 2), (4, 2, 2), (2, 4, 2), (1, 2, 4), (4, 4, 1)])
@pytest.mark.parametrize("gate", ["none", "head", "channel"])
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_steps_equal_the_sequence(delta, gate, heads):
    p = problem(9, heads, gate=gate, delta=delta)
    state, o = p.state.clone(), []
    for t in range(9):
        q, k, v, beta, gate_t = (None if x is None else x[:, t] for x in p.tensors()[:5])
        if delta:
            o.append(delta_step_(q, k, v, beta, gate_t, state))
        else:
            o.append(decayed_step_(q, k, v, gate_t, state))
    torch.testing.assert_close((torch.stack(o, 1), state), run(p))


@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_a_step_writes_where_it_is_told(delta):
    p = problem(1, (4, 2, 2), delta=delta, dtype=torch.bfloat16)
    state = p.state.float()
    place, out = state.data_ptr(), torch.empty(2, 4, 5)
    q, k, v, gate = p.q[:, 0], p.k[:, 0], p.v[:, 0], p.log_decay[:, 0]
    beta = [p.beta[:, 0]] if delta else []
    found = (delta_step_ if delta else decayed_step_)(q, k, v, *beta, gate, state, out)
    assert found is out
    assert state.data_ptr() == place
    wanted, last = run(p.map(torch.Tensor.float))
    torch.testing.assert_close((out[:, None], state), (wanted, last))


def test_a_gate_of_minus_infinity_forgets():
    p = problem(1, gate="head")
    state = p.state.clone()
    decayed_step_(p.q[:, 0], p.k[:, 0], p.v[:, 0], torch.full((2, 2), -torch.inf), state)
    torch.testing.assert_close(state, p.k[:, 0, :, :, None] * p.v[:, 0, :, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_that_is_a_view_is_changed_all_the_same(dtype, monkeypatch):
    p = problem(2, (4, 2, 2), dtype=dtype)
    wide = torch.zeros(2, 2, 6, 9, dtype=dtype)
    view = wide[..., 2:7]
    decayed_step_(p.q[:, 0], p.k[:, 0], p.v[:, 0], None, view)
    whole = torch.zeros(2, 2, 6, 5, dtype=dtype)
    decayed_step_(p.q[:, 0], p.k[:, 0], p.v[:, 0], None, whole)  # in one piece, so by the loop where there is one
    torch.testing.assert_close(view, whole)


def test_a_step_that_is_differentiated_runs_by_operators():
    p = problem(2, (2, 2, 2))
    q = p.q[:, 0].clone().requires_grad_()
    o = decayed_step_(q, p.k[:, 0], p.v[:, 0], None, p.state.clone())
    o.sum().backward()
    torch.testing.assert_close(q.grad, (p.state + p.k[:, 0, :, :, None] * p.v[:, 0, :, None]).sum(-1))
    with torch.no_grad():
        decayed_step_(q, p.k[:, 0], p.v[:, 0], None, p.state.clone())


def test_why_a_loop_can_not_run(monkeypatch):
    state = torch.zeros(2, 2, 3, 3)
    if not compiled.available("numba"):
        assert "lineament[cpu]" in compiled.refused(state)
    else:
        assert compiled.refused(state) is None
        assert "torch.bfloat16" in compiled.refused(state.bfloat16())
        assert "float64 beside" in compiled.refused(state, state.double())
        assert "view" in compiled.refused(state.mT)
        with monkeypatch.context() as machine:
            machine.setattr(compiled, "LARGE", 8)
            machine.setattr(torch, "get_num_threads", lambda: 16)
            assert "16 threads" in compiled.refused(state)
    decayed_step_(*(torch.zeros(2, 2, 3),) * 3, None, state)
