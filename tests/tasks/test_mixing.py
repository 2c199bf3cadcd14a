"""Mixing weights: the matrix that multiplies the values, for every kind of layer; shares by a loop."""

import pytest
import torch

from lineament._base.errors import InputError
from lineament.graph import capture
from lineament.models import DecoderForCausalLM, decoder_config
from lineament.tasks import mixing_weights, near_share

LAYERS = [
    "softmax",
    "sliding-window",
    "linear",
    "retnet",
    "diag-attention",
    "norm-attention-t2",
    "gated-deltanet",
    "gla",
]


@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_the_weights_are_what_multiplies_the_values(layer):
    torch.manual_seed(0)
    config = decoder_config(
        "transnormer-t1", ratio=["softmax", layer], vocab_size=16, width=16, layers=2, heads=4, key_heads=2
    )
    model = DecoderForCausalLM(config).eval().double()
    ids = torch.randint(16, (2, 70))
    A = mixing_weights(model, ids, layer=1)
    assert not A.triu(1).any()
    name = "model.layers.1.mixer.heads"
    with capture(model, name, inputs=True) as seen:
        model(input_ids=ids, use_cache=False)
    v, o = seen.inputs(name)[0][0][2], seen.outputs(name)[0][0]
    v = v.repeat_interleave(o.shape[2] // v.shape[2], dim=2)
    torch.testing.assert_close(torch.einsum("bhts,bshv->bthv", A, v), o, rtol=1e-6, atol=1e-9)


def test_shares_are_counted_token_by_token():
    weights = torch.randn(1, 2, 9, 9, generator=torch.Generator().manual_seed(0)).tril()
    shares = [
        sum(abs(weights[0, h, t, s]) for s in range(max(0, t - 2), t + 1)) / sum(abs(weights[0, h, t, : t + 1]))
        for h in range(2) for t in range(9)
    ]  # fmt: skip
    assert near_share(weights, 3) == pytest.approx(float(sum(shares)) / 18, abs=1e-6)
    assert near_share(torch.zeros(1, 1, 4, 4), 1) == 1.0


def test_a_layer_that_is_not_there_is_named():
    model = DecoderForCausalLM(decoder_config("llama", vocab_size=16, width=16, layers=1, heads=2))
    with pytest.raises(InputError, match="no layer 3 with a mixer"):
        mixing_weights(model, torch.zeros(1, 3, dtype=torch.long), layer=3)
