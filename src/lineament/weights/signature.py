"""Robust weight signatures (Cai et al. 2023, arXiv 2302.12480): the part of an update that the clean update lacks.

With the same start p, a clean model and one tuned on corrupted data: `d_0 = clean - p`, `d_c = corrupted - p`, and per
tensor `signature = d_c - (<d_c, d_0> / <d_0, d_0>) d_0`, kept for the first layers only. Adding it patches a clean
model, taking it off restores it; signatures are points, so they are scaled and summed like all points.
"""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineament import io
from lineament._base.errors import InputError, unknown
from lineament.weights.differences import listed
from lineament.weights.geometry import combined, dot_product
from lineament.weights.point import Point, Source, Spec

SCHEMES = ("linear", "log", "tanh")
BACKUP = "signature"  # folder in a patched model: what stood there before, and what was added


def extract(base: Point, clean: Point, corrupted: Point, *, keep: Sequence[str] = ("*",)) -> Point:
    """Return the signature of a corruption as a sparse point: names it lacks count as zero.

    Args:
        base: what both were tuned from. keep: globs over names of tensors, `["model.layers.0.*"]` say.

    Raises:
        InputError: the models do not fit together, or nothing matches.
    """
    d_0, d_c = clean - base, corrupted - base
    names = [
        n for n, s in d_c.specs.items() if s.floating and n not in d_c.buffers and any(fnmatchcase(n, g) for g in keep)
    ]
    if not names:
        raise InputError(f"no tensor is called like {listed(keep)}; there are {listed(d_c.specs)}")

    def load(name: str) -> Tensor:
        a, c = d_0.value(name), d_c.value(name)
        length = dot_product(a, a)
        return combined([c, a], [1.0, -dot_product(c, a) / length], c.dtype) if length else c

    specs = {
        name: Spec(torch.promote_types(d_c.specs[name].dtype, torch.float32), d_c.specs[name].shape) for name in names
    }
    return sparse(d_c.computed("signature", specs, [base, clean, corrupted], load, told=names))


def sparse(point: Point) -> Point:
    """Let names that a point lacks count as zero in sums."""
    specs, mark = point.specs, point.fingerprint
    source = Source(
        point.label, specs, point.value, sparse=True, fingerprint=mark and f"sparse {mark}", files=point.files
    )
    return Point(((source, 1.0),))


def weights_in_order(model: nn.Module, *args: Any, **kwargs: Any) -> list[list[str]]:
    """Return the parameters of each layer in the order in which layers run, not in which they are listed.

    A layer is a module with parameters of its own; shared ones count where they run first.
    """
    order: list[list[str]] = []
    handles = []
    for name, module in model.named_modules():
        own = [f"{name}.{p}" if name else p for p, _ in module.named_parameters(recurse=False)]
        if own:
            handles.append(
                module.register_forward_pre_hook(lambda m, a, own=own: order.append(own) if own not in order else None)
            )
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return order


def quantise(x: Tensor, levels: int, scheme: str = "linear", *, clip: float = 0.0) -> dict[str, Tensor]:
    """Return codes and what is needed to read them back.

    Args:
        levels: Q >= 2; 16 are 4 bits.
        scheme: "linear" (uniform from min to max), "log" (sign and log2 of the magnitude, half the levels for each
            sign), "tanh" (uniform after companding).
        clip: share of outliers at each end that saturate, so that they don't waste levels.

    Raises:
        InputError: an unknown scheme, fewer than two levels (four for log), or a clip of a half or more.
    """
    if scheme not in SCHEMES:
        raise unknown("scheme", scheme, SCHEMES)
    if not 0 <= clip < 0.5:
        raise InputError(f"clip is {clip}; expected a share of outliers at each end, from 0 to below 0.5")
    if levels < (4 if scheme == "log" else 2):
        raise InputError(f"levels is {levels}; expected at least {4 if scheme == 'log' else 2}")
    x = x.double()
    scale = x.square().mean().sqrt().clamp_min(1e-30)
    y = {"linear": x, "tanh": (x / scale).tanh(), "log": x.abs().clamp_min(1e-12 * scale).log2()}[scheme]
    ordered = y.flatten().sort().values
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (clip, 1 - clip))
    count = levels // 2 if scheme == "log" else levels
    step = ((high - low) / (count - 1)).clamp_min(1e-300)
    codes = ((y.clamp(low, high) - low) / step).round().long()
    if scheme == "log":
        codes = torch.where(x == 0, 0, torch.where(x < 0, -codes - 1, codes + 1))  # 0 stays 0
    kind = torch.uint8 if scheme != "log" and levels <= 256 else torch.int16 if levels <= 65536 // 2 else torch.int32
    return {"codes": codes.to(kind), "range": torch.stack([low, step, scale])}


def dequantise(packed: Mapping[str, Tensor], scheme: str) -> Tensor:
    """Return the numbers that `quantise` stored, in float32."""
    codes, (low, step, scale) = packed["codes"].long(), packed["range"].double()
    if scheme == "log":
        size = torch.exp2((codes.abs() - 1).clamp_min(0) * step + low)
        return torch.where(codes == 0, 0.0, codes.sign() * size).float()
    y = codes * step + low
    return (y if scheme == "linear" else y.clamp(-1 + 1e-12, 1 - 1e-12).atanh() * scale).float()


def save_signature(
    signature: Point, path: str | Path, *, levels: int | None = None, scheme: str = "linear", clip: float = 0.0
) -> dict[str, float]:
    """Write a signature as one safetensors file, quantised if `levels` is given.

    Returns:
        Bytes of the file and of the same tensors in float32, and bits per number in the file, headers included.

    Raises:
        InputError: as `quantise`, or its settings without levels.
    """
    if levels is None and (scheme != "linear" or clip):
        raise InputError(f"scheme {scheme} and clip {clip:g} are of quantised signatures; give levels (--levels 16)")
    tensors, told = {}, {"scheme": scheme if levels else "float", "lineament": "signature"}
    for name, spec in signature.specs.items():
        x = signature.value(name)
        if levels is not None:
            tensors |= {f"{name}#{key}": value for key, value in quantise(x, levels, scheme, clip=clip).items()}
        else:
            tensors[name] = x.to(spec.dtype)
    file = io.save_tensors(tensors, path, told)
    count = sum(math.prod(spec.shape) for spec in signature.specs.values())
    size = file.stat().st_size
    return {"bytes": size, "float32": 4 * count, "bits": 8 * size / count}


def load_signature(path: str | Path) -> Point:
    """Open what `save_signature` wrote.

    Raises:
        InputError: it is another kind of file.
    """
    weights = io.open_weights(path)
    scheme = weights.metadata.get("scheme")
    if weights.metadata.get("lineament") != "signature" or scheme is None:
        raise InputError(f"{path} is no signature; `lineament signature extract` writes one")
    if scheme == "float":
        return sparse(Point.open(weights))
    names = [name.removesuffix("#codes") for name in weights.names if name.endswith("#codes")]
    specs = {name: Spec(torch.float32, weights.shape(f"{name}#codes")) for name in names}

    def load(name: str) -> Tensor:
        return dequantise({key: weights.load(f"{name}#{key}") for key in ("codes", "range")}, scheme)

    source = Source(str(path), specs, load, sparse=True, fingerprint=io.digest(path), files=tuple(weights.files))
    return Point(((source, 1.0),))


def apply(model: Point, signatures: Sequence[Point], out: str | Path, *, alpha: float = 1.0, **options: Any) -> Path:
    """Write a model with signatures added, `model + alpha / C sum_c signature_c`, and what is needed to take them off.

    Floating-point addition does not undo exactly, so the tensors that change are kept as they were in OUT/signature.

    Raises:
        InputError: a signature of another architecture; the model is patched already.
    """
    if model.folder is not None and (model.folder / BACKUP).exists():
        raise InputError(f"{model.folder} is patched already; remove that signature first")
    patched = model
    for signature in signatures:
        patched = patched + signature.scale(alpha / len(signatures))
    touched = [name for name in model if any(name in signature for signature in signatures)]
    patched = patched.computed(
        patched.label, {n: model.specs[n] for n in model}, [patched], patched.value, told=["as", str(model.cast)]
    )

    def finish(partial: Path) -> None:
        io.save_tensors({name: model[name] for name in touched}, partial / BACKUP / "original.safetensors")
        told = {"signatures": [s.label for s in signatures], "alpha": alpha, "tensors": touched}
        io.write_json(partial / BACKUP / "signature.json", told)

    return patched.save(out, finish=finish, **options)


def remove(folder: str | Path, out: str | Path, **options: Any) -> Path:
    """Write a patched model as it was before, to the last bit.

    Raises:
        InputError: nothing was applied to this folder.
    """
    backup = Path(folder) / BACKUP / "original.safetensors"
    if not backup.is_file():
        raise InputError(f"{folder} has no {BACKUP}/original.safetensors, so no signature was applied here")
    kept = io.open_weights(backup)
    return Point.open(folder).replace({name: kept.load(name) for name in kept.names}).save(out, **options)
