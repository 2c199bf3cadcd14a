"""Attribution along paths, over noise, by leaving out; and the measures of explanations."""

import pytest
import torch
from tiny_families import image, make
from torch import nn

from lineament import explain


def linear_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)).double(), image(8).double()


def test_integrated_gradients_add_up_to_the_difference_of_two_outputs():
    model, inputs, _ = make("vgg", torch.float64)
    found = explain.relevance(model, inputs, target=1, rules=explain.IntegratedGradients(300), at="5", baseline=0.1)
    nothing = model(torch.full_like(inputs["input"], 0.1))[:, 1].sum()
    assert found.ledger.columns["constants"] == pytest.approx(nothing.item())
    assert found.inputs["input"].sum().item() == pytest.approx((found.value.sum() - nothing).item(), rel=0.02)
    assert found.at["5"].sum().item() == pytest.approx(found.inputs["input"].sum().item(), rel=0.02)  # conductance


@pytest.mark.parametrize(
    "name", ["integrated-gradients", "deep-lift", "smoothgrad", "occlusion", "gradient-x-input", "epsilon"]
)
def test_methods_agree_on_a_linear_model(name):
    model, x = linear_model()
    rules = explain.Occlusion(patch=1) if name == "occlusion" else name
    found = explain.relevance(model, x, target=2, rules=rules).inputs["input"]
    terms = x * model[1].weight[2].view(3, 8, 8)
    if name == "occlusion":
        terms = terms.sum(1, keepdim=True).expand_as(terms) / 3  # a place goes out in all colours at once
    torch.testing.assert_close(found, terms.detach())


def test_token_methods_take_embeddings_for_the_input():
    model, inputs, _ = make("gpt2")
    for name in ("integrated-gradients", "smoothgrad", "occlusion", "rollout"):
        found = explain.relevance(model, inputs, rules=name)
        assert found.inputs["input_ids"].shape == inputs["input_ids"].shape
        assert found.rules == name
    torch.testing.assert_close(found.inputs["input_ids"].sum(1), torch.ones(2))  # rollout's weights
    assert model.config._attn_implementation == "sdpa"


def test_token_methods_move_the_embedding_that_the_model_calls():
    model, inputs, _ = make("t5")  # each half has an embedding of its own module; `shared` is called by nobody
    found = explain.relevance(model, inputs, target=5, rules="occlusion")
    embedded = model.encoder.embed_tokens(inputs["input_ids"])
    rest = {"decoder_input_ids": inputs["decoder_input_ids"]}
    with torch.no_grad():
        for i in range(embedded.shape[1]):
            without = embedded.clone()
            without[:, i] = 0
            drop = found.value - model(inputs_embeds=without, **rest).logits[:, -1, 5]
            torch.testing.assert_close(found.inputs["input_ids"][:, i], drop, rtol=1e-4, atol=1e-5)
    assert found.inputs["input_ids"].abs().min() > 0
    assert explain.relevance(model, inputs, rules="integrated-gradients").inputs["input_ids"].abs().min() > 0
    most, least = explain.flipping(model, inputs, found.inputs["input_ids"], target=5, steps=3)
    assert most[1] != most[0]
    assert most != least


def test_what_a_method_cannot_do_is_said():
    model, x = linear_model()
    with pytest.raises(ValueError, match="needs a transformers model"):
        explain.relevance(model, x, rules="rollout")
    with pytest.raises(ValueError, match="explains inputs only"):
        explain.relevance(model, x, rules="occlusion", at="1")


def test_measures_tell_a_good_explanation_from_a_bad_one():
    model, inputs, _ = make("vgg", torch.float64)
    found = explain.relevance(model, inputs, rules="epsilon")
    order = found.inputs["input"].sum(1)
    most, least = explain.flipping(model, inputs, order)
    assert most[0] == pytest.approx(found.value.mean().item())
    curves = explain.flip_curves(model, inputs, order)
    known = explain.flip_curves(model, inputs, order, ends=curves[0, [0, -1]])
    torch.testing.assert_close(known, curves, rtol=0, atol=0)
    assert curves.shape == (2, 17, len(order))
    assert curves[1].mean(1).tolist() == least
    assert explain.abpc(most, least) > 0
    assert explain.abpc(most, least) == pytest.approx(-explain.abpc(*explain.flipping(model, inputs, -order)))
    assert 0 < explain.sensitivity(model, inputs, rules="epsilon") < 10
    line, x = linear_model()
    said = explain.relevance(line, x)
    assert explain.infidelity(line, x, said) < 1e-12
    said.inputs["input"].mul_(2)
    assert explain.infidelity(line, x, said) > 1e-4


def test_deep_lift_adds_up_to_the_difference_of_two_outputs():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 4, 3),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.Sigmoid(),
        nn.Linear(8, 3),
    )
    model, x = nn.Sequential(*layers).double(), image(8).double()
    found = explain.relevance(model, x, target=1, rules="deep-lift", baseline=0.3)
    assert found.ledger.unaccounted < 1e-9
    with pytest.raises(ValueError, match="pass inputs_embeds"):
        explain.relevance(*make("gpt2")[:2], rules="deep-lift")
