"""Dictionaries as modules, on disk, in their places, and learning."""

import json
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_families import ids, make

from lineament import explain
from lineament.explain.dictionaries.activations import open_activations
from lineament.explain.dictionaries.hooks import norm_affine, placed, substituted
from lineament.explain.dictionaries.module import Dictionary, DictionaryConfig, scaled
from lineament.explain.dictionaries.training import _started
from lineament.explain.places import run, values_at

KINDS = [
    {"activation": "topk", "k": 3},
    {"activation": "topk", "k": 3, "skip": True},
    {"activation": "relu", "input_bias": "own"},
    {"activation": "relu", "input_bias": "output", "reads": "blocks.0.hook_mlp_out", "writes": "blocks.0.hook_mlp_out"},
    {"activation": "jumprelu", "skip": True},
]


def dictionary(width: int = 6, features: int = 10, dtype=torch.float64, **changes) -> Dictionary:
    torch.manual_seed(0)
    given = {"reads": "blocks.0.mlp.hook_in", "writes": "blocks.0.hook_mlp_out", "k": 3, **changes}
    found = Dictionary(DictionaryConfig(inputs=width, outputs=width, features=features, **given), dtype)
    with torch.no_grad():
        for p in found.parameters():
            p.copy_(torch.randn(p.shape))
        if found.config.activation == "jumprelu":
            found.threshold.abs_()
    return found


@torch.no_grad()
def by_hand(d: Dictionary, x: torch.Tensor) -> torch.Tensor:
    """The equation, token by token and feature by feature."""
    y = []
    for token in x:
        centre = {"none": 0, "own": getattr(d, "b_in", None), "output": d.b_dec}[d.config.input_bias]
        pre = [float((token - centre) @ d.W_enc[i] + d.b_enc[i]) for i in range(d.config.features)]
        kept = sorted(range(len(pre)), key=lambda i: -pre[i])[: d.config.k] if d.config.activation == "topk" else None
        made = d.b_dec.clone()
        for i, value in enumerate(pre):
            on = i in kept if kept is not None else value > (d.threshold[i] if "jump" in d.config.activation else 0)
            made = made + d.W_dec[i] * max(value, 0.0) * bool(on)
        y.append(made + d.W_skip @ token if d.config.skip else made)
    return torch.stack(y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_dictionary_is_its_equation(kind, tokens):
    d, x = dictionary(**kind), torch.randn(tokens, 6, dtype=torch.float64)
    torch.testing.assert_close(d(x), by_hand(d, x))
    torch.testing.assert_close(d.decode(d.encode(x), x), d(x))
    values, index = d.active(x)
    torch.testing.assert_close(torch.zeros_like(d.encode(x)).scatter(-1, index, values), d.encode(x))


def test_sparse_gradients_are_those_of_the_dense_sums():
    d, x = dictionary(features=300, k=4), torch.randn(261, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(261, 6, dtype=torch.float64)
    names, ps = zip(*d.named_parameters(), strict=True)
    found = torch.autograd.grad((d(x) * weight).sum(), [x, *ps])
    pre = x @ d.W_enc.T + d.b_enc
    z = torch.where(pre >= pre.topk(4, -1).values[:, -1:], pre, 0).relu()
    wanted = torch.autograd.grad(((z @ d.W_dec + d.b_dec) * weight).sum(), [x, *ps])
    for name, a, b in zip(["x", *names], found, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_thresholds_learn_through_a_window_around_them():
    pre = torch.tensor([[0.5, 1.02, 1.2]], dtype=torch.float64, requires_grad=True)
    threshold = torch.ones(3, dtype=torch.float64, requires_grad=True)
    z, on = explain.dictionaries.sparse.jump(pre, threshold, 0.1)
    assert on.tolist() == [[0, 1, 1]]
    torch.testing.assert_close(torch.autograd.grad(z.sum(), pre, retain_graph=True)[0], on)
    torch.testing.assert_close(torch.autograd.grad(z.sum(), threshold, retain_graph=True)[0][1], threshold[1] * -10)
    assert torch.autograd.grad(on.sum(), threshold)[0].tolist() == pytest.approx([0, -10, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_scale_folds_into_both_weights_and_all_biases(kind):
    d, x = dictionary(**kind), torch.randn(5, 6, dtype=torch.float64)
    s = (2.5, 2.5) if kind.get("input_bias") == "output" else (2.5, 0.4)
    wanted, rows = d(x * s[0]) / s[1], d.W_dec.norm(dim=1)
    torch.testing.assert_close(scaled(d, *s)(x), wanted)
    torch.testing.assert_close(d.W_dec.norm(dim=1), rows)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_a_norm_per_token_is_undone_after_decoding(norm):
    d, x = dictionary(norm=norm, activation="relu"), torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(d(7 * x), 7 * d(x), rtol=1e-4, atol=1e-4)  # EPSILON beside the deviation
    with pytest.raises(ValueError, match="no constant scale"):
        scaled(d, 2, 2)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.get("input_bias") != "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_loaded_is_saved_bit_for_bit(kind, dtype, tmp_path):
    d = dictionary(dtype=dtype, **kind)
    d.save(tmp_path / "a")
    again = Dictionary.load(tmp_path / "a")
    again.save(tmp_path / "b")
    for file in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert all(bool((a == b).all()) for a, b in zip(d.parameters(), again.parameters(), strict=True))
    assert again.config.reads == d.config.reads
    assert again.config.transcodes == d.config.transcodes


def test_a_dictionary_of_heads_side_by_side_is_saved_as_such(tmp_path):
    for site, form in (("blocks.0.attn.hook_z", "hook_z"), ("blocks.0.hook_resid_mid", "none")):
        dictionary(activation="relu", input_bias="output", reads=site, writes=site).save(tmp_path / form)
        assert json.loads((tmp_path / form / "cfg.json").read_text())["reshape_activations"] == form


def test_an_own_input_bias_is_folded_when_saved(tmp_path):
    d, x = dictionary(**KINDS[2]), torch.randn(4, 6, dtype=torch.float64)
    d.save(tmp_path / "a")
    torch.testing.assert_close(Dictionary.load(tmp_path / "a")(x), d(x))


def test_older_configs_and_scales_are_understood(tmp_path):
    d = dictionary(**KINDS[3], dtype=torch.float32)
    d.save(tmp_path / "a")
    cfg = json.loads((tmp_path / "a/cfg.json").read_text())
    old = {"d_in": 6, "d_sae": 10, "hook_point": "blocks.0.hook_mlp_out", "normalize_activations": True,
           "model_name": "gpt2-small"}  # fmt: skip
    (tmp_path / "a/cfg.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="pass scale="):
        Dictionary.load(tmp_path / "a")
    x = torch.randn(4, 6)
    torch.testing.assert_close(Dictionary.load(tmp_path / "a", scale=3.0)(x), d(3 * x) / 3)
    (tmp_path / "a/cfg.json").write_text(json.dumps({**cfg, "architecture": "gated"}))
    with pytest.raises(ValueError, match="unknown architecture of a dictionary 'gated'"):
        Dictionary.load(tmp_path / "a")


def test_gemma_scope_is_read_without_unpickling(tmp_path):
    d = dictionary(activation="jumprelu", dtype=torch.float32)
    arrays = {name: p.detach().numpy() for name, p in d.named_parameters()}
    np.savez(tmp_path / "params.npz", **{**arrays, "W_enc": arrays["W_enc"].T})
    with pytest.raises(ValueError, match="pass reads="):
        Dictionary.load(tmp_path / "params.npz")
    found = Dictionary.load(tmp_path / "params.npz", reads="a", writes="b")
    x = torch.randn(4, 6)
    torch.testing.assert_close(found(x), d(x))
    np.savez(tmp_path / "evil.npz", W_enc=np.array([print], dtype=object))
    with pytest.raises(ValueError, match="without unpickling"):
        Dictionary.load(tmp_path / "evil.npz", reads="a")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_norm_without_its_gain_is_folded_into_the_encoder(family):
    model, inputs, _ = make(family, torch.float64)
    d = dictionary(32, reads="blocks.1.ln2.hook_normalized", writes="blocks.1.hook_mlp_out", k=4)
    at = placed(model, d)
    norm = model.get_submodule(at.reads)
    gain, shift = norm_affine(norm, 32)
    x = values_at(model, inputs, [at.reads])[at.reads]
    bare = (x - shift) / gain
    torch.testing.assert_close(bare.square().mean(-1), torch.ones_like(bare[..., 0]), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(at.dictionary(x), d(bare), rtol=1e-4, atol=1e-4)


def test_centred_residuals_are_folded_or_refused():
    model = make("gpt2", torch.float64)[0]
    site = {"reads": "blocks.1.hook_resid_pre", "writes": "blocks.1.hook_resid_pre"}
    d = dictionary(32, input_bias="output", k=4, **site)
    with pytest.raises(ValueError, match="pass centred=True or centred=False"):
        placed(model, d)
    x = torch.randn(5, 32, dtype=torch.float64) + 3
    mean = x.mean(-1, keepdim=True)
    torch.testing.assert_close(placed(model, d, centred=True).dictionary(x), d(x - mean) + mean)
    assert placed(model, d, centred=False).dictionary is d
    said = dictionary(32, metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}}, k=4, **site)
    torch.testing.assert_close(placed(model, said).dictionary(x), said(x - mean) + mean)
    assert placed(make("llama")[0], dictionary(32, k=4, **site)).reads == "model.layers.1:input"  # RMS norms centre not


@pytest.mark.parametrize("bias", ["none", "output"])
def test_heads_less_the_values_bias(bias):
    model = make("gpt2", torch.float64)[0]
    d = dictionary(32, input_bias=bias, k=4, reads="blocks.0.attn.hook_z", writes="blocks.0.attn.hook_z")
    b_v = model.transformer.h[0].attn.c_attn.bias[64:]
    x = torch.randn(5, 32, dtype=torch.float64)
    torch.testing.assert_close(placed(model, d).dictionary(x), d(x - b_v) + b_v)


def test_a_dictionary_is_placed_on_the_models_device():
    model, d = make("llama")[0].to("meta"), dictionary(32, reads="blocks.1.mlp.hook_in", writes="blocks.1.hook_mlp_out")
    assert {p.device.type for p in placed(model, d).dictionary.parameters()} == {"meta"}
    assert {p.device.type for p in d.parameters()} == {"cpu"}


def test_a_dictionary_that_says_nothing_of_a_place_or_another_width_is_refused():
    model = make("llama")[0]
    with pytest.raises(ValueError, match="reads width 6, and the model is 32 wide"):
        placed(model, dictionary())
    with pytest.raises(ValueError, match="reads width 6, and"):
        dictionary()(torch.ones(3, 7, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"feature 10 is outside the dictionary, which has features 0 to 9"):
        dictionary().check([3, 10])
    with pytest.raises(ValueError, match=r"Did you mean 'blocks\.0\.hook_mlp_out'"):
        placed(model, dictionary(32, reads="blocks.0.hook_mlp_uot"))


def test_a_perfect_stand_in_changes_nothing_and_the_model_comes_back():
    model, inputs, _ = make("llama", torch.float64)
    before = run(model, inputs).logits
    at = placed(model, dictionary(32, k=4, reads="blocks.1.mlp.hook_in", writes="blocks.1.hook_mlp_out"))
    with substituted(model, [at]):
        changed = run(model, inputs).logits
    torch.testing.assert_close(changed[:, 0], before[:, 0])  # the first position stays the model's own
    assert float((changed - before)[:, 1:].abs().max().detach()) > 1e-3
    object.__setattr__(at, "dictionary", deepcopy(model.model.layers[1].mlp))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with torch.no_grad(), substituted(model, [at]):
        torch.testing.assert_close(run(model, inputs).logits, before)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def cached(tmp_path, name="cache", **changes):
    model = make("llama")[0]
    windows = ids(9, 40)
    places = ["model.layers.1.mlp:input", "model.layers.1.mlp"]
    return model, windows, explain.cache_activations(model, windows, places, tmp_path / name, per_shard=7, **changes)


def test_cached_rows_are_what_the_model_holds(tmp_path):
    model, windows, found = cached(tmp_path, dtype=torch.float32)
    wanted = values_at(model, {"input_ids": windows}, ["model.layers.1.mlp"])["model.layers.1.mlp"]
    index = torch.randperm(found.count)[:50]
    torch.testing.assert_close(found.rows("model.layers.1.mlp", index), wanted[:, 1:].flatten(0, 1)[index])
    assert found.count == 40 * 8
    with pytest.raises(ValueError, match="was not captured"):
        found.rows("model.layers.0.mlp", index)
    with pytest.raises(ValueError, match="another model, text or place"):
        cached(tmp_path, about={"model": "other"})


def test_an_interrupted_cache_goes_on(tmp_path):
    def stop(what, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, said=stop)
    first = (tmp_path / "cache/shard-00001.safetensors").stat().st_mtime_ns
    found, whole = cached(tmp_path)[2], cached(tmp_path, "whole")[2]
    assert (tmp_path / "cache/shard-00001.safetensors").stat().st_mtime_ns == first
    rows = torch.arange(found.count)
    assert bool((found.rows("model.layers.1.mlp", rows) == whole.rows("model.layers.1.mlp", rows)).all())


def test_a_cache_grows_serves_fewer_windows_and_knows_its_text(tmp_path):
    model, place = make("llama")[0], "model.layers.1.mlp"
    windows = ids(9, 40)

    def cache(some, folder="cache"):
        return explain.cache_activations(model, some, [place], tmp_path / folder, per_shard=7)

    def captured():
        return [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache").glob("shard-*"))]

    cache(windows[:17])
    first = captured()
    whole, fresh = cache(windows), cache(windows, "fresh")
    assert captured()[:2] == first[:2]  # the third had 3 windows of 7 and was made again
    rows = torch.arange(whole.count)
    assert torch.equal(whole.rows(place, rows), fresh.rows(place, rows))
    before, fewer = captured(), cache(windows[:10])
    assert captured() == before
    assert fewer.count == 10 * 8
    assert fewer.digest != whole.digest
    assert open_activations(tmp_path / "cache").count == whole.count
    both = explain.cache_activations(model, windows, [place, f"{place}:input"], tmp_path / "both", per_shard=7)
    one = cache(windows, "both")  # of the two places this is one
    assert one.places == both.places
    assert torch.equal(one.rows(place, rows), whole.rows(place, rows))
    with pytest.raises(ValueError, match="another text"):
        cache(windows.flip(0))
    (tmp_path / "cache/shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks shard 1"):
        open_activations(tmp_path / "cache")


def test_a_dashboard_of_cached_activations_is_that_of_the_model_on_their_text(tmp_path):
    model, windows, activations = cached(tmp_path, dtype=torch.float32)
    assert torch.equal(activations.windows(10), windows[:10])
    at = placed(model, dictionary(32, k=4, reads="blocks.1.mlp.hook_in", writes="blocks.1.hook_mlp_out",
                                  dtype=torch.float32))  # fmt: skip
    words = SimpleNamespace(decode=lambda ids, **how: " ".join(map(str, ids)))
    chosen = {"features": [1, 5, 7], "examples": 2}
    run, read = (explain.dashboard(model, words, at, windows[:10], activations=each, **chosen).features
                 for each in (None, activations))  # fmt: skip
    for a, b in zip(run, read, strict=True):
        assert (a.feature, a.density) == (b.feature, b.density)
        assert a.most == pytest.approx(b.most, rel=1e-5)
        assert [tokens for tokens, _ in a.examples] == [tokens for tokens, _ in b.examples]
    with pytest.raises(ValueError, match="other windows"):
        explain.dashboard(model, words, at, windows[3:10], activations=activations, **chosen)


@pytest.mark.parametrize("kind", KINDS)
def test_learning_lowers_the_error_and_rows_keep_length_1(kind, tmp_path):
    _, _, activations = cached(tmp_path)
    places = ("model.layers.1.mlp:input", "model.layers.1.mlp")
    places = places if kind.get("input_bias") != "output" else places[1:] * 2
    given = {"reads": places[0], "writes": places[1], **kind, "features": 64}
    given |= {"reads": places[0], "writes": places[1]}
    config = DictionaryConfig(inputs=32, outputs=32, **given)
    how = explain.DictionaryTraining(steps=40, batch=64, lr=5e-3, warmup=1, penalty=1e-4, revive="ghost", dead_after=9)
    found = explain.train_dictionary(activations, config, how)
    x, y = (activations.rows(place, torch.arange(activations.count)) for place in places)
    before = scaled(_started(config, 0, x, y), 1, 1)(x)
    assert float((found.dictionary(x) - y).square().sum()) < 0.9 * float((before - y).square().sum())
    torch.testing.assert_close(found.dictionary.W_dec.norm(dim=1), torch.ones(64))
    assert found.tokens == 40 * 64


@pytest.mark.parametrize("revive", ["auxk", "ghost"])
def test_training_resumes_to_the_bit(revive, tmp_path, monkeypatch):
    _, _, activations = cached(tmp_path)
    config = DictionaryConfig(inputs=32, outputs=32, features=64, k=2, reads="model.layers.1.mlp:input",
                              writes="model.layers.1.mlp")  # fmt: skip
    how = explain.DictionaryTraining(steps=8, batch=64, dead_after=2, revive=revive, checkpoint_every=2)

    def stop(what, done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explain.train_dictionary(activations, config, how, out=tmp_path / "run", said=stop)
    cut = explain.train_dictionary(activations, config, how, out=tmp_path / "run")
    whole = explain.train_dictionary(activations, config, how)
    assert whole.last["dead"] > 0
    for a, b in zip(cut.dictionary.parameters(), whole.dictionary.parameters(), strict=True):
        assert bool((a == b).all())
    with pytest.raises(ValueError, match="other settings"):
        explain.train_dictionary(
            activations, config, explain.DictionaryTraining(steps=9, batch=64), out=tmp_path / "run"
        )


def test_the_best_affine_map_is_least_squares_and_scores_are_of_the_model(tmp_path):
    model, windows, activations = cached(tmp_path, dtype=torch.float32)
    places = ("model.layers.1.mlp:input", "model.layers.1.mlp")
    affine = explain.best_affine(activations, *places)
    x, y = (activations.rows(place, torch.arange(activations.count)).double() for place in places)
    wide = torch.cat([x, torch.ones(len(x), 1)], 1)
    wanted = wide @ torch.linalg.lstsq(wide, y).solution
    torch.testing.assert_close(affine(x.float()), wanted.float(), rtol=1e-3, atol=1e-3)
    d = dictionary(32, k=4, reads="blocks.1.mlp.hook_in", writes="blocks.1.hook_mlp_out", dtype=torch.float32)
    scores = explain.evaluate_dictionaries(
        model,
        {"t": placed(model, d)},
        windows[:9],
        beside={"affine": affine, "itself": deepcopy(model.model.layers[1].mlp)},
        ks=[2],
    )
    found = {score.name: score for score in scores}
    assert found["mean"].recovered == pytest.approx(0)
    assert found["zero"].recovered_of_zero == pytest.approx(0)
    assert found["itself"].recovered == pytest.approx(1, abs=1e-4)
    assert found["itself"].explained == pytest.approx(1, abs=1e-6)
    assert found["mean"].explained == pytest.approx(0, abs=1e-6)
    assert found["affine"].explained > 0
    assert found["t"].l0 <= 4
    assert found["t, k = 2"].l0 <= 2
    on = d.encode(values_at(model, {"input_ids": windows[:9]}, [places[0]])[places[0]][:, 1:].flatten(0, 1)) > 0
    assert found["t"].dead == pytest.approx(float((~on.any(0)).double().mean()))


def test_unit_rows_can_be_learned_from_the_gradient_across_them_alone(tmp_path):
    """Rescaling a feature must not lower the loss: the gradient has no part along the rows."""
    d = dictionary(features=12, k=3)
    learner = explain.dictionaries.training._Learner(d, explain.DictionaryTraining(steps=1, revive="none"))
    learner.settle()
    with learner.straight():
        x = torch.randn(20, 6, dtype=torch.float64)
        explain.dictionaries.training.dictionary_loss(learner, (x, x.flip(1)))[0].backward()
    assert float((d.W_dec.grad * d.W_dec).sum(1).abs().max()) < 1e-12
