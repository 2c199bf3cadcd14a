"""Token by token equals the whole sequence, in place."""

import pytest
import torch
from recurrence_problems import problem, run

from lineament.ops.recurrence import decayed_step_, delta_step_


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
