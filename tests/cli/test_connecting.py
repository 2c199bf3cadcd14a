"""`connect` and `align` on tiny models in folders."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lineament import weights
from lineament.cli import run
from lineament.models import find_model, tiny_teacher


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model and a hidden permutation of it, both as folders."""
    root = tmp_path_factory.mktemp("pair")
    tokenizer = AutoTokenizer.from_pretrained(find_model("smollm2"))
    model = tiny_teacher("llama", vocab_size=len(tokenizer), num_hidden_layers=2)
    group = weights.symmetry(model, input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    model.save_pretrained(root / "a")
    group.random(0).apply(weights.Point.open(root / "a")).save(root / "b")
    (root / "text.txt").write_text("The line between two models. " * 200)
    for name in "ab":
        tokenizer.save_pretrained(root / name)
    return root


def test_align_finds_the_way_back(folders, tmp_path, capsys):
    out = tmp_path / "c"
    assert run(["align", str(folders / "a"), str(folders / "b"), "-o", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["distance_after"] == 0
    assert told["distance_before"] > 1
    a, c = (AutoModelForCausalLM.from_pretrained(folder) for folder in (folders / "a", out))
    assert all(torch.equal(x, c.get_parameter(name)) for name, x in a.named_parameters())
    assert run(["align", str(folders / "a"), str(folders / "b"), "-o", str(out)]) == 2
    assert "exists" in capsys.readouterr().err


def test_connect_follows_the_line_and_matching_makes_it_flat(folders, tmp_path, capsys):
    heights = []
    for extra in ([], ["--align"]):
        pair = [str(folders / "a"), str(folders / "b")]
        options = ["--text", str(folders / "text.txt"), "--tokens", "256", "--length", "32", "--points", "3", "--json"]
        plot = tmp_path / "plot.png"
        assert run(["connect", *pair, *options, *extra, "--plot", str(plot)]) == 0
        told = json.loads(capsys.readouterr().out)
        losses = [row["data loss"] for row in told["path"]]
        heights.append(abs(losses[1] - losses[0]))
        assert losses[0] == pytest.approx(losses[2], abs=1e-5)  # the same function in other places
        assert len(told["path"]) == 3
        assert plot.stat().st_size > 0
    assert heights[1] == pytest.approx(0, abs=1e-5)
    assert heights[0] != pytest.approx(0, abs=1e-5)


def test_a_lora_on_its_base_is_an_end_of_a_line(folders, tmp_path, capsys):
    a, b, adapter = (str(folder) for folder in (folders / "a", folders / "b", tmp_path / "lora"))
    assert run(["merge", b, "--base", a, "--extract-lora", "4", "-o", adapter]) == 0
    assert run(["merge", f"{a}+{adapter}", "-o", str(tmp_path / "merged")]) == 0
    options = ["--text", str(folders / "text.txt"), "--tokens", "64", "--length", "32", "--points", "3", "--json"]
    told = []
    for end in (f"{a}+{adapter}", str(tmp_path / "merged")):
        capsys.readouterr()
        assert run(["connect", end, a, *options]) == 0
        told.append([row["data loss"] for row in json.loads(capsys.readouterr().out)["path"]])
    assert told[0] == pytest.approx(told[1], abs=1e-6)


def test_models_of_other_shapes_are_refused(folders, tmp_path, capsys):
    other = tiny_teacher("llama", vocab_size=100, num_hidden_layers=2)
    other.save_pretrained(tmp_path / "other")
    assert run(["align", str(folders / "a"), str(tmp_path / "other"), "-o", str(tmp_path / "c")]) == 2
    message = capsys.readouterr().err
    assert "differ in 1 tensors: model.embed_tokens.weight" in message or "lm_head.weight" in message
    assert not (tmp_path / "c").exists()
