"""Opening folders and files of weights, saving them, and what is refused."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lineament._base.errors import InputError
from lineament.io import check_finite, digest, open_weights, read_json, save_sharded, save_tensors
from lineament.io.header import DTYPES


def some(n=4):
    return {f"layers.{i}.w": torch.randn(10, 5, generator=torch.Generator().manual_seed(i)) for i in range(n)}


def same(a, b):
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8))
        assert a[name].shape == b[name].shape


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(st.sampled_from(sorted(DTYPES)), st.integers(0, 5))))
def test_what_is_saved_comes_back_through_both_readers(tmp_path_factory, shapes):
    shapes.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("w") / "w.safetensors"
    tensors = {name: torch.ones(n, 3, dtype=torch.uint8).to(DTYPES[code]) for name, (code, n) in shapes.items()}
    save_tensors(tensors, path, {"format": "pt"})
    same(tensors, dict(open_weights(path)))
    same(tensors, load_file(path))


def test_views_and_shared_memory_are_written_out(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"whole": whole, "view": whole.T, "again": whole, "conj": torch.tensor([1 + 2j]).conj()}
    path = save_tensors(tensors, tmp_path / "w.safetensors")
    weights = open_weights(path)
    assert all(torch.equal(weights[name], tensors[name]) for name in tensors)


def test_saving_is_repeatable_to_the_bit(tmp_path):
    first = save_tensors(some(), tmp_path / "a.safetensors", {"b": "1", "a": "2"})
    second = save_tensors(dict(reversed(some().items())), tmp_path / "b.safetensors", {"a": "2", "b": "1"})
    assert digest(first) == digest(second)


def test_headers_answer_without_loading(tmp_path):
    weights = open_weights(save_tensors(some(), tmp_path / "w.safetensors"))
    (tmp_path / "w.safetensors").unlink()
    assert weights.names == [f"layers.{i}.w" for i in range(4)]
    assert (weights.shape("layers.0.w"), weights.dtype("layers.0.w"), weights.nbytes()) == ((10, 5), torch.float32, 800)
    assert "layers.0.w" in weights
    assert len(weights) == 4
    with pytest.raises(InputError, match="changed since it was opened"):
        weights.load("layers.0.w")


def test_an_unknown_name_gets_the_near_miss(tmp_path):
    weights = open_weights(save_tensors(some(), tmp_path / "w.safetensors"))
    with pytest.raises(InputError, match=r"no tensor 'layer\.1\.w'. Did you mean 'layers\.1\.w'"):
        weights.load("layer.1.w")
    assert weights.get("layer.1.w") is None


@pytest.mark.parametrize(("size", "files"), [("5GB", 1), (400, 2), (1, 4)])
def test_shards_are_what_transformers_reads(tmp_path, size, files):
    written = save_sharded(some(), tmp_path, max_shard_size=size)
    assert len(written) == files == len(list(tmp_path.glob("*.safetensors")))
    weights = open_weights(tmp_path)
    same(some(), dict(weights))
    assert weights.metadata == {"format": "pt"}
    if files > 1:
        index = read_json(tmp_path / "model.safetensors.index.json")
        assert index["metadata"]["total_size"] == 800
        same(some(), {n: load_file(tmp_path / f)[n] for n, f in index["weight_map"].items()})


def test_saving_again_in_another_form_leaves_no_stale_weights(tmp_path):
    save_sharded({"old": torch.ones(1)}, tmp_path)
    save_sharded(some(), tmp_path, max_shard_size=400)
    assert len(open_weights(tmp_path)) == 4
    save_sharded({"new": torch.ones(1)}, tmp_path)
    assert open_weights(tmp_path).names == ["new"]


def test_shards_of_an_earlier_save_go_and_an_interrupted_one_leaves_no_mixture(tmp_path):
    save_sharded(some(), tmp_path, max_shard_size=1)
    save_sharded(some(), tmp_path, max_shard_size=400)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2

    def interrupted(written):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_sharded({name: x + 1 for name, x in some().items()}, tmp_path, max_shard_size=400, progress=interrupted)
    with pytest.raises(InputError, match="which"):
        open_weights(tmp_path)


def test_weights_can_be_saved_without_being_loaded_at_once(tmp_path):
    save_sharded(some(), tmp_path / "a", max_shard_size=400)
    save_sharded(open_weights(tmp_path / "a"), tmp_path / "b", max_shard_size=400)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


@pytest.mark.parametrize("bad", [torch.ones(2).to_sparse(), torch.ones(2, device="meta"), [1.0]])
def test_what_can_not_be_saved_is_named(tmp_path, bad):
    with pytest.raises(InputError, match="'odd'"):
        save_tensors({"fine": torch.ones(1), "odd": bad}, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def sharded(tmp_path):
    save_sharded(some(), tmp_path, max_shard_size=400)
    return tmp_path


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors is missing"):
        open_weights(sharded)


def test_a_shard_without_its_tensor_is_named(sharded):
    save_file({"else": torch.ones(1)}, sharded / "model-00001-of-00002.safetensors")
    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors has no tensor 'layers\.0\.w'"):
        open_weights(sharded)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"w": "../secret.safetensors"}}', "expected the plain name of a file beside it"),
        ('{"weight_map": {"w": ".."}}', "expected the plain name of a file beside it"),
        ('{"weight_map": {"w": "model.bin"}}', "is a pickle"),
    ],
)
def test_a_bad_index_is_named(sharded, index, message):
    (sharded / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=message):
        open_weights(sharded)


def test_folders_without_safetensors_say_what_they_hold(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_weights(tmp_path / "none")
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(InputError, match="holds no weights; expected"):
        open_weights(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(InputError, match=r"is a pickle.*save it again"):
            open_weights(path)
    save_tensors(some(), tmp_path / "adapter.safetensors")
    assert len(open_weights(tmp_path)) == 4  # the only one there is
    save_tensors(some(), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"adapter\.safetensors, other\.safetensors; which\?"):
        open_weights(tmp_path)
    with pytest.raises(InputError, match="not a safetensors file"):
        open_weights(tmp_path / "config.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_tensors_with_nan_are_named_with_their_count(tmp_path, dtype):
    tensors = {
        "fine": torch.full((3,), 4e4).to(dtype),
        "bad": torch.tensor([1.0, float("nan"), float("nan")]).to(dtype),
    }
    check_finite({"fine": tensors["fine"], "ids": torch.tensor([1])})
    weights = open_weights(save_tensors(tensors, tmp_path / "w.safetensors"))
    with pytest.raises(InputError, match=r"w\.safetensors holds NaN or infinite numbers in bad \(2\)"):
        check_finite(weights)


def test_many_bad_tensors_are_cut_short_in_the_message():
    with pytest.raises(InputError, match=r"t4 \(1\) and 3 more tensors"):
        check_finite({f"t{i}": torch.tensor([float("inf")]) for i in range(8)})


def test_a_header_may_begin_with_a_pickles_first_byte(tmp_path):
    """A header of 384 = 0x180 bytes is written as 80 01 00 ...: no reason to call the file a pickle."""
    path = tmp_path / "w.safetensors"
    for length in range(1, 400):
        save_tensors({"x" * length: torch.ones(1)}, path)
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert open_weights(path).names == ["x" * length]
