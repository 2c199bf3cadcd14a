"""`lineament merge` and `diff`: plans read as mergekit's, what is refused by name, and kill and resume."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import lineament
from lineament import io
from lineament.cli import run
from lineament.models import tiny_teacher
from lineament.weights import Point, merge


def tokenizer(words, out):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(out)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two models a step away from it."""
    home = tmp_path_factory.mktemp("models")
    tiny_teacher("llama", tie_word_embeddings=False).save_pretrained(home / "base")
    tokenizer(["<unk>", *(f"w{i}" for i in range(60))], home / "base")
    base = Point.open(home / "base")
    for seed, name in enumerate("ab"):
        g = torch.Generator().manual_seed(seed)
        step = Point.open({n: 0.1 * torch.randn(s.shape, generator=g) for n, s in base.specs.items()}, copy=False)
        (base + step).save(home / name, max_shard_size="30kB")
    return home


@pytest.fixture
def here(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "b"):
        (tmp_path / name).symlink_to(models / name)
    return tmp_path


def plan(here, text):
    (here / "plan.yml").write_text(text)
    return "plan.yml"


def test_flags_and_yaml_say_the_same(here, capsys):
    flags = [
        "merge",
        "a",
        "b",
        "--base",
        "base",
        "--method",
        "ties",
        "--weight",
        "1",
        "--density",
        "0.3",
        "--density",
        "0.6",
    ]
    assert run([*flags, "-o", "one", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    text = """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 1, density: 0.3}}
  - {model: b, parameters: {weight: 1, density: 0.6}}
  - model: base
"""
    assert run(["merge", plan(here, text), "-o", "two", "--shard-size", "40kB"]) == 0
    one, two = Point.open("one"), Point.open("two")
    assert all(torch.equal(one[n], two[n]) for n in one)
    expected = merge(["a", "b"], "ties", base="base", weight=1.0, density=[0.3, 0.6])
    assert all(torch.equal(one[n], expected[n]) for n in one)
    assert told["written"] == sum(one.nbytes(n) for n in one)
    assert len(list((here / "two").glob("*.safetensors"))) > 1
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained("two")
    assert AutoTokenizer.from_pretrained("two")("w3 w5")["input_ids"] == [4, 6]
    card = (here / "two" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert '"merge_method": "ties"' in card


def test_a_weight_that_is_not_said_is_one_and_set_counts(here):
    """As in the example of the command's help."""
    merging = ["merge", "a", "b", "--base", "base", "--method", "task_arithmetic"]
    assert run([*merging, "-o", "c"]) == 0
    assert run([*merging, "--set", "weight=0.5", "-o", "d"]) == 0
    assert run(["merge", "a", "b", "--method", "average", "-o", "e"]) == 0
    for out, expected in (
        ("c", merge(["a", "b"], "task_arithmetic", base="base", weight=1)),
        ("d", merge(["a", "b"], "task_arithmetic", base="base", weight=0.5)),
        ("e", merge(["a", "b"], "average")),
    ):
        found = Point.open(out)
        assert all(torch.equal(found[n], expected[n]) for n in found)


def test_layer_gradients_filters_lambda_normalize_and_dtypes(here):
    text = """
merge_method: task_arithmetic
base_model: base
models:
  - model: a
    parameters:
      weight:
        - {filter: mlp, value: [0, 0.5, 1]}
        - {filter: self_attn, value: 1e-1}
        - value: 0.25
  - {model: b, parameters: {weight: 0.5}}
parameters: {lambda: 0.8, normalize: false, int8_mask: true}
dtype: float32
out_dtype: bfloat16
"""
    assert run(["merge", plan(here, text), "-o", "c"]) == 0
    base, a, b, c = (Point.open(n) for n in ("base", "a", "b", "c"))
    for name in c:
        layer = next((int(p) for p in name.split(".") if p.isdigit()), None)
        w = layer / 2 if ".mlp." in name else 0.1 if "self_attn" in name else 0.25
        expected = base[name] + 0.8 * (w * (a[name] - base[name]) + 0.5 * (b[name] - base[name]))
        assert c[name].dtype == torch.bfloat16
        torch.testing.assert_close(c[name].float(), expected, rtol=0.008, atol=1e-6)
    assert json.loads((here / "c" / "config.json").read_text())["dtype"] == "bfloat16"


def test_slices_stack_layers_and_blend_others(here):
    text = """
merge_method: slerp
base_model: a
modules:
  default:
    slices:
      - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
        parameters: {t: [0, 1]}
      - sources: [{model: a, layer_range: [1, 3]}, {model: b, layer_range: [1, 3]}]
        parameters: {t: 0.5}
"""
    assert run(["merge", plan(here, text), "-o", "c"]) == 0
    from transformers import AutoModelForCausalLM

    a, b, c = (Point.open(n) for n in "abc")
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(c[name.format(0)], a[name.format(0)])
    torch.testing.assert_close(c[name.format(1)], b[name.format(1)])
    torch.testing.assert_close(c[name.format(3)], a.slerp(b, 0.5)[name.format(2)])
    assert torch.equal(c["model.embed_tokens.weight"], a["model.embed_tokens.weight"])  # t is 0 before the layers
    torch.testing.assert_close(c["model.norm.weight"], a.slerp(b, 0.5)["model.norm.weight"])
    model = AutoModelForCausalLM.from_pretrained("c")
    assert model.config.num_hidden_layers == 4
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_a_base_beside_the_sources_of_a_slice_gives_the_same_layers(here, capsys):
    """The result has them at the front: the base's own first layers are not what they were tuned from."""
    text = """
merge_method: task_arithmetic
base_model: base
parameters: {weight: 0.5}
slices:
  - sources: [{model: a, layer_range: [1, 3]}%s]
"""
    name = "model.layers.{}.mlp.up_proj.weight"
    assert run(["merge", plan(here, text % ""), "-o", "c"]) == 0
    assert run(["merge", plan(here, text % ", {model: base, layer_range: [1, 3]}"), "-o", "d"]) == 0
    a, base, c, d = (Point.open(n) for n in ("a", "base", "c", "d"))
    torch.testing.assert_close(c[name.format(0)], (a[name.format(1)] + base[name.format(1)]) / 2)
    assert all(torch.equal(c[n], d[n]) for n in c)
    assert run(["merge", plan(here, text % ", {model: b, layer_range: [0, 2]}"), "-o", "e"]) == 2
    assert "list base among them" in capsys.readouterr().err


def test_passthrough_repeats_layers(here):
    text = """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 3], parameters: {scale: [{filter: o_proj, value: 0.0}, {value: 1.0}]}}]
"""
    assert run(["merge", plan(here, text), "-o", "c"]) == 0
    b, c = Point.open("b"), Point.open("c")
    assert torch.equal(c["model.layers.2.mlp.up_proj.weight"], b["model.layers.1.mlp.up_proj.weight"])
    assert not c["model.layers.3.self_attn.o_proj.weight"].any()
    assert torch.equal(c["lm_head.weight"], b["lm_head.weight"])


@pytest.fixture
def other_words(here):
    """A model like b with other words, some of them new, in another order."""
    words = ["<unk>", *(f"w{i}" for i in range(59, 9, -1)), "new", "newer"]
    b = Point.open("b")
    rows = torch.randn(len(words), 24, generator=torch.Generator().manual_seed(3))
    tensors = {n: rows if n.endswith(("embed_tokens.weight", "lm_head.weight")) else b[n] for n in b}
    (here / "words").mkdir()
    for name in ("config.json", "generation_config.json"):
        told = json.loads((here / "b" / name).read_text())
        (here / "words" / name).write_text(
            json.dumps(told | ({"vocab_size": len(words)} if name == "config.json" else {}))
        )
    save_file({n: x.clone() for n, x in tensors.items()}, here / "words" / "model.safetensors")
    tokenizer(words, here / "words")
    return words, rows


def test_vocabularies_are_joined_token_by_token(here, other_words, capsys):
    words, rows = other_words
    assert run(["merge", "a", "words", "-o", "c"]) == 2
    assert "only the vocabulary differs (61 and 53 rows)" in capsys.readouterr().err
    text = """
merge_method: linear
models: [{model: a, parameters: {weight: 1}}, {model: words, parameters: {weight: 1}}]
tokenizer:
  source: union
  pad_to_multiple_of: 10
  tokens:
    newer: {source: a, force: false}
    w1: {source: {kind: model_token, model: words, token: new}, force: true}
    extra: {source: {kind: zero}}
""".replace("newer: {source: a, force: false}", "newer: {source: words}")
    assert run(["merge", plan(here, text), "-o", "c"]) == 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    c, a = Point.open("c"), Point.open("a")
    found = AutoTokenizer.from_pretrained("c")
    ids, e = found.get_vocab(), c["model.embed_tokens.weight"]
    old = a["model.embed_tokens.weight"]
    torch.testing.assert_close(e[ids["w20"]], (old[21] + rows[words.index("w20")]) / 2)  # both know it
    torch.testing.assert_close(e[ids["w5"]], old[6])  # only a knows it
    torch.testing.assert_close(e[ids["new"]], rows[words.index("new")])
    torch.testing.assert_close(e[ids["w1"]], rows[words.index("new")])  # forced
    assert not e[ids["extra"]].any()
    assert len(e) == 70 == AutoModelForCausalLM.from_pretrained("c").config.vocab_size
    torch.testing.assert_close(e[-1], e[: len(ids)].mean(0))


def test_the_words_of_one_model_bring_what_it_says_of_them(here, other_words):
    """Special tokens are named by number in the configs, and numbers mean other words in another model."""
    for name in ("config.json", "generation_config.json"):
        told = json.loads((here / "words" / name).read_text())
        assert told.pop("pad_token_id") == 0
        (here / "words" / name).write_text(json.dumps(told | {"eos_token_id": 7, "bos_token_id": 8}))
    shutil.copytree((here / "a").resolve(), here / "full")
    (here / "full" / "vocab.json").write_text("{}")
    (here / "full" / "chat_template.jinja").write_text("{{ messages }}")
    assert run(["merge", "full", "words", "--tokenizer", "words", "-o", "c"]) == 0
    for name in ("config.json", "generation_config.json"):
        told = json.loads((here / "c" / name).read_text())
        assert (told["eos_token_id"], told["bos_token_id"]) == (7, 8)
        assert "pad_token_id" not in told
    assert not (here / "c" / "vocab.json").exists()  # the other tokenizer's
    assert not (here / "c" / "chat_template.jinja").exists()


def test_lists_of_layers_are_those_of_the_layers_taken(here, capsys):
    told = json.loads((here / "a" / "config.json").read_text())
    for name, kinds in (("deep", ["full", "full", "window", "window"]), ("flat", ["full"] * 3)):
        shutil.copytree((here / "a").resolve(), here / name)
        (here / name / "config.json").write_text(json.dumps(told | {"num_hidden_layers": len(kinds), "kinds": kinds}))
    extra = {n.replace(".2.", ".3."): x.clone() for n, x in Point.open("a").state_dict().items() if ".2." in n}
    (here / "deep" / "model.safetensors").unlink(missing_ok=True)
    for file in (here / "deep").glob("model-*"):
        file.unlink()
    (here / "deep" / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(Point.open("a").state_dict() | extra, here / "deep" / "model.safetensors")
    text = """
merge_method: passthrough
slices:
  - sources: [{model: flat, layer_range: [0, 2]}]
  - sources: [{model: deep, layer_range: [2, 4]}]
"""
    assert run(["merge", plan(here, text), "-o", "c"]) == 0
    found = json.loads((here / "c" / "config.json").read_text())
    assert (found["num_hidden_layers"], found["kinds"]) == (4, ["full", "full", "window", "window"])
    (here / "deep" / "config.json").write_text(json.dumps(told | {"num_hidden_layers": 4}))
    assert run(["merge", plan(here, text), "-o", "d"]) == 2
    assert "no config says kinds of layer 3 of deep" in capsys.readouterr().err


def test_a_chat_template_is_taken_by_vote_or_given(here):
    assert run(["merge", "a", "b", "--chat-template", "{{ messages[0]['content'] }}", "-o", "c"]) == 0
    from transformers import AutoTokenizer

    assert (
        AutoTokenizer.from_pretrained("c").apply_chat_template([{"role": "u", "content": "hi"}], tokenize=False) == "hi"
    )


def test_a_lora_is_extracted_and_merged_again(here, capsys):
    base = Point.open("base")
    g = torch.Generator().manual_seed(0)
    name = "model.layers.1.self_attn.q_proj.weight"
    change = torch.randn(48, 3, generator=g) @ torch.randn(3, 24, generator=g)
    base.replace({name: base[name] + change}).save("tuned")
    assert run(["merge", "tuned", "--base", "base", "--extract-lora", "3", "-o", "adapter"]) == 0
    merged = Point.open("adapter", base="base")
    torch.testing.assert_close(merged[name], base[name] + change, rtol=1e-4, atol=1e-4)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter").merge_and_unload()
    torch.testing.assert_close(model.get_parameter(name).data, merged[name], rtol=1e-5, atol=1e-5)
    assert run(["merge", "base+adapter", "b", "-o", "c"]) == 0
    torch.testing.assert_close(Point.open("c")[name], (merged[name] + Point.open("b")[name]) / 2)
    tiny_teacher("llama", hidden_size=36, tie_word_embeddings=False).save_pretrained("other")
    assert run(["merge", "other+adapter", "b", "-o", "d", "--any-base"]) == 2
    assert "is a LoRA of another base" in capsys.readouterr().err
    assert not list(here.glob("d*"))
    assert run(["merge", "base", "--base", "base", "--extract-lora", "3", "-o", "none"]) == 2
    assert "nothing to extract" in capsys.readouterr().err


def test_extracting_obeys_a_dry_run_and_refuses_what_it_would_not_do(here, capsys):
    before = sorted(here.iterdir())
    extract = ["merge", "a", "--base", "base", "--extract-lora", "2", "-o", "adapter"]
    assert run([*extract, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["dry_run"]
    assert told["matrices"] == 3 * 7
    assert sorted(here.iterdir()) == before
    assert run([*extract, "--method", "ties", "--untie"]) == 2
    assert "no use for --method, --untie" in capsys.readouterr().err
    (here / "adapter").mkdir()
    assert run([*extract, "--dry-run"]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_model_with_a_lora_is_a_model_to_every_command(here, capsys):
    assert run(["merge", "a", "--base", "base", "--extract-lora", "2", "-o", "adapter"]) == 0
    capsys.readouterr()
    assert run(["diff", "base", "base+adapter", "--json", "--no-ranks"]) == 0
    near = json.loads(capsys.readouterr().out)["all"]["distance"]
    assert near == pytest.approx((Point.open("adapter", base="base") - Point.open("base")).norm(), rel=1e-5)
    assert run(["merge", "base+adapter", "--base", "base", "--extract-lora", "2", "-o", "again"]) == 0
    assert run(["signature", "extract", "base", "base", "base+adapter", "-o", "s.safetensors"]) == 0


def test_diff_names_a_tensor_that_is_not_finite(here, capsys):
    base = Point.open("base").state_dict()
    base["model.norm.weight"][0] = float("nan")
    (here / "c").mkdir()
    save_file(base, here / "c" / "model.safetensors")
    assert run(["diff", "base", "c"]) == 2
    assert "'model.norm.weight' of c holds 1 NaN" in capsys.readouterr().err


def test_a_dry_run_checks_everything_and_writes_nothing(here, capsys):
    before = sorted(here.iterdir())
    assert run(["merge", "a", "b", "-o", "c", "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["memory"] == (2 + 2) * 4 * 61 * 24 + 256_000_000
    assert told["read"] > told["written"] > 0
    for odd, said in ((["-o", "a"], "a exists"), (["-o", "c", "--shard-size", "big"], "big")):
        assert run(["merge", "a", "b", *odd, "--dry-run"]) == 2
        assert said in capsys.readouterr().err
    assert sorted(here.iterdir()) == before


def test_json_is_json_where_a_number_is_none(here, capsys):
    base = Point.open("base")
    base.replace({"model.norm.weight": torch.zeros(24)}).save("c")
    assert run(["diff", "c", "base", "--json", "--no-ranks"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert next(row for row in told["tensors"] if row["tensor"] == "model.norm.weight")["angle"] is None


def test_diff_tells_distance_angle_and_rank(here, capsys):
    base = Point.open("base")
    name = "model.layers.1.mlp.up_proj.weight"
    base.replace({name: base[name] + torch.outer(torch.ones(32), torch.arange(24.0))}).save("c")
    assert run(["diff", "base", "c", "--json", "--picture", "p.png"]) == 0
    told = json.loads(capsys.readouterr().out)
    row = next(row for row in told["tensors"] if row["tensor"] == name)
    distance = float((32 * (torch.arange(24.0) ** 2).sum()) ** 0.5)
    assert row["distance"] == pytest.approx(distance, rel=1e-6)
    assert row["effective rank"] == pytest.approx(1, abs=1e-3)
    assert told["all"]["distance"] == pytest.approx(distance, rel=1e-6)
    assert told["all"]["angle"] == pytest.approx(
        torch.rad2deg(torch.tensor(base.angle(Point.open("c")))).item(), abs=1e-3
    )
    assert (here / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert run(["diff", "base", "c"]) == 0


def stored(here, name, tensors):
    (here / name).mkdir()
    save_file(tensors, here / name / "model.safetensors")


def test_what_a_model_lacks_is_refused_the_bases_or_skipped(here, capsys):
    base, a, b = (Point.open(name).state_dict() for name in ("base", "a", "b"))
    norm, extra = "model.norm.weight", {"extra.weight": torch.ones(3)}
    stored(here, "less", {n: x for n, x in b.items() if n != norm})
    stored(here, "more", b | extra)
    plain = ["merge", "a", "less", "--base", "base", "--method", "task_arithmetic", "--weight", "0.5"]
    assert run([*plain, "-o", "c"]) == 2
    assert norm in capsys.readouterr().err
    assert run([*plain, "--missing", "base", "-o", "c", "--json"]) == 0
    assert any(f"not every model has {norm}" in note for note in json.loads(capsys.readouterr().out)["notes"])
    torch.testing.assert_close(Point.open("c")[norm], (base[norm] + a[norm]) / 2)
    mean = ["merge", "a", "less", "--method", "linear"]
    assert run([*mean, "--missing", "skip", "-o", "d"]) == 0
    assert torch.equal(Point.open("d")[norm], a[norm])  # the mean of one
    assert run([*mean, "--missing", "base", "-o", "e"]) == 2
    assert "there is no base that has it" in capsys.readouterr().err
    plain[2] = "more"
    assert run([*plain, "--missing", "skip", "-o", "f"]) == 0
    assert "extra.weight" not in Point.open("f")
    assert run([*plain, "--missing", "guess", "-o", "g"]) == 2
    assert "unknown answer to missing tensors 'guess'" in capsys.readouterr().err


def test_prefixes_are_renamed_and_old_buffers_passed_over(here, capsys):
    b = Point.open("b").state_dict()
    stored(here, "wrapped", {f"module.{n}": x for n, x in b.items()})
    stored(here, "old", b | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert run(["merge", "a", "wrapped", "-o", "c"]) == 2
    assert "--rename module.=" in capsys.readouterr().err
    assert run(["merge", "a", "wrapped", "--rename", "module.=", "-o", "c"]) == 0
    assert run(["merge", "a", "old", "-o", "d"]) == 0
    expected, c, d = merge(["a", "b"], "linear", weight=1), Point.open("c"), Point.open("d")
    assert list(c) == list(d)
    assert all(torch.equal(c[n], expected[n]) and torch.equal(d[n], expected[n]) for n in c)
    assert run(["merge", "a", "b", "--rename", "module.", "-o", "e"]) == 2
    assert "--rename 'module.' is not understood" in capsys.readouterr().err


MERGE = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: linear\nmodels: []\n", "exactly one of models, slices and modules"),
        (MERGE.replace("linear", "liner"), "Did you mean 'linear'"),
        (
            MERGE + "tokeniser_source: union\n",
            "'tokeniser_source', which is not known here. Did you mean 'tokenizer_source'",
        ),
        (MERGE + "parameters: {wieght: 1}\n", "'wieght', which no merge method knows. Did you mean 'weight'"),
        (MERGE.replace("weight: 1", "weight: heavy"), "weight of a is 'heavy'; expected a finite number"),
        (MERGE.replace("weight: 1", "weight: .nan"), "expected a finite number"),
        (MERGE.replace("b, parameters: {weight: 1}", "b, parameters: {weight: -1}"), "sum to zero"),
        (MERGE + "dtype: fp17\n", "dtype is 'fp17'"),
        (MERGE + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n", "exactly one of"),
        ("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [2, 9]}]}]\n", "goes beyond its end"),
        ("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [2, 1]}]}]\n", "layer_range of"),
        ("merge_method: passthrough\nslices: [{sources: [{model: a}]}]\n", "layer_range of"),
        (MERGE + "modules: {text: 1, vision: 2}\n", "exactly one of"),
        ("modules: {text: {}, vision: {}}\nmerge_method: linear\n", "text, vision"),
        (MERGE + "chat_template: alpacka\n", "'alpacka' is not known by name"),
        (MERGE.replace("model: a", "model: {model: a, lora: x, revision: y}"), "has revision"),
        ("[1, 2]", "holds no mapping"),
        (MERGE.replace("{weight: 1}", "[weight]"), "the parameters of a are ['weight']; expected a mapping"),
        (MERGE + "parameters: {weight: [{filter: 3, value: 1}, 1]}\n", "the filter 3; expected text"),
        (MERGE + "tokenizer: {tokens: [w1]}\n", "tokens of the tokenizer is ['w1']; expected a mapping"),
        (MERGE + "tokenizer: {tokens: {1: {source: a}}}\n", "expected a mapping of tokens (text)"),
        (MERGE + "tokenizer: {tokens: {w1: {force: maybe}}}\n", "force of the token 'w1' is 'maybe'"),
        (
            MERGE + "tokenizer: {tokens: {w1: {source: {kind: model_token, model: a, token_id: x}}}}\n",
            "token_id that is no whole number",
        ),
        *((MERGE + f"tokenizer: {{pad_to_multiple_of: {n}}}\n", "of at least 1") for n in ("x", 0, -8, 2.5, [8])),
        ("a: [", "not valid YAML"),
        (MERGE.replace("model: a", "model: nowhere/to/be"), "does not exist"),
    ],
)
def test_a_bad_plan_is_one_line_and_leaves_nothing(here, capsys, text, said):
    assert run(["merge", plan(here, text), "-o", "c"]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
    assert not list(here.glob("c*"))


def spoil(here, what):
    """Make a model `bad` that is broken in one way; returns what the message must hold."""
    bad = here / "bad"
    Point.open("b").save(bad, max_shard_size="30kB")
    shards = sorted(bad.glob("*.safetensors"))
    if what == "shard missing":
        shards[1].unlink()
        return "is missing, but model.safetensors.index.json lists it"
    if what == "index lying":
        index = json.loads((bad / "model.safetensors.index.json").read_text())
        index["weight_map"]["made.up"] = shards[0].name
        (bad / "model.safetensors.index.json").write_text(json.dumps(index))
        return "has no tensor 'made.up'"
    if what == "truncated":
        shards[0].write_bytes(shards[0].read_bytes()[:-10])
        return "truncated"
    if what == "pickle":
        for file in bad.glob("*.safetensors*"):
            file.unlink()
        (bad / "pytorch_model.bin").write_bytes(b"\x80\x02")
        return "is a pickle"
    if what == "NaN":
        tensors = load_file(shards[0])
        name = sorted(tensors)[0]
        tensors[name].view(-1)[3] = float("nan")
        save_file(tensors, shards[0], {"format": "pt"})
        return f"'{name}' of bad holds 1 NaN"
    import shutil

    shutil.rmtree(bad)
    changes = {"other shapes": {"hidden_size": 36}, "other architecture": {}}[what]
    tiny_teacher(
        "llama" if changes else "gpt2", **({"tie_word_embeddings": False} if changes else {}), **changes
    ).save_pretrained(bad)
    tokenizer(["<unk>"], bad)
    return "differ in the shapes of" if changes else "have another architecture"


@pytest.mark.parametrize(
    "what", ["shard missing", "index lying", "truncated", "pickle", "NaN", "other shapes", "other architecture"]
)
def test_a_bad_model_is_one_line_and_leaves_nothing(here, capsys, what):
    said = spoil(here, what)
    assert run(["merge", "a", "bad", "-o", "c"]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
    assert not list(here.glob("c*"))


def test_an_output_that_exists_is_not_touched(here, capsys):
    (here / "c").mkdir()
    assert run(["merge", "a", "b", "-o", "c"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert not list((here / "c").iterdir())


def test_no_space_is_said_before_and_keeps_what_is_there_after(here, capsys, monkeypatch):
    from lineament.io import files

    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    assert run(["merge", "a", "b", "-o", "c"]) == 2
    assert "of disk" in capsys.readouterr().err
    assert not list(here.glob("c*"))
    monkeypatch.undo()
    monkeypatch.chdir(here)
    calls = iter([10**12, 10**12, 10**12])
    monkeypatch.setattr(files, "free_bytes", lambda path: next(calls, 1000))
    assert run(["merge", "a", "b", "-o", "c", "--shard-size", "30kB"]) == 2
    assert "c.partial" in capsys.readouterr().err
    assert list((here / "c.partial").glob("*.safetensors"))
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert run(["merge", "a", "b", "-o", "c", "--shard-size", "30kB"]) == 0
    assert not (here / "c.partial").exists()


KILLED = """
import sys, time
import lineament
from lineament import io
from lineament.io import save
inner = save.save_tensors
def slow(part, path, *rest, **more):
    found = inner(part, path, *rest, **more)
    print(path, flush=True)
    time.sleep(0.3)
    return found
save.save_tensors = slow
from lineament.cli import run
sys.exit(run(sys.argv[1:]))
"""


def test_a_kill_is_survived_and_the_end_is_the_same_to_the_bit(here):
    command = ["merge", "a", "b", "--base", "base", "--method", "dare_ties", "--weight", "0.5", "--density", "0.5"]
    command += ["--shard-size", "20kB"]
    assert run([*command, "-o", "whole"]) == 0
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, *command, "-o", "c"],
        stdout=subprocess.PIPE,
        env=dict(os.environ) | {"PYTHONPATH": str(Path(lineament.__file__).parents[1])},
    ) as job:
        assert job.stdout is not None
        for _ in range(3):
            job.stdout.readline()
        job.send_signal(signal.SIGKILL)
    assert not (here / "c").exists()
    done = {file: file.stat().st_mtime_ns for file in (here / "c.partial").glob("*.safetensors")}
    assert 3 <= len(done) < len(list((here / "whole").glob("*.safetensors")))
    other = [*command[:-1], "30kB"]
    assert run([*other, "-o", "c"]) == 2  # other work is not taken for the same
    assert run([*command, "-o", "c"]) == 0
    kept = {(here / "c" / file.name).stat().st_mtime_ns for file in done}
    assert kept == set(done.values())  # the finished shards were not written again
    for file in (here / "whole").iterdir():
        if file.name != "README.md":  # its title is the folder's name
            assert io.digest(here / "c" / file.name) == io.digest(file), file.name


def test_a_plan_round_trips_through_yaml(here):
    from lineament.weights.recipe import read_recipe

    recipe = read_recipe(yaml.safe_load(MERGE))
    assert recipe.models == ["a", "b"]
    assert read_recipe(plan(here, MERGE)) == recipe


def test_signatures_from_the_command_line(here, capsys):
    first = ["--keep", "model.layers.0.*"]
    assert run(["signature", "extract", "base", "a", "b", *first, "-o", "s.safetensors"]) == 0
    assert run(["signature", "quantise", "s.safetensors", "--levels", "16", "-o", "q.safetensors"]) == 0
    assert run(["signature", "combine", "s.safetensors", "q.safetensors", "-o", "c.safetensors"]) == 0
    assert (here / "q.safetensors").stat().st_size < (here / "s.safetensors").stat().st_size / 2
    assert run(["signature", "apply", "a", "c.safetensors", "--alpha", "0.5", "-o", "patched"]) == 0
    assert run(["signature", "remove", "patched", "-o", "clean"]) == 0
    a, patched, clean = (Point.open(n) for n in ("a", "patched", "clean"))
    assert all(torch.equal(a[n], clean[n]) for n in a)
    assert {n for n in a if not torch.equal(a[n], patched[n])} == {n for n in a if n.startswith("model.layers.0.")}
    whole = (here / "s.safetensors").read_bytes()
    for command in (
        ["quantise", "s.safetensors"], ["combine", "s.safetensors"], ["extract", "base", "a", "b"],
    ):  # fmt: skip
        assert run(["signature", *command, "-o", "s.safetensors"]) == 2
        assert "s.safetensors exists" in capsys.readouterr().err
    assert (here / "s.safetensors").read_bytes() == whole
    assert run(["signature", "extract", "base", "a", "b", "--scheme", "log", "-o", "t.safetensors"]) == 2
    assert "give levels" in capsys.readouterr().err
    assert run(["signature", "remove", "a", "-o", "other"]) == 2
    assert "no signature was applied" in capsys.readouterr().err


def test_composing_learns_on_text_and_saves_a_model(here, capsys):
    g = torch.Generator().manual_seed(0)
    words = [f"w{i}" for i in torch.randint(0, 8, (40 * 256,), generator=g).tolist()]
    (here / "words.txt").write_text(" ".join(words))
    command = ["compose", "base", "a", "b", "--data", "words.txt", "--steps", "12", "--json", "-o", "c"]
    assert run(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["losses"]["composed"] < told["losses"]["base"]
    assert told["coefficients"] == 2 * 30
    table = json.loads((here / "c" / "coefficients.json").read_text())
    base, a, b, c = (Point.open(n) for n in ("base", "a", "b", "c"))
    name = "model.layers.1.mlp.up_proj.weight"
    (x,), (y,) = table[name]
    torch.testing.assert_close(c[name], base[name] + x * (a[name] - base[name]) + y * (b[name] - base[name]))
    (here / "b").unlink()
    shutil.copytree(Path("a").resolve(), here / "b")  # another context length is a matter of the tuned model's config
    config = json.loads((here / "b" / "config.json").read_text())
    (here / "b" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 7}))
    for parts, out in ((1, "d"), (2, "e")):
        command = ["compose", "base", "b", "--data", "words.txt", "--steps", "1", "-o", out, "--parts", str(parts)]
        assert run(command) == 0
        told = [json.loads((here / each / "config.json").read_text()) for each in ("base", out)]
        assert told[0]["max_position_embeddings"] == told[1]["max_position_embeddings"] != 7
        assert (here / out / "tokenizer.json").is_file()
