"""The compiled step of windowed attention against the ordinary operators, and where it steps back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lineament._base.seeds import generator
from lineament.nn import MixerConfig, build
from lineament.nn import windowed as windowed_module
from lineament.nn.state import cloned
from lineament.nn.windowed import HedgehogWindow
from lineament.ops import compiled, window_fused

pytest.importorskip("numba")


def filling(heads=4, key_heads=2, width=8, *, window=5, sinks=2, dtype=torch.float64, codes=3, **options):
    shape = {"heads": heads, "key_heads": key_heads, "key_width": width, "value_width": width + 2, "model_width": 6}
    options = {"map": "product", "codes": codes, "query_scale": True, "log_scale": 0.0, **options}
    made = build(MixerConfig(kind="hedgehog-window", window=window, sinks=sinks, options=options, **shape)).filling
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.add_(0.4 * torch.randn(p.shape, generator=generator(i)))
    return made.to(dtype)


def tokens(mixer, rows, length, seed=0):
    c = mixer.config
    shapes = ((c.heads, c.key_width), (c.key_heads, c.key_width), (c.key_heads, c.value_width))
    found = [torch.randn(rows, length, *s, generator=generator(seed + i)) for i, s in enumerate(shapes)]
    return [x.to(mixer.log_scale.dtype) for x in (*found, torch.zeros(rows, length, c.model_width))]


@torch.no_grad()
def steps(mixer, parts, state, start):
    q, k, v, x = parts
    outs = []
    for t in range(start, q.shape[1]):
        o, state = mixer(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], x=x[:, t : t + 1], state=state)
        outs.append(o)
    return torch.cat(outs, 1), state


@torch.no_grad()
def prefix(mixer, parts, start):
    q, k, v, x = (part[:, :start] for part in parts)
    return mixer(q, k, v, x=x)[1]


def used(monkeypatch):
    """Count the calls of the compiled step."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return window_fused.product_step_(*args, **kwargs)

    monkeypatch.setattr(windowed_module, "product_step_", counted)
    return calls


SIZES = [(1, 3), (1, 3), (1, 9), (1, 6), (0, 3), (1, 14)]


@given(*(st.integers(*size) for size in SIZES))
@settings(max_examples=25, deadline=None)
def test_steps_are_the_whole_sequence(key_heads, groups, width, window, sinks, start):
    mixer = filling(key_heads * groups, key_heads, width, window=window, sinks=sinks)
    parts = tokens(mixer, 2, 17)
    with torch.no_grad():
        expected, last = mixer(*parts[:3], x=parts[3])
    found, state = steps(mixer, parts, prefix(mixer, parts, start), start)
    torch.testing.assert_close(found, expected[:, start:], rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(state, last, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_scale", [0.0, 40.0, -40.0, float("-inf")])
def test_steps_are_those_of_the_operators(monkeypatch, dtype, log_scale):
    mixer = filling(dtype=dtype, codes=4, log_scale=log_scale)
    parts = tokens(mixer, 1, 20)
    before, calls = prefix(mixer, parts, 3), used(monkeypatch)
    ours, state = steps(mixer, parts, cloned(before), 3)
    assert len(calls) == 17
    monkeypatch.setattr(windowed_module, "refused", lambda *_: "the operators, for comparison")
    theirs, other = steps(mixer, parts, cloned(before), 3)
    assert len(calls) == 17
    close = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(ours, theirs, rtol=close, atol=close)
    torch.testing.assert_close(state.far, other.far, rtol=close, atol=close)


def test_rows_that_have_seen_unequal_numbers_of_tokens():
    mixer = filling()
    parts = tokens(mixer, 2, 16)
    short = [part[1:, 4:] for part in parts]
    rows = [prefix(mixer, [part[:1] for part in parts], 10), prefix(mixer, short, 6)]
    both = type(rows[0])(*(torch.cat(pair) for pair in zip(*rows, strict=True)))
    found, _ = steps(mixer, parts, both, 10)
    first, _ = steps(mixer, [part[:1] for part in parts], rows[0], 10)
    second, _ = steps(mixer, short, rows[1], 6)
    torch.testing.assert_close(found, torch.cat([first, second]), rtol=1e-12, atol=1e-12)


def test_it_steps_back_where_it_can_not_run(monkeypatch):
    calls = used(monkeypatch)
    for mixer in (filling(dtype=torch.bfloat16), filling(decay=True), filling(map="hedgehog", codes=0)):
        parts = tokens(mixer, 1, 9)
        found, _ = steps(mixer, parts, prefix(mixer, parts, 4), 4)
        assert found.isfinite().all()
    assert not calls
    mixer = filling()
    state = prefix(mixer, tokens(mixer, 1, 9), 4)
    assert "float32 beside a state in torch.float64" in window_fused.refused(state, torch.zeros(1))
    assert "view" in window_fused.refused(state._replace(far=state.far.mT), state.keys)
    monkeypatch.setattr(compiled, "available", lambda _: False)
    assert "lineament[cpu]" in window_fused.refused(state, state.keys)
    assert isinstance(mixer, HedgehogWindow)
