"""Under autocast the operators compute what they compute outside it: states and sums are never half precision."""

import pytest
import torch
from recurrence_problems import problem, run

from lineament.ops import compiled
from lineament.ops.linear import linear_attention
from lineament.ops.recurrence import decayed_step_, delta_step_
from lineament.ops.window import empty_state, windowed_linear_attention, windowed_step_


def window_inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    q, k, v, phi_q, phi_k = (
        torch.randn(2, 90, *s, generator=g).to(dtype) for s in ((4, 8), (2, 8), (2, 6), (4, 5), (2, 5))
    )
    return q, k, v, phi_q.abs(), phi_k.abs(), torch.zeros(4)


def same_under_autocast(compute):
    wanted = compute()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = compute()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["chunked", "chunked-autograd", "reference"])
@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_the_recurrence(delta, gate, backend):
    p = problem(40, gate=gate, delta=delta, dtype=torch.float32)
    same_under_autocast(lambda: run(p, backend))


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("sizes", [(5, 1), (0, 0)])
def test_windowed_attention(backend, sizes):
    window, sinks = sizes
    same_under_autocast(
        lambda: windowed_linear_attention(*window_inputs(), window=window, sinks=sinks, backend=backend)
    )


def test_linear_attention():
    _, _, v, phi_q, phi_k, _ = window_inputs()
    same_under_autocast(lambda: linear_attention(phi_q, phi_k, v))


def test_steps_by_operators(monkeypatch):
    monkeypatch.setattr(compiled, "available", lambda _: False)
    q, k, v, phi_q, phi_k, log_scale = (x[:, 0] if x.dim() > 1 else x for x in window_inputs())
    g = torch.Generator().manual_seed(1)
    start, beta = torch.randn(2, 2, 8, 6, generator=g), torch.rand(2, 2, generator=g)

    def windowed():
        state = empty_state(2, 2, 8, 6, 5, window=2, sinks=1, like=k)
        return [windowed_step_(q, k, v, phi_q, phi_k, log_scale, state, window=2, sinks=1) for _ in range(6)], state

    same_under_autocast(lambda: decayed_step_(q, k, v, None, start.clone()))
    same_under_autocast(lambda: delta_step_(q, k, v, beta, None, start.clone()))
    same_under_autocast(windowed)


def test_a_step_takes_the_queries_that_autocast_made_narrow():
    q, k, v, phi_q, phi_k, log_scale = (x[:, 0] if x.dim() > 1 else x for x in window_inputs())
    state = empty_state(2, 2, 8, 6, 5, window=2, sinks=1, like=k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = windowed_step_(q.bfloat16(), k, v, phi_q, phi_k, log_scale, state, window=2, sinks=1)
    torch.testing.assert_close(o, v.repeat_interleave(2, 1))
