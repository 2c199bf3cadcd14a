"""Readings of the residual stream, beside a plain loop over a Llama's layers written out in float64."""

import pytest
import torch
from tiny_models import MAKERS, batch, tiny

from lineament import graph
from lineament._base.errors import InputError

ATTENTION = {"gpt2": "attn", "neox": "attention", "gemma3": "post_attention_layernorm"}


def read(family="llama", given=None, double=True):
    model, layers = tiny(family)
    model = model.double() if double else model
    added = [f"{layer}.{ATTENTION.get(family, 'self_attn')}" for layer in layers]
    given = batch() if given is None else given
    return model, layers, added, given, graph.residual_stream(model, layers, given, attention=added)


def by_hand(model, ids, skip=None, positions=()):
    """Return what each layer of a Llama adds, by attention and MLP, and the output distribution; one layer skipped."""
    inner, where = model.model, torch.zeros(ids.shape[1], dtype=torch.bool)
    where[list(positions)] = True
    h = inner.embed_tokens(ids)
    place = torch.arange(ids.shape[1])[None]
    rotary = inner.rotary_emb(h, place)
    causal = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=h.dtype).triu(1)[None, None]
    written = []
    for s, layer in enumerate(inner.layers):
        a = layer.self_attn(layer.input_layernorm(h), position_embeddings=rotary, attention_mask=causal)[0]
        m = layer.mlp(layer.post_attention_layernorm(h + a))
        c = a + m
        if s == skip:
            c = torch.where(where[:, None], 0.0, c)
        written.append(c)
        h = h + c
    return torch.stack(written), torch.softmax(model.lm_head(inner.norm(h)), -1)


@pytest.mark.parametrize("family", MAKERS)
def test_what_layers_write_adds_up(family):
    _, layers, _, _, found = read(family, batch(padded=True))
    assert found.hidden.shape == (5, 2, 9, 32)
    torch.testing.assert_close(found.hidden[0] + found.written.sum(0), found.hidden[-1], rtol=1e-6, atol=1e-6)
    assert found.position[0].tolist() == [-1, -1, -1, 0, 1, 2, 3, 4, 5]
    measures = graph.contributions(found)
    assert measures["|c|"].shape == (len(layers), 2, 9)
    assert {"|a|/|h|", "|m|/|h+a|", "cos(c,h)"} <= set(measures)


def test_attention_and_mlp_are_what_the_layer_adds():
    model, _, _, given, found = read()
    with torch.no_grad():
        written, p = by_hand(model, given["input_ids"])
    torch.testing.assert_close(found.written, written, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logits.softmax(-1), p, rtol=1e-5, atol=1e-6)
    h, c = found.hidden[1][0, 4], found.written[1][0, 4]
    measures = graph.contributions(found)
    assert float(measures["|c|/|h|"][1, 0, 4]) == pytest.approx(float(c.norm() / h.norm()), rel=1e-5)
    assert float(measures["cos(c,h)"][1, 0, 4]) == pytest.approx(float(c @ h / c.norm() / h.norm()), abs=1e-5)


def test_skipping_a_layer_is_what_a_loop_without_it_finds():
    model, layers, _, given, found = read()
    effects = graph.skip_effects(model, layers, given, found, until=4)
    with torch.no_grad():
        clean, p = by_hand(model, given["input_ids"])
        for s in range(4):
            written, q = by_hand(model, given["input_ids"], skip=s, positions=range(1, 4))
            change = ((written - clean).norm(dim=-1) / clean.norm(dim=-1))[:, :, 4:].flatten(1)
            torch.testing.assert_close(effects.relative[s, s + 1 :].double(), change[s + 1 :], rtol=1e-3, atol=1e-5)
            assert effects.relative[s, : s + 1].abs().max() == 0
            torch.testing.assert_close(
                effects.output[s].double(), (q - p).norm(dim=-1)[:, 4:].flatten(), rtol=1e-3, atol=1e-6
            )


@pytest.mark.parametrize("part", ["layer", "attention", "mlp"])
@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_skipping_nowhere_changes_nothing_and_the_parts_differ(family, part):
    model, layers, added, given, found = read(family)
    nothing = graph.skip_effects(model, layers, given, found, until=1, part=part, attention=added)
    assert nothing.relative.max() < 1e-6
    assert nothing.output.max() < 1e-7
    assert graph.skip_effects(model, layers, given, found, part=part, attention=added).relative.max() > 1e-3


def test_direct_effects_are_of_one_layer_on_another():
    model, layers, _, given, found = read()
    direct = graph.direct_effects(model, layers, given, found, until=4)
    through = graph.skip_effects(model, layers, given, found, until=4)
    for s in range(3):  # the next layer sees nothing but the skipped one
        torch.testing.assert_close(direct.relative[s, s + 1], through.relative[s, s + 1], rtol=1e-3, atol=1e-5)
    assert (direct.relative[0, 3] - through.relative[0, 3]).abs().max() > 1e-4


def test_the_lens_at_the_end_is_the_model():
    model, layers, _, given, found = read("neox")
    lens = graph.logit_lens(model, layers, given, found)
    assert lens["KL"].shape == (5,)
    assert abs(float(lens["KL"][-1])) < 1e-6
    assert float(lens["overlap"][-1]) == 1
    assert float(lens["KL"][0]) > 1e-3


def test_neither_padding_nor_company_changes_a_row():
    padded = batch(padded=True)
    model, layers, _, _, found = read("llama", padded)
    alone = {"input_ids": padded["input_ids"][:1, 3:]}
    own = graph.residual_stream(model, layers, alone)
    torch.testing.assert_close(found.hidden[:, :1, 3:], own.hidden, rtol=1e-5, atol=1e-6)
    own_effects = graph.skip_effects(model, layers, alone, own, until=3)
    both = graph.skip_effects(model, layers, padded, found, until=3)
    torch.testing.assert_close(both.relative[..., :3], own_effects.relative, rtol=1e-3, atol=1e-5)


def test_a_stream_maps_onto_itself():
    made = torch.Generator().manual_seed(0)
    x = torch.randn(3, 400, 8, generator=made)
    x[1] += x[0]
    x[2] += x[1]
    maps = graph.linear_maps((x[:, :300], x[:, :300]), (x[:, 300:], x[:, 300:]))
    assert maps.best.tolist() == [0, 1, 2]
    assert maps.error.diagonal().max() < 1e-3
    assert maps.r2.diagonal().min() > 1 - 1e-6
    assert maps.diagonal() == pytest.approx(1.0)
    assert maps.r2[0, 1] < 0.9


def test_maps_are_ridge_regression():
    made = torch.Generator().manual_seed(1)
    x, y = (torch.randn(1, 60, 4, generator=made, dtype=torch.float64) for _ in range(2))
    maps = graph.linear_maps((x[:, :40], y[:, :40]), (x[:, 40:], y[:, 40:]), ridge=0.1)
    X, Y = x[0, :40] - x[0, :40].mean(0), y[0, :40] - y[0, :40].mean(0)
    W = torch.linalg.inv(X.T @ X + 0.1 * torch.trace(X.T @ X) / 4 * torch.eye(4).double()) @ X.T @ Y
    gap = y[0, 40:] - ((x[0, 40:] - x[0, :40].mean(0)) @ W + y[0, :40].mean(0))
    spread = y[0, 40:] - y[0, 40:].mean(0)
    assert float(maps.r2[0, 0]) == pytest.approx(float(1 - gap.square().sum() / spread.square().sum()), rel=1e-9)
    assert float(maps.error[0, 0]) == pytest.approx(float((gap.norm(dim=1) / y[0, 40:].norm(dim=1)).mean()), rel=1e-9)


def test_summaries_say_where_depth_is_used():
    assert graph.depth_score(torch.tensor([0.0, 0.0, 2.0, 0.0])) == 2
    assert graph.effective_depth(torch.ones(4, 4).triu(1)) == 3
    assert graph.transition_layer(torch.tensor([9.0, 9, 1, 1, 1, 0, 0, 0, 9, 9])) == 5
    assert graph.transition_layer(torch.ones(4)) is None


def test_mistakes_are_named():
    model, layers, added, given, found = read()
    for wrong, words in (
        (lambda: graph.residual_stream(model, layers, given, attention=added[:1]), "expected one each"),
        (lambda: graph.skip_effects(model, layers, given, found, part="head"), "unknown part"),
        (lambda: graph.skip_effects(model, layers, given, found, part="mlp"), "names of the attention"),
        (lambda: graph.skip_effects(model, layers, given, found, until=9), "no token lies"),
        (lambda: graph.skip_effects(model, layers, given, found, until=0), "1 is the least"),
        (lambda: graph.linear_maps((torch.ones(1, 3, 2), torch.ones(1, 4, 2)), (torch.ones(1, 3, 2),) * 2), "as many"),
    ):
        with pytest.raises(InputError, match=words):
            wrong()
