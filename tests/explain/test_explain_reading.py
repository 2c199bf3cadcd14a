"""Explanations by name: a text or a picture in, JSON, a page and heat maps out; mistakes in one line."""

import json

import pytest
import torch
from PIL import Image
from tiny_families import make, saved_decoder
from transformers import ViTImageProcessor

from lineament import explain
from lineament.cli import run

WORDS = ["[UNK]", "the", "capital", "of", "france", "is", "paris"]


@pytest.fixture
def decoder(tmp_path):
    folder = saved_decoder(tmp_path, WORDS)
    return folder


@pytest.fixture
def classifier(tmp_path):
    make("vit")[0].save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    Image.new("RGB", (40, 30), (200, 30, 60)).save(tmp_path / "red.png")
    return str(tmp_path / "vit"), str(tmp_path / "red.png")


def test_a_text_is_explained_as_json_page_and_picture(decoder, capsys, tmp_path):
    files = [str(tmp_path / "why.html"), str(tmp_path / "why.png")]
    text = ["explain", decoder, "--text", "the capital of france is", "--target", "paris"]
    assert run([*text, "--html", files[0], "--png", files[1], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["token"] for each in found["tokens"]] == ["the", " capital", " of", " france", " is"]
    total = sum(each["relevance"] for each in found["tokens"])
    assert total + sum(v for k, v in found["ledger"].items() if k != "inputs") == pytest.approx(
        found["value"], rel=1e-4
    )
    assert torch.tensor(found["heads"]).shape == (2, 4)
    page = (tmp_path / "why.html").read_text()
    assert " france</span>" in page
    assert "rgba(" in page
    assert (tmp_path / "why.png").read_bytes()[:4] == b"\x89PNG"
    assert run(text) == 0
    assert "remainder" in capsys.readouterr().out


def test_what_adds_up_to_nothing_is_not_said_to(decoder, capsys, tmp_path, monkeypatch):
    text, out = ["explain", decoder, "--text", "the capital of france is"], ["--html", str(tmp_path / "why.html")]
    assert run([*text, "--rules", "occlusion", *out]) == 0
    assert "only for additive models" in capsys.readouterr().out
    page = (tmp_path / "why.html").read_text()
    assert "only for additive models" in page
    assert "add up to the score" not in page
    assert run([*text, "--rules", "occlusion", "--unknown", "vjp"]) == 2
    monkeypatch.delitem(explain.OPERATORS, "Silu")
    assert run(text) == 2
    assert "no rule for" in capsys.readouterr().err
    assert run([*text, "--unknown", "vjp", *out]) == 0
    assert "The ledger is open. " in (tmp_path / "why.html").read_text()
    assert run([*text, "--unknown", "vpj"]) == 2
    assert "Did you mean 'vjp'" in capsys.readouterr().err


def test_a_picture_is_explained(classifier, capsys, tmp_path):
    model, picture = classifier
    out = str(tmp_path / "why.html")
    assert run(["explain", model, "--image", picture, "--target", "2", "--html", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert torch.tensor(found["pixels"]).shape == (32, 32)
    assert found["target"] == "LABEL_2"
    assert found["unaccounted"] < 1e-4


def test_paths_are_listed_drawn_and_written(decoder, capsys, tmp_path):
    text = ["explain", decoder, "--text", "the capital of france is", "--target", "paris", "--paths", "3"]
    assert run([*text, "--beam", "9", "--html", str(tmp_path / "why.html"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["paths"]
    assert found["sites"] == ["input_ids", "a0", "m0", "a1", "m1"]
    assert len(found["paths"]) == 3
    assert not found["exact"]
    assert "data:image/svg+xml;base64," in (tmp_path / "why.html").read_text()
    assert run([*text, "--site", "model.layers.0", "--beam", "1000"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "paths to 'paris'; 15 were followed to the input, none given up" in out
    assert "' is'@4 -> model.layers.0@4 ' is' -> 'paris'" in out
    assert run([*text, "--site", "model.layer"]) == 2
    assert run([*text, "--rules", "occlusion"]) == 2
    assert "sends no messages" in capsys.readouterr().err


def test_paths_of_a_picture(classifier, capsys, tmp_path):
    model, picture = classifier
    out = str(tmp_path / "why.html")
    assert run(["explain", model, "--image", picture, "--paths", "4", "--html", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["paths"]
    assert found["paths"][0]["nodes"][0]["site"] == "pixel_values"
    assert len(found["paths"][0]["nodes"]) == 3  # each block is passed at one patch


def test_coverage_is_listed(decoder, capsys):
    assert run(["coverage", decoder, "--text", "the capital", "--json"]) == 0
    assert all(row["covered"] for row in json.loads(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--text", " "], "the text is empty"),
        ([], "give either --text or --image"),
        (["--image", "none.png"], "does not exist"),
        (["--text", "the " * 40], "the model reads 32"),
        (["--text", "the", "--rules", "atnlrp"], "Did you mean 'attnlrp'"),
    ],
)
def test_a_mistake_is_one_line(decoder, capsys, arguments, said):
    assert run(["explain", decoder, *arguments]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
