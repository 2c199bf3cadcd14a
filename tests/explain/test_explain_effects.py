"""Patching and its estimates."""

import pytest
import torch
from tiny_families import ids, make
from torch import nn

from lineament import explain
from lineament.explain.moved import How, moved
from lineament.explain.places import Grid, values_at
from lineament.explain.relevance import propagate
from lineament.explain.restart import Restart
from lineament.explain.rules import GRADIENT, RELP
from lineament.graph import InDouble

MLPS = ["model.layers.0.mlp", "model.layers.1.mlp"]


def llama():
    model = make("llama", torch.float64)[0]
    return model, {"input_ids": ids(6)}, {"input_ids": (ids(6) + 7) % 58 + 3}


def difference(output):
    return output.logits[:, -1, 5] - output.logits[:, -1, 9]


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x):
        return self.second(self.first(x).cumsum(1))


@pytest.mark.parametrize("method", ["attribution", "relp", "integrated-gradients"])
def test_every_estimate_is_exact_on_a_linear_model(method):
    model, x, y = Bilinear(), torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    sites = ["first", "second:input"]
    scores = [
        explain.effects(model, x, y, lambda out: out[:, -1, 1], sites, method=m).scores for m in ("patch", method)
    ]
    for site in sites:
        torch.testing.assert_close(scores[0][site], scores[1][site], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "place",
    ["input_layernorm:input", "post_attention_layernorm:input", "post_attention_layernorm:stream", ":input",
     "self_attn.q_proj:input", "self_attn.o_proj:input", "mlp:input", "mlp"],
)  # fmt: skip
def test_a_slope_at_a_place_is_that_of_patching_it_by_a_little(place):
    """Others may read the same tensor: beside a norm goes the stream, beside the queries keys and values."""
    site = f"model.layers.0.{place}".replace(".:", ":")
    model, _, corrupt = llama()
    with InDouble():
        old = values_at(model, corrupt, [site])
        step = torch.randn(old[site].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        moves = [{site: old[site] + size * step} for size in (1e-5, -1e-5)]
        grid = Grid(("position",))
        up, down = (moved(model, corrupt, old, new, difference, How("patch", grid))[site] for new in moves)
        for method, exact in (("attribution", (up - down) / 2), ("integrated-gradients", up)):
            found = moved(model, corrupt, old, moves[0], difference, How(method, grid))[site]
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
    assert bool((up.abs() > 1e-7).any())


@pytest.mark.parametrize("where", ["attention", "module"])
def test_models_that_drop_out_are_refused(where):
    model, clean, corrupt = llama()
    if where == "attention":  # a function, no module
        model.model.layers[1].self_attn.attention_dropout = 0.1
    else:
        model.model.layers[1].extra = nn.Dropout(0.1).eval()
    metric = explain.LogitDifference(torch.tensor([5, 6]), torch.tensor([9, 2]))
    given = model, clean, corrupt, metric
    explain.effects(*given, MLPS, method="patch")  # in eval mode they are fine
    model.train()
    for refused in (
        lambda: explain.effects(*given, MLPS, method="patch"), lambda: explain.effects(*given, MLPS, method="mean"),
        lambda: explain.effects(*given, "m0->logits", method="patch"), lambda: explain.circuit(*given),
        lambda: explain.steering_vector(model, clean, corrupt, MLPS[0]), lambda: metric.between(*given[:3]),
        lambda: explain.depth(model, [torch.arange(3, 23)]), lambda: explain.layer_maps(model, model, [], []),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="drops out in training mode"):
            refused()


def test_patching_the_whole_last_residual_is_the_whole_difference():
    model, clean, corrupt = llama()
    found = explain.effects(model, clean, corrupt, difference, "model.layers.1", method="patch").scores[
        "model.layers.1"
    ]
    with torch.no_grad():
        whole = difference(model(**clean)) - difference(model(**corrupt))
    torch.testing.assert_close(found[:, -1], whole)
    assert bool((found[:, :-1].abs() < 1e-12).all())  # the last position alone is read


@pytest.mark.parametrize(("family", "latest"), [("llama", 5), ("gpt2", 5), ("gemma2", 0)])
@pytest.mark.parametrize("method", ["patch", "integrated-gradients"])
def test_runs_go_on_from_the_first_token_that_changes(family, latest, method):
    """Where logits are asked for at the last token alone, earlier tokens' keys and values are kept: the same scores."""
    model = make(family, torch.float64)[0]
    clean, corrupt = ids(6), ids(6).clone()
    corrupt[:, 2] = (corrupt[:, 2] + 7) % 58 + 3
    site, kept = "blocks.1.hook_resid_pre", {"logits_to_keep": torch.tensor([5])}
    found = [
        explain.effects(
            model, {"input_ids": clean} | more, {"input_ids": corrupt} | more, difference, site, method=method, steps=3
        )
        for more in ({}, kept)
    ]
    whole, again = (next(iter(each.scores.values())) for each in found)
    torch.testing.assert_close(whole, again)
    assert bool((again[:, :2] == 0).all())
    assert bool((again[:, 2:].abs() > 1e-6).all())
    assert Restart(model, {"input_ids": corrupt} | kept, ["model"]).latest == latest


def test_no_rules_are_the_gradient():
    model, _, inputs = llama()
    run = propagate(
        model, inputs, target=difference, rules=GRADIENT, at=["model.layers.0"], counting=False, coefficients_only=True
    )
    kept = []
    hook = model.model.layers[0].register_forward_hook(lambda m, a, out: kept.append(out))
    value = difference(model(**inputs)).sum()
    hook.remove()
    (slope,) = torch.autograd.grad(value, kept[0])
    torch.testing.assert_close(run.sweep.at["model.layers.0"][0], slope, rtol=1e-6, atol=1e-6)


def test_coefficients_are_the_gradient_of_a_model_rewritten_by_hand(monkeypatch):
    """The rules say: norm scales constant, phi(x) / x constant, a gate's factors half each."""
    from transformers.models.llama import modeling_llama as code

    model, _, inputs = llama()
    sites = ["model.layers.0.mlp", "model.layers.0"]
    run = propagate(model, inputs, target=difference, rules=RELP, at=sites, counting=False, coefficients_only=True)

    def norm(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt().detach()

    def mlp(self, x):
        a = self.gate_proj(x)
        product = a * (nn.functional.silu(a) / a).detach() * self.up_proj(x)
        return self.down_proj(product / 2 + (product / 2).detach())

    monkeypatch.setattr(code.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(code.LlamaMLP, "forward", mlp)
    kept = []
    hooks = [model.get_submodule(s).register_forward_hook(lambda m, a, out: kept.append(out)) for s in sites]
    value = difference(model(**inputs)).sum()
    for hook in hooks:
        hook.remove()
    for site, slope in zip(sites, torch.autograd.grad(value, kept), strict=True):
        torch.testing.assert_close(run.sweep.at[site][0], slope, rtol=1e-5, atol=1e-6)


def test_heads_of_a_layer_add_up_and_names_of_transformerlens_are_understood():
    model, clean, corrupt = llama()
    ours = "model.layers.1.self_attn.o_proj:input"
    by_head = explain.effects(model, clean, corrupt, difference, "blocks.1.attn.hook_z", heads=4).scores[ours]
    assert by_head.shape == (2, 6, 4)
    whole = explain.effects(model, clean, corrupt, difference, ours).scores[ours]
    torch.testing.assert_close(by_head.sum(-1), whole)
    patched = explain.effects(model, clean, corrupt, difference, ours, method="patch", heads=4, rows=7).scores[ours]
    assert patched.shape == (2, 6, 4)
    with pytest.raises(ValueError, match="known: blocks"):
        explain.effects(model, clean, corrupt, difference, "blocks.1.hook_zz")


def test_ablations_take_a_part_away_from_the_clean_run():
    model, clean, corrupt = llama()
    found = {
        m: explain.effects(model, clean, corrupt, difference, MLPS, method=m) for m in ("zero", "mean", "resample")
    }
    hook = model.model.layers[0].mlp.register_forward_hook(
        lambda m, a, out: out * torch.tensor([0.0] + [1.0] * 5)[:, None]
    )
    with torch.no_grad():
        without = difference(model(**clean))
        hook.remove()
        expected = without - difference(model(**clean))
    torch.testing.assert_close(found["zero"].scores[MLPS[0]][:, 0], expected)
    assert all(e.scores[MLPS[1]].shape == (2, 6) for e in found.values())
    assert found["zero"].pearson(found["zero"]) == pytest.approx(1.0)


def test_direct_effects_of_the_last_mlp_are_those_of_relp():
    model, clean, corrupt = llama()
    direct = explain.effects(model, clean, corrupt, difference, MLPS, method="direct").scores
    relp = explain.effects(model, clean, corrupt, difference, MLPS, method="relp").scores
    torch.testing.assert_close(direct[MLPS[1]], relp[MLPS[1]])
    assert (direct[MLPS[0]] - relp[MLPS[0]]).abs().max() > 1e-3


def test_direct_effects_of_what_attention_holds_are_those_of_what_it_writes():
    model, clean, corrupt = llama()
    for layer in range(2):
        inside, written = (
            explain.effects(model, clean, corrupt, difference, site, method="direct").scores
            for site in (f"blocks.{layer}.attn.hook_z", f"model.layers.{layer}.self_attn")
        )
        torch.testing.assert_close(next(iter(inside.values())), next(iter(written.values())))
    with pytest.raises(ValueError, match="is not written to the residual stream"):
        explain.effects(model, clean, corrupt, difference, "model.layers.0.mlp.down_proj:input", method="direct")


def test_wrong_pairs_and_names_are_refused():
    model, clean, _ = llama()
    with pytest.raises(ValueError, match="pair prompts of equal length"):
        explain.effects(model, clean, {"input_ids": ids(5)}, difference, MLPS)
    with pytest.raises(ValueError, match="Did you mean 'relp'"):
        explain.effects(model, clean, clean, difference, MLPS, method="rlp")
    with pytest.raises(ValueError, match="no module is called 'mlp'"):
        explain.effects(model, clean, clean, difference, "mlp")


@pytest.mark.parametrize("rules", ["attnlrp", "relp", "cp-lrp"])
def test_coefficients_without_a_ledger_are_those_with_one(rules):
    model, _, inputs = llama()
    options = {"rules": explain.RULES[rules](), "at": ["model.layers.0"], "coefficients_only": True}
    found = [propagate(model, inputs, target=difference, counting=c, **options).sweep.at for c in (True, False)]
    torch.testing.assert_close(found[0]["model.layers.0"], found[1]["model.layers.0"])
