"""A conversion by two processes: each trains on batches of its own, one measures and writes."""

import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from convert_helpers import teacher_folder, text_folder, tiny_plan

from lineament._base.errors import InputError
from lineament.convert import distil, run, stages, transfer
from lineament.convert.transfer import side_by_side
from lineament.io import open_weights


@pytest.mark.parametrize(("lengths", "processes"), [(1, 1), (2, 1), (3, 2), (2, 4)])
def test_processes_share_a_step_of_one_length_and_nothing_is_drawn_twice(lengths, processes):
    draw = side_by_side(lambda index: index, lengths, processes)
    steps = [[draw(step * processes + rank) for rank in range(processes)] for step in range(4 * lengths)]
    assert all({index % lengths for index in found} == {step % lengths} for step, found in enumerate(steps))
    assert sorted(index for found in steps for index in found) == list(range(4 * lengths * processes))


def test_a_model_in_shares_is_refused_before_anything_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="whole model in every process"):
        run(tmp_path / "nowhere", "default", tmp_path / "student")


@pytest.mark.slow
def test_two_processes_make_the_student_of_one_that_takes_both_batches(tmp_path, monkeypatch):
    teacher, text = teacher_folder(tmp_path / "teacher"), text_folder(tmp_path / "text")
    plan = tiny_plan(text, transfer_loss="both", distil_retrieval=0.0, extend_steps=2, extend_lengths=(96,))
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    command = ["-m", "lineament", "convert", str(teacher), "--plan", str(tmp_path / "plan.json"), "--json", "-o"]
    done = subprocess.run(
        [sys.executable, *launch, *command, str(tmp_path / "two")], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["rows"]  # said once
    assert done.stderr.count("layer 0: relative error") == 1

    both = SimpleNamespace(num_processes=2, is_main_process=True, wait_for_everyone=lambda: None)
    monkeypatch.setattr(stages, "join_processes", lambda: None)
    for room in (stages, transfer, distil):
        monkeypatch.setattr(room, "PartialState", lambda: both)
    run(teacher, plan, tmp_path / "one")
    ours, theirs = open_weights(tmp_path / "two"), open_weights(tmp_path / "one")
    assert ours.names == theirs.names
    for name in ours.names:
        torch.testing.assert_close(ours.load(name), theirs.load(name), atol=1e-5, rtol=0, msg=lambda m, n=name: n + m)
