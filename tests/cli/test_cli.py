"""The command line: light to start, one line for a mistake, 0 / 1 / 2 as exit codes."""

import atexit
import json
import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from lineament import papers
from lineament.cli import main, run
from lineament.io import building_folder
from lineament.papers import records

COMMANDS = [
    "convert",
    "plans",
    "inspect",
    "evaluate",
    "generate",
    "merge",
    "diff",
    "connect",
    "align",
    "bricks",
    "compose",
    "papers",
    "reproduce",
    "doctor",
    "explain",
    "coverage",
    "circuit",
    "scope",
    "depth",
    "blindspots",
    "diagram",
]


def test_help_lists_every_command_and_loads_no_torch():
    code = "import sys; from lineament.cli import run; run(['--help']); sys.exit('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert all(command in found.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(command, capsys):
    assert run([command, "--help"]) == 0
    assert "Example" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", "/no/such/folder", "-o", "x"], "/no/such/folder"),
        (["convert", "smollm2", "-o", "x", "--plan", "hedghog"], "Did you mean 'hedgehog'"),
        (["convert", "smollm2", "-o", "x", "--set", "windw=3"], "Did you mean 'window'"),
        (["convert", "smollm2", "-o", "x", "--keep", "evry:4"], "Did you mean 'every'"),
        (["convert", "smollm2", "-o", "x", "--budget", "soon"], "15min"),
        (["reproduce", "hedgehogg"], "Did you mean 'hedgehog'"),
        (["papr"], "papers"),
        (["diagram", "smollm2", "-o", "x.pdf"], "expected .svg"),
        (["plans", "--jsn"], "--json"),
        (["convert", "smollm2", "-o", "x", "--set", "window"], "--set 'window' is not understood"),
        (["inspect", "smollm2", "--set", "windw=3"], "Did you mean 'window'"),
        (["papers", "--status", "wroks"], "Did you mean 'works'"),
        (["coverage", "smollm2", "--text", " "], "the text is empty"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        ["explain", "smollm2", "--text", "a", "--html"], ["scope", "smollm2", "--text", "a", "--html"],
        ["depth", "smollm2", "--html"], ["circuit", "smollm2", "--png"], ["bricks", "smollm2", "--html"],
        ["connect", "smollm2", "smollm2", "--plot"], ["diff", "smollm2", "smollm2", "--picture"],
        ["evaluate", "smollm2", "--html"], ["reproduce", "hedgehog", "--html"],
        ["blindspots", "x", "--image", "x", "--target", "x", "--html"],
        ["transcode", "evaluate", "smollm2", "x", "--html"], ["transcode", "dashboard", "smollm2", "x", "--html"],
        ["transcode", "graph", "smollm2", "x", "--text", "a", "-o"], ["transcode", "circuit", "smollm2", "x", "--png"],
        ["diagram", "smollm2", "-o"],
    ],
)  # fmt: skip
def test_a_file_that_can_not_be_written_is_refused_before_the_work(command, capsys, tmp_path):
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "file").write_text("")
    for place in ("folder.svg", "file/x.svg"):
        assert run([*command, str(tmp_path / place)]) == 2
        assert "can't be written" in capsys.readouterr().err


def test_a_package_that_is_missing_is_said_before_anything_is_measured(capsys, monkeypatch):
    from lineament import convert
    from lineament._base import extras

    monkeypatch.setattr(extras, "available", lambda module: False)
    monkeypatch.setattr(convert, "evaluate_folder", lambda *args, **options: pytest.fail("it was measured"))
    assert run(["evaluate", "smollm2", "--teacher", "smollm2", "--tasks", "arc_easy"]) == 2
    assert "lineament[eval]" in capsys.readouterr().err


def test_a_planned_paper_says_so_with_exit_code_1(capsys):
    planned = next(one.slug for one in records() if one.status == "planned")
    assert run(["reproduce", planned]) == 1
    assert "planned" in capsys.readouterr().err


def test_papers_are_listed_searched_and_shown(capsys):
    assert run(["papers", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 44
    assert run(["papers", "linear", "attention"]) == 0
    assert "hedgehog" in capsys.readouterr().out
    assert run(["papers", "hedgehog"]) == 0
    assert "Claim." in capsys.readouterr().out


def test_plans_and_doctor_speak_json(capsys):
    assert run(["plans", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["default"]["mixer"] == "hedgehog-window"
    assert run(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["extras"]["lora"] == {"peft": True}


def test_ctrl_c_says_where_the_work_is_kept(tmp_path, capsys, monkeypatch):
    def begun(*_, **__):
        with building_folder(tmp_path / "out") as partial:
            (partial / "half").write_text("of it", encoding="utf-8")
            raise KeyboardInterrupt

    monkeypatch.setattr(papers, "records", begun)
    assert run(["papers"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("interrupted: the work so far is kept in")
    assert f"{tmp_path / 'out.partial'}; the same command goes on" in told


def test_an_error_in_the_middle_says_so_too(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        with building_folder(tmp_path / "out") as partial:
            (partial / "half").write_text("of it", encoding="utf-8")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(papers, "records", full)
    assert run(["papers"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert "out.partial" in told


def test_a_reader_that_has_read_enough_is_no_mistake():
    command = f"{sys.executable} -m lineament papers --json | head -c 10"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("[")
    assert done.stderr == ""


def test_without_a_command_the_help_is_all_there_is_to_say(capsys):
    assert run([]) == 2
    told = capsys.readouterr()
    assert "convert" in told.out
    assert told.err == ""


@pytest.mark.parametrize(("arguments", "left"), [(["--version"], True), (["no-such-command"], False)])
def test_what_ends_well_leaves_its_group_of_processes(tmp_path, monkeypatch, arguments, left):
    monkeypatch.setattr(sys, "argv", ["lineament", *arguments])
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: None)
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code == 0, dist.is_initialized()) == (left, not left)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
