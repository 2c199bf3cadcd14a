"""Attribution graphs through transcoders, features by their weights, dashboards, and the command."""

import json
from copy import deepcopy

import pytest
import torch
from test_explain_dictionaries import dictionary
from tiny_families import ids, make, saved_decoder

from lineament import explain
from lineament.cli import run as command
from lineament.explain.dictionaries.attribution import Frozen, Node
from lineament.explain.dictionaries.feature_graph import _influence, _largest
from lineament.explain.dictionaries.hooks import placed
from lineament.explain.dictionaries.weights import read_directions
from lineament.explain.places import values_at
from lineament.graph import InDouble
from lineament.models import load_teacher, tiny

WORDS = ["?", *(f"w{i}" for i in range(60))]


def frozen(family: str, skip: bool = False, length: int = 6, model=None):
    """A tiny model with a transcoder for each of its first two layers, of different kinds."""
    model = model or make(family, torch.float64)[0]
    kinds = [
        {"activation": "relu", "reads": "blocks.0.ln2.hook_normalized", "writes": "blocks.0.hook_mlp_out"},
        {"k": 3, "reads": "blocks.1.mlp.hook_in", "writes": "blocks.1.hook_mlp_out"},
    ]
    both = [placed(model, dictionary(model.config.hidden_size, skip=skip, **kind)) for kind in kinds]
    return model, both, Frozen(model, ids(length, 1), both)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3"])
@pytest.mark.parametrize("skip", [False, True])
def test_everything_written_before_adds_up_to_each_target(family, skip):
    with InDouble():
        model, _, at = frozen(family, skip)
        sources = at.sources()
        for targets in [*at.features(sources.nodes), at.logits(mass=0.95, most=3, chosen=None)]:
            A = at.edges(targets, sources)
            held = at.values[targets.place]
            pairs = zip(targets.nodes, targets.directions, targets.offsets, strict=True)
            wanted = torch.stack([held[n.position] @ u + b for n, u, b in pairs])
            torch.testing.assert_close(A.sum(1), wanted, rtol=1e-9, atol=1e-9)
            for row, target in zip(A, targets.nodes, strict=True):
                late = [
                    (n.layer, n.position) for n, w in zip(sources.nodes, row, strict=False) if float(w.abs()) > 1e-12
                ]
                assert all(layer < target.layer and t <= target.position for layer, t in late)
    assert all(not p.grad_fn for p in model.parameters())


@pytest.mark.parametrize("kind", ["hedgehog-window", "lightning", "gla", "gated-deltanet", "kda"])
def test_a_students_graph_adds_up_too(kind):
    """Patterns of mixers, and of the heads that stayed softmax beside them, are constants as softmax's are."""
    with InDouble():
        student = tiny("llama", kind, full_heads=(0,)).double().eval()
        _, _, at = frozen("llama", length=15, model=student)
        sources = at.sources()
        for targets in [*at.features(sources.nodes), at.logits(mass=0.95, most=3, chosen=None)]:
            wanted = (at.values[targets.place][[n.position for n in targets.nodes]] * targets.directions).sum(1)
            torch.testing.assert_close(
                at.edges(targets, sources).sum(1), wanted + targets.offsets, rtol=1e-9, atol=1e-9
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_graphs_of_half_precision_are_those_of_single(dtype):
    model = make("llama", dtype)[0]
    _, _, half = frozen("llama", model=model)
    _, _, single = frozen("llama", model=deepcopy(model).float())
    found, wanted = (at.edges(at.logits(mass=1.0, most=3, chosen=[5, 9]), at.sources()) for at in (half, single))
    tokens = slice(0, 6)  # (features that are barely on may differ)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:, tokens], wanted[:, tokens], rtol=0.1, atol=0.1 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_edges_are_finite_differences_of_the_model_with_patterns_and_scales_held(family):
    """Adding a token's vector once more, while norm scales, patterns and MLP outputs stay as they were, moves a target
    by its edge."""
    with InDouble():
        model, _, at = frozen(family)
        sources = at.sources()
        targets = at.features(sources.nodes)[1]
        A = at.edges(targets, sources)
        norms = [m for n, m in model.named_modules() if "norm" in n or ".ln_" in n]
        old: dict = {}
        hooks = [m.register_forward_hook(lambda m, a, out: old.setdefault(m, (a[0], out)) and None) for m in norms]
        attention = [layer.get_submodule(at.adapter.attention) for layer in at.layers]
        model.set_attn_implementation("eager")
        with torch.no_grad():
            patterns = model(input_ids=at.ids, output_attentions=True).attentions
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            start = at.values[at.start]
            for i in range(4):
                x = start.clone()
                x[i] += start[i]
                moved = _held(at, x, old, patterns, attention) - _held(at, start, old, patterns, attention)
                for row, (node, u) in enumerate(zip(targets.nodes, targets.directions, strict=True)):
                    torch.testing.assert_close(moved[node.position] @ u, A[row, i], rtol=1e-8, atol=1e-10)


def _held(at, x, old, patterns, attention):
    """What MLP 1 reads when layer 0 receives x: written out for two layers, everything but the stream held."""
    for index, layer in enumerate(at.layers):
        first, second = (layer.get_submodule(name) for name in at.adapter.reads)
        x = x + _heads(attention[index], _scaled(first, x, old), patterns[index][0])
        if index:
            return _scaled(second, x, old)
        x = x + at.values[at.written[0]]
    raise AssertionError


def _scaled(norm, x, old):
    """A norm with the scale it had."""
    before, after = old[norm][0][0], old[norm][1][0]
    if isinstance(norm, torch.nn.LayerNorm):
        deviation = (before.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        return (x - x.mean(-1, keepdim=True)) / deviation * norm.weight + norm.bias
    ratio = after / before.where(before != 0, torch.ones(()).double())
    return x * ratio


def _heads(module, x, pattern):
    if hasattr(module, "c_attn"):
        v = module.c_attn(x)[:, 64:].unflatten(-1, (4, 8))
        return module.c_proj(torch.einsum("hts,shk->thk", pattern, v).flatten(1))
    v = module.v_proj(x).unflatten(-1, (2, 8)).repeat_interleave(2, 1)
    return module.o_proj(torch.einsum("hts,shk->thk", pattern, v).flatten(1))


def test_influence_is_the_sum_over_all_paths():
    A = torch.zeros(5, 4)  # sources 0, 1 (tokens), 2, 3 (features); one logit
    A[2, 0], A[2, 1], A[3, 2], A[3, 1], A[4, 3], A[4, 0] = 1.0, -3.0, 1.0, 1.0, 2.0, -2.0
    total = _influence(A, torch.ones(1))
    assert total.tolist() == pytest.approx([0.5 + 0.25 * 0.25, 0.25 + 0.25 * 0.75, 0.25, 0.5])
    assert _largest(torch.tensor([0.1, 0.5, 0.4, 0.0]), 0.8).tolist() == [False, True, True, False]


def test_a_graph_keeps_what_counts_and_says_where_influence_ends():
    model, both, _ = frozen("llama")
    found = explain.attribute(model, ids(6, 1), both, most_logits=3, rows=5)
    whole = explain.attribute(model, ids(6, 1), both, most_logits=3, keep_nodes=1.0, keep_edges=1.0)
    assert len(found.nodes) < len(whole.nodes)
    assert sum(found.ends.values()) == pytest.approx(1)
    assert {"token", "error"} <= set(found.ends)
    assert found.expanded == found.active
    kinds = [node.kind for node in found.nodes]
    assert kinds.count("token") == 6
    assert kinds.count("logit") == 3
    names = json.loads(json.dumps(found.to_json()))
    assert len({node["name"] for node in names["nodes"]}) == len(found.nodes)
    some = explain.attribute(model, ids(6, 1), both[1:], targets=[7], most_features=4)
    assert some.expanded == 4
    assert {"mlp", "feature"} <= set(some.ends)
    assert [node.index for node in some.nodes if node.kind == "logit"] == [7]


def test_what_goes_into_one_feature_adds_up_to_it():
    model, both, at = frozen("llama")
    node = next(n for n in at.sources().nodes if n.kind == "feature" and n.layer == 1)
    found = explain.into_feature(model, at.ids, both, layer=1, position=node.position, feature=node.index)
    assert sum(found.values()) == pytest.approx(node.value, rel=1e-5)
    assert Node("bias", 1, node.position) in found


def test_graphs_refuse_what_they_cannot_trace():
    model, both, _ = frozen("llama")
    with pytest.raises(ValueError, match="one per layer"):
        explain.attribute(model, ids(6, 1), [both[0], both[0]])
    same = placed(model, dictionary(32, reads="blocks.0.hook_mlp_out"))
    with pytest.raises(ValueError, match="lead through transcoders"):
        explain.attribute(model, ids(6, 1), [same])
    with pytest.raises(ValueError, match="layer 5 has no dictionary"):
        explain.into_feature(model, ids(6, 1), both, layer=5, position=0, feature=0)
    with pytest.raises(ValueError, match="feature 99 is outside"):
        explain.into_feature(model, ids(6, 1), both, layer=0, position=0, feature=99)
    with pytest.raises(ValueError, match="the vocabulary has 0 to 60"):
        explain.attribute(model, ids(6, 1), both, targets=[61])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_connections_are_the_pull_of_a_decoder_row_on_an_encoder_row(family):
    model, (first, second), _ = frozen(family)
    rows = explain.connections(model, first, second, top=5)
    C = first.dictionary.W_dec @ read_directions(model, second).T
    best = C.detach().abs().max()
    assert abs(rows[0]["weight"]) == pytest.approx(float(best))
    i, j = (int(rows[0][key].split(".")[1]) for key in ("from", "to"))
    assert float(C[i, j].detach()) == pytest.approx(rows[0]["weight"])
    assert [abs(row["weight"]) for row in rows] == sorted((abs(row["weight"]) for row in rows), reverse=True)
    rates = torch.zeros(10)
    rates[4] = 1.0
    assert explain.connections(model, first, second, rates=rates, top=1)[0]["from"] == "t0.4"
    order = torch.randperm(10)
    first.dictionary.W_dec.data = first.dictionary.W_dec.data[order]
    again = explain.connections(model, first, second, top=5)
    assert [row["weight"] for row in again] == pytest.approx([row["weight"] for row in rows])
    with pytest.raises(ValueError, match="doesn't come before"):
        explain.connections(model, second, first)


def test_the_de_embedding_is_what_a_token_alone_drives_up_to_the_norms_scale():
    model, (first, _), _ = frozen("llama")
    W = model.model.embed_tokens.weight
    norm = model.get_submodule(first.reads)
    drive = explain.de_embedding(model, first, [2, 5])
    rms = (W.square().mean(-1) + norm.variance_epsilon).sqrt()
    wanted = first.dictionary.W_enc[[2, 5]] @ norm(W).T * rms
    torch.testing.assert_close(drive, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skip", [False, True])
def test_a_circuit_of_features_and_rests_is_faithful_whole_and_nothing_empty(skip):
    model, both, _ = frozen("llama", skip)
    clean, corrupt = ids(6), (ids(6) + 7) % 58 + 3
    metric = explain.LogitDifference(torch.tensor([5, 6]), torch.tensor([9, 4]))
    found = explain.feature_circuit(model, clean, corrupt, metric, both, shares=(0.3, 1.0), faithful=0.0, rows=1)
    assert found.curve[-1]["faithfulness"] == pytest.approx(1)
    assert found.curve[-1]["completeness"] == pytest.approx(0)
    with torch.no_grad():
        assert found.whole == pytest.approx(float(metric(model(input_ids=clean)).mean()))
    again = json.loads(json.dumps(found.to_json()))
    assert explain.Circuit.from_json(again).parts == dict(found.parts)
    assert {name[0] for name in found.nodes} <= {"t", "e"}
    assert explain.feature_picture(found)[:4] == b"\x89PNG"


def test_a_feature_of_the_last_layer_scores_what_ablating_it_does_where_the_rest_is_linear(monkeypatch):
    """The last MLP's features reach the logits through the last norm alone; with its scale held the score is exact."""
    model, both, _ = frozen("llama")
    monkeypatch.setattr(model.model.norm, "forward", lambda x: x * model.model.norm.weight)
    clean, corrupt = ids(6), (ids(6) + 7) % 58 + 3
    metric = explain.LogitDifference(torch.tensor([5, 6]), torch.tensor([9, 4]))
    found = explain.feature_circuit(model, clean, corrupt, metric, both[1:], shares=(1.0,), faithful=0.0)
    name = next(name for name in found.parts if name.startswith("t1."))
    d, feature = both[1].dictionary, int(name.partition(".")[2])
    reads = both[1].reads
    z = [d.encode(values_at(model, {"input_ids": x}, [reads])[reads]) for x in (clean, corrupt)]
    step = (z[0] - z[1])[:, -1, feature, None] * d.W_dec[feature] * model.model.norm.weight
    logits = (step @ model.lm_head.weight.T).detach()
    wanted = (logits[[0, 1], [5, 6]] - logits[[0, 1], [9, 4]]).mean()
    assert found.parts[name] == pytest.approx(float(wanted), rel=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transcode")
    model = saved_decoder(folder, WORDS)
    torch.manual_seed(0)
    texts = [" ".join(f"w{i}" for i in torch.randint(60, (40,)).tolist()) for _ in range(60)]
    (folder / "texts").mkdir()
    for i, text in enumerate(texts):
        (folder / f"texts/{i}.txt").write_text(text)
    arguments = ["transcode", "train", model, "--layer", "1", "--kind", "transcoder", "--kind", "autoencoder", "-o",
                 str(folder / "out"), "--data", str(folder / "texts"), "--length", "8", "--batch", "64",
                 "--features", "64", "--k", "4"]  # fmt: skip
    assert command(arguments) == 0
    return model, folder, arguments


def test_the_command_trains_and_does_not_train_again(trained, capsys):
    _, folder, arguments = trained
    saved = explain.Dictionary.load(folder / "out/transcoder-1")
    assert saved.config.reads == "blocks.1.mlp.hook_in"
    assert command([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["note"] for row in found["dictionaries"]] == ["finished before"] * 2
    assert command([*arguments[:-2], "--k", "5"]) == 2  # it is not what is there
    assert "other settings" in capsys.readouterr().err


def test_the_command_scores_shows_and_traces(trained, tmp_path, capsys):
    model, folder, _ = trained
    texts, both = str(folder / "texts"), [str(folder / f"out/{kind}-1") for kind in ("transcoder", "autoencoder")]
    scoring = ["transcode", "evaluate", model, *both, "--data", texts, "--length", "8", "--k", "2", "--json"]
    more = ["--activations", str(folder / "out/activations"), "--html", str(tmp_path / "scores.html")]
    assert command([*scoring, *more]) == 0
    rows = {row["in the place"]: row for row in json.loads(capsys.readouterr().out)["scores"]}
    assert {"mean", "zero", "best affine map", "transcoder-1", "autoencoder-1, k = 2"} <= set(rows)
    assert command([*scoring, "--at-least", "2"]) == 1
    capsys.readouterr()
    looking = ["transcode", "dashboard", model, both[0], "--data", texts, "--length", "8", "--count", "3", "--json"]
    assert command([*looking, "--html", str(tmp_path / "features.html")]) == 0
    features = json.loads(capsys.readouterr().out)["features"]
    assert len(features) == 3
    assert features[-1]["density"] >= features[0]["density"] > 0
    tokens, values = features[0]["examples"][0]
    assert max(values) == pytest.approx(features[0]["most"])
    assert "Feature" in (tmp_path / "features.html").read_text()
    again = ["transcode", "dashboard", model, both[0], "--feature", "3", "--tokens", "400", "--json"]
    assert command([*again, "--activations", str(folder / "out/activations")]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 50 * 7
    tracing = ["transcode", "graph", model, both[0], "--text", "w3 w4 w5", "--json", "-o", str(tmp_path / "g.json")]
    assert command([*tracing, "--html", str(tmp_path / "g.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nodes"] == json.loads((tmp_path / "g.json").read_text())["nodes"]
    assert len(tokens) == len(values)


@pytest.fixture(scope="module")
def task(trained):
    """Prompts that the model solves by chance: it goes on with what is likelier after the clean one."""
    model, folder, _ = trained
    net, tokenizer = load_teacher(model)
    pairs = []
    for i in range(12):
        clean, corrupt = f"w{i} w7 w20", f"w{i + 20} w7 w20"
        asked = torch.tensor([tokenizer(text)["input_ids"] for text in (clean, corrupt)])
        with torch.no_grad():
            logits = net(input_ids=asked).logits[:, -1]
        gain = logits[0] - logits[1]
        words = [tokenizer.decode([int(i)]).strip() for i in (gain.argmax(), gain.argmin())]
        pairs.append({"clean": clean, "corrupt": corrupt, "answer": words[0], "distractor": words[1]})
    path = folder / "task.json"
    path.write_text(json.dumps({"prompts": pairs}))
    return str(path)


def test_the_command_finds_the_features_of_a_task(trained, task, tmp_path, capsys):
    model, folder, _ = trained
    asked = ["transcode", "circuit", model, str(folder / "out/transcoder-1"), "--task", task, "--json"]
    written = ["--html", str(tmp_path / "c.html"), "--png", str(tmp_path / "c.png"), "-o", str(tmp_path / "c.json")]
    assert command([*asked, *written]) == 0
    found = json.loads(capsys.readouterr().out)
    parts = found["circuit"]["parts"]
    assert found["circuit"]["faithfulness"] >= 0.85
    assert {name.partition(".")[0] for name in parts} <= {"t1", "e1"}
    assert all(len(words) == 4 for words in found["speaks for"].values())
    assert set(found["held out"]) == {"faithfulness", "completeness", "whole", "nothing"}
    assert found == json.loads((tmp_path / "c.json").read_text())
    assert "speaks for" in (tmp_path / "c.html").read_text()
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    assert command([*asked, "--faithful", "9"]) == 1
    capsys.readouterr()
    assert command([*asked, "--size", "100000"]) == 2
    assert "size is 100000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["dashboard", "MODEL", "OUT", "--feature", "64"], "feature 64 is outside the dictionary"),
        (["evaluate", "MODEL", "nowhere"], "nowhere is no folder"),
        (["graph", "MODEL", "OUT", "--text", " "], "the text is empty"),
        (["circuit", "MODEL", "OUT", "--task", "nowhere.json"], "nowhere.json does not exist"),
        (["train", "MODEL", "--layer", "7", "-o", "x"], "layer 7 is outside the model's layers 0 to 1"),
        (["train", "MODEL", "--layer", "1", "--kind", "sae", "-o", "x"], "unknown kind of dictionary 'sae'"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(trained, capsys, more, message):
    model, folder, _ = trained
    names = {"MODEL": model, "OUT": str(folder / "out/transcoder-1")}
    assert command(["transcode", *(names.get(word, word) for word in more)]) == 2
    assert message in capsys.readouterr().err
