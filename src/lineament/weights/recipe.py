"""Merge plans: mergekit's YAML read as it is, or the same said by flags; every field known or refused by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lineament._base.errors import InputError, near_miss
from lineament.weights.merge import find_method
from lineament.weights.methods import ALIASES, KINDS, METHODS
from lineament.weights.settings import check_setting

Parameters = Mapping[str, Any]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64,
          "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # fmt: skip
FIELDS = {
    "plan": ("merge_method", "models", "slices", "modules", "base_model", "dtype", "out_dtype", "tokenizer_source",
             "tokenizer", "chat_template", "parameters"),
    "module": ("slices", "models", "parameters"), "slice": ("sources", "base_model", "parameters"),
    "source": ("model", "layer_range", "parameters"), "model": ("model", "parameters"),
    "tokenizer": ("source", "tokens", "pad_to_multiple_of"), "token": ("source", "force"),
    "token source": ("kind", "model", "token", "token_id"),
}  # fmt: skip
KNOWN_OPTIONS = {name for row in METHODS.values() for name in (*row.each, *row.shared)}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A model's share of a slice: which layers (None: all), and its options."""

    model: str
    layers: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A run of layers of the result, made of the same number of layers of each source."""

    sources: tuple[Part, ...]
    base: str | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole merge, checked: nothing in it is unknown.

    `missing` says what happens to a tensor that some model lacks: "refuse" it; take the one of the "base" instead; or
    "skip" the model there, and what the base lacks altogether. `rename` is {old prefix: new prefix} of all models'
    tensors. Plans are silent on both.
    """

    method: str
    slices: tuple[Slice, ...]
    base: str | None = None
    parameters: Parameters = field(default_factory=dict)
    dtype: torch.dtype | None = None
    tokenizer_source: str | None = None
    tokens: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pad_to: int | None = None
    chat_template: str | None = None
    notes: tuple[str, ...] = ()
    text: Mapping[str, Any] = field(default_factory=dict)
    missing: str = "refuse"
    rename: Mapping[str, str] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """All models named, the base first if there is one."""
        named = [part.model for one in self.slices for part in one.sources]
        bases = [base for base in (self.base, *(one.base for one in self.slices)) if base]
        return list(dict.fromkeys([*bases, *named]))


def read_recipe(source: str | Path | Mapping[str, Any]) -> Recipe:
    """Read a plan from a YAML file or a mapping.

    Raises:
        InputError: not YAML; a field that is unknown here (named); models missing, or said twice over; an unknown
            method, option or dtype; a value of the wrong kind.
    """
    if not isinstance(source, Mapping):
        source = _yaml(Path(source))
    _fields(source, "plan", "the plan")
    method = source.get("merge_method")
    if method is None:
        raise InputError(f"the plan has no merge_method; expected one of {', '.join(METHODS)}")
    preset = ALIASES[method]() if method in ALIASES else {"method": str(method)}
    find_method(method := preset.pop("method"))
    modules = source.get("modules")
    if sum(bool(source.get(key)) for key in ("models", "slices", "modules")) != 1:
        raise InputError("the plan must have exactly one of models, slices and modules, and it must not be empty")
    body, outer = source, {**preset, **_parameters(source.get("parameters"), "the plan")}
    if modules:
        if not isinstance(modules, Mapping) or len(modules) != 1:
            names = ", ".join(modules) if isinstance(modules, Mapping) else repr(modules)
            raise InputError(
                f"modules names {names}; a plan for one module is read here, such as modules: {{default: ...}}"
            )
        name, body = next(iter(modules.items()))
        _fields(body, "module", f"modules.{name}")
        outer = {**outer, **_parameters(body.get("parameters"), f"modules.{name}")}
    tokenizer = source.get("tokenizer") or {}
    if tokenizer and source.get("tokenizer_source"):
        raise InputError("the plan has both tokenizer_source and tokenizer; give one of them")
    _fields(tokenizer, "tokenizer", "tokenizer")
    slices = _slices(body)
    used = [outer, *(p for one in slices for p in (one.parameters, *(part.parameters for part in one.sources)))]
    row = METHODS[method]
    idle = sorted({name for group in used for name in group if name not in row.each and name not in row.shared})
    wanted = tokenizer.get("source", "union") if tokenizer else source.get("tokenizer_source")
    return Recipe(
        method=method, slices=slices, base=_optional(source.get("base_model"), _model_name), parameters=outer,
        dtype=_dtype(source.get("out_dtype") or source.get("dtype")),
        tokenizer_source=wanted if wanted in ("union", "base", None) else _model_name(wanted),
        tokens=_tokens(tokenizer.get("tokens")), pad_to=_optional(tokenizer.get("pad_to_multiple_of"), _multiple),
        chat_template=_optional(source.get("chat_template"), str),
        notes=(f"{method} has no use for {', '.join(idle)}: ignored",) if idle else (), text=dict(source),
    )  # fmt: skip


def _yaml(path: Path) -> Mapping[str, Any]:
    import yaml

    if not path.is_file():
        raise InputError(f"{path} does not exist; expected a merge plan in YAML")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, Mapping):
        raise InputError(f"{path} holds no mapping; expected a merge plan with merge_method and models or slices")
    return found


def _fields(given: Any, kind: str, where: str) -> None:
    if not isinstance(given, Mapping):
        raise InputError(f"{where} is {given!r}; expected a mapping with {', '.join(FIELDS[kind])}")
    for name in given:
        if name not in FIELDS[kind]:
            near = near_miss(str(name), FIELDS[kind])
            known = ", ".join(FIELDS[kind])
            raise InputError(f"{where} has the field {name!r}, which is not known here.{near} Known: {known}.")


def _parameters(given: Any, where: str) -> dict[str, Any]:
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise InputError(f"the parameters of {where} are {given!r}; expected a mapping of options and values")
    for name, value in given.items():
        if name not in KNOWN_OPTIONS:
            raise InputError(f"the parameters of {where} have {name!r}, which no merge method knows."
                             f"{near_miss(name, KNOWN_OPTIONS)}")  # fmt: skip
        if value is not None:
            check_setting(value, f"{name} of {where}", KINDS.get(name, float))
    return dict(given)


def _slices(body: Mapping[str, Any]) -> tuple[Slice, ...]:
    if body.get("models"):
        parts = []
        for i, one in enumerate(_list(body["models"], "models")):
            _fields(one, "model", f"models[{i}]")
            name = _model_name(one.get("model"))
            parts.append(Part(model=name, parameters=_parameters(one.get("parameters"), name)))
        return (Slice(sources=tuple(parts)),)
    found = []
    for i, one in enumerate(_list(body.get("slices"), "slices")):
        _fields(one, "slice", f"slices[{i}]")
        parts = []
        for j, source in enumerate(_list(one.get("sources"), f"slices[{i}].sources")):
            where = f"slices[{i}].sources[{j}]"
            _fields(source, "source", where)
            parts.append(
                Part(model=_model_name(source.get("model")), layers=_layers(source.get("layer_range"), where),
                     parameters=_parameters(source.get("parameters"), where))
            )  # fmt: skip
        if len({part.layers[1] - part.layers[0] for part in parts if part.layers}) > 1:
            raise InputError(f"the sources of slices[{i}] have different numbers of layers; they must agree")
        found.append(Slice(sources=tuple(parts), base=_optional(one.get("base_model"), _model_name),
                           parameters=_parameters(one.get("parameters"), f"slices[{i}]")))  # fmt: skip
    return tuple(found)


def _list(given: Any, where: str) -> Sequence[Any]:
    if not isinstance(given, list) or not given:
        raise InputError(f"{where} is {'empty' if not given else repr(given)}; expected a list with at least one entry")
    return given


def _layers(given: Any, where: str) -> tuple[int, int]:
    whole = isinstance(given, list) and len(given) == 2 and all(type(n) is int for n in given)
    if not whole or not 0 <= given[0] < given[1]:
        raise InputError(f"layer_range of {where} is {given!r}; expected [first, last + 1], whole numbers")
    return given[0], given[1]


def _model_name(given: Any) -> str:
    """A model's name: text, or mergekit's mapping of path and LoRA, written `model+lora`."""
    if isinstance(given, str) and given:
        return given
    if isinstance(given, Mapping) and given.get("model"):
        inner, lora = given["model"], given.get("lora")
        paths = [one.get("path") if isinstance(one, Mapping) else one for one in (inner, lora) if one]
        extra = [k for k in given if k not in ("model", "lora")]
        extra += [k for one in (inner, lora) if isinstance(one, Mapping) for k in one if k != "path"]
        if not extra and all(isinstance(path, str) for path in paths):
            return "+".join(map(str, paths))
        raise InputError(
            f"the model {dict(given)} has {', '.join(extra) or 'no path'}; expected a path, with or without a LoRA"
        )
    raise InputError(f"a model is {given!r}; expected a folder, a Hub name or smollm2")


def _optional(given: Any, read: Any) -> Any:
    return None if given is None else read(given)


def _dtype(given: Any) -> torch.dtype | None:
    if given is None:
        return None
    if str(given) not in DTYPES:
        raise InputError(f"dtype is {given!r}.{near_miss(str(given), DTYPES)} Known: {', '.join(DTYPES)}.")
    return DTYPES[str(given)]


def _multiple(given: Any) -> int:
    if type(given) is not int or given < 1:
        raise InputError(f"pad_to_multiple_of is {given!r}; expected a whole number of at least 1")
    return given


def _tokens(given: Any) -> dict[str, dict[str, Any]]:
    found = {}
    given = {} if given is None else given
    if not isinstance(given, Mapping) or not all(isinstance(token, str) for token in given):
        raise InputError(f"tokens of the tokenizer is {given!r}; expected a mapping of tokens (text) to their sources")
    for token, how in given.items():
        _fields(how, "token", f"the token {token!r}")
        if type(how.get("force", False)) is not bool:
            raise InputError(f"force of the token {token!r} is {how['force']!r}; expected true or false")
        source = how.get("source")
        if isinstance(source, Mapping) and "kind" in source:
            _fields(source, "token source", f"the source of the token {token!r}")
            if source["kind"] not in ("zero", "model_token"):
                raise InputError(
                    f"the source of the token {token!r} is of kind {source['kind']!r}; expected zero or model_token"
                )
            if source["kind"] == "model_token" and ("token" in source) == ("token_id" in source):
                raise InputError(f"the source of the token {token!r} needs exactly one of token and token_id")
            if type(source.get("token_id", 0)) is not int or not isinstance(source.get("token", ""), str):
                raise InputError(f"the source of the token {token!r} has a token that is no text or a token_id that "
                                 "is no whole number")  # fmt: skip
            if source["kind"] == "model_token":
                source = {**source, "model": _model_name(source.get("model"))}
        elif source is not None:
            source = _model_name(source)
        found[token] = {"source": source, "force": how.get("force", False)}
    return found
