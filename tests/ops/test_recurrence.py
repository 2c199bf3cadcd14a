"""Every backend equals the reference, and the recurrence obeys its laws."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrence_problems import GATES, NAMES, everything, problem, run, waves, worst
from torch.nn.functional import normalize

BACKENDS = ("chunked", "chunked-autograd")
HEADS = ((2, 2, 2), (4, 2, 2), (2, 4, 2), (2, 2, 4), (1, 2, 4), (4, 4, 1), (4, 1, 2))
EXACT = 1e-10  # float64; measured: at most 3e-13


def same(p, backend, wanted=None, tolerance=EXACT, **options):
    wanted = everything(p, "reference") if wanted is None else wanted
    errors = worst(everything(p, backend, **options), wanted)
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("T", [1, 15, 33, 63, 64, 65, 130])  # one step, both sides of the edges of chunks and panels
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_backends_equal_the_reference_with_gradients(delta, gate, T):
    p = problem(T, gate=gate, delta=delta)
    wanted = everything(p, "reference")
    for backend in BACKENDS:
        same(p, backend, wanted)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_heads_repeat_consecutively(delta, gate, heads):
    p = problem(21, heads, gate=gate, delta=delta, K=4, V=3)
    wanted = everything(p, "reference")
    for backend in BACKENDS:
        same(p, backend, wanted, chunk_size=8)
    Hs = max(heads[1:])
    wide = replace(p, **{n: getattr(p, n).repeat_interleave(max(1, Hs // getattr(p, n).shape[2]), 2) for n in "qkv"})
    torch.testing.assert_close(run(wide)[0], run(p)[0])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_equals_the_reference(data):
    few, many = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 4)]))
    heads = (data.draw(st.sampled_from([few, many])), few, many) if data.draw(st.booleans()) else (many, many, few)
    p = problem(
        data.draw(st.integers(1, 80)),
        heads,
        B=data.draw(st.integers(1, 20)),
        K=data.draw(st.integers(1, 9)),
        V=data.draw(st.integers(1, 9)),
        gate=data.draw(st.sampled_from(GATES)),
        delta=data.draw(st.booleans()),
        state=data.draw(st.booleans()),
        strength=data.draw(st.sampled_from([1e-3, 0.5, 8.0])),
        seed=data.draw(st.integers(0, 99)),
    )
    same(p, data.draw(st.sampled_from(BACKENDS)), chunk_size=data.draw(st.sampled_from([None, 1, 16, 32])))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_gradcheck(delta, gate):
    p = problem(5, (2, 1, 2), B=1, K=2, V=3, gate=gate, delta=delta).map(lambda x: x.requires_grad_())
    names = [
        n for n, x in zip(("q", "k", "v", "beta", "log_decay", "state"), p.tensors(), strict=True) if x is not None
    ]

    def function(*tensors):
        return run(replace(p, **dict(zip(names, tensors, strict=True))), "chunked", chunk_size=4)

    torch.autograd.gradcheck(function, [getattr(p, n) for n in names])


@pytest.mark.parametrize("only", ["o", "last"])
def test_gradients_from_one_output_only(only):
    p = problem(70, gate="channel").map(lambda x: x.requires_grad_())
    grads = []
    for backend in ("chunked", "reference"):
        out = run(p, backend)[only == "last"]
        grads.append(torch.autograd.grad(out.sin().sum(), [p.k, p.log_decay, p.state]))
    torch.testing.assert_close(*grads)


def test_differentiating_twice_takes_the_plain_form():
    p = problem(9, gate="head", B=1, K=2, V=2).map(lambda x: x.requires_grad_())
    for backend in ("chunked-autograd", "reference"):
        (grad,) = torch.autograd.grad(run(p, backend)[0].sum(), p.q, create_graph=True)
        torch.autograd.grad(grad.sum(), p.k)
    (grad,) = torch.autograd.grad(run(p, "chunked")[0].sum(), p.q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), p.k)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("at", [1, 23, 64])
@pytest.mark.parametrize("gate", GATES)
def test_a_sequence_may_be_cut_anywhere(gate, at, backend):
    p = problem(70, gate=gate)
    first, state = run(p.cut(0, at), backend)
    rest, last = run(p.cut(at, 70, state), backend)
    torch.testing.assert_close((torch.cat([first, rest], 1), last), run(p, backend))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_no_state_is_a_state_of_zeros_and_the_given_one_stays(delta, gate):
    p = problem(30, gate=gate, delta=delta)
    torch.testing.assert_close(
        run(replace(p, state=None)), run(replace(p, state=torch.zeros_like(p.state))), rtol=0, atol=0
    )
    before = p.state.clone()
    run(p)
    assert torch.equal(p.state, before)


@pytest.mark.parametrize("lengths", [(5,), (1, 1, 1), (1, 64, 0, 65, 3, 1, 66, 0), (7, 7, 7)])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_packed_documents_equal_separate_runs(delta, gate, lengths):
    N, T = len(lengths), sum(lengths)
    p = problem(T, (4, 2, 2), B=1, gate=gate, delta=delta)
    states = torch.randn(N, *p.state.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    borders = torch.tensor([0, *lengths]).cumsum(0)
    packed = everything(replace(p, state=states), cu_seqlens=borders)
    leaves = replace(p, state=states).map(lambda x: x.clone().requires_grad_())
    parts = [
        run(leaves.cut(a, b, leaves.state[i : i + 1])) for i, (a, b) in enumerate(borders.unfold(0, 2, 1).tolist())
    ]
    o, last = torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts])
    inputs = [x for x in leaves.tensors() if x is not None]
    grads = torch.autograd.grad((o * waves(o)).sum() + (last * waves(last)).sum(), inputs)
    for found, wanted in zip(packed.values(), [o, last, *grads], strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta", [False, True], ids=["decayed", "delta"])
def test_past_outputs_do_not_know_the_future_to_the_bit(delta, gate):
    p = problem(100, gate=gate, delta=delta, dtype=torch.float32, K=16, V=16)
    other = problem(100, gate=gate, delta=delta, dtype=torch.float32, K=16, V=16, seed=5, strength=30.0)
    for at in (1, 20, 47, 64, 90):
        names = [name for name in NAMES[:5] if getattr(p, name) is not None]
        mixed = {name: torch.cat([getattr(p, name)[:, :at], getattr(other, name)[:, at:]], 1) for name in names}
        assert torch.equal(run(replace(p, **mixed))[0][:, :at], run(p)[0][:, :at])


@pytest.mark.parametrize("gate", GATES)
def test_twice_the_same_to_the_bit(gate):
    p = problem(150, (4, 2, 2), gate=gate, dtype=torch.float32)
    first, second = everything(p), everything(p)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_chunk_size_does_not_matter():
    p = problem(50, gate="channel")
    for size in (1, 2, 32, 128):
        same(p, "chunked", chunk_size=size)


def test_constant_channels_equal_one_gate_per_head_and_zero_gates_equal_none():
    p = problem(70, gate="head")
    channels = replace(p, log_decay=p.log_decay[..., None].expand(-1, -1, -1, 6))
    torch.testing.assert_close(run(channels), run(p))
    plain = run(replace(p, log_decay=None))
    for zero in (torch.zeros_like(p.log_decay), torch.zeros_like(channels.log_decay)):
        torch.testing.assert_close(run(replace(p, log_decay=zero)), plain)


@pytest.mark.parametrize("gate", GATES)
def test_a_write_of_strength_zero_only_decays_the_state(gate):
    p = problem(70, gate=gate, strength=0.01)
    decay = 1.0 if p.log_decay is None else p.log_decay.sum(1).exp()
    decay = decay[..., None, None] if gate == "head" else decay[..., None] if gate == "channel" else decay
    torch.testing.assert_close(run(replace(p, beta=torch.zeros_like(p.beta)))[1], p.state * decay)


def test_channel_gates_hold_slow_and_fast_memories_at_once():
    k = torch.zeros(1, 12, 1, 2)
    k[0, 0, 0, 0] = k[0, 1, 0, 1] = 1.0
    beta = torch.zeros(1, 12, 1)
    beta[:, :2] = 1.0
    gate = torch.zeros(1, 12, 1, 2)
    gate[:, 2:, :, 1] = torch.tensor(0.5).log()
    _, last = run(replace(problem(), q=k, k=k, v=torch.ones(1, 12, 1, 1), beta=beta, log_decay=gate, state=None))
    torch.testing.assert_close(last.flatten(), torch.tensor([1.0, 2.0**-10]))


def test_orthonormal_keys_at_full_strength_only_add():
    p = problem(8, (1, 1, 1), B=1, K=8, gate="head", state=False)
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))[0]
    p = replace(p, k=basis.view(1, 8, 1, 8), beta=torch.ones_like(p.beta))
    torch.testing.assert_close(run(p), run(replace(p, beta=None)))


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_zero_padding_before_the_start_changes_nothing(gate):
    p = problem(20, gate=gate, state=False)
    padded = p.map(lambda x: torch.cat([torch.zeros_like(x[:, :9]), x], 1))
    torch.testing.assert_close(run(padded)[0][:, 9:], run(p)[0])


def test_many_batch_rows_are_walked_in_groups():
    p = problem(10, (3, 3, 3), B=20, gate="head")
    wanted = [run(p.map(lambda x, i=i: x[i : i + 1]))[0] for i in range(20)]
    torch.testing.assert_close(run(p)[0], torch.cat(wanted))


def test_keys_that_are_repeated_are_overwritten():
    k = normalize(torch.randn(1, 1, 2, 8, generator=torch.Generator().manual_seed(0)), dim=-1).expand(1, 70, 2, 8)
    p = replace(problem(70, K=8, dtype=torch.float32, gate="none", B=1, state=False), k=k, q=k)
    o, _ = run(replace(p, beta=torch.ones_like(p.beta)))
    torch.testing.assert_close(o, p.v, rtol=1e-4, atol=1e-4)
