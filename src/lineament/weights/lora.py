"""LoRA adapters (Hu et al. 2022, arXiv 2106.09685) as points: products s B A, or the factors apart; and back again."""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineament import io
from lineament._base.errors import InputError, unknown
from lineament.weights.differences import listed
from lineament.weights.geometry import wide
from lineament.weights.point import Point, Source, Spec

FORMS = ("merged", "product", "factors")
PREFIX = "base_model.model."
MOVES_BASE = ("pissa", "olora", "corda", "lora_ga")
"""Starts of an adapter that take its first product out of the base."""
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Families whose layers are transformers' `Conv1D`, with weights [I, O]; other matrices there are saved whole."""
CONV1D = ("c_attn", "c_fc", "c_proj", "q_attn")
TABLE = re.compile(r"emb|wte|wpe|relative_attention_bias")
"""Last names of modules that are looked up by row: peft's factors of those are others than those of a layer."""


@dataclass(frozen=True)
class Pair:
    """The two factors of one weight, by their names in the file: `weight += scale * up @ down`."""

    down: str
    up: str
    scale: float
    transposed: bool

    def product(self, load: Any) -> Tensor:
        """Multiply the factors out, in float32."""
        a, b = load(self.down).float(), load(self.up).float()
        if self.transposed:  # an embedding's factors stand the other way round, and so do fan-in-fan-out layers
            return (a.T @ b.T).mul_(self.scale)
        return (b @ a).mul_(self.scale)


def open_adapter(folder: Path, *, base: Any = None, lora: str = "merged", any_base: bool = False) -> Point:
    """Open an adapter's folder; see `sources.open_point`.

    On a base with tied weights an adapter moves the side it was trained on and no other, as peft runs it: the merged
    point is untied then. (peft's `merge_and_unload` adds a LoRA of one side to both.)

    Raises:
        InputError: the form is unknown; the adapter is no plain LoRA; the base is missing, of another name or shape; a
            "product" of one side of tied weights.
    """
    if lora not in FORMS:
        raise unknown("form of a LoRA", lora, FORMS)
    config = io.read_json(folder / "adapter_config.json")
    weights = io.open_weights(folder)
    _check_plain(folder, config)
    from lineament.weights.sources import stored

    source = stored(weights, str(folder))
    if lora == "factors":
        return Point(((source, 1.0),))
    base = base if base is not None else config.get("base_model_name_or_path")
    if base is None:
        raise InputError(f"{folder} names no base model; give base")
    point = Point.open(base)
    pairs, whole = _pairs(folder, weights, config, point)
    _check_base(folder, config, point, str(base), any_base)
    # peft saves frozen embeddings beside their factors; they are the base's own
    frozen = [n for n in pairs if n in whole and n in point and weights.shape(whole[n]) == point.shape(n)]
    whole = {name: key for name, key in whole.items() if name not in frozen}
    _check_shapes(folder, weights, pairs, whole, point)
    if config.get("ensure_weight_tying"):  # peft saves one change twice
        pairs = {name: pair for name, pair in pairs.items() if point.ties.get(name) not in pairs}
        whole = {name: key for name, key in whole.items() if point.ties.get(name) not in whole}
    elif apart := _apart(weights, pairs, whole, point):
        if lora == "product":
            raise InputError(
                f"{folder} changes {listed(apart)} on one side only; open it as 'merged', or give an untied base "
                "(base=Point.open(...).untie())"
            )
        point = point.untie()
    product = product_source(source, pairs, point)
    if lora == "product":
        if whole:
            raise InputError(f"{folder} also replaces whole modules ({listed(whole)}); open it as 'merged'")
        return Point(((product, 1.0),), point.ties, frozenset(), point.folder, point.config)
    merged = point + Point(((product, 1.0),), point.ties)
    return merged.replace({name: weights.load(key) for name, key in whole.items()}) if whole else merged


def _apart(weights: io.Weights, pairs: Mapping[str, Pair], whole: Mapping[str, str], base: Point) -> list[str]:
    """Name the tied weights whose sides differ once the adapter is on."""

    def differ(*sides: str) -> bool:
        if any(name in pairs for name in sides):
            return True
        if not any(name in whole for name in sides):
            return False
        one, other = (wide(weights.load(whole[name]) if name in whole else base[name]) for name in sides)
        return not torch.equal(one, other)

    return [f"{alias} (tied to {owner})" for alias, owner in base.ties.items() if differ(alias, owner)]


def product_source(source: Source, pairs: Mapping[str, Pair], base: Point) -> Source:
    """Return s B A for the weights that have factors; everything else counts as zero."""
    specs = {name: Spec(torch.promote_types(base.dtype(name), source.specs[pair.down].dtype), base.shape(name))
             for name, pair in pairs.items()}  # fmt: skip
    mark = None
    if source.fingerprint is not None:
        mark = hashlib.sha256(f"product {source.fingerprint}".encode()).hexdigest()
    return Source(
        source.label, specs, lambda name: pairs[name].product(source.load), sparse=True, fingerprint=mark,
        files=source.files,
    )  # fmt: skip


def _check_plain(folder: Path, config: Mapping[str, Any]) -> None:
    kind = str(config.get("peft_type", "LORA")).upper()
    odd = {
        f"it is {kind}": kind != "LORA",
        "it is a DoRA": config.get("use_dora"),
        "it has biases of its own": config.get("lora_bias"),
        "it acts from its invocation tokens on only (aLoRA)": config.get("alora_invocation_tokens"),
        "it reads pooled inputs (QALoRA)": config.get("use_qalora"),
        "its base has layers several times (layer_replication)": config.get("layer_replication"),
    }
    for what, found in odd.items():
        if found:
            raise InputError(
                f"{folder} is no plain LoRA: {what}; merge it with peft (merge_and_unload) and use the result"
            )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(MOVES_BASE):
        raise InputError(
            f"{folder} starts as {start}, which changes the base it is added to; save it from peft with "
            "path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )


def _pairs(
    folder: Path, weights: io.Weights, config: Mapping[str, Any], base: Point
) -> tuple[dict[str, Pair], dict[str, str]]:
    """Sort an adapter's tensors: weight's name -> its factors; weight's name -> its whole replacement.

    `fan_in_fan_out` is one flag, which peft corrects module by module: where a family has both kinds of layers, the
    flag on file is that of the last module.
    """
    pairs, whole, both = {}, {}, _transposed(base)
    for key in weights.names:
        name = key.removeprefix(PREFIX)
        if match := re.fullmatch(r"(.*)\.lora_(embedding_)?A(\.weight)?", name):
            module, embedding = match[1], bool(match[2])
            up = key.replace("lora_embedding_A", "lora_embedding_B") if embedding else key.replace(".lora_A", ".lora_B")
            if up not in weights:
                raise InputError(f"{folder} has {key} and lacks {up}; get the adapter again")
            rank, alpha = _of(config, "rank_pattern", module, "r"), _of(config, "alpha_pattern", module, "lora_alpha")
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            turned = module.rpartition(".")[2] in CONV1D if both else bool(config.get("fan_in_fan_out"))
            flipped = embedding or turned
            pairs[f"{module}.weight"] = Pair(key, up, scale, flipped)
        elif not re.search(r"\.lora_(embedding_)?B(\.weight)?$", name):
            whole[name.replace(".modules_to_save", "").replace(".base_layer", "")] = key
    return pairs, whole


def _of(config: Mapping[str, Any], patterns: str, module: str, default: str) -> float:
    """A module's own rank or alpha, by peft's rule: the first pattern that matches the end of its name."""
    for pattern, number in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return number
    return config[default]


def _check_base(folder: Path, config: Mapping[str, Any], base: Point, given: str, any_base: bool) -> None:
    told = str(config.get("base_model_name_or_path") or given)
    known = {Path(each).name for each in (given, str(base.folder or given))}
    if Path(told).name not in known and not any_base:
        raise InputError(
            f"{folder} was trained on {told}, the base given is {given}; merge it with its own base, or accept another "
            "one with any_base (--any-base)"
        )


def _check_shapes(folder: Path, weights: io.Weights, pairs: Mapping[str, Pair], whole: Mapping[str, str], base: Point):
    unknown_names = [name for name in [*pairs, *whole] if name not in base]
    if unknown_names:
        raise InputError(f"{folder} is a LoRA of another base: {base.label} has no {listed(unknown_names)}")
    wrong = []
    for name, pair in pairs.items():
        if len(weights.shape(pair.down)) != 2 or len(weights.shape(pair.up)) != 2:
            raise InputError(f"{folder} adapts a convolution ({name}); merge it with peft (merge_and_unload)")
        width, height = weights.shape(pair.down)[1], weights.shape(pair.up)[0]
        shape = (width, height) if pair.transposed else (height, width)
        if shape != base.shape(name):
            wrong.append(f"{name} {shape} for {base.shape(name)}")
    wrong += [
        f"{n} {weights.shape(k)} for {base.shape(n)}" for n, k in whole.items() if weights.shape(k) != base.shape(n)
    ]
    if wrong:
        raise InputError(f"{folder} is a LoRA of another base than {base.label}; shapes differ in {listed(wrong)}")


def factorise(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the best factors of a given rank, in the Frobenius norm.

    Args:
        delta: [O, I]. rank: cut to min(O, I).

    Returns:
        A [r, I], B [O, r] with `B A ~ delta` and equal column and row norms, and the share of the squared norm kept.
    """
    rank = min(rank, *delta.shape)
    u, s, v = torch.linalg.svd(delta.float(), full_matrices=False)
    root = s[:rank].sqrt()
    total = float(s.square().sum())
    kept = float(s[:rank].square().sum()) / total if total else 1.0
    return root[:, None] * v[:rank], u[:, :rank] * root, kept


def extract_adapter(tuned: Point, base: Point, out: str | Path, *, rank: int, base_name: str) -> dict[str, float]:
    """Write the difference of two models as a LoRA adapter that peft opens; matrices by factors, the rest whole.

    Args:
        rank: of every layer's matrix; embeddings, heads and vectors that changed are saved whole.
        base_name: what the adapter names as its base.

    Returns:
        Weight's name -> share of the squared difference that its factors keep.

    Raises:
        InputError: the models differ in names or shapes, in nothing at all, or `out` exists.
    """
    delta, flipped = _checked(tuned, base, rank), _transposed(tuned, base)
    tensors, kept, others, ranks = {}, {}, [], {}
    for name, spec in delta.specs.items():
        if not spec.floating or not bool((change := delta.value(name)).any()):
            continue
        if not _factored(name, spec, flipped):
            others.append(name)
            continue
        module = name.removesuffix(".weight")
        down, up, kept[name] = factorise(change.T if flipped else change, rank)
        ranks[module] = len(down)
        tensors |= {f"{PREFIX}{module}.lora_A.weight": down, f"{PREFIX}{module}.lora_B.weight": up}
    keys, modules = _beside(others, tuned, ranks)
    tensors |= {key: tuned[name].clone() for key, name in keys.items()}
    if not tensors:
        raise InputError(f"{tuned.label} and {base.label} are equal; there is nothing to extract")
    small = {re.escape(module): r for module, r in ranks.items() if r != rank}
    biases = any(".base_layer." in key for key in keys)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": rank,
        "lora_alpha": rank, "rank_pattern": small, "alpha_pattern": small, "target_modules": sorted(ranks),
        "modules_to_save": modules or None, "bias": "lora_only" if biases else "none", "fan_in_fan_out": flipped,
        "inference_mode": True,
    }  # fmt: skip
    with io.building_folder(out) as partial:
        io.save_tensors(tensors, partial / "adapter_model.safetensors", {"format": "pt"})
        io.write_json(partial / "adapter_config.json", config)
    return kept


def adapter_costs(tuned: Point, base: Point, *, rank: int) -> dict[str, int]:
    """Return how many matrices `extract_adapter` factorises and the bytes it writes, both at most; nothing is read.

    Raises:
        InputError: the models differ in names or shapes.
    """
    specs, flipped = _checked(tuned, base, rank).specs, _transposed(tuned, base)
    factored = {name: spec for name, spec in specs.items() if _factored(name, spec, flipped)}
    factors = sum(4 * min(rank, *spec.shape) * sum(spec.shape) for spec in factored.values())
    rest = sum(spec.nbytes for name, spec in specs.items() if name not in factored)
    return {"matrices": len(factored), "written": factors + rest}


def _checked(tuned: Point, base: Point, rank: int) -> Point:
    if rank < 1:
        raise InputError(f"rank is {rank}; expected at least 1")
    return tuned - base


def _transposed(*points: Point) -> bool:
    folder = next((point.folder for point in points if point.folder is not None), None)
    return folder is not None and io.read_json(folder / "config.json").get("model_type") in TRANSPOSED


def _factored(name: str, spec: Spec, flipped: bool) -> bool:
    from lineament.weights.vocabulary import ENDS

    module, _, kind = name.rpartition(".")
    last = module.rpartition(".")[2]
    if not spec.floating or len(spec.shape) != 2 or kind != "weight" or name.endswith(ENDS) or TABLE.search(last):
        return False
    return last in CONV1D or not flipped


def _beside(changed: Sequence[str], tuned: Point, factored: Mapping[str, int]) -> tuple[dict[str, str], list[str]]:
    """Say where peft looks for what has no factors: key in the file -> tensor's name; and which modules it replaces.

    Tied weights are saved for each of their modules. A bias beside factors, and a parameter of a module with a name of
    its own, are not replaced module by module: peft loads these into the base.
    """
    names, keys, modules = [*tuned.specs, *tuned.ties], {}, {}
    aliases = [alias for alias, owner in tuned.ties.items() if owner in changed]
    for name in [*changed, *aliases]:
        module, _, kind = name.rpartition(".")
        if module in factored:
            keys[f"{PREFIX}{module}.base_layer.{kind}"] = name
        elif module and kind in ("weight", "bias"):
            modules[module] = None
            keys |= {f"{PREFIX}{each}": each for each in names if each.rpartition(".")[0] == module}
        else:
            keys[f"{PREFIX}{name}"] = name
    return keys, list(modules)
