"""Every backend and every head mixer that is here joins the batteries."""

from functools import partial

import pytest

from lineament.nn import BUILDERS, LayerState, MixerConfig, build
from lineament.ops import elementwise_scan
from lineament.ops.recurrence import decayed_attention, delta_rule
from lineament.testing import INPUTS, MIXER_LAWS, OP_LAWS, MixerCase, check_mixer, check_op

CASE = MixerCase(length=21, key_width=4, value_width=4, model_width=6)


@pytest.mark.parametrize("backend", ["chunked", "chunked-autograd"])
@pytest.mark.parametrize("op", [decayed_attention, delta_rule], ids=lambda op: op.__name__)
@pytest.mark.parametrize("law", OP_LAWS)
def test_backend(op, backend, law):
    check_op(partial(op, chunk_size=16), backend, inputs=INPUTS[op.__name__], chunk=16, laws=[law])


@pytest.mark.parametrize("law", OP_LAWS)
def test_scan(law):
    check_op(elementwise_scan, "chunked", chunk=64, laws=[law])


def maker(kind, full=(), **shape):
    options = {"log_scale": -1.0} if kind == "hedgehog-window" else {}
    full = full if shape["key_heads"] > 1 else ()
    return build(MixerConfig(kind=kind, window=6, sinks=2, options=options, full_heads=full, **shape))


@pytest.mark.parametrize("kind", BUILDERS)
def test_mixer(kind):
    check_mixer(lambda **shape: maker(kind, **shape).filling, case=CASE)


@pytest.mark.parametrize("law", MIXER_LAWS)
def test_layer_with_a_full_head(law):
    make = partial(maker, "hedgehog-window", (1,))
    check_mixer(make, case=CASE, begin=LayerState, constant_state=False, laws=[law])
