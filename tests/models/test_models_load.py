"""Models by name, and what is said when one can't be loaded."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationMixin, PreTrainedTokenizerFast

import lineament.models.load as load
import lineament.models.place as place
from lineament._base.errors import InputError
from lineament.models import (
    build_student,
    find_model,
    head_shape,
    load_teacher,
    mixers_of,
    tiny,
    tiny_teacher,
    write_text,
)
from lineament.nn import MixerConfig


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
    made.chat_template = "{% for m in messages %}w4 {{ m['content'] }}{% endfor %}"
    return made


@pytest.fixture
def folder(tmp_path):
    tiny_teacher().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_loaded_with_its_chat_template(folder):
    model, words = load_teacher(folder)
    assert not model.training
    assert torch.equal(model.lm_head.weight, tiny_teacher().lm_head.weight)
    found = write_text((model, words), "w5 w6", chat=True, max_new_tokens=3)
    assert (found["prompt_tokens"], found["tokens"]) == (3, 3)


def test_a_students_folder_is_loaded_by_name(tmp_path):
    tiny("qwen3").save_pretrained(tmp_path / "s")
    tokenizer().save_pretrained(tmp_path / "s")
    model, words = load_teacher(str(tmp_path / "s"))
    assert len(mixers_of(model)) == 3
    assert write_text((model, words), "w5 w6", max_new_tokens=3, temperature=1.0)["tokens"] == 3
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="a number >= 0"):
            write_text((model, words), "w5 w6", temperature=temperature)


def test_a_named_model_goes_to_the_accelerator_in_the_dtype_asked_for(folder, monkeypatch):
    class Found(Exception):
        pass

    def look(network, ids, **_):
        raise Found(network.device.type, ids.device.type, network.dtype)

    monkeypatch.setattr(place, "PartialState", lambda: SimpleNamespace(device=torch.device("meta")))
    monkeypatch.setattr(GenerationMixin, "generate", look)
    with pytest.raises(Found) as found:
        write_text(folder, "w5 w6", dtype="bf16")
    assert found.value.args == ("meta", "meta", torch.bfloat16)
    with pytest.raises(Found) as found:
        write_text(folder, "w5 w6", device="cpu")
    assert found.value.args == ("cpu", "cpu", torch.float32)


@pytest.mark.parametrize("wrong", [{"device": "cuda:99"}, {"device": "gpu"}, {"dtype": "float"}])
def test_a_device_or_dtype_that_is_not_there_is_said(folder, wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))}.*{next(iter(wrong.values()))}"):
        write_text(folder, "w5 w6", **wrong)


def broken(folder, how):
    weights = folder / "model.safetensors"
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "not a config":
        (folder / "config.json").write_text("[]")
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "no tokenizer":
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).unlink()
    elif how == "another architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    elif how == "unknown type":
        (folder / "config.json").write_text(json.dumps({"model_type": "nothing"}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "has no config.json"),
        ("not a config", "names no model_type"),
        ("no weights", "holds no weights"),
        ("truncated", "model.safetensors"),
        ("pickle", "is a pickle"),
        ("no tokenizer", "has no tokenizer"),
        ("another architecture", "lacks 18 weights"),
        ("unknown type", "causal language model"),
    ],
)
def test_a_broken_folder_is_one_clear_line(folder, how, message):
    broken(folder, how)
    with pytest.raises(InputError, match=message) as caught:
        load_teacher(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_may_be_named_from_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load.find_model(f"~/{folder.name}") == folder


def test_names_that_are_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "a.gguf").write_bytes(b"nonsense")
    for name, message in [
        (tmp_path / "none", "does not exist"),
        ("./none", "does not exist"),
        (tmp_path / "a.txt", "is a file"),
        (tmp_path / "a.gguf", "not a GGUF file"),
        (tmp_path / "b.gguf", "does not exist"),
    ]:
        with pytest.raises(InputError, match=message):
            find_model(name)


def test_a_gguf_file_is_unpacked_once_and_not_left_half_done(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"x" * 100)
    calls = []

    def unpack(file, out):
        calls.append(file)
        if len(calls) == 1:
            raise InputError("broken")
        (out / "config.json").write_text("{}")

    monkeypatch.setattr(load, "_unpack", unpack)
    with pytest.raises(InputError, match="broken"):
        find_model(tmp_path / "m.gguf")
    first = find_model(tmp_path / "m.gguf")
    assert find_model(tmp_path / "m.gguf") == first
    assert len(calls) == 2
    assert [p.name for p in first.iterdir()] == ["config.json"]


def test_the_hub_is_asked_last(monkeypatch):
    import huggingface_hub

    def refuse(name, **_):
        raise OSError("no network\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=r"no network Did you mean 'smollm2'\?"):
        find_model("smollm")


@pytest.mark.parametrize("weights", [True, False])
def test_of_a_hub_name_only_what_is_read_is_fetched(monkeypatch, tmp_path, weights):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    there = [
        "config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "consolidated.safetensors", "pytorch_model.bin", "README.md",
    ]  # fmt: skip
    fetched = []

    def download(name, **patterns):
        fetched.extend(filter_repo_objects(there, **patterns))
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_model("owner/name", weights=weights) == tmp_path
    small = {"config.json", "tokenizer.json", "model.safetensors.index.json", "README.md"}
    assert set(fetched) == (small | set(there[2:4]) if weights else small)


@pytest.mark.slow
def test_the_embedded_model_writes_english_as_teacher_and_as_student():
    pytest.importorskip("gguf")
    model, words = load_teacher("smollm2")
    assert getattr(model.config, "quantization_config", None) is None
    prompt = "The capital of France is"
    assert "Paris" in write_text((model, words), prompt, max_new_tokens=5)["text"]
    shape = head_shape(model.config)
    mixers = {i: MixerConfig(kind="hedgehog-window", window=64, **shape) for i in range(30)}
    student = build_student(model, mixers, share=True)
    assert "Paris" in write_text((student, words), prompt, max_new_tokens=5)["text"]
