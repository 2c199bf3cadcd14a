"""The doors: errors, choice of backends, tracing."""

from dataclasses import replace

import pytest
import torch
from recurrence_problems import problem, run
from torch.export import Dim, export

from lineament._base.backends import why
from lineament._base.errors import InputError
from lineament.ops.recurrence import BACKENDS_DECAYED, BACKENDS_DELTA, decayed_attention, delta_rule

P = problem(6, (4, 2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": P.v[:, :5]}, "v has T=5, but q has T=6"),
        ({"k": P.k[..., :3]}, "k has K=3, but q has K=6"),
        ({"q": P.q[:, :, :3]}, "k has 2 heads and q has 3"),
        ({"k": P.k.repeat(1, 1, 3, 1)[:, :, :3]}, "v has 2 heads and k has 3"),
        ({"q": P.q[0]}, "q has shape"),
        ({"beta": P.beta[..., :1]}, "beta has shape .*; k and v ask for"),
        ({"log_decay": P.log_decay[:, :2]}, "log_decay has shape .*; k and v ask for"),
        ({"state": P.state[..., :2]}, "state has shape .*; q, k and v ask for"),
        ({"q": P.q.long()}, "q has dtype torch.int64"),
        ({"v": P.v.to("meta")}, "v is on meta and q is on cpu"),
    ],
)
def test_errors_name_both_tensors(change, message):
    with pytest.raises(InputError, match=message):
        run(replace(P, **change))


@pytest.mark.parametrize(
    ("borders", "message"),
    [([0, 3], "rising list from 0 to T=6"), ([0, 4, 3, 6], "rising"), ([0.0, 6.0], "expected"), ([6], "expected")],
)
def test_wrong_borders(borders, message):
    p = replace(P, state=None).map(lambda x: x[:1])
    with pytest.raises(InputError, match=message):
        run(p, cu_seqlens=torch.tensor(borders))
    with pytest.raises(InputError, match="q has B=2"):
        run(P, cu_seqlens=torch.tensor([0, 6]))


def test_a_state_per_document():
    with pytest.raises(InputError, match=r"state has shape \[1, 2, 6, 5\]; q, k and v ask for \[2, 2, 6, 5\]"):
        run(P.map(lambda x: x[:1]), cu_seqlens=torch.tensor([0, 2, 6]))


def test_chunk_sizes_are_powers_of_two():
    with pytest.raises(InputError, match="power of two"):
        run(P, chunk_size=48)


@pytest.mark.parametrize("table", [BACKENDS_DECAYED, BACKENDS_DELTA])
def test_tables_have_the_same_names_and_say_why(table):
    assert list(table) == ["triton", "fla", "chunked", "chunked-autograd", "reference"]
    assert "fla" in why(table, P.q)


def test_a_forced_backend_runs_or_raises():
    with pytest.raises(RuntimeError, match="backend 'fla' can't run here"):
        run(P, "fla")
    with pytest.raises(InputError, match="Did you mean 'chunked'"):
        run(P, "chunkd")


def test_auto_on_a_cpu_is_chunked_to_the_bit():
    assert torch.equal(run(P, "auto")[0], run(P, "chunked")[0])


@pytest.mark.parametrize("backend", ["auto", "chunked-autograd", "reference"])
def test_no_tokens(backend):
    o, last = run(P.cut(0, 0), backend)
    assert o.shape == (2, 0, 4, 5)
    assert torch.equal(last, P.state)


def test_strides_do_not_matter():
    turned = P.map(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(run(turned)[0], run(P)[0])


class Both(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, q, k, v, beta, log_decay):
        o, state = delta_rule(q, k, v, beta, log_decay, backend=self.backend)
        more, state = decayed_attention(q, k, v, log_decay, state=state, backend=self.backend)
        return o + more, state


def tensors(T, gate="head"):
    return problem(T, (4, 2, 2), gate=gate, dtype=torch.float32).tensors()[:5]


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_export_with_a_free_length(gate):
    T = Dim("T", min=2, max=4096)
    program = export(Both("auto"), tuple(tensors(70, gate)), dynamic_shapes=tuple({1: T} for _ in range(5)))
    for length in (3, 64, 131):
        inputs = tensors(length, gate)
        torch.testing.assert_close(program.module()(*inputs), Both("auto")(*inputs), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("backend", "dynamic"), [("auto", True), ("chunked-autograd", False)])
def test_compile_in_one_graph_with_gradients(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(Both(backend), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    results = []
    for length in (70, 33)[: 2 if dynamic else 1]:
        for function in (compiled, Both(backend)):
            inputs = [x.clone().requires_grad_() for x in tensors(length)]
            o, state = function(*inputs)
            results.append((o, state, *torch.autograd.grad(o.sum() + state.sum(), inputs)))
        torch.testing.assert_close(results[-2], results[-1])


@pytest.mark.parametrize("gate", ["none", "head", "channel"])
def test_the_operator_keeps_the_rules_of_custom_operators(gate):
    p = problem(5, gate=gate, dtype=torch.float32).map(lambda x: x.requires_grad_())
    torch.library.opcheck(torch.ops.lineament.recurrence.default, (*p.tensors(), 4, True))


@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_a_document_that_is_not_a_number_leaves_the_others_alone(delta):
    p = replace(problem(12, B=1, delta=delta), state=None)
    borders = torch.tensor([0, 3, 5, 12])
    wanted, _ = run(p, "chunked", cu_seqlens=borders)
    p.k[:, 0] = torch.nan  # where padding of other documents takes its numbers from
    found, states = run(p, "chunked", cu_seqlens=borders)
    torch.testing.assert_close(found[:, 3:], wanted[:, 3:])
    assert states[1:].isfinite().all()
