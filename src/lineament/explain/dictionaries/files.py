"""Dictionaries on disk: SAELens's folders (cfg.json and sae_weights.safetensors), and Gemma Scope's params.npz."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lineament import io
from lineament._base.errors import InputError, unknown
from lineament.explain.dictionaries.module import Dictionary, DictionaryConfig, scaled

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES = {  # name -> (activation, skip, transcoder)
    "standard": ("relu", False, False),
    "topk": ("topk", False, False),
    "jumprelu": ("jumprelu", False, False),
    "transcoder": ("relu", False, True),
    "skip_transcoder": ("relu", True, True),
    "jumprelu_transcoder": ("jumprelu", False, True),
    "jumprelu_skip_transcoder": ("jumprelu", True, True),
    "topk_transcoder": ("topk", False, True),
    "topk_skip_transcoder": ("topk", True, True),
}
"""SAELens's names; it has none for the last two and refuses them, which is better than running them as ReLU ones."""
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
OWN = {
    "architecture", "d_in", "d_out", "d_sae", "k", "dtype", "device", "apply_b_dec_to_input", "metadata", "hook_name",
    "hook_name_out", "hook_point", "model_name", "normalize_activations", "reshape_activations", "activation_fn",
    "activation_fn_str", "activation_fn_kwargs",
}  # fmt: skip
LAYOUT = "6.0.0"  # of SAELens, the first version with this layout; without, its reader takes the file for an older one
GEMMA_SCOPE = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def load_dictionary(
    path: str | Path, *, scale: float | None = None, reads: str = "", writes: str = "", model: str = ""
) -> Dictionary:
    """Load a transcoder or sparse autoencoder.

    Args:
        path: a folder in SAELens's layout, or Gemma Scope's `params.npz` (never unpickled).
        scale: the constant that activations were multiplied by, where cfg.json says "expected_average_only_in"; it is
            folded into the weights.
        reads, writes: places, where the file doesn't say (an .npz never does); they count before the file's.
        model: whose places these are.

    Returns:
        The dictionary in the dtype of its file, in eval mode.

    Raises:
        InputError: no such file; an architecture, norm or layout that isn't known; shapes that contradict each other.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return _from_npz(path, reads, writes, model)
    if not path.is_dir():
        raise InputError(f"{path} is no folder; expected one with {CONFIG} and {WEIGHTS}, or a params.npz")
    cfg = io.read_json(path / CONFIG)
    if not isinstance(cfg, dict) or "d_in" not in cfg:
        raise InputError(f"{path / CONFIG} names no d_in, so it is not a dictionary's config")
    weights = io.open_weights(path / WEIGHTS)
    config, norm = _config(cfg, weights, reads, writes, model)
    d = _filled(config, {name: weights.load(name) for name in weights.names})
    if norm == "expected_average_only_in":
        if scale is None:
            raise InputError(
                "activations were scaled by one constant (expected_average_only_in), and the file doesn't say which; "
                "pass scale=sqrt(d_in) / mean norm of what it reads"
            )
        scaled(d, scale, scale if not config.transcodes else 1.0)
    return d


def _config(
    cfg: Mapping[str, Any], weights: Mapping[str, Tensor], reads: str, writes: str, model: str
) -> tuple[DictionaryConfig, str]:
    """Return the config that cfg.json means, and its way with the scale of activations."""
    said = {**(cfg.get("metadata") or {}), **cfg}
    architecture = said.get("architecture") or "standard"
    if said.get("activation_fn_str", said.get("activation_fn")) == "topk" and architecture == "standard":
        architecture = "topk"
    if architecture not in ARCHITECTURES:
        raise unknown("architecture of a dictionary", str(architecture), ARCHITECTURES)
    activation, skip, transcoder = ARCHITECTURES[architecture]
    norm = said.get("normalize_activations") or "none"
    norm = "expected_average_only_in" if norm is True else norm
    known = ("none", "expected_average_only_in", "layer_norm", "constant_norm_rescale")
    if norm not in known:
        raise unknown("normalize_activations", str(norm), known)
    k = said.get("k") or (said.get("activation_fn_kwargs") or {}).get("k") or 32
    read = reads or said.get("hook_name") or said.get("hook_point") or ""
    config = DictionaryConfig(
        inputs=int(cfg["d_in"]), outputs=int(said.get("d_out") or cfg["d_in"]) if transcoder else int(cfg["d_in"]),
        features=int(cfg["d_sae"]), activation=activation, k=int(k), skip=skip, reads=read,
        input_bias="none" if transcoder or not said.get("apply_b_dec_to_input", True) else "output",
        norm="none" if norm == "expected_average_only_in" else norm,
        writes=writes or (said.get("hook_name_out") or "" if transcoder else read), metadata=_metadata(cfg),
        model=model or said.get("model_name") or "",
    )  # fmt: skip
    if transcoder and config.norm != "none":
        raise InputError(f"a transcoder with {norm} can't be undone after decoding, and isn't in SAELens either")
    extra = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold", "W_skip", "log_threshold", "scaling_factor"}
    strange = set(weights) - extra
    if strange or "log_threshold" in weights:
        raise InputError(f"the dictionary has {sorted(strange or {'log_threshold'})[0]!r}, which isn't known")
    return config, norm


def _metadata(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return what else cfg.json says, in the shape it is written again."""
    inner = cfg.get("metadata")
    outer = {key: value for key, value in cfg.items() if key not in OWN}
    return {**outer, **inner} if isinstance(inner, dict) else outer


def _filled(config: DictionaryConfig, weights: Mapping[str, Tensor]) -> Dictionary:
    """Return a dictionary with these weights, W_enc being [D_in, F] there."""
    if "W_enc" not in weights or weights["W_enc"].shape[0] != config.inputs:
        shape = list(weights["W_enc"].shape) if "W_enc" in weights else "nothing"
        raise InputError(f"W_enc is {shape}; expected [{config.inputs}, {config.features}]")
    d = Dictionary(config, weights["W_enc"].dtype)
    for name, p in d.named_parameters():
        given = weights.get(name)
        given = given.T if given is not None and name == "W_enc" else given
        if given is None or given.shape != p.shape:
            shape = "nothing" if given is None else list(given.shape)
            raise InputError(f"{name} is {shape}; a dictionary of its config has {list(p.shape)}")
        p.data = given.contiguous()
    factor = weights.get("scaling_factor")
    if factor is not None and not bool((factor == 1).all()):
        raise InputError("the dictionary has a scaling_factor of its own per feature, which isn't known here")
    if not all(bool(p.isfinite().all()) for p in d.parameters()):
        raise InputError("the dictionary's weights are not all finite")
    return d.eval()


def _from_npz(path: Path, reads: str, writes: str, model: str) -> Dictionary:
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected a params.npz")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (ValueError, OSError) as error:
        raise InputError(f"{path} can't be read without unpickling: {str(error).splitlines()[0]}") from None
    missing = [name for name in GEMMA_SCOPE if name not in found]
    if missing:
        raise InputError(f"{path} has no {missing[0]}; Gemma Scope's files have {', '.join(GEMMA_SCOPE)}")
    if not reads:
        raise InputError(
            "an .npz doesn't say where it belongs; pass reads= (and writes= for a transcoder), such as "
            "reads='blocks.5.ln2.hook_normalized', writes='blocks.5.hook_mlp_out'"
        )
    inputs, features = found["W_enc"].shape
    config = DictionaryConfig(
        inputs=inputs, outputs=found["W_dec"].shape[-1], features=features, activation="jumprelu", reads=reads,
        writes=writes or reads, model=model,
    )  # fmt: skip
    return _filled(config, found)


def save_dictionary(dictionary: Dictionary, folder: str | Path) -> Path:
    """Write a dictionary in SAELens's layout, as a whole or not at all; an own input bias is folded into the encoder's.

    What was loaded is written bit for bit. "topk" transcoders get an architecture that SAELens doesn't know.

    Raises:
        InputError: the folder exists.
    """
    config, folder = dictionary.config, Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists; give a folder that does not")
    tensors = {name: p.detach() for name, p in dictionary.named_parameters() if name != "b_in"}
    tensors["W_enc"] = tensors["W_enc"].T
    if config.input_bias == "own":
        tensors["b_enc"] = tensors["b_enc"] - dictionary.W_enc.detach() @ dictionary.b_in.detach()
    with io.building_folder(folder) as partial:
        io.save_tensors(tensors, partial / WEIGHTS, {"format": "pt"})
        io.write_json(partial / CONFIG, saelens_config(dictionary))
    return folder


def saelens_config(dictionary: Dictionary) -> dict[str, Any]:
    """Return what cfg.json says of a dictionary."""
    c = dictionary.config
    kind = (c.activation, c.skip, c.transcodes)
    architecture = next((name for name, row in ARCHITECTURES.items() if row == kind), None)
    if architecture is None:
        raise InputError("SAELens's layout has no autoencoder with a skip; keep the dictionary it was made from")
    dtype = next(name for name, each in DTYPES.items() if each == dictionary.W_enc.dtype)
    places = {"hook_name": c.reads, "model_name": c.model} | ({"hook_name_out": c.writes} if c.transcodes else {})
    return {
        "architecture": architecture, "d_in": c.inputs, "d_sae": c.features, "dtype": dtype, "device": "cpu",
        "apply_b_dec_to_input": c.input_bias == "output", "normalize_activations": c.norm,
        "reshape_activations": "hook_z" if c.reads.endswith("hook_z") else "none",  # heads side by side
        **({"d_out": c.outputs} if c.transcodes else {}), **({"k": c.k} if c.activation == "topk" else {}),
        "metadata": {"sae_lens_version": LAYOUT, **c.metadata, **places},
    }  # fmt: skip
