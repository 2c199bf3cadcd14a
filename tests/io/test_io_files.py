"""Files and folders appear whole or not at all, whatever goes wrong."""

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import lineament.io.folder as folder_module
from lineament._base.errors import InputError, LineamentError
from lineament.io import (
    DiskFullError,
    building_folder,
    digest,
    free_bytes,
    need_space,
    open_weights,
    parse_bytes,
    partial_path,
    read_json,
    replacing,
    save_tensors,
    write_json,
    write_text,
)
from lineament.io.folder import locked


@pytest.fixture
def full_disk(monkeypatch):
    """Every forced write fails the way a full disk does."""

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)


def test_text_and_json_come_back(tmp_path):
    assert write_text(tmp_path / "deep" / "a.txt", "grüß\n").read_text("utf-8") == "grüß\n"
    assert read_json(write_json(tmp_path / "a.json", {"a": [1, "é"]})) == {"a": [1, "é"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert read_json(tmp_path / "a.json") == {"a": [1, "é"]}
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match=r"bad\.json is not valid JSON"):
        read_json(tmp_path / "bad.json")


def test_an_error_while_writing_keeps_the_old_file(tmp_path):
    path = write_text(tmp_path / "a.txt", "old")
    with pytest.raises(TypeError, match="bytes-like"), replacing(path) as file:
        file.writelines([b"half", "the rest"])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_closed_before_it_is_renamed(tmp_path, monkeypatch):
    closed, replace = [], os.replace
    with monkeypatch.context() as patch, replacing(tmp_path / "a.txt") as file:
        patch.setattr(os, "replace", lambda a, b: closed.append(file.closed) or replace(a, b))
        file.write(b"1")
    write_text(tmp_path / "b.txt", "2")
    assert closed == [True]


@pytest.mark.skipif(os.name == "nt", reason="the system itself does so there")
def test_a_system_that_forces_only_writable_files_to_the_disk_builds_a_folder(tmp_path, monkeypatch):
    import fcntl

    from lineament.io import files, folder

    def strict(handle, force=os.fsync):
        if not fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE:
            raise OSError(errno.EBADF, "Bad file descriptor")
        force(handle)

    monkeypatch.setattr(os, "fsync", strict)
    for room in (files, folder):
        monkeypatch.setattr(room, "WINDOWS", True)
    with building_folder(tmp_path / "student") as partial:
        (partial / "a.txt").write_text("1")
    assert (tmp_path / "student" / "a.txt").read_text() == "1"


def test_a_full_disk_fails_clearly_and_keeps_the_old_state(tmp_path, full_disk):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(DiskFullError, match=r"no space left while writing .*w\.safetensors.* is untouched") as caught:
        save_tensors({"w": torch.ones(4)}, path)
    assert isinstance(caught.value, LineamentError)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_errors_of_the_system_pass_unchanged(tmp_path):
    (tmp_path / "a").write_text("a file, not a folder")
    with pytest.raises(OSError, match="a"):
        write_text(tmp_path / "a" / "b.txt", "x")


def test_too_small_a_disk_is_found_before_the_first_byte(tmp_path):
    assert free_bytes(tmp_path / "not" / "yet") > 0
    need_space(tmp_path, 1)
    with pytest.raises(InputError, match=r"needs 1e\+06 TB of disk.*are free"):
        need_space(tmp_path, 10**18)


def test_the_digest_sees_names_and_contents(tmp_path):
    for name in ("a", "b"):
        write_text(tmp_path / name / "x.txt", "1")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    write_text(tmp_path / "b" / "x.txt", "2")
    assert digest(tmp_path / "a") != digest(tmp_path / "b")
    with pytest.raises(InputError, match="does not exist"):
        digest(tmp_path / "c")


@pytest.mark.parametrize("text", ["", "5 parsecs", "-1", "0", "GB"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="is not understood"):
        parse_bytes(text)


def test_the_folder_appears_complete(tmp_path):
    out = tmp_path / "runs" / "student"
    with building_folder(out) as folder:
        assert folder == partial_path(out) == out.with_name("student.partial")
        write_text(folder / "sub" / "a.txt", "1")
        assert not out.exists()
    assert (out / "sub" / "a.txt").read_text() == "1"
    assert [p.name for p in out.parent.iterdir()] == ["student"]
    with pytest.raises(InputError, match="student exists already"), building_folder(out):
        pass


def test_a_folder_finished_by_another_process_in_the_meantime_is_left_alone(tmp_path, monkeypatch):
    out = tmp_path / "student"

    @contextmanager
    def late(partial):
        partial.rename(out)  # as the other process does when it is done; then this one gets the lock
        partial.mkdir()
        yield

    monkeypatch.setattr(folder_module, "locked", late)
    with pytest.raises(InputError, match="student exists already"), building_folder(out):
        pytest.fail("nothing is left to build")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    with pytest.raises(InputError, match="in use by another process"), locked(tmp_path / "renamed"):
        pass


def build_until(error, out):
    with building_folder(out) as folder:
        write_text(folder / "step1.txt", "done")
        raise error


def test_after_an_error_the_work_is_kept_and_named(tmp_path):
    out = tmp_path / "student"
    folder = partial_path(out)
    with pytest.raises(KeyboardInterrupt) as caught:
        build_until(KeyboardInterrupt(), out)
    assert caught.value.__notes__ == [f"the work so far is kept in {folder}; the same command goes on from there"]
    assert not out.exists()
    with (
        pytest.raises(InputError, match=r"student\.partial is left from an earlier run"),
        building_folder(out, resume=False),
    ):
        pass
    (folder / ".half.1234.tmp").write_text("being written when the power went")
    with building_folder(out) as folder:
        assert [p.name for p in folder.iterdir()] == ["step1.txt"]
    assert (out / "step1.txt").exists()


def test_bad_input_leaves_nothing_behind(tmp_path):
    with pytest.raises(InputError, match="bad"), building_folder(tmp_path / "student", scratch="work"):
        raise InputError("bad")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_building_keeps_the_partial_folder(tmp_path):
    with pytest.raises(DiskFullError, match="no space left"):
        build_until(OSError(errno.ENOSPC, "No space left on device"), tmp_path / "student")
    assert (tmp_path / "student.partial" / "step1.txt").exists()


@pytest.mark.parametrize("killed_at", [None, "rename"])
def test_scratch_is_kept_until_the_folder_stands(tmp_path, monkeypatch, killed_at):
    out = tmp_path / "student"

    def build():
        with building_folder(out, scratch="work") as folder:
            (folder / "work" / "step").write_text(str(len(list((folder / "work").iterdir()))))
            (folder / "model.txt").write_text("1")

    if killed_at:
        rename = os.rename
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", lambda a, b: rename(a, b) if Path(b) != out else sys.exit("killed"))
            with pytest.raises(SystemExit):
                build()
        assert not out.exists()
    build()
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
    assert [p.name for p in out.iterdir()] == ["model.txt"]


WORKER = """
import sys, time
from lineament.io import building_folder, write_text
with building_folder(sys.argv[1]) as folder:
    for i in range(1000):
        write_text(folder / f"{i}.txt", "x" * 1000)
        print(i, flush=True)
        time.sleep(0.01)
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX locks and signals")
def test_a_killed_run_lets_go_and_a_running_one_is_left_alone(tmp_path):
    out = tmp_path / "student"
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        worker.stdout.readline()
        with pytest.raises(InputError, match="in use by another process"), building_folder(out):
            pass
    finally:
        time.sleep(0.05)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    with building_folder(out) as folder:
        assert all(len(p.read_text()) == 1000 for p in folder.iterdir())


def test_a_broken_model_is_never_seen_by_a_reader(tmp_path):
    path = save_tensors({"w": torch.zeros(1000)}, tmp_path / "model.safetensors")
    for step in range(5):
        save_tensors({"w": torch.full((1000,), float(step))}, path)
        assert open_weights(path)["w"].unique().tolist() == [step]
