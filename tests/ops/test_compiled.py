"""Compiled loops: what is kept between runs, and what may be handed to them."""

import importlib
import sys

import pytest
import torch

from lineament.ops import compiled

pytest.importorskip("numba")
CALLED = """
from lineament.ops.compiled import loop

@loop
def number(x):
    return x + {}
"""
CALLER = """
from called import number
from lineament.ops.compiled import loop

@loop
def twice(x):
    return 2 * number(x)
"""


def test_what_is_kept_follows_the_files_that_a_loop_calls_into(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "caller.py").write_text(CALLER)
    for added in (1, 25):
        (tmp_path / "called.py").write_text(CALLED.format(added))
        importlib.invalidate_caches()
        for name in ("called", "caller"):
            sys.modules.pop(name, None)
        assert importlib.import_module("caller").twice(3) == 2 * (3 + added)


def test_a_program_without_source_files_compiles_too():
    """As packed into one file by a freezer: code is there, the file that it names is not."""
    space = {"__name__": "frozen"}
    exec(compile(CALLED.format(4), "nowhere/called.py", "exec"), space)
    assert space["number"](3) == 7


def test_what_a_loop_writes_is_never_a_copy():
    x = torch.zeros(3, 4)
    (array,) = compiled.written(x)
    array[:] = 1
    assert x.eq(1).all()
    with pytest.raises(AssertionError):
        compiled.written(x.mT)
