"""The adapters to fla without its package: a stand-in with fla's signatures and our reference behind them."""

import sys
from types import ModuleType

import pytest
import torch
from recurrence_problems import GATES, everything, problem, worst

from lineament._base.backends import Backend
from lineament.ops import recurrence
from lineament.ops.recurrence import BACKENDS_DECAYED, decayed_attention, reference


def stand_in(called):
    def attend(name, q, k, v, beta, g, scale, initial_state, output_final_state):
        called.append(name)
        assert scale == 1.0
        assert output_final_state
        assert q.shape[2] == k.shape[2] == v.shape[2] == initial_state.shape[1]
        if beta is None:
            return reference.run_decayed(q, k, v, g, initial_state)
        return reference.run_delta(q, k, v, beta, g, initial_state)

    ops = ModuleType("fla.ops")
    for name in ("chunk_simple_gla", "chunk_gla"):
        setattr(ops, name, lambda q, k, v, g=None, _name=name, **rest: attend(_name, q, k, v, None, g, **rest))
    ops.chunk_delta_rule = lambda q, k, v, beta, **rest: attend("chunk_delta_rule", q, k, v, beta, None, **rest)
    for name in ("chunk_gated_delta_rule", "chunk_kda"):
        setattr(ops, name, lambda q, k, v, g, beta, _name=name, **rest: attend(_name, q, k, v, beta, g, **rest))
    return ops


@pytest.mark.parametrize("heads", [(2, 2, 2), (4, 2, 2), (2, 1, 2)])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_adapters_pass_everything_on(monkeypatch, delta, gate, heads):
    called = []
    package = ModuleType("fla")
    package.ops = stand_in(called)
    monkeypatch.setitem(sys.modules, "fla", package)
    monkeypatch.setitem(sys.modules, "fla.ops", package.ops)
    for table, name in (("BACKENDS_DECAYED", "run_decayed"), ("BACKENDS_DELTA", "run_delta")):
        row = Backend(f"lineament.ops.recurrence.fla:{name}")
        monkeypatch.setitem(getattr(recurrence, table), "fla", row)
    p = problem(9, heads, gate=gate, delta=delta, dtype=torch.float32)
    errors = worst(everything(p, "fla"), everything(p, "reference"))
    assert max(errors.values()) < 1e-5, errors
    names = ["chunk_delta_rule", "chunk_gated_delta_rule", "chunk_kda"] if delta else [
        "chunk_simple_gla", "chunk_simple_gla", "chunk_gla"]  # fmt: skip
    assert called == [names[GATES.index(gate)]]


def test_without_the_package_or_a_gpu_the_reason_is_given():
    x = torch.zeros(1, 1, 1, 1)
    assert BACKENDS_DECAYED["fla"].usable(x)
    with pytest.raises(RuntimeError, match="fla"):
        decayed_attention(x, x, x, backend="fla")
