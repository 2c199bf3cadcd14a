"""Direct logit attribution, attention patterns and steering."""

import pytest
import torch
from test_explain_edges import difference, measured, pair, state
from tiny_families import make

from lineament import explain
from lineament.explain.wiring import wiring


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "gemma2"])
def test_what_nodes_write_adds_up_to_the_logits(family):
    model, inputs, _ = pair(family)
    norm = model.get_submodule(wiring(model).readers[-1].norm)
    if getattr(norm, "bias", None) is not None:  # its share is nobody's
        torch.nn.init.zeros_(norm.bias)
    if model.config.to_dict().get("final_logit_softcapping"):
        model.config.final_logit_softcapping = None  # a tanh of the logits is not linear in them
    found = explain.direct_logits(model, inputs, difference).scores
    assert {"embed", "m1", "a1" if family == "gemma2" else "a1.h3"} <= set(found)
    if family in ("gpt2", "gpt-neox"):
        assert "biases" in found
        for layer in (m for name, m in model.named_modules() if name.endswith((".c_proj", ".dense_4h_to_h"))):
            assert layer.bias is not None
    torch.testing.assert_close(sum(x.sum(1) for x in found.values()), measured(model, inputs), rtol=1e-5, atol=1e-6)
    assert all(bool((x[:, :-1] == 0).all()) for x in found.values())  # the last position alone is read


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_patterns_are_causal_distributions_and_have_pictures(family, tmp_path):
    model, inputs, _ = pair(family)
    before = state(model), model.config._attn_implementation
    found = explain.patterns(model, inputs, tokens=["the", " $x$", "\n", " of", " it"])
    assert (state(model), model.config._attn_implementation) == before
    assert {layer: list(x.shape) for layer, x in found.weights.items()} == {0: [2, 4, 5, 5], 1: [2, 4, 5, 5]}
    for x in found.weights.values():
        torch.testing.assert_close(x.sum(-1), torch.ones(2, 4, 5).double())
        assert bool((x.triu(1) == 0).all())
    assert found.png(1, 3)[:4] == b"\x89PNG"
    assert "layer 1, head 3" in found.write_html(tmp_path / "a.html", [(1, 3)]).read_text()
    with pytest.raises(ValueError, match=r"there are layers \[0, 1\] of 4 heads"):
        found.png(1, 4)
    with pytest.raises(ValueError, match="needs a transformers model"):
        explain.patterns(torch.nn.Identity(), {"input": torch.ones(1)})


def test_steering_moves_a_place_by_the_difference_and_nothing_stays():
    model, inputs, other = pair()
    site = "blocks.0.hook_resid_post"
    vector = explain.steering_vector(model, inputs, other, site)
    kept = []
    hook = model.model.layers[0].register_forward_hook(lambda m, a, out: kept.append(out))
    for given in (inputs, other):
        measured(model, given)
    torch.testing.assert_close(vector, kept[0][:, -1].mean(0) - kept[1][:, -1].mean(0))
    hook.remove()
    before, plain = state(model), measured(model, inputs)
    hook = model.model.layers[0].register_forward_hook(lambda m, a, out: out + 2 * vector)
    expected = measured(model, inputs)
    hook.remove()
    with explain.steered(model, site, vector, strength=2.0):
        torch.testing.assert_close(measured(model, inputs), expected)
        assert model.generate(inputs["input_ids"], max_new_tokens=2, do_sample=False).shape == (2, 7)
    torch.testing.assert_close(measured(model, inputs), plain)
    with pytest.raises(KeyboardInterrupt), explain.steered(model, site, vector):
        raise KeyboardInterrupt
    assert state(model) == before
    with pytest.raises(ValueError, match="the vector is"), explain.steered(model, site, vector[:3]):
        measured(model, inputs)
    with pytest.raises(ValueError, match="means 2 places"):
        explain.steering_vector(model, inputs, other, "*.mlp")
    with pytest.raises(ValueError, match="position 9"):
        explain.steering_vector(make("llama")[0], inputs, other, site, position=9)
