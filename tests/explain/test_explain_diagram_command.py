"""`lineament diagram`: from a folder to a drawing that was checked, and mistakes in one line."""

import json

import transformers as hf
from tiny_families import saved_decoder

from lineament.cli import run

WORDS = ["[UNK]", "the", "capital", "of", "france", "is"]


def test_a_decoder_is_drawn_told_and_checked(tmp_path, capsys):
    folder = saved_decoder(tmp_path, WORDS)
    assert run(["diagram", folder, "-o", str(tmp_path / "a.svg"), "--check", "--json", "--tokens", "5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["error"] < 1e-9
    assert found["opaque_share"] == 0
    assert "LlamaDecoderLayer" in (tmp_path / "a.svg").read_text()
    assert run(["diagram", folder]) == 0
    assert "learned linear map" in capsys.readouterr().out


def test_an_image_classifier_is_drawn_and_checked(tmp_path, capsys):
    config = hf.ResNetConfig(embedding_size=4, hidden_sizes=[8, 12], depths=[2, 1], layer_type="basic")
    hf.ResNetForImageClassification(config).save_pretrained(tmp_path / "net")
    assert run(["diagram", str(tmp_path / "net"), "-o", str(tmp_path / "a.html"), "--check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["error"] < 1e-9
    assert found["opaque_share"] == 0
    assert "<pre>" in (tmp_path / "a.html").read_text()


def test_mistakes_are_one_line(tmp_path, capsys):
    assert run(["diagram", "/no/such/folder"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert run(["diagram", "smollm2", "-o", str(tmp_path / "a.pdf")]) == 2
    assert "expected .svg, .html, .txt or .json" in capsys.readouterr().err
