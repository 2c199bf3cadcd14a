"""What a broken file must say."""

import json
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from lineament._base.errors import InputError
from lineament.io import open_weights, read_header


def write(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(begin, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def test_the_header_agrees_with_the_library_that_wrote_it(file):
    tensors = {"b": torch.ones(2, 3, dtype=torch.bfloat16), "a": torch.zeros(0), "c": torch.tensor(7)}
    save_file(tensors, file, {"format": "pt"})
    header = read_header(file)
    assert {n: (e.dtype, e.shape) for n, e in header.entries.items()} == {
        n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()
    }
    assert header.metadata == {"format": "pt"}


@pytest.mark.parametrize("kept", [0, 3, 8, 20, 90, -1])
def test_a_file_cut_anywhere_is_refused(file, kept):
    save_file({"w": torch.ones(64)}, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"model\.safetensors is not a sound safetensors file: .*(truncated|claims)"):
        open_weights(file)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "not valid JSON"),
        (b"\xff\xfe", b"", "not valid JSON"),
        (b'{"a":1,"a":2}', b"", "'a' is listed twice"),
        ([1], b"", "a JSON list, not an object"),
        ({"__metadata__": {"x": 1}}, b"", "not a map of strings"),
        ({"a": {"dtype": "F32"}}, b"", "lacks dtype, shape or data_offsets"),
        ({"a": 3}, b"", "lacks dtype, shape or data_offsets"),
        ({"a": entry(0, 4, [1], "F33")}, b"1234", "unknown dtype 'F33'. Did you mean 'F32'?"),
        ({"a": entry(0, 4, [-4])}, b"1234", "whole numbers >= 0"),
        ({"a": entry(0, 4, [True])}, b"1234", "whole numbers >= 0"),
        ({"a": entry(0, 4, [2], "F32")}, b"1234", "needs 8 bytes, its offsets give 4"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456", "'b' begins at byte 2 and overlaps 'a'"),
        ({"a": entry(0, 4), "b": entry(6, 8)}, b"12345678", "2 bytes before 'b' belong to no tensor"),
        ({"a": entry(0, 9)}, b"1234", "promises 9 bytes of tensors, the file holds 4"),
        ({"a": entry(0, 4)}, b"12345678", "lies about its size: 4 bytes of tensors are listed, 8 bytes are there"),
        ({"a": entry(0, 1 << 70)}, b"1234", "promises"),
    ],
)
def test_a_header_that_does_not_hold_says_why(file, header, data, message):
    with pytest.raises(InputError, match=r"model\.safetensors is not a sound safetensors file") as caught:
        open_weights(write(file, header, data))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_header_longer_than_the_file_is_refused(file):
    with pytest.raises(InputError, match="claims to be 1099511627776 bytes long, but only 2 bytes follow"):
        open_weights(write(file, {}, length=1 << 40))


def test_a_pickle_by_another_name_is_named(file):
    torch.save({"w": torch.ones(2)}, file)
    assert zipfile.is_zipfile(file)
    with pytest.raises(InputError, match="a pickle or a zip archive, whatever its name says"):
        open_weights(file)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.safetensors does not exist"):
        read_header(tmp_path / "nothing.safetensors")
    with pytest.raises(InputError, match="is a folder"):
        read_header(tmp_path)
