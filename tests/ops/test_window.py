from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lineament.ops.linear import linear_attention
from lineament.ops.window import (
    WindowState,
    empty_state,
    lolcats_attention,
    lolcats_step_,
    window_attention,
    windowed_linear_attention,
    windowed_step_,
)
from lineament.ops.window_state import code_shares

EXACT = {"atol": 1e-9, "rtol": 1e-9}


def problem(T, Hq=6, Hk=2, B=2, K=4, V=3, F=5, seed=0, decay=False, dtype=torch.float64, grad=False):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad)

    phi_q, phi_k = rand(B, T, Hq, F), rand(B, T, Hk, F)
    x = {
        "q": rand(B, T, Hq, K), "k": rand(B, T, Hk, K), "v": rand(B, T, Hk, V), "phi_q": phi_q.detach().abs(),
        "phi_k": phi_k.detach().abs(), "log_scale": rand(B, T, Hq),
        "log_decay": -rand(B, T, Hk).detach().abs() if decay else None,
    }  # fmt: skip
    return {name: t if t is None else t.detach().requires_grad_(grad) for name, t in x.items()}


def at(x, tokens, rows=slice(None)):
    return {name: None if t is None else t[rows, tokens] for name, t in x.items()}


def dense(q, k, v, window, sinks):
    """Softmax under the mask, head by head."""
    r = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.repeat_interleave(r, 2).transpose(1, 2) for x in (k, v))
    n, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
    keep = ((j > n - window) | (j < sinks)) & (j <= n)
    return torch.softmax((q @ k.mT).masked_fill(~keep, -torch.inf), -1).matmul(v).transpose(1, 2)


def by_steps(x, state, form, **options):
    outs = []
    for t in range(x["q"].shape[1]):
        outs.append(form(**at(x, t), state=state, **options))
    return torch.stack(outs, 1), state


sizes = {
    "T": st.integers(1, 150), "window": st.integers(0, 70), "sinks": st.integers(0, 5), "decay": st.booleans(),
    "cut": st.integers(0, 150), "seed": st.integers(0, 99), "outer": st.sampled_from([0, 2]),
}  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(r=st.integers(1, 3), **sizes)
def test_blocked_equals_reference_in_outputs_states_and_gradients(T, window, sinks, decay, r, cut, seed, outer):
    window += window + sinks == 0
    results = []
    for backend in ("blocked", "reference"):
        x = problem(T, Hq=2 * r, seed=seed, decay=decay, grad=True)
        options = {"window": window, "sinks": sinks, "backend": backend, "outer": outer}
        cut = min(cut, T - 1)
        first, state = windowed_linear_attention(**at(x, slice(cut)), **options) if cut else (x["v"][:, :0], None)
        rest, state = windowed_linear_attention(**at(x, slice(cut, T)), state=state, **options)
        first = first.new_zeros(2, 0, 2 * r, 3) if cut == 0 else first
        o = torch.cat([first, rest], 1)
        weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=o.dtype)
        ((o * weight).sum() + sum((s * s).sum() for s in state[:4])).backward()
        results.append((o, *state, *(t.grad for t in x.values() if t is not None)))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, **EXACT)


@pytest.mark.parametrize(("decay", "outer", "cut"), [(False, 0, 0), (True, 2, 0), (False, 2, 150)])
def test_blocks_taken_in_runs_equal_the_reference(decay, outer, cut):
    """Blocks of 64 that look alike are taken eight at a time: 500 tokens hold runs and what doesn't fit into them."""
    results = []
    for backend in ("blocked", "reference"):
        x = problem(500, B=1, Hq=2, seed=3, decay=decay, grad=True)
        run = partial(windowed_linear_attention, window=70, sinks=3, outer=outer, backend=backend)
        first, state = run(**at(x, slice(cut))) if cut else (x["q"][:, :0, :, :3], None)
        rest, state = run(**at(x, slice(cut, None)), state=state)
        o = torch.cat([first, rest], 1)
        ((o * o).sum() + state.far.sin().sum()).backward()
        results.append([o, *state, *(t.grad for t in x.values() if t is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@settings(max_examples=20, deadline=None)
@given(**sizes)
def test_prefill_equals_chunked_prefill_equals_steps(T, window, sinks, decay, cut, seed, outer):
    x, cut = problem(T, seed=seed, decay=decay), min(cut, T)
    options = {"window": window, "sinks": sinks, "outer": outer}
    whole, end = windowed_linear_attention(**x, **options)
    parts, state = [], None
    for piece in (slice(0, cut), slice(cut, cut + 1), slice(cut + 1, T)):
        if len(range(*piece.indices(T))):
            o, state = windowed_linear_attention(**at(x, piece), state=state, **options)
            parts.append(o)
    torch.testing.assert_close((torch.cat(parts, 1), *state), (whole, *end), **EXACT)
    start = empty_state(2, 2, 4, 3, 5, like=x["k"], **options)
    o, state = by_steps(x, start, windowed_step_, **options)
    torch.testing.assert_close((o, *state), (whole, *end), **EXACT)


@settings(max_examples=20, deadline=None)
@given(decay=st.booleans(), scale=st.sampled_from([-30.0, 0.0, 45.0]), window=st.integers(0, 9),
       sinks=st.integers(1, 3), codes=st.integers(1, 4), seed=st.integers(0, 99))  # fmt: skip
def test_a_step_on_the_logits_of_codes_equals_a_step_on_their_shares(decay, scale, window, sinks, codes, seed):
    T, g = 30, torch.Generator().manual_seed(seed)
    x = problem(T, B=2, Hq=4, seed=seed, decay=decay)
    y_q, y_k = (4 * torch.randn(2, T, h, 2 * codes, generator=g, dtype=torch.float64) for h in (4, 2))
    x["phi_k"] = code_shares(y_k, codes)[0]
    shares, total = code_shares(y_q, codes)
    scale = scale + torch.randn(2, T, 4, generator=g, dtype=torch.float64)
    options = {"window": window, "sinks": sinks, "outer": codes}
    known = x | {"phi_q": shares, "log_scale": scale + total}
    state = empty_state(2, 2, 4, 3, 2 * codes, like=x["k"], **options)
    read = windowed_linear_attention(**at(known, slice(0, 7)), **options)[1]
    state = WindowState(*(torch.cat([a[:1], b[1:]]) for a, b in zip(read, state, strict=True)))  # rows of unequal age
    outs = []
    for form, logits in ((known, False), (x | {"phi_q": y_q, "log_scale": scale}, True)):
        own = WindowState(*(one.clone() for one in state))
        o, end = by_steps(form, own, partial(windowed_step_, logits=logits), **options)
        outs.append((o, *end))
    torch.testing.assert_close(outs[1], outs[0], **EXACT)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 80), min_size=1, max_size=4), window=st.integers(0, 40), sinks=st.integers(0, 5))
def test_packed_documents_and_uneven_rows_equal_separate_runs(lengths, window, sinks):
    lengths = [*lengths, 3]
    total = sum(lengths)
    x = problem(total, B=1, decay=True)
    y = problem(7, B=len(lengths), seed=1, decay=True)
    options = {"window": window, "sinks": sinks}
    edges = torch.tensor([0, *lengths]).cumsum(0)
    packed, state = windowed_linear_attention(**x, cu_seqlens=edges, **options)
    after, _ = windowed_linear_attention(**y, state=state, **options)
    stepped, _ = by_steps(y, WindowState(*(s.clone() for s in state)), windowed_step_, **options)
    assert state.count.tolist() == lengths
    for i, (start, stop) in enumerate(pairwise(edges)):
        own = None
        if stop > start:
            o, own = windowed_linear_attention(**at(x, slice(start, stop)), **options)
            torch.testing.assert_close(packed[:, start:stop], o, **EXACT)
            torch.testing.assert_close(tuple(s[i : i + 1] for s in state), tuple(own), **EXACT)
        rest, _ = windowed_linear_attention(**at(y, slice(None), slice(i, i + 1)), state=own, **options)
        torch.testing.assert_close(after[i : i + 1], rest, **EXACT)
        torch.testing.assert_close(stepped[i : i + 1], rest, **EXACT)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize(("window", "sinks"), [(9, 3), (1, 0), (0, 2), (64, 4), (200, 0)])
def test_a_scale_of_minus_infinity_is_softmax_on_window_and_sinks(backend, window, sinks):
    x = problem(130, grad=True)
    x["log_scale"] = torch.full((6,), -torch.inf, dtype=torch.float64, requires_grad=True)
    o, _ = windowed_linear_attention(**x, window=window, sinks=sinks, backend=backend)
    o.pow(2).sum().backward()
    expected = dense(x["q"], x["k"], x["v"], window, sinks)
    torch.testing.assert_close(o, expected, **EXACT)
    assert all(t.grad.isfinite().all() for t in x.values() if t is not None)
    grads = torch.autograd.grad(expected.pow(2).sum(), (x["q"], x["k"], x["v"]))
    torch.testing.assert_close(tuple(x[name].grad for name in "qkv"), grads, **EXACT)
    baseline = window_attention(x["q"], x["k"], x["v"], window=window, sinks=sinks, backend=backend)
    torch.testing.assert_close(baseline, expected, **EXACT)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("window", [0, 9])
def test_factors_equal_their_products(backend, window):
    x = problem(80, decay=True)
    options = {"window": window, "sinks": window // 4, "backend": backend}
    o, state = windowed_linear_attention(**x, **options, outer=2)
    products = {name: (x[name][..., :2, None] * x[name][..., None, 2:]).flatten(-2) for name in ("phi_q", "phi_k")}
    expected, end = windowed_linear_attention(**{**x, **products}, **options)
    torch.testing.assert_close((o, state.far), (expected, end.far), **EXACT)
    with pytest.raises(ValueError, match="both factors need at least one"):
        windowed_linear_attention(**x, **options, outer=5)


def test_a_constant_on_all_logits_and_the_scale_changes_nothing():
    x = problem(100, decay=True)
    options = {"window": 20, "sinks": 2}
    o, _ = windowed_linear_attention(**x, **options)
    one = torch.ones(2, 100, 6, 1, dtype=torch.float64)
    x["q"], x["k"] = torch.cat([x["q"], 300 * one], -1), torch.cat([x["k"], one[:, :, :2]], -1)
    x["log_scale"] = x["log_scale"] + 300
    torch.testing.assert_close(windowed_linear_attention(**x, **options)[0], o, **EXACT)


def test_no_window_and_no_sinks_is_pure_linear_attention():
    x = problem(100, decay=True)
    o, state = windowed_linear_attention(**x, window=0, sinks=0)
    pure, far = linear_attention(x["phi_q"], x["phi_k"], x["v"], log_decay=x["log_decay"])
    torch.testing.assert_close((o, state.far), (pure, far), **EXACT)


@pytest.mark.parametrize("scale", [-1e4, -100.0, 90.0, 1e4])
def test_any_scale_is_finite_and_an_empty_far_state_weighs_nothing(scale):
    x = {name: t if t is None else t.float() for name, t in problem(40).items()}
    x["log_scale"] = torch.full((6,), scale, requires_grad=True)
    o, _ = windowed_linear_attention(**x, window=8, sinks=2)
    o.sum().backward()
    assert o.isfinite().all()
    assert x["log_scale"].grad.isfinite().all()
    torch.testing.assert_close(o[:, :8], dense(x["q"], x["k"], x["v"], 8, 2)[:, :8])


@pytest.mark.parametrize("window", [1, 6, 100])
def test_lolcats_equals_its_formula(window):
    x = problem(70, Hq=2)
    x.pop("log_decay")
    log_gamma = -x.pop("log_scale").abs()[0, 0]
    q, k, v, phi_q, phi_k = (x[name].transpose(1, 2) for name in ("q", "k", "v", "phi_q", "phi_k"))
    n, j = torch.arange(70)[:, None], torch.arange(70)
    near = (j > n - window) & (j <= n)
    logits = (q @ k.mT).masked_fill(~near, -torch.inf)
    weight = (logits - logits.amax(-1, keepdim=True)).exp() * log_gamma.exp()[:, None, None]
    weight = weight + (phi_q @ phi_k.mT).masked_fill(~(j <= n - window), 0)
    expected = (weight @ v / weight.sum(-1, keepdim=True)).transpose(1, 2)
    o, end = lolcats_attention(**x, log_gamma=log_gamma, window=window)
    torch.testing.assert_close(o, expected, **EXACT)
    start = empty_state(2, 2, 4, 3, 5, like=x["k"], window=window, sinks=0)
    o, state = by_steps(x, start, lambda **a: lolcats_step_(log_gamma=log_gamma, window=window, **a))
    torch.testing.assert_close((o, *state), (expected, *end), **EXACT)


@pytest.mark.parametrize("form", ["common", "lolcats", "window"])
def test_gradcheck(form):
    x = problem(11, Hq=2, Hk=1, B=1, K=2, V=2, F=2, decay=True, grad=True)
    _, start = windowed_linear_attention(**problem(5, Hq=2, Hk=1, B=1, K=2, V=2, F=2, seed=2), window=3, sinks=1)
    far = start.far.requires_grad_()

    def common(*inputs):
        o, state = windowed_linear_attention(*inputs[:6], window=3, sinks=1, log_decay=inputs[6],
                                             state=start._replace(far=inputs[7]))  # fmt: skip
        return o, *state[:4]

    def lolcats(*inputs):
        return lolcats_attention(*inputs[:5], inputs[5][0, 0], window=3)[0]

    def window(*inputs):
        return window_attention(*inputs[:3], window=3, sinks=1)

    used = {"common": 8, "lolcats": 6, "window": 3}[form]
    assert torch.autograd.gradcheck({"common": common, "lolcats": lolcats, "window": window}[form],
                                    (*x.values(), far)[:used])  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_and_keeps_its_state_wide(dtype):
    x = problem(200, K=16, V=16, F=16, dtype=torch.float32)
    low = {name: t if t is None else t.to(dtype) for name, t in x.items()}
    wide = {name: t if t is None else t.float() for name, t in low.items()}
    options = {"window": 32, "sinks": 4}
    o, state = windowed_linear_attention(**low, **options)
    expected, _ = windowed_linear_attention(**wide, **options)
    assert o.dtype == dtype
    assert state.far.dtype == torch.float32
    assert (o.float() - expected).norm() / expected.norm() < 1e-2  # bfloat16 measured 5e-3
    stepped, _ = by_steps(low, empty_state(2, 2, 16, 16, 16, like=low["k"], **options), windowed_step_, **options)
    assert (stepped.float() - expected).norm() / expected.norm() < 1e-2


def test_training_keeps_the_inputs_the_output_and_few_states():
    x = problem(1024, Hq=2, Hk=1, B=1, K=16, V=16, F=16, dtype=torch.float32, grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes), lambda t: t):
        windowed_linear_attention(**x, window=32, sinks=4)
    assert sum(saved) < 3 * sum(t.nbytes for t in x.values() if t is not None)  # the inputs, o, and states at edges


def packed():
    return at(problem(5), slice(None), slice(1))


def before(F=5, V=3):
    return empty_state(2, 2, 4, V, F, window=3, sinks=1, like=torch.zeros(()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": -1}, "neither may be negative"),
        ({"phi_k": None}, "all of phi_q, phi_k and log_scale"),
        ({"k": torch.zeros(2, 5, 4, 4)}, "head counts must divide|v has Hk=2"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "need B=1"),
        ({**packed(), "cu_seqlens": torch.tensor([0, 3])}, "from 0 to T=5"),
        ({**packed(), "cu_seqlens": torch.tensor([2, 5])}, "from 0 to T=5"),
        ({**packed(), "cu_seqlens": torch.tensor([0, 3, 9])}, "from 0 to T=5"),
        ({**packed(), "cu_seqlens": torch.tensor([0, 4, 3, 5])}, "rising"),
        ({"backend": "bloked"}, "Did you mean 'blocked'"),
        ({"state": empty_state(2, 2, 4, 3, 5, window=7, sinks=1, like=torch.zeros(()))}, "state.keys has shape"),
        ({"state": before(F=4)}, "state.far has shape .*these arguments need"),
        ({"state": before(V=2)}, "state.far has shape"),
        ({"state": before()._replace(values=torch.zeros(2, 2, 4, 2))}, "state.values has shape"),
        ({"state": before()._replace(count=torch.zeros(3, dtype=torch.int64))}, "state.count has shape"),
        ({"state": before()._replace(far=torch.zeros(2, 2, 5, 4, device="meta"))}, "state.far is on meta"),
    ],
)
def test_errors_say_what_was_wrong(change, message):
    options = {**problem(5), "window": 3, "sinks": 1, **change}
    with pytest.raises(ValueError, match=message):
        windowed_linear_attention(**options)


def test_a_second_derivative_is_refused_by_the_blocks_and_right_by_the_reference():
    x = problem(5, grad=True)
    o, _ = windowed_linear_attention(**x, window=2, sinks=1, backend="blocked")
    (first,) = torch.autograd.grad(o.sin().sum(), x["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        first.square().sum().backward()
    o, _ = windowed_linear_attention(**x, window=2, sinks=1, backend="reference")
    (first,) = torch.autograd.grad(o.sin().sum(), x["q"], create_graph=True)
    first.square().sum().backward()
    assert x["q"].grad.isfinite().all()


def test_an_empty_batch_is_answered():
    x = problem(5, B=0, decay=True)
    o, state = windowed_linear_attention(**x, window=2, sinks=1)
    assert o.shape == (0, 5, 6, 3)
    assert windowed_step_(**at(x, 0), state=state, window=2, sinks=1).shape == (0, 6, 3)


def test_a_step_refuses_to_lose_a_gradient():
    x = problem(1, grad=True)
    state = empty_state(2, 2, 4, 3, 5, window=3, sinks=1, like=x["k"].detach())
    with pytest.raises(RuntimeError, match="no gradient"):
        windowed_step_(**at(x, 0), state=state, window=3, sinks=1)


@pytest.mark.parametrize(("heads", "dtype"), [(6, torch.float64), (2, torch.float64), (2, torch.float32)])
def test_compiled_equals_eager_with_gradients(heads, dtype):
    results = []
    compiled = torch.compile(windowed_linear_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for form in (windowed_linear_attention, compiled):
        for T in (40, 9):
            x = problem(T, Hq=heads, decay=True, grad=True, dtype=dtype)
            o, state = form(**x, window=7, sinks=2, outer=2)
            (o.sin().sum() + state.far.sum() + state.keys.sum()).backward()
            results.append((o, *state, *(t.grad for t in x.values())))
    tolerance = EXACT if dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(results[:2], results[2:], **tolerance)


def test_exported_with_any_number_of_tokens():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v, phi_q, phi_k, log_scale):
            return windowed_linear_attention(q, k, v, phi_q, phi_k, log_scale, window=7, sinks=2)[0]

    inputs = tuple(problem(30).values())[:6]
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(Attention(), inputs, dynamic_shapes=tuple({1: tokens} for _ in inputs))
    for T in (3, 8, 200):
        other = tuple(problem(T).values())[:6]
        torch.testing.assert_close(program.module()(*other), Attention()(*other), **EXACT)
