"""`lineament circuit`: from a task file to a page, and mistakes in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_families import make, saved_decoder, word_tokenizer

from lineament.cli import run
from lineament.explain.circuit_page import batch, compared, solved
from lineament.io import Parts
from lineament.tasks.prompt_pairs import Pair, encode

WORDS = ["[UNK]", "the", "capital", "of", "france", "is", "paris", "italy", "rome", "spain", "madrid", "in"]
PROMPTS = [
    {"clean": f"the capital of {a} is", "corrupt": f"the capital of {b} is", "answer": x, "distractor": y}
    for a, x in (("france", "paris"), ("italy", "rome"), ("spain", "madrid"))
    for b, y in (("france", "paris"), ("italy", "rome"), ("spain", "madrid"))
    if a != b
] + [{"clean": "in the capital of france is", "corrupt": "in the capital of italy is", "answer": "paris",
      "distractor": "rome"}]  # fmt: skip


@pytest.fixture
def decoder(tmp_path):
    folder = saved_decoder(tmp_path, WORDS)
    (tmp_path / "task.json").write_text(json.dumps({"prompts": PROMPTS}))
    return folder


def test_a_task_file_gives_json_and_page(decoder, tmp_path, capsys):
    command = ["circuit", decoder, "--task", str(tmp_path / "task.json"), "--faithful", "-99", "--compare", "mlp"]
    assert run([*command, "--html", str(tmp_path / "a.html"), "-o", str(tmp_path / "a.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "a.json").read_text())
    assert found["asked"] == 7
    assert 2 <= found["solved"] <= 7
    assert found["agreement"][0]["places"] == "mlp"
    page = (tmp_path / "a.html").read_text()
    assert "How faithful it is" in page
    assert "Estimates beside patching" in page


def test_heads_are_drawn_and_what_is_not_faithful_exits_with_1(decoder, tmp_path, capsys):
    command = ["circuit", decoder, "--task", str(tmp_path / "task.json"), "--level", "node", "--faithful", "99"]
    assert run([*command, "--png", str(tmp_path / "a.png")]) == 1
    assert "prompts solved" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("fails_at", [1, 2, 5, 12])
def test_an_interrupted_command_goes_on_to_the_same_circuit(decoder, tmp_path, capsys, monkeypatch, fails_at):
    """The parts: who solves what, scores by batch, the metric's ends, a size each, held-out prompts, comparisons."""
    command = ["circuit", decoder, "--task", str(tmp_path / "task.json"), "--faithful", "-99", "--compare", "mlp"]
    assert run([*command, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    real, made = Parts._path, []

    def dies(parts, *name):
        if len(made) == fails_at:
            raise KeyboardInterrupt
        made.append(name)
        return real(parts, *name)

    work = tmp_path / "work"
    with monkeypatch.context() as patched:
        patched.setattr(Parts, "_path", dies)
        assert run([*command, "--work", str(work)]) == 1
    kept = stamps(work)
    assert len(kept) == fails_at + 1  # and what was asked
    seen: dict[str, int] = {}
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda folder: seen.update(stamps(Path(folder))))
        assert run([*command, "--work", str(work), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert kept.items() <= seen.items()  # nothing is made twice
    assert without_seconds(found) == without_seconds(whole)


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def without_seconds(found):
    if isinstance(found, dict):
        return {name: without_seconds(x) for name, x in found.items() if name != "seconds" and not name.endswith(", s")}
    return [without_seconds(x) for x in found] if isinstance(found, list) else found


def test_mistakes_are_one_line(decoder, tmp_path, capsys):
    task = str(tmp_path / "task.json")
    unequal = tmp_path / "unequal.json"
    unequal.write_text(json.dumps([PROMPTS[0] | {"corrupt": "the capital is"}]))
    for options, message in (
        (["--task", "none.json"], "none.json does not exist"),
        (["--task", str(unequal)], "pair 0: the clean prompt has 5"),
        (["--task", task, "--method", "rlp"], "Did you mean 'relp'"), (["--task", task, "--size", "0"], "size is 0"),
        (["--task", task, "--level", "head"], "unknown level"), (["--prompts", "1"], "expected 2 or more"),
        (["--task", task, "--compare", "mpl"], "Did you mean 'mlp'"),
        (["--task", "ioi"], "none of the generator's names"),
    ):  # fmt: skip
        assert run(["circuit", decoder, *options]) == 2, options
        error = capsys.readouterr().err.strip()
        assert message in error.replace("\n", " ")
        assert "Traceback" not in error


def test_prompts_of_unequal_lengths_are_read_where_each_ends():
    model = make("llama")[0]
    pairs = [Pair(x["clean"], x["corrupt"], (x["answer"],), (x["distractor"],)) for x in PROMPTS]
    found = encode(word_tokenizer(WORDS), pairs)
    clean, corrupt, metric = batch(found)
    assert clean["logits_to_keep"].tolist() == [4, 5]
    with torch.no_grad():
        together = metric(model(**clean))
        for row in range(7):
            one, _, alone = batch(found.rows([row]))
            torch.testing.assert_close(alone(model(**one)), together[row : row + 1])
        right, first = solved(model, found, rows=3)
        assert right.tolist() == ((together > 0) & (metric(model(**corrupt)) < together)).tolist()
    assert first.shape == (7,)
    rows = compared(model, found, ["residual"])
    assert rows[0]["count"] == 2 * 6
