import pytest
import torch

from lineament._base.backends import Backend, choose, usable, why
from lineament._base.errors import InputError


def only_double(x):
    return None if x.dtype == torch.float64 else "needs float64"


TABLE = {"wide": Backend("math:floor", only_double), "plain": Backend("math:ceil")}


def test_auto_takes_the_first_that_can_run():
    assert choose(TABLE, "auto", torch.zeros(1))(0.5) == 1
    assert choose(TABLE, "auto", torch.zeros(1, dtype=torch.float64))(0.5) == 0


def test_a_forced_backend_runs_or_says_why_not():
    assert choose(TABLE, "plain", torch.zeros(1))(0.5) == 1
    with pytest.raises(RuntimeError, match="backend 'wide' can't run here: needs float64"):
        choose(TABLE, "wide", torch.zeros(1))


def test_unknown_backend_suggests():
    with pytest.raises(InputError, match="Did you mean 'plain'"):
        choose(TABLE, "plane", torch.zeros(1))


def test_auto_can_say_why():
    assert why(TABLE, torch.zeros(1)) == "wide: needs float64; plain: chosen"
    assert usable(TABLE, torch.zeros(1)) == ["plain"]


def test_nothing_usable():
    with pytest.raises(RuntimeError, match="no backend can run here: wide: needs float64"):
        choose({"wide": TABLE["wide"]}, "auto", torch.zeros(1))
