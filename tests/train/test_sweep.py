"""Sweeps: results by name, what is done is not done again, one failure leaves the others, other processes, Ray."""

import json
import os
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from lineament._base.errors import InputError
from lineament.train import SweepError, sweep

WORK = f"{__name__}:square"


def square(value, folder):
    """Leave a mark for every call, so that a test can count them."""
    with open(os.path.join(folder, "calls"), "a") as file:
        file.write(f"{os.getpid()}\n")
    if value["x"] < 0:
        raise ValueError("negative")
    return {"y": value["x"] ** 2, "pid": os.getpid()}


def calls(folder):
    return (folder / "calls").read_text().split()


def test_results_come_by_name_and_are_not_made_twice(tmp_path):
    values, seen = {"a": {"x": 2}, "b": {"x": 3}}, []
    first = sweep(WORK, {"a": values["a"]}, tmp_path)
    both = sweep(WORK, values, tmp_path, on_done=lambda name, result: seen.append((name, result["y"])))
    assert [both[name]["y"] for name in values] == [4, 9]
    assert both["a"] == first["a"]
    assert seen == [("a", 4), ("b", 9)]
    assert len(calls(tmp_path / "a")) == 1


def test_a_failure_leaves_the_others_and_is_tried_again(tmp_path):
    values = {"bad": {"x": -1}, "good": {"x": 5}}
    with pytest.raises(SweepError, match=r"1 of 2 runs failed, e\.g\. bad: ValueError: negative"):
        sweep(WORK, values, tmp_path)
    assert json.loads((tmp_path / "good" / "result.json").read_text())["result"]["y"] == 25
    with pytest.raises(SweepError):
        sweep(WORK, values, tmp_path)
    assert (len(calls(tmp_path / "bad")), len(calls(tmp_path / "good"))) == (2, 1)


def test_a_finished_run_of_another_value_is_not_taken_for_this_one(tmp_path):
    sweep(WORK, {"a": {"x": 2}}, tmp_path)
    with pytest.raises(InputError, match="of another value"):
        sweep(WORK, {"a": {"x": 3}}, tmp_path)
    with pytest.raises(InputError, match="workers=0"):
        sweep(WORK, {"a": {"x": 2}}, tmp_path, workers=0)


@pytest.mark.slow  # starting an interpreter with torch in it takes seconds
def test_workers_are_other_processes(tmp_path):
    found = sweep(WORK, {str(x): {"x": x} for x in range(3)}, tmp_path, workers=2)
    assert [found[str(x)]["y"] for x in range(3)] == [0, 1, 4]
    assert os.getpid() not in {result["pid"] for result in found.values()}


def test_without_ray_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("lineament._base.extras.available", lambda module: False)
    with pytest.raises(InputError, match=r"pip install 'lineament\[ray\]'"):
        sweep(WORK, {"a": {"x": 2}}, tmp_path, ray="auto")


def test_ray_gets_every_run_and_says_when_it_is_not_there(tmp_path, monkeypatch):
    """With a stand-in that runs a task when its result is asked for; the real one is an optional package."""
    started, asked = [], []

    def init(address, **_):
        if address == "nowhere":
            raise ConnectionError("no cluster")
        started.append(address)

    def remote(**options):
        asked.append(options)
        return lambda function: SimpleNamespace(remote=lambda *given: partial(function, *given))

    cluster = SimpleNamespace(
        init=init, remote=remote, is_initialized=lambda: bool(started),
        wait=lambda jobs, num_returns: (jobs[:num_returns], jobs[num_returns:]), get=lambda job: job(),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", cluster)
    monkeypatch.setattr("lineament._base.extras.available", lambda module: True)
    with pytest.raises(InputError, match="no Ray cluster at 'nowhere': no cluster"):
        sweep(WORK, {"a": {"x": 2}}, tmp_path, ray="nowhere")
    found = sweep(WORK, {"a": {"x": 2}, "b": {"x": 3}}, tmp_path, ray="local")
    assert [found["a"]["y"], found["b"]["y"], started, asked] == [4, 9, [None], [{"num_cpus": 1}]]
