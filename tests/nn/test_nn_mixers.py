"""Laws of every head mixer: a sequence may be cut, padded, packed and reordered; full heads are ordinary softmax."""

import pytest
import torch

from lineament._base.errors import InputError
from lineament._base.extras import available
from lineament.nn import BUILDERS, LayerState, Lightning, MixerConfig, Rows, build, causal_softmax, quiet_log_scale
from lineament.nn.codes import start_codes
from lineament.nn.feature_maps import Product
from lineament.nn.state import leaves
from lineament.ops import compiled, decayed_attention

B, T, HQ, HK, K, D = 2, 23, 6, 3, 8, 24
OPTIONS = {
    "hedgehog-window": {"log_scale": -1.0, "decay": True, "query_scale": True, "bias": True},
    "hedgehog": {"temperature": True, "decay": True},
    "kda": {"key_norm": "query"},
}
PRODUCT = {"map": "product", "codes": 3, "log_scale": -0.5, "decay": True, "query_scale": True}
PRODUCTS = {"product-window": PRODUCT, "product-groups": {**PRODUCT, "codes": [3, 2, 3]}}
KINDS = [*sorted(BUILDERS), *PRODUCTS]


def mixer(kind, full=(), **changes):
    torch.manual_seed(0)
    fields = {"value_width": K, "window": 6, "sinks": 2, "options": OPTIONS.get(kind, {}), **changes}
    if kind in PRODUCTS:
        kind, fields = "hedgehog-window", {**fields, "options": PRODUCTS[kind]}
    config = MixerConfig(kind=kind, heads=HQ, key_heads=HK, key_width=K, model_width=D, full_heads=full, **fields)
    made = build(config).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return made.eval()


def problem(length=T, seed=1, value_width=K):
    g = torch.Generator().manual_seed(seed)
    shapes = ((HQ, K), (HK, K), (HK, value_width))
    q, k, v = (torch.randn(B, length, *shape, generator=g, dtype=torch.float64) * 0.6 for shape in shapes)
    return q, k, v, torch.randn(B, length, D, generator=g, dtype=torch.float64)


def run(m, parts, span=slice(None), row=slice(None), **kwargs):
    q, k, v, x = (part[row, span] for part in parts)
    return m(q, k, v, x=x, **kwargs)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("full", [(), (1,)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_sequence_may_be_cut_anywhere(kind, full):
    m, parts = mixer(kind, full), problem()
    whole, _ = run(m, parts)
    state, outs = LayerState(), []
    for a, b in [(0, 9), (9, 10), (10, 11), (11, 20), *((t, t + 1) for t in range(20, T))]:
        o, state = run(m, parts, slice(a, b), state=state)
        outs.append(o)
    close(torch.cat(outs, dim=1), whole)


@pytest.mark.parametrize("full", [(), (0, 2)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padded_rows_equal_rows_alone_also_when_continued(kind, full):
    m, parts = mixer(kind, full), problem()
    valid = torch.ones(B, 15, dtype=torch.bool)
    valid[1, :4] = False
    o, state = run(m, parts, slice(0, 15), rows=Rows.make(valid), state=LayerState())
    outs = [o]
    for a, b in [(15, 19), *((t, t + 1) for t in range(19, T))]:
        o, state = run(m, parts, slice(a, b), state=state)
        outs.append(o)
    o = torch.cat(outs, dim=1)
    close(o[:1], run(m, parts, row=slice(0, 1))[0])
    close(o[1:, 4:], run(m, parts, slice(4, None), slice(1, 2))[0])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_right_padding_leaves_the_state_where_the_text_ends(kind):
    m, parts = mixer(kind), problem()
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[0, 17:] = False
    _, state = run(m, parts, rows=Rows.make(valid), state=LayerState())
    _, alone = run(m, parts, slice(0, 17), slice(0, 1), state=LayerState())
    state.select(torch.tensor([0]))
    for (name, ours), (_, theirs) in zip(leaves(state.filling), leaves(alone.filling), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("full", [(), (1,)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_documents_equal_documents_alone(kind, full):
    m, parts = mixer(kind, full), problem()
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[0, 7] = starts[0, 8] = starts[1, 12] = True
    o, _ = run(m, parts, rows=Rows.make(None, starts))
    for row, a, b in [(0, 0, 7), (0, 7, 8), (0, 8, T), (1, 0, 12), (1, 12, T)]:
        close(o[row : row + 1, a:b], run(m, parts, slice(a, b), slice(row, row + 1))[0])
    one = [part[:1] for part in parts]
    o, _ = run(m, one, cu_seqlens=torch.tensor([0, 5, T]))
    close(o[:, 5:], run(m, one, slice(5, None))[0])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_may_be_reordered(kind):
    m, parts = mixer(kind, (1,)), problem()
    _, state = run(m, parts, slice(0, 20), state=LayerState())
    copy = state.copy()
    copy.select(torch.tensor([1, 1, 0]))
    swapped = [torch.stack([part[1], part[1], part[0]]) for part in parts]
    o, _ = run(m, swapped, slice(20, 21), row=slice(None), state=copy)
    expected, _ = run(m, parts, slice(20, 21), state=state)
    close(o, expected[[1, 1, 0]])


@pytest.mark.parametrize("kind", KINDS)
def test_full_heads_are_softmax_and_the_others_do_not_notice(kind):
    parts = problem()
    q, k, v, x = (part.requires_grad_() for part in parts)
    m = mixer(kind, (0, 2))
    o, _ = run(m, parts)
    exact = causal_softmax(q, k, v)
    close(o[:, :, [0, 1, 4, 5]], exact[:, :, [0, 1, 4, 5]])
    close(o[:, :, 2:4], m.filling(q[:, :, 2:4], k[:, :, 1:2], v[:, :, 1:2], x=x)[0])
    o.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [*m.parameters(), q, k, v])


def test_a_layer_of_full_heads_only_has_no_filling():
    m, parts = mixer("kda", (0, 1, 2)), problem()
    close(run(m, parts)[0], causal_softmax(*parts[:3]))
    assert not list(m.parameters())


@pytest.mark.parametrize("kind", ["hedgehog-window", "softmax-window", "lolcats"])
def test_a_window_over_everything_is_softmax(kind):
    m, parts = mixer(kind, window=T + 1), problem()
    close(run(m, parts)[0], causal_softmax(*parts[:3]))


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("kind", ["hedgehog-window", *PRODUCTS])
@torch.no_grad()
def test_dense_weights_are_what_the_layer_computes(kind, window):
    m, (q, k, v, x) = mixer(kind, window=window), problem()
    rows = torch.tensor([0, 5, 6, 9, T - 1])
    share = m.filling.log_weights(q[:, rows], k, rows).softmax(-1)
    o = (share @ v.repeat_interleave(2, 2).transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(o, m(q, k, v, x=x)[0][:, rows], rtol=0, atol=1e-7)


@torch.no_grad()
def test_heads_with_other_codebooks_are_fillings_of_their_own():
    m, (q, k, v, x) = mixer("product-groups"), problem()
    (few, small), (many, large) = m.filling.groups.values()
    assert (few, many) == ((1,), (0, 2))
    o = m(q, k, v, x=x)[0]
    close(o[:, :, 2:4], small(q[:, :, 2:4], k[:, :, 1:2], v[:, :, 1:2], x=x)[0])
    close(o[:, :, [0, 1, 4, 5]], large(q[:, :, [0, 1, 4, 5]], k[:, :, [0, 2]], v[:, :, [0, 2]], x=x)[0])


def test_codes_per_head_name_every_head():
    config = {"kind": "hedgehog-window", "heads": 6, "key_heads": 3, "key_width": 8, "value_width": 8, "model_width": 9}
    with pytest.raises(InputError, match="codes has 2 entries; the layer has 3 key-value heads"):
        build(MixerConfig(options={"map": "product", "codes": [3, 2]}, **config))
    with pytest.raises(InputError, match="give log_scale as one number"):
        build(MixerConfig(options={"map": "product", "codes": [3, 2, 3], "log_scale": [0.0] * 6}, **config))


@torch.no_grad()
def test_codes_start_as_attention_to_the_centres_of_clusters():
    """Keys that are sums of few corners, nine points in all: enough codes for each leave little error."""
    g = torch.Generator().manual_seed(0)
    corners = torch.randn(2, 3, 4, generator=g, dtype=torch.float64) * 3
    pick = torch.randint(3, (2, 400), generator=g)
    k = torch.cat([corners[0, pick[0]], corners[1, pick[1]]], -1)[:, None]
    q = torch.randn(400, 2, 8, generator=g, dtype=torch.float64)
    map_q, map_k = Product(2, 8, codes=32).double(), Product(1, 8, codes=32).double()
    start_codes(map_q, map_k, q, k)
    phi_q, total = map_q.factors(q)
    ours = map_q(q[:50]).transpose(0, 1) @ map_k(k).transpose(0, 1).mT * total[:50].exp().mT[..., None]
    exact = (q[:50].transpose(0, 1) @ k[:, 0].mT).exp()
    ours, exact = (w / w.sum(-1, keepdim=True) for w in (ours, exact))
    even = (exact - 1 / 400).abs().sum(-1).mean()
    assert (ours - exact).abs().sum(-1).mean() < 0.25 * even
    assert phi_q.shape == (400, 2, 64)


@torch.no_grad()
def test_one_code_of_each_half_is_the_sink_s():
    g = torch.Generator().manual_seed(0)
    q, k, sink = (torch.randn(*s, 8, generator=g, dtype=torch.float64) for s in ((60, 4), (60, 2), (2,)))
    map_q, map_k = Product(4, 8, codes=5).double(), Product(2, 8, codes=5).double()
    start_codes(map_q, map_k, q, k, sink=sink / 4)
    last = map_q.weight[:, :, [4, 9]].sum(-1)  # the sum of both halves' last centres
    torch.testing.assert_close(last, sink.repeat_interleave(2, 0) / 4)
    chosen = map_k(sink.expand(1, 2, 8) / 4)[0]
    assert chosen.argmax(-1).tolist() == [24, 24]  # of 25 pairs the one of last codes
    alone = Product(4, 8, codes=1).double(), Product(2, 8, codes=1).double()
    start_codes(*alone, q, k, sink=sink)
    torch.testing.assert_close(alone[0].weight.sum(-1), k.mean(0).repeat_interleave(2, 0))


@pytest.mark.parametrize("kind", ["hedgehog-window", *PRODUCTS])
@torch.no_grad()
def test_dense_weights_may_count_sinks_as_far(kind):
    m, (q, k, _, _) = mixer(kind), problem()
    rows = torch.tensor([1, T - 1])
    far = m.filling.log_weights(q[:, rows], k, rows, sinks=0)
    exact = m.filling.log_weights(q[:, rows], k, rows)
    assert (far - exact)[:, :, 1, 2:].abs().max() == 0
    assert (far - exact)[:, :, 1, :2].abs().min() > 0
    assert torch.equal(far[:, :, 0], exact[:, :, 0])  # the first tokens lie in the window


@torch.no_grad()
def test_a_far_part_switched_off_is_window_and_sinks():
    m, parts = mixer("hedgehog-window"), problem()
    m.filling.log_scale.fill_(-torch.inf)
    close(run(m, parts)[0], run(mixer("softmax-window"), parts)[0])


@torch.no_grad()
def test_the_quiet_start_is_a_no_op_to_its_share():
    parts = problem(60)
    m = mixer("hedgehog-window", options={})
    m.filling.map_q.reset_parameters(), m.filling.map_k.reset_parameters(), m.filling.reset_parameters()
    m.filling.log_scale.copy_(quiet_log_scale(*parts[:2], window=6, sinks=2))
    error = (run(m, parts)[0] - run(mixer("softmax-window"), parts)[0]).abs().max()
    assert 0 < error < 1e-3 * parts[2].abs().max() * 2


@torch.no_grad()
def test_a_fresh_delta_layer_passes_the_teachers_queries_on():
    """One token: u = beta (v |k|), o = k_hat u . q = beta (q . k) v, with the gate open and the convolution silent."""
    q, k, v, x = problem(1)
    for kind in ("kda", "gated-deltanet"):
        config = MixerConfig(kind=kind, heads=HQ, key_heads=HK, key_width=K, value_width=K, model_width=D)
        o, _ = build(config).double()(q, k, v, x=x)
        k2, v2 = (part.repeat_interleave(2, dim=2) for part in (k, v))
        close(o, 0.5 * (q * k2).sum(-1, keepdim=True) * v2)


@pytest.mark.skipif(not available("numba"), reason="numba is not installed")
@pytest.mark.parametrize(("key_norm", "width"), [("value", K), ("query", K), ("value", 2 * K), ("value", K // 2)])
@pytest.mark.parametrize("kind", ["gated-deltanet", "kda"])
@torch.no_grad()
def test_a_delta_layer_steps_by_a_loop_as_by_operators(kind, key_norm, width, monkeypatch):
    m = mixer(kind, value_width=width, options={"key_norm": key_norm})
    parts, calls = problem(value_width=width), []
    step = type(m.filling)._step
    monkeypatch.setattr(type(m.filling), "_step", lambda *args: calls.append(1) or step(*args))
    _, state = run(m, parts, slice(0, 9), state=LayerState())
    other = state.copy()
    found = [run(m, parts, slice(t, t + 1), state=state)[0] for t in range(9, T)]
    assert len(calls) == T - 9
    monkeypatch.setattr(compiled, "available", lambda _: False)
    wanted = [run(m, parts, slice(t, t + 1), state=other)[0] for t in range(9, T)]
    assert len(calls) == T - 9
    close(torch.cat(found), torch.cat(wanted))
    close(torch.cat(found, 1), run(m, parts)[0][:, 9:])
    for name, x in state.tensors().items():
        close(x, other.tensors()[name])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_state_keeps_no_prompt_in_memory(kind):
    _, state = run(mixer(kind), problem(200), state=LayerState())
    for name, x in state.tensors().items():
        assert x.untyped_storage().nbytes() <= 2 * x.nbytes, name


@torch.no_grad()
def test_folded_gates_follow_a_changed_parameter():
    m, parts = mixer("hedgehog-window"), problem()
    _, state = run(m, parts, slice(0, 20), state=LayerState())
    before, _ = run(m, parts, slice(20, 21), state=state.copy())
    m.filling.log_scale.add_(2.0)
    after, _ = run(m, parts, slice(20, 21), state=state.copy())
    m.filling.map_q.temperature.add_(1.0)
    hotter, _ = run(m, parts, slice(20, 21), state=state.copy())
    assert (after - hotter).abs().max() > 1e-6
    close(hotter, run(m, parts, slice(0, 21))[0][:, 20:])
    m.filling.map_q.temperature.sub_(1.0)
    assert (before - after).abs().max() > 1e-3
    close(after, run(m, parts, slice(0, 21))[0][:, 20:])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_bf16_inputs_keep_a_wide_state(kind):
    m = mixer(kind).to(torch.bfloat16)
    q, k, v, x = (part.bfloat16() for part in problem())
    o, state = m(q, k, v, x=x, state=LayerState())
    assert o.dtype == torch.bfloat16
    assert o.isfinite().all()
    assert any(t.dtype == torch.float32 for _, t in leaves(state.filling)) or kind == "softmax-window"
    wide, _ = mixer(kind).float()(*(part.float() for part in (q, k, v)), x=x.float())
    assert (o.float() - wide).abs().max() < 0.15 * wide.abs().max()


def test_the_decays_of_lightning_are_not_rounded_with_the_weights():
    config = MixerConfig(kind="lightning", heads=3, key_heads=3, key_width=8, value_width=8, model_width=24)
    layer = Lightning(config, layer=1, layers=4)
    wide = layer.decays().clone()
    assert wide.dtype == torch.float32
    narrow = layer.bfloat16()
    assert (narrow.log_decay / wide - 1).abs().max() > 1e-4
    assert torch.equal(narrow.decays(), wide)
    x = torch.randn(1, 9, 3, 8)
    found = narrow(x, x, x, x=x)[0]
    assert torch.equal(found, decayed_attention(x, x, x, wide.expand(1, 9, 3))[0])
