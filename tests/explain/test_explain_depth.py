"""The depth report: its numbers are the graph room's, on softmax models and students; the command and mistakes."""

import importlib
import json

import pytest
import torch
from tiny_families import make, saved_decoder

from lineament import explain, graph, models
from lineament._base.errors import InputError
from lineament.cli import run
from lineament.explain.depth import layer_names

room = importlib.import_module("lineament.explain.depth")  # the function of that name hides it


def texts(count=3, length=20):
    return list(torch.randint(3, 61, (count, length), generator=torch.Generator().manual_seed(1)))


def test_a_report_is_the_measures_of_the_graph_room_summed_up():
    model, text = make("llama")[0], texts(1)[0]
    found = explain.depth(model, [text], cuts=1)
    names, added = layer_names(model)
    stream = graph.residual_stream(model, names, text[None], attention=added)
    measures = graph.contributions(stream)
    for name, values in found.written.items():
        torch.testing.assert_close(torch.tensor(values["mean"]), measures[name][:, 0, 1:].mean(1))
        torch.testing.assert_close(torch.tensor(values["first"]), measures[name][:, 0, 0])
    current = graph.skip_effects(model, names, text[None], stream)
    torch.testing.assert_close(torch.tensor(found.current["mean"]), current.summary()["mean"])
    assert found.lens["KL"][-1] == pytest.approx(0, abs=1e-6)
    assert found.tokens == 19
    assert 0 < found.effective_depth <= 2
    assert set(found.scores) >= {"by layers", "by output"}


@pytest.mark.parametrize("kind", ["gla", "hedgehog-window"])
def test_students_are_reported_as_teachers_are(kind):
    found = explain.depth(models.tiny("llama", kind), texts(1), cuts=1)
    assert found.layers == len(found.written["|a|/|h|"]["mean"]) == len(found.lens["KL"]) - 1
    assert torch.tensor(found.future["mean"]).isfinite().all()


def test_a_decoder_without_an_adapter_is_read_by_its_longest_list_of_layers():
    config = models.decoder_config("gla", vocab_size=61, width=16, layers=3, heads=2)
    found = explain.depth(models.DecoderForCausalLM(config).eval(), texts(1), cuts=1)
    assert found.layers == 3
    assert "|a|" not in found.written


def test_an_unconverted_copy_maps_onto_its_teacher_without_loss():
    teacher = make("llama")[0]
    maps, identity = explain.layer_maps(teacher, teacher, texts(10), texts(4, 21))
    assert maps.r2.diagonal().min() > 1 - 1e-4
    assert maps.error.diagonal().max() < 2e-2
    torch.testing.assert_close(identity, torch.ones_like(identity))
    other = make("llama")[0]
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(-1)
    changed = explain.layer_maps(teacher, other, texts(10), texts(4, 21))[1]
    assert changed[1] == 1  # what enters layer 1 is the same
    assert changed[2] < 0.99


def test_levels_get_scores_with_an_interval():
    levels = {"easy": texts(2), "hard": texts(3, 30)}
    found = explain.depth(make("gpt2")[0], texts(1), cuts=1, levels=levels)
    mean, low, high = found.difficulty["hard"]["by output"]
    assert low <= mean <= high


def test_mistakes_are_named():
    model = make("llama")[0]
    for wrong, words in (
        (lambda: explain.depth(model, []), "no text"),
        (lambda: explain.depth(model, texts(1, 9)), "13 or more"),
        (lambda: explain.depth(torch.nn.Linear(2, 2), texts(1)), "no list of layers"),
        (lambda: explain.layer_maps(model, model, texts(1), texts(1)), "too few to fit"),
    ):
        with pytest.raises(InputError, match=words):
            wrong()


@pytest.fixture
def decoder(tmp_path):
    words = ["[UNK]", *(f"w{i}" for i in range(60))]
    folder = saved_decoder(tmp_path, words)
    lines = [" ".join(f"w{int(i)}" for i in text) for text in texts(60, 40)]
    (tmp_path / "text.txt").write_text(" ".join(lines))
    return folder, str(tmp_path / "text.txt")


def test_the_command_writes_one_page(decoder, capsys, tmp_path):
    model, text = decoder
    levels = tmp_path / "levels.json"
    levels.write_text(json.dumps({"one hop": ["w1 w2 w3 " * 6]}))
    options = ["--data", text, "--texts", "2", "--tokens", "24", "--cuts", "1", "--levels", str(levels)]
    page = tmp_path / "depth.html"
    assert run(["depth", model, *options, "--to", model, "--html", str(page), "--json"]) == 0
    out = capsys.readouterr()
    found = json.loads(out.out)
    assert found["maps"]["identity"] == pytest.approx([1.0, 1.0, 1.0])
    assert "texts" in out.err
    assert "2/2" in out.err
    shown = page.read_text()
    assert "Logit lens" in shown
    assert "are this library&#39;s summaries" in shown
    assert run(["depth", model, *options]) == 0
    assert "effective depth" in capsys.readouterr().out
    levels.write_text("[]")
    assert run(["depth", model, *options]) == 2


def test_a_killed_report_goes_on_to_the_same_numbers(decoder, capsys, tmp_path, monkeypatch):
    model, text = decoder
    levels = tmp_path / "levels.json"
    levels.write_text(json.dumps({"one hop": ["w1 w2 w3 " * 6, "w4 w5 w6 " * 6]}))
    command = ["depth", model, "--data", text, "--texts", "3", "--tokens", "24", "--to", model, "--levels", str(levels)]
    assert run([*command, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    page, begun, real, read = tmp_path / "depth.html", tmp_path / "depth.html.partial", room._read, []

    def dies(*given):
        read.append(given)
        if len(read) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(room, "_read", dies)
    assert run([*command, "--html", str(page)]) == 1
    assert "goes on from there" in capsys.readouterr().err
    assert sorted(path.name for path in begun.glob("text-*")) == ["text-0.safetensors", "text-1.safetensors"]
    assert run([*command, "--seed", "1", "--html", str(page)]) == 2
    assert "begun with other seed" in capsys.readouterr().err.replace("\n", " ")
    assert run([*command, "--html", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == whole
    assert len(read) == 4
    assert page.exists()
    assert not begun.exists()
