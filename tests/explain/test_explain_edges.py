"""Edges and paths, against runs changed by hand; and a model that comes back as it was."""

import hashlib
from copy import deepcopy

import pytest
import torch
from tiny_families import ids, make

from lineament import explain
from lineament.explain.places import aliased, values_at
from lineament.explain.wiring import rewired, wiring, without

FAMILIES = ["llama", "gpt2", "gpt-neox", "gemma2", "qwen3"]


def pair(family="llama"):
    model = make(family, torch.float64)[0]
    return model, {"input_ids": ids(5)}, {"input_ids": (ids(5) + 7) % 58 + 3}


def difference(output):
    return output.logits[:, -1, 5] - output.logits[:, -1, 9]


def measured(model, inputs):
    with torch.no_grad():
        return difference(model(**inputs))


@pytest.mark.parametrize("family", [*FAMILIES, "opt"])
def test_restarting_at_a_layer_gives_what_a_whole_run_gives(family):
    model, clean, corrupt = pair(family)
    sites = ["blocks.1.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.hook_attn_out", "blocks.1.attn.hook_z"]
    sites += [] if family == "opt" else ["blocks.1.hook_mlp_out"]
    sites += [] if family in ("opt", "gpt-neox") else ["blocks.0.hook_resid_mid", "blocks.1.hook_resid_mid"]
    for site in sites:
        ((name, found),) = explain.effects(model, clean, corrupt, difference, site, method="patch").scores.items()
        module, received = model.get_submodule(name.partition(":")[0]), ":" in name
        kept = []

        def keep(m, args, out=None, kept=kept):
            x = (out if isinstance(out, torch.Tensor) else out[0]) if out is not None else args[0]
            kept.append(x.clone())

        hook = (module.register_forward_pre_hook if received else module.register_forward_hook)(keep)
        measured(model, clean)
        hook.remove()
        for t in range(5):

            def put(x, t=t, new=kept[0], name=name):
                x = x if name.endswith(":stream") else x.clone()  # (in place, what skips the MLP changes too)
                x[:, t] = new[:, t]
                return x

            if received:
                hook = module.register_forward_pre_hook(lambda m, args, put=put: (put(args[0]), *args[1:]))
            else:
                hook = module.register_forward_hook(
                    lambda m, args, out, put=put: put(out) if isinstance(out, torch.Tensor) else (put(out[0]), *out[1:])
                )
            expected = measured(model, corrupt)
            hook.remove()
            torch.testing.assert_close(found[:, t], expected - measured(model, corrupt), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_stream_before_the_last_mlp_holds_all_that_counts(family):
    model, clean, corrupt = pair(family)
    whole = measured(model, clean) - measured(model, corrupt)

    def scores(**how):
        found = explain.effects(model, clean, corrupt, difference, "blocks.1.hook_resid_mid", by="component", **how)
        return next(iter(found.scores.values()))

    torch.testing.assert_close(scores(method="patch"), whole, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(scores(method="resample"), -whole, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(scores(method="integrated-gradients", steps=100), whole, rtol=1e-3, atol=1e-5)


def test_parallel_blocks_have_no_stream_between_attention_and_mlp():
    model, clean, corrupt = pair("gpt-neox")
    for site in ("blocks.1.hook_resid_mid", "gpt_neox.layers.1.post_attention_layernorm:stream"):
        with pytest.raises(ValueError, match="stream"):
            explain.effects(model, clean, corrupt, difference, site, method="patch")


@pytest.mark.parametrize("family", FAMILIES)
def test_all_writers_together_are_what_the_last_norm_reads(family):
    model, inputs, other = pair(family)
    at, kept = wiring(model), []
    hook = model.get_submodule(at.readers[-1].norm).register_forward_pre_hook(lambda m, args: kept.append(args[0]))
    written = 0
    for given, sign in ((inputs, 1), (other, -1)):  # biases cancel in the difference of two runs
        values = at.values(model, given)
        written = written + sign * sum(at.written(group, x).sum(0) for group, x in values.items())
    hook.remove()
    torch.testing.assert_close(written, kept[0] - kept[-1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_every_edge_is_the_other_run_and_cutting_none_is_this_one(family):
    model, clean, corrupt = pair(family)
    at = wiring(model)
    other = at.values(model, corrupt)
    for cut, expected in ((at.allowed, corrupt), (at.allowed & False, clean)):
        with rewired(model, at, other, cut):
            found = measured(model, clean)
        torch.testing.assert_close(found, measured(model, expected), rtol=1e-6, atol=1e-7)
    with without(model, at, other, torch.ones(len(at.writers), dtype=torch.bool)):
        torch.testing.assert_close(measured(model, clean), measured(model, corrupt), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_one_edge_cut_is_that_edge_patched(family):
    model, clean, corrupt = pair(family)
    at = wiring(model)
    found = explain.effects(model, clean, corrupt, difference, "*->*", method="resample", by="component", rows=5).scores
    assert len(found) == len(at.edges())
    other, whole = at.values(model, corrupt), measured(model, clean)
    for reader, writer in at.edges()[:: 1 + len(at.edges()) // 6]:
        cut = torch.zeros_like(at.allowed)
        cut[reader, writer] = True
        with rewired(model, at, other, cut):
            one = measured(model, clean) - whole
        torch.testing.assert_close(found[at.edge(reader, writer)], one, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["attribution", "relp", "integrated-gradients", "direct"])
def test_effects_in_half_precision_are_those_in_single(method, dtype):
    half, inputs, _ = make("llama", dtype)
    given = inputs, {"input_ids": (inputs["input_ids"] + 7) % 58 + 3}, difference
    for sites in ("*->logits", ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]):
        found, wanted = (
            torch.stack(list(explain.effects(model, *given, sites, method=method, by="component").scores.values()))
            for model in (half, deepcopy(half).float())
        )
        torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.1 * float(wanted.abs().max()))


def test_a_circuit_of_a_model_in_bfloat16_is_found():
    model, inputs, _ = make("llama", torch.bfloat16)
    metric = explain.LogitDifference(torch.tensor([5, 6]), torch.tensor([9, 2]))
    found = explain.circuit(model, inputs, {"input_ids": (inputs["input_ids"] + 7) % 58 + 3}, metric, size=20)
    assert found.level == "edge"
    assert len(found.parts) > 0


def test_an_edge_reaches_its_reader_alone():
    model, clean, corrupt = pair()
    kept = {}
    for name, inputs in (("clean", clean), ("corrupt", corrupt)):
        hook = model.model.layers[0].mlp.register_forward_hook(lambda m, a, out, name=name: kept.__setitem__(name, out))
        measured(model, inputs)
        hook.remove()
    hook = model.model.norm.register_forward_pre_hook(lambda m, args: args[0] + kept["clean"] - kept["corrupt"])
    expected = measured(model, corrupt)
    hook.remove()
    found = explain.effects(model, clean, corrupt, difference, "m0->logits", method="patch", by="component").scores
    torch.testing.assert_close(found["m0->logits"], expected - measured(model, corrupt))
    by_position = explain.effects(model, clean, corrupt, difference, "m0->logits", method="patch").scores["m0->logits"]
    torch.testing.assert_close(by_position[:, -1], found["m0->logits"])
    assert bool((by_position[:, :-1].abs() < 1e-12).all())


def test_a_path_of_two_steps_goes_through_the_node_between():
    model, clean, corrupt = pair()
    at = wiring(model)
    old, new = at.values(model, corrupt), at.values(model, clean)
    sent = at.written("a0", new["a0"] - old["a0"])[2]
    hook = model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(lambda m, args: args[0] + sent)
    heard = at.values(model, corrupt)["m1"] - old["m1"]
    hook.remove()
    hook = model.model.norm.register_forward_pre_hook(lambda m, args: args[0] + heard)
    expected = measured(model, corrupt)
    hook.remove()
    path = "a0.h2->m1->logits"
    found = explain.effects(model, clean, corrupt, difference, path, method="patch", by="component").scores[path]
    torch.testing.assert_close(found, expected - measured(model, corrupt))
    heads = [f"m0->a1.h{h}->logits" for h in range(4)]
    parts = explain.effects(model, clean, corrupt, difference, heads, method="patch", by="component").scores
    assert len({float(x.sum()) for x in parts.values()}) == 4
    for wrong, message in (("m1->a0->logits", "does not reach"), ("m9->m1->logits", "no writer is called 'm9'")):
        with pytest.raises(ValueError, match=message):
            explain.effects(model, clean, corrupt, difference, wrong, method="patch", by="component")
    with pytest.raises(ValueError, match="method='patch' knows paths"):
        explain.effects(model, clean, corrupt, difference, path, by="component")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["attribution", "relp"])
def test_what_a_writer_is_worth_is_the_sum_over_its_readers(family, method):
    model, clean, corrupt = pair(family)
    edges = explain.effects(model, clean, corrupt, difference, "*->*", method=method, by="component").scores
    for site, writer in (("blocks.0.hook_attn_out", "a0"), ("blocks.0.hook_mlp_out", "m0")):
        whole = explain.effects(model, clean, corrupt, difference, site, method=method, by="component").scores
        parts = [x for name, x in edges.items() if name.startswith((f"{writer}.", f"{writer}->"))]
        torch.testing.assert_close(sum(parts), next(iter(whole.values())), rtol=1e-6, atol=1e-8)


def test_integrated_gradients_of_edges_are_those_along_the_embeddings():
    model, clean, corrupt = pair()
    at, total = wiring(model), 0
    embedded = [model.model.embed_tokens(inputs["input_ids"]).detach() for inputs in (corrupt, clean)]
    for share in (1 / 6, 3 / 6, 5 / 6):
        kept = []
        hook = model.model.norm.register_forward_pre_hook(lambda m, args, kept=kept: kept.append(args[0]))
        value = difference(model(inputs_embeds=torch.lerp(*embedded, share))).sum()
        hook.remove()
        total = total + torch.autograd.grad(value, kept[0])[0] / 3
    moved = at.values(model, clean)["m0"] - at.values(model, corrupt)["m0"]
    options = {"method": "integrated-gradients", "steps": 3, "by": "component"}
    found = explain.effects(model, clean, corrupt, difference, "m0->logits", **options).scores["m0->logits"]
    torch.testing.assert_close(found, (moved * total).sum((1, 2)), rtol=1e-6, atol=1e-8)


def test_direct_effects_are_those_of_the_edges_to_the_logits():
    model, clean, corrupt = pair()
    found = explain.effects(model, clean, corrupt, difference, "*->*", method="direct", by="component").scores
    whole = explain.effects(model, clean, corrupt, difference, "blocks.0.hook_mlp_out", method="direct", by="component")
    torch.testing.assert_close(found["m0->logits"], whole.scores["model.layers.0.mlp"])
    assert all(bool((x == 0).all()) for name, x in found.items() if not name.endswith("->logits"))


def test_keys_and_values_that_heads_share_are_cut_into_their_own_heads():
    model, clean, corrupt = pair()  # four heads on two keys of width 8
    kept = []
    hook = model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda m, args, out: kept.append(out))
    measured(model, clean)
    hook.remove()
    found = explain.effects(model, clean, corrupt, difference, "blocks.0.attn.hook_v", method="patch", by="head").scores
    scores = found["model.layers.0.self_attn.v_proj"]
    assert scores.shape == (2, 2)
    for head, columns in enumerate((slice(0, 8), slice(8, 16))):

        def put(m, args, out, columns=columns):
            out = out.clone()
            out[..., columns] = kept[0][..., columns]
            return out

        hook = model.model.layers[0].self_attn.v_proj.register_forward_hook(put)
        expected = measured(model, corrupt)
        hook.remove()
        torch.testing.assert_close(scores[:, head], expected - measured(model, corrupt))
    with pytest.raises(ValueError, match="width 61 has no heads of 8"):
        explain.effects(model, clean, corrupt, difference, "lm_head", method="patch", by="head")


def test_places_are_cut_by_component_head_and_neuron():
    model, clean, corrupt = pair()
    for method in ("patch", "relp"):

        def scores(site, method=method, **cut):
            return next(
                iter(explain.effects(model, clean, corrupt, difference, site, method=method, **cut).scores.values())
            )

        assert scores("blocks.0.mlp.hook_post", by="neuron").shape == (2, 48)
        assert scores("blocks.0.mlp.hook_post", by=("position", "neuron"), positions=[-1, 2]).shape == (2, 2, 48)
        assert scores("blocks.0.attn.hook_z", by="head").shape == (2, 4)
        assert scores("blocks.0.hook_mlp_out", by="component").shape == (2,)
    whole = scores("blocks.0.hook_mlp_out", by="component")
    torch.testing.assert_close(scores("blocks.0.hook_mlp_out").sum(1), whole)
    torch.testing.assert_close(scores("blocks.0.mlp.hook_post", by="neuron").sum(1), whole)
    for wrong, message in (
        ({"by": "heads"}, "Did you mean 'head'"), ({"positions": [5]}, "positions are 0 to 4"),
        ({"heads": 7}, "no 7 heads"), ({"by": ("head", "neuron")}, "by head or by neuron"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            scores("blocks.0.attn.hook_z", **wrong)
    with pytest.raises(ValueError, match=r"no edge is called 'a0.h9->m1'. Did you mean"):
        scores("a0.h9->m1")
    with pytest.raises(ValueError, match="residual stream of opt is not known"):
        explain.effects(make("opt")[0], clean, corrupt, difference, "m0->m1")


def state(model):
    hashes = [hashlib.sha256(x.detach().numpy().tobytes()).hexdigest() for x in model.state_dict().values()]
    modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__)
               for m in model.modules()]  # fmt: skip
    return hashes, modules, [(p.requires_grad, p.grad) for p in model.parameters()]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method", ["patch", "mean", "attribution", "relp", "integrated-gradients"])
def test_a_model_comes_back_as_it_was(method, error):
    model, clean, corrupt = pair()
    model.model.norm.weight.requires_grad_(False)
    before, calls = state(model), []

    def metric(output):
        calls.append(1)
        if error and len(calls) > (method in ("patch", "mean")):
            raise error("stop")
        return difference(output)

    for sites in (["blocks.1.attn.hook_z", "blocks.1.hook_resid_pre"], "*->m1"):
        calls.clear()
        try:
            explain.effects(model, clean, corrupt, metric, sites, method=method)
        except (RuntimeError, KeyboardInterrupt):
            assert error
        assert state(model) == before


def test_cells_that_hold_the_same_in_both_runs_are_not_run():
    model, clean, _ = pair()
    corrupt = {"input_ids": clean["input_ids"].clone()}
    corrupt["input_ids"][:, 3] = 7
    rows = []

    def metric(output):
        rows.append(len(output.logits))
        return difference(output)

    found = explain.effects(model, clean, corrupt, metric, "blocks.0.hook_resid_post", method="patch").scores
    assert sum(rows) == 2 + 2 * 2  # the corrupt run, and two positions of two rows
    assert bool((found["model.layers.0"][:, :3] == 0).all())
    assert bool((found["model.layers.0"][:, 3:] != 0).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_transformerlens_mean_places_of_the_right_width(family):
    model, inputs, _ = pair(family)
    split = {"hook_q": 32, "hook_v": 16} if family in ("llama", "gemma2", "qwen3") else {}
    neurons = 128 if family == "gpt2" else 48
    names = {"hook_embed": 32, "blocks.1.hook_resid_pre": 32, "blocks.1.mlp.hook_post": neurons}
    names |= {} if family == "gpt-neox" else {"blocks.1.hook_resid_mid": 32}
    names |= {"blocks.1.attn.hook_z": 32} | {f"blocks.1.attn.{name}": width for name, width in split.items()}
    for name, width in names.items():
        (found,) = values_at(model, inputs, [aliased(model, name)]).values()
        assert found.shape == (2, 5, width), name
