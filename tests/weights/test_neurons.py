"""Neurons: indicators, silence, functionality scores, and what taking neurons out does."""

import importlib.util
import math

import pytest
import torch
from torch import nn

from lineament._base.errors import InputError
from lineament._base.seeds import generator, seeded
from lineament.models import tiny_teacher
from lineament.weights import neurons


def net():
    with seeded(0):
        return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)).double()


def batch(rows=8):
    draw = generator(2)
    return torch.randn(rows, 5, generator=draw, dtype=torch.double), torch.randint(3, (rows,), generator=draw)


def test_a_neuron_is_an_input_of_the_output_map():
    model, (x, _) = net(), batch()
    held = neurons.activations(model, "2", x)["2"]
    torch.testing.assert_close(held, model[:2](x))
    said = neurons.indicator(model[2], held)
    contributions = held[..., None] * model[2].weight.T  # what each neuron adds to the output, [N, F, out]
    torch.testing.assert_close(said, contributions.norm(dim=-1))


def test_the_quietest_of_every_token_are_zero_and_no_others():
    model, (x, _) = net(), batch()
    held = model[:2](x)
    said = neurons.indicator(model[2], held)
    expected = []
    for row, loud in zip(held, said, strict=True):
        kept = row.clone()
        for i in sorted(range(12), key=lambda i: float(loud[i].detach()))[:6]:
            kept[i] = 0
        expected.append(model[2](kept))
    with neurons.quietest_silent(model, "2", 0.5):
        torch.testing.assert_close(model(x), torch.stack(expected))


def test_a_share_of_zero_changes_nothing_to_the_bit():
    model, (x, _) = net(), batch()
    before = model(x)
    with neurons.quietest_silent(model, "2", 0.0):
        assert torch.equal(model(x), before)


def test_the_curve_starts_at_one_and_its_ratio_is_that_of_perplexities():
    model, pair = net(), batch()
    first, second = neurons.sparsity_curve(model, "2", [pair], [0.0, 0.75])
    assert first["ratio"] == 1.0
    assert second["ratio"] == pytest.approx(math.exp(second["loss"] - first["loss"]))


def test_activity_counts_shares_below_the_largest():
    model, (x, _) = net(), batch()
    (row,) = neurons.activity(model, "2", [x])
    m = neurons.indicator(model[2], model[:2](x))
    below = [[v.item() < 0.2 * token.max().item() for v in token] for token in m]
    assert row["below 0.2"] == pytest.approx(sum(map(sum, below)) / m.numel())
    assert row["active"] == pytest.approx(float((m > 0).double().mean()))


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is the reference")
@pytest.mark.parametrize("kinds", [2, 5, 1000])  # few kinds of scores: many ties
def test_average_precision_is_scikit_learns_on_ties_too(kinds):
    from sklearn.metrics import average_precision_score

    draw = generator(0)
    scores = torch.randint(kinds, (40, 7), generator=draw).double()
    labels = torch.rand(40, generator=draw) < 0.3
    expected = [average_precision_score(labels.numpy(), scores[:, i].numpy()) for i in range(7)]
    torch.testing.assert_close(neurons.average_precision(scores, labels), torch.tensor(expected, dtype=torch.double))


def test_a_perfect_neuron_scores_one_and_a_constant_one_the_prior():
    labels = torch.tensor([1, 0, 0, 1, 0])
    scores = torch.stack([labels.double(), torch.ones(5).double()], 1)
    torch.testing.assert_close(neurons.average_precision(scores, labels), torch.tensor([1.0, 0.4]).double())
    with pytest.raises(InputError, match="a positive"):
        neurons.average_precision(scores, torch.zeros(5))


def planted():
    """A net whose neurons 0 and 1 speak for one function and 2 for the other."""
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.9, 0.0], [0.0, 1.0], [0.2, 0.2]]))
        model[2].weight.copy_(torch.tensor([[1.0, 1.0, 0.0, 0.1], [0.0, 0.0, 1.0, 0.1]]))
    f, g = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    return model, {"f": [f, 1.1 * f, 1.2 * f], "g": [g, 1.1 * g]}


def test_planted_specialists_are_found_and_taking_them_out_hurts_their_function_only():
    model, instances = planted()
    scores = neurons.function_scores(model, "2", instances)
    assert scores["2"]["f"][0] == scores["2"]["f"][1] == scores["2"]["g"][2] == 1.0
    assert neurons.specificity(scores["2"])["f"][3] < 0.5 < neurons.specificity(scores["2"])["f"][0]
    assert sorted(neurons.top(scores, "f", 0.5)["2"].tolist()) == [0, 1]
    assert neurons.overlap(scores, "f", "g", 0.25) == 0.0
    batches = {"f": [(instances["f"][0], torch.tensor([0]))], "g": [(instances["g"][0], torch.tensor([1]))]}
    hurt = neurons.damage(model, scores, batches, share=0.25)
    assert hurt["f"]["f"] > 10 * abs(hurt["f"]["g"])
    with pytest.raises(InputError, match="at least two functions"):
        neurons.function_scores(model, "2", {"f": instances["f"]})


def test_a_language_model_has_neurons_in_every_layer():
    model, ids = tiny_teacher("llama"), torch.arange(1, 9)[None]
    held = neurons.activations(model, neurons.OUTPUTS, {"input_ids": ids})
    assert {name: x.shape for name, x in held.items()} == {
        f"model.layers.{i}.mlp.down_proj": torch.Size([1, 8, 32]) for i in range(3)
    }
    rows = neurons.sparsity_curve(
        model, neurons.OUTPUTS, [{"input_ids": ids, "labels": ids, "use_cache": False}], [0.0, 0.9]
    )
    assert rows[0]["ratio"] == 1.0 != rows[1]["ratio"]


def test_what_is_no_output_map_is_named():
    with pytest.raises(InputError, match="output map is a ReLU"):
        neurons.activations(net(), "1", batch()[0])
    with pytest.raises(InputError, match="share is 1"), neurons.quietest_silent(net(), "2", 1.0):
        pass
    with pytest.raises(InputError, match="unknown indicator"):
        neurons.indicator(net()[2], torch.ones(12), "loudness")
