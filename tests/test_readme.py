"""The README's walk-through, executed: its Python blocks in order, and its commands, on a tiny model."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
SMALL = ["--set", "transfer_steps=1", "--set", "distil_steps=1", "--set", "transfer_lengths=32"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)


def test_the_walk_through_has_both_kinds_of_blocks():
    assert len(blocks("python")) >= 4
    assert len(blocks("console")) >= 2
