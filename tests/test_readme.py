"""The README's walk-through, executed on a tiny model: its commands in order, then its Python blocks in order."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from lineament import convert
from lineament.cli import run

sys.path.insert(0, str(Path(__file__).parent / "convert"))
from convert_helpers import teacher_folder, text_folder, tiny_plan

README = Path(__file__).resolve().parents[1] / "README.md"
LONG = ("reproduce",)  # minutes; tested where the paper is


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Stand in a folder where a text of the README can run as written, with a tiny teacher for the embedded model."""
    teacher = teacher_folder(tmp_path / "teacher", max_position_embeddings=1024)
    plan = tiny_plan(text_folder(tmp_path / "text", documents=40, words=400), name="default")
    monkeypatch.setitem(convert.PLANS, "default", plan)
    monkeypatch.chdir(tmp_path)
    return lambda text: text.replace("smollm2", str(teacher)).replace("15min", "2s")


def test_the_commands_run(small, capsys):
    commands = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert len(commands) >= 5
    for command in commands:
        name, *arguments = shlex.split(small(command))
        assert name == "lineament"
        if arguments[0] not in LONG:
            assert run(arguments) == 0, command
    assert Path("report.html").stat().st_size > 1000
    assert "tokens" in capsys.readouterr().out


def test_the_python_blocks_run(small, capsys):
    names: dict = {}
    for block in blocks("python"):
        exec(compile(small(block), "README.md", "exec"), names)
    assert names["o"].shape == (1, 4096, 8, 64)
    assert "conversion" in capsys.readouterr().out
