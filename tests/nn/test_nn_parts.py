"""Feature maps, configs, rows, the short convolution, key-value buffers and the layer from scratch."""

import json

import pytest
import torch

from lineament._base.errors import InputError
from lineament.nn import (
    FEATURE_MAPS,
    KeyValues,
    Mixer,
    MixerCache,
    MixerConfig,
    Rows,
    ShortConv,
    Slots,
    build,
    causal_softmax,
    softmax,
)
from lineament.nn.additive import slopes
from lineament.nn.build import options_of
from lineament.nn.feature_maps import Hedgehog

SHAPE = {"heads": 4, "key_heads": 2, "key_width": 8, "value_width": 8, "model_width": 16}


@pytest.mark.parametrize("name", [n for n in FEATURE_MAPS if n != "taylor"])
def test_features_are_not_negative(name):
    phi, x = FEATURE_MAPS[name](3, 8), torch.randn(2, 5, 3, 8)
    out = phi(x, torch.arange(5).expand(2, 5)) if name == "cosformer" else phi(x)
    assert out.shape == (2, 5, 3, phi.features)
    assert (out >= 0).all()


def test_the_exp_form_is_a_sum_of_cosh():
    phi = Hedgehog(1, 4, form="exp")
    q, k = torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 4)
    torch.testing.assert_close((phi(q) * phi(k)).sum(-1), 2 * torch.cosh(q + k).sum(-1))


def test_the_taylor_map_is_the_second_order_series():
    phi = FEATURE_MAPS["taylor"](1, 4)
    q, k = torch.randn(3, 1, 4), torch.randn(3, 1, 4)
    s = (q * k).sum(-1)
    torch.testing.assert_close((phi(q) * phi(k)).sum(-1), 1 + s + s * s / 2)


def test_performer_estimates_the_exponential():
    phi = FEATURE_MAPS["performer"](1, 4, features=4096)
    q, k = torch.randn(5, 1, 4) * 0.4, torch.randn(5, 1, 4) * 0.4
    exact = (q * k).sum(-1).exp()
    assert ((phi(q) * phi(k)).sum(-1) / exact - 1).abs().max() < 0.2


def test_cosformer_weights_fall_with_distance():
    phi = FEATURE_MAPS["cosformer"](1, 2, reach=10)
    x, position = torch.ones(1, 10, 1, 2), torch.arange(10)[None]
    weight = (phi(x, position)[:, 9:] * phi(x, position)).sum(-1).flatten()
    assert (weight.diff() > 0).all()


def test_slopes_of_nine_heads_fill_from_the_next_power():
    assert slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert slopes(9)[8] == 2**-0.5


def test_config_travels_as_json():
    config = MixerConfig(kind="hedgehog-window", full_heads=(1,), options={"decay": True}, **SHAPE)
    assert MixerConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "kdaa"}, "Did you mean 'kda'"),
        ({"kind": "kda", "options": {"convv": 3}}, "Did you mean 'conv'"),
        ({"kind": "kda", "full_heads": (2,)}, "key-value heads 0 to 1"),
        ({"kind": "kda", "heads": 5}, "must divide"),
        ({"kind": "kda", "window": -1}, "0 or more"),
        ({"kind": "hedgehog", "options": {"form": "exq"}}, "Did you mean 'exp'"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(changes, message):
    with pytest.raises(InputError, match=message):
        build(MixerConfig(**{**SHAPE, **changes}))


def test_an_unknown_field_is_named():
    with pytest.raises(InputError, match="Did you mean 'window'"):
        MixerConfig.from_json({"kind": "kda", "windw": 3, **SHAPE})


def test_options_list_a_maps_own():
    assert {"form", "features", "temperature", "decay"} <= set(options_of("hedgehog"))


def test_rows_pack_and_unpack():
    rows = Rows.make(torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0]]))
    x = torch.arange(9.0).view(3, 3)
    assert rows.cu_seqlens.tolist() == [0, 2, 3, 3]
    assert rows.pack(x).tolist() == [[1, 2, 3]]
    assert rows.unpack(rows.pack(x)).tolist() == [[0, 1, 2], [3, 0, 0], [0, 0, 0]]


def test_the_short_convolution_may_be_cut_and_packed():
    conv, x = ShortConv(3, 4, identity=False).double(), torch.randn(1, 12, 3, dtype=torch.float64)
    whole, _ = conv(x)
    a, tail = conv(x[:, :1])
    b, tail = conv(x[:, 1:7], tail)
    c, _ = conv(x[:, 7:], tail)
    torch.testing.assert_close(torch.cat([a, b, c], dim=1), whole)
    cu = torch.tensor([0, 2, 2, 12])
    packed, tails = conv(x, cu_seqlens=cu)
    torch.testing.assert_close(packed[:, 2:], conv(x[:, 2:])[0])
    torch.testing.assert_close(tails[2], x[0, -3:])
    y, _ = conv(x[:, :3], tails[2:], cu_seqlens=torch.tensor([0, 3]))
    torch.testing.assert_close(y, conv(x[:, :3], tails[2:])[0])


def test_a_key_value_buffer_grows_by_chunks_and_holds_no_more():
    past, keys = KeyValues(), torch.randn(1, 600, 2, 8)
    q = torch.randn(1, 600, 4, 8)
    with torch.no_grad():
        parts = [causal_softmax(q[:, :255], keys[:, :255], keys[:, :255], past=past)]
        for t in range(255, 600):
            one = (x[:, t : t + 1] for x in (q, keys, keys))
            parts.append(causal_softmax(*one, past=past))
    assert past.keys.shape[2] == 768
    torch.testing.assert_close(torch.cat(parts, dim=1), causal_softmax(q, keys, keys), atol=1e-5, rtol=1e-5)


MIXERS = {
    "gated deltanet": (
        MixerConfig(kind="gated-deltanet", options={"conv": 0, "output_gate": False, "key_norm": "none"}, **SHAPE),
        Slots(conv=4, activation="silu", qk_norm="l2", output_norm="head", output_gate="sigmoid", gate_rank=4),
    ),
    "softmax": (MixerConfig(kind="kda", full_heads=(0, 1), **SHAPE), Slots(rope=1e4, qk_norm="rms")),
    "lightning": (MixerConfig(kind="lightning", **SHAPE), Slots(rope=1e4, activation="silu", output_gate="silu")),
    "hybrid": (MixerConfig(kind="hedgehog", full_heads=(1,), **SHAPE), Slots(conv=3, rope=1e4)),
}


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_a_layer_from_scratch_may_be_cut_padded_and_packed(name):
    torch.manual_seed(0)
    layer = Mixer(*MIXERS[name]).double().eval()
    x = torch.randn(2, 14, 16, dtype=torch.float64)
    whole = layer(x)
    cache = MixerCache()
    parts = [layer(x[:, a:b], cache=cache) for a, b in [(0, 6), (6, 7), (7, 8), (8, 14)]]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    mask = torch.ones(2, 14)
    mask[1, :5] = 0
    cache = MixerCache()
    padded = [layer(x[:, :11], cache=cache, padding_mask=mask[:, :11]), layer(x[:, 11:], cache=cache)]
    torch.testing.assert_close(torch.cat(padded, dim=1)[1:, 5:], layer(x[1:, 5:]))
    packed = layer(x[:1], cu_seqlens=torch.tensor([0, 4, 14]))
    torch.testing.assert_close(packed[:, 4:], layer(x[:1, 4:]))


def test_a_layer_refuses_a_mask_and_packing_together():
    layer = Mixer(MixerConfig(kind="lightning", **SHAPE))
    with pytest.raises(InputError, match="not both"):
        layer(torch.zeros(1, 2, 16), padding_mask=torch.ones(1, 2), cu_seqlens=torch.tensor([0, 2]))
    with pytest.raises(InputError, match="unknown output_gate"):
        Slots(output_gate="tanh")


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("value_width", [8, 5])
def test_softmax_in_pieces_is_softmax_at_once(dtype, tolerance, value_width):
    """Without gradients a piece reads its past and itself apart, and joins both by their log sums."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, h, w).to(dtype) for h, w in ((6, 8), (2, 8), (2, value_width)))
    whole, seen, parts = causal_softmax(10 * q, k, v), KeyValues(), []
    with torch.no_grad():
        for a, b in ((0, 13), (13, 14), (14, 31), (31, 40)):
            parts.append(causal_softmax(10 * q[:, a:b], k[:, a:b], v[:, a:b], past=seen))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("rows", "key_heads"), [(1, 1), (1, 3), (2, 3), (1, 2)])
@pytest.mark.parametrize("threads", [2, 4])
def test_a_token_reads_a_long_past_in_stretches(monkeypatch, rows, key_heads, threads):
    monkeypatch.setattr(softmax, "LONG", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows, 43, h, 8, dtype=torch.float64) for h in (2 * key_heads, key_heads, key_heads))
    seen = KeyValues()
    with torch.no_grad():
        causal_softmax(q[:, :42], k[:, :42], v[:, :42], past=seen)
        last = causal_softmax(q[:, 42:], k[:, 42:], v[:, 42:], past=seen)
    torch.testing.assert_close(last, causal_softmax(q, k, v)[:, 42:], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("past_dtype", [torch.float32, torch.bfloat16])
def test_pieces_run_under_autocast_in_mixed_widths(past_dtype):
    q, k, v, seen = torch.randn(1, 9, 2, 8), torch.randn(1, 9, 1, 8), torch.randn(1, 9, 1, 8), KeyValues()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        causal_softmax(q[:, :5], k[:, :5].to(past_dtype), v[:, :5].to(past_dtype), past=seen)
        found = causal_softmax(q[:, 5:], k[:, 5:], v[:, 5:].bfloat16(), past=seen)
    torch.testing.assert_close(found.float(), causal_softmax(q, k, v)[:, 5:], atol=5e-2, rtol=5e-2)
