"""The chunked form as compiled loops equals the reference, the operators and itself, forward and backward."""

import pytest
import torch
from recurrence_problems import everything, problem, run, worst

from lineament._base.extras import available
from lineament.ops import compiled
from lineament.ops.recurrence import chunked_compiled

pytestmark = pytest.mark.skipif(not available("numba"), reason="numba is not installed")
HEADS = ((2, 2, 2), (4, 2, 2), (2, 4, 2), (2, 2, 4), (1, 2, 4), (4, 4, 1), (4, 1, 2))


@pytest.fixture
def loops(monkeypatch):
    """Let loops take problems of any size, and see that each of them did."""
    calls, run_loop = [], chunked_compiled._over_heads
    monkeypatch.setattr(chunked_compiled, "SMALLEST", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(chunked_compiled, "_over_heads", lambda *args: calls.append(args[0]) or run_loop(*args))
    return calls


@pytest.mark.parametrize("T", [1, 31, 32, 33, 64, 65, 130])
@pytest.mark.parametrize("gate", ["none", "head"])
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_loops_equal_the_reference_with_gradients(loops, delta, gate, T):
    p = problem(T, gate=gate, delta=delta)
    errors = worst(everything(p, "chunked"), everything(p, "reference"))
    assert max(errors.values()) < 1e-10, errors
    assert loops == ["forward", "backward"]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_heads_repeat_consecutively(loops, delta, heads):
    p = problem(70, heads, delta=delta, K=17, V=33)
    errors = worst(everything(p, "chunked"), everything(p, "reference"))
    assert max(errors.values()) < 1e-10, errors
    assert loops


@pytest.mark.parametrize("size", [1, 32, 64, 128])
def test_any_chunk_size_gives_the_same(loops, size):
    p = problem(200)
    errors = worst(everything(p, "chunked", chunk_size=size), everything(p, "reference"))
    assert max(errors.values()) < 1e-10, errors
    assert loops


@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_float32_stays_near_float64(loops, delta):
    p = problem(300, (2, 4, 4), K=64, V=64, delta=delta, strength=0.1)
    errors = worst(everything(p.map(torch.Tensor.float), "chunked"), everything(p, "reference"))
    assert max(errors.values()) < 2e-6, errors
    assert loops


@pytest.mark.parametrize("value", [0.0, -1e-6, -50.0, -torch.inf])
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_extreme_gates(loops, delta, value):
    p = problem(90, delta=delta, strength=0.3)
    assert p.log_decay is not None
    p.log_decay[:, ::3] = value
    errors = worst(everything(p, "chunked"), everything(p, "reference"))
    assert max(errors.values()) < 1e-10, errors
    assert loops


@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_a_head_that_is_not_a_number_leaves_the_others_alone(loops, delta):
    p = problem(40, (3, 3, 3), K=7, V=5, delta=delta)
    wanted = everything(p, "chunked")
    p.q[:, 20:, 0] = p.k[:, 20:, 0] = p.v[:, 20:, 0] = torch.nan
    found = everything(p, "chunked")
    for name in ("o", "q", "k", "v"):
        assert found[name][:, :, 0].isnan().any()
        torch.testing.assert_close(found[name][:, :, 1:], wanted[name][:, :, 1:], msg=name)
    assert loops


def test_strided_inputs_are_read_in_place(loops):
    p = problem(65)
    wanted = run(p)
    torch.testing.assert_close(run(p.map(lambda x: x.transpose(0, -1).contiguous().transpose(0, -1))), wanted)
    assert loops


@pytest.mark.parametrize("heads", [(4, 4, 4), (2, 4, 4)])
def test_threads_share_heads_and_change_nothing(loops, monkeypatch, heads):
    p = problem(70, heads, B=3)
    alone = everything(p, "chunked")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    shared = everything(p, "chunked")
    assert all(torch.equal(alone[name], shared[name]) for name in alone)
    assert len(loops) == 4


def test_what_the_loops_refuse(monkeypatch):
    p = problem(64, (1, 4, 4), B=1, K=64, V=64)
    states = torch.zeros(1, 1, 4, 64, 64, dtype=torch.float64)
    given = (p.q, p.k, p.v, p.beta)

    def reason(*inputs):
        return chunked_compiled.refused(*inputs) or ""

    assert "short" in reason(*given, p.log_decay, states)
    monkeypatch.setattr(chunked_compiled, "SMALLEST", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert "share rows" in reason(*given, p.log_decay, states)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert reason(*given, p.log_decay, states) == ""
    assert "float32 beside" in reason(p.q.float(), *given[1:], p.log_decay, states)
    assert "per channel" in reason(*given, problem(64, (1, 4, 4), gate="channel").log_decay, states)
    monkeypatch.setattr(compiled, "available", lambda _: False)
    assert "numba" in reason(*given, p.log_decay, states)
