"""Which precision training runs in is decided by a clock, once."""

import pytest
import torch

from lineament._base.errors import InputError
from lineament.convert import precision, stages
from lineament.convert.job import Job
from lineament.convert.plan import Plan

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
