"""Which precision training runs in is decided by a clock, once."""

from importlib import import_module

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lineament._base.errors import InputError
from lineament.convert import divergence, precision, stages
from lineament.convert.job import Job
from lineament.convert.plan import Plan
from lineament.nn import codes, positions
from lineament.nn.feature_maps import Product

agreement = import_module("lineament.tasks.agreement")  # the package has a function of that name
CPU = torch.device("cpu")


@pytest.mark.parametrize(("gain", "expected"), [(3.0, "bf16"), (1.3, "bf16"), (1.2, "fp32"), (0.5, "fp32")])
def test_auto_takes_bf16_only_where_its_products_are_faster_by_a_quarter(monkeypatch, gain, expected):
    monkeypatch.setattr(precision, "_gain", lambda: gain)
    assert precision.resolve("auto", CPU) == expected
    assert precision.resolve("fp32", CPU) == "fp32"
    with pytest.raises(InputError, match="expected auto, bf16 or fp32"):
        precision.resolve("fp16", CPU)


def test_a_run_that_goes_on_keeps_the_precision_it_began_with(monkeypatch, tmp_path):
    job = Job(plan=Plan(), info=None, teacher=torch.nn.Linear(1, 1), tokenizer=None, documents={}, name="")
    monkeypatch.setattr(precision, "_gain", lambda: 3.0)
    assert stages.settled(job, tmp_path).plan.precision == "bf16"
    monkeypatch.setattr(precision, "_gain", lambda: 0.5)
    assert stages.settled(job, tmp_path).plan.precision == "bf16"
    assert stages.settled(job, tmp_path).precision == "bf16"


def test_denormals_are_flushed_for_the_time_of_a_block_only():
    tiny = torch.full((64,), 1e-39)
    with precision.denormals_flushed():
        flushed = float((tiny * 1).sum())
    assert float((tiny * 1).sum()) > 0
    assert flushed == 0 or not torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)


class NoDoubles(TorchDispatchMode):
    """Stands for a device without float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            assert not isinstance(one, torch.Tensor) or one.dtype != torch.float64, func
        return found


def start_codes():
    maps, x = [Product(2, 8, codes=4) for _ in range(2)], torch.randn(20, 2, 8)
    codes.start_codes(*maps, x, x)


def distil():
    x, one = torch.randn(4, 7, requires_grad=True), torch.ones(4)
    divergence.distil_loss(x, x.detach(), torch.zeros(4, dtype=torch.long), kl=one, following=one)[0].backward()


@pytest.mark.parametrize(
    ("room", "work"),
    [
        (codes, start_codes),
        (divergence, distil),
        (agreement, lambda: agreement._compare(torch.randn(3, 7), torch.randn(3, 7))),
        (positions, lambda: positions.rotate(torch.randn(1, 5, 2, 8), torch.arange(5)[None], 1e4)),
    ],
    ids=["codes", "distil", "agreement", "positions"],
)
def test_a_device_without_float64_is_asked_for_none(monkeypatch, room, work):
    with pytest.raises(AssertionError), NoDoubles():
        work()
    monkeypatch.setattr(room, "widest", lambda device: torch.float32)
    with NoDoubles():
        work()
