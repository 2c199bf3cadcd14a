"""Parts of long work: made once, found again after an error or a kill, gone in the end."""

import subprocess
import sys

import pytest
import torch

from lineament import io

KILLED = """
import sys, time
from lineament import io

with io.kept_parts(sys.argv[1], {"what": 1}) as parts:
    print(parts.value("one", lambda: 1), flush=True)
    time.sleep(60)
"""


def test_parts_are_made_once_and_come_back_to_the_bit(tmp_path):
    x, made = torch.randn(3, 4), []

    def work():
        with io.kept_parts(tmp_path / "work", {"sizes": (1, 2)}) as parts:
            value = parts.value("a", lambda: made.append("a") or [0.1, "word"])
            tensors = parts.tensors("b", lambda: made.append("b") or {"x/y": x, "n": torch.tensor(2.5)})
            if len(made) < 3:
                raise RuntimeError("interrupted")
            return value, tensors

    with pytest.raises(RuntimeError) as error:
        work()
    assert "goes on from there" in error.value.__notes__[0]
    with pytest.raises(RuntimeError):
        work()
    assert made == ["a", "b"]
    made.append("end")
    value, tensors = work()
    assert value == [0.1, "word"]
    assert torch.equal(tensors["x/y"], x)
    assert tensors["n"] == 2.5
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("x", [torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bfloat16), torch.tensor(True)])
def test_tensors_of_any_dtype_have_a_digest(x):
    assert io.digest_of(x) == io.digest_of(x.clone()) != io.digest_of(~x if x.dtype == torch.bool else 2 * x)
    if x.is_floating_point():
        assert io.digest_of(torch.nn.Parameter(x)) == io.digest_of(x)


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with io.kept_parts(None, {}) as parts:
        assert parts.value("a", lambda: 1) == 1
        assert parts.value("a", lambda: 2) == 2
    assert not list(tmp_path.iterdir())


def test_other_work_and_other_things_are_not_gone_on_with(tmp_path):
    folder = tmp_path / "work"

    def begin():
        with io.kept_parts(folder, {"texts": 1, "seed": 0}) as parts:
            parts.value("a", lambda: 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin()
    with pytest.raises(ValueError, match="begun with other seed, texts"), io.kept_parts(folder, {"texts": 2}):
        pass
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other things"), io.kept_parts(tmp_path / "notes", {}):
        pass
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"


def test_a_mistake_before_the_first_part_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), io.kept_parts(tmp_path / "work", {}):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_killed_process_lets_go_of_its_folder(tmp_path):
    folder = tmp_path / "work"
    job = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline().strip() == "1"
    with pytest.raises(ValueError, match="in use by another process"), io.kept_parts(folder, {"what": 1}):
        pass
    job.kill()
    job.wait()
    with io.kept_parts(folder, {"what": 1}) as parts:
        assert parts.value("one", lambda: 2) == 1


def test_a_stamp_changes_when_a_file_does(tmp_path):
    (tmp_path / "a").write_text("1")
    before = io.stamp(tmp_path)
    assert io.stamp(tmp_path) == before
    (tmp_path / "a").write_text("12")
    assert io.stamp(tmp_path) != before
    x = torch.arange(3)
    assert io.digest_of(x) == io.digest_of(x.clone()) != io.digest_of(x.float()) != io.digest_of(x.float()[None])
