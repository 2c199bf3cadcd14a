"""`bricks` on a tiny model in a folder: measured, chosen, saved."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lineament.cli import run
from lineament.models import find_model, tiny_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with the embedded tokenizer, and two kinds of text."""
    root = tmp_path_factory.mktemp("bricks")
    tokenizer = AutoTokenizer.from_pretrained(find_model("smollm2"))
    tiny_teacher("llama", vocab_size=len(tokenizer), num_hidden_layers=2).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    for name, word in (("a", "river"), ("b", "matrix")):
        lines = [json.dumps({"text": f"{i} {word} and line {i} " * 80}) for i in range(30)]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    return root


def options(folder, *more):
    texts = ["--data", str(folder / "a.jsonl"), "--kind", str(folder / "a.jsonl"), "--kind", str(folder / "b.jsonl")]
    return ["bricks", str(folder / "model"), *texts, "--tokens", "512", "--json", *more]


@pytest.mark.slow
def test_a_model_is_measured_and_the_chosen_one_is_an_ordinary_folder(folder, tmp_path, capsys):
    out, html = tmp_path / "sparse", tmp_path / "bricks.html"
    assert run(options(folder, "--most", "1.5", "-o", str(out), "--html", str(html))) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["curve"][0]["ratio"] == 1.0
    assert told["chosen"]["ratio"] <= 1.5
    assert {row["by"] for row in told["skipping"]} == {"gate", "product"}
    assert len(told["functions"]) == 2
    assert html.stat().st_size > 1000
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(1, 9)[None]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 11)
    assert float(model.model.layers[0].mlp.threshold) > 0
    assert json.loads((out / "bricks.json").read_text())["chosen"] == told["chosen"]
    assert run(options(folder, "-o", str(out))) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.slow
def test_the_exit_code_says_that_nothing_is_within_the_limit(folder, capsys):
    assert run(options(folder, "--most", "1.0000001", "--no-speed", "--by", "gate")) in (0, 1)
    told = json.loads(capsys.readouterr().out)
    assert (told["chosen"] is None) == all(row["ratio"] > 1.0000001 for row in told["skipping"])


@pytest.mark.parametrize(
    ("more", "said"),
    [(["--most", "0.9"], "limit 0.9"), (["--by", "luck"], "unknown way"), (["--data", "wik"], "wik")],
)
def test_mistakes_are_one_line(folder, capsys, more, said):
    assert run(options(folder, *more)) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
