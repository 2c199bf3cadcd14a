"""A conversion as a value: what is replaced, by what, what learns, for how long. JSON through and through."""

import hashlib
import json
import re
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, get_args, get_origin, get_type_hints

from lineament._base.errors import InputError, near_miss

MIXERS = (
    "hedgehog-window", "hedgehog", "lolcats", "softmax-window", "lightning", "gated-deltanet", "kda",
    "elu", "t2r", "relu", "performer", "taylor", "cosformer", "product",
)  # fmt: skip
LOSSES = ("output-mse", "attention-kl", "both")
DISTIL = ("lora", "full", "mixers", "none")
PRECISIONS = ("auto", "bf16", "fp32")
DAMAGE = ("both", "measured", "gates")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything a conversion needs to know, as one frozen value.

    Steps are optimiser steps; a `budget` replaces the two step counts by what fits into that time, measured on
    this machine and written down before step 1. Lengths are tokens and are drawn in turn.

    Args:
        name, about: what `lineament plans` lists.
        mixer, options: the linear-time mixer (a key of `nn.BUILDERS`) and its own options.
        window, sinks: the tokens attended exactly: the last `window` and the first `sinks` of a document.
        keep: what stays softmax: "none", "all" (a control: the teacher tuned), "every:4" (layers 3, 7, 11, ...),
            "0,7,15", "auto:N" layers or "auto-heads:F" of all key-value heads, the last two by the damage table.
        state_share: share of the teacher's cache at 32k tokens that all of the student's may take; the codes of a
            product map are then given to heads by their damage. 0: every head has as many as `options` says.
        damage, damage_tokens, damage_prompts: how that table is made ("measured" head by head, "gates":
            one backward through gates, "both"), on how many calibration tokens and retrieval prompts.
        learns: globs over the names of a mixer's parameters: what transfer may change.
        transfer_loss: "output-mse" (relative, per layer), "attention-kl" (soft-target cross-entropy less the
            teacher's entropy) or "both". transfer_steps, transfer_lengths, transfer_tokens (per step),
            transfer_lr (maps), transfer_gate_lr (gates, decays, temperatures), transfer_pool (sequences held),
            transfer_positions (queries of a sequence that attention-kl compares; 0 = all), transfer_far_sinks
            (every so many steps of a length the sinks count as far, so that codes, one of which begins at a sink's
            key, learn what such a key weighs beyond the window; 0 = never; of product maps with
            attention-kl only).
        distil: "lora" (peft, merged before saving; needs the extra lora), "full", "mixers" (only the new
            parts) or "none". distil_kl, distil_next: weights of the KL to the teacher and of the next token.
            distil_retrieval: share of steps that are synthetic retrieval prompts (training templates).
            distil_lr: of LoRA (or all weights) and the norms; distil_mixer_lr, distil_gate_lr: of a mixer's maps
            and gates. distil_positions: predictions scored per sequence (0 = all). lora_rank,
            lora_targets: "attention", "all" or a comma-separated list of projection names.
        extend_steps, extend_lengths: more distillation at greater lengths; 0 steps = none.
        teacher_topk: cache the teacher's k best logits on disk before distillation; 0 = run the teacher.
        budget: None, seconds, or "15min", "1h"; budget_transfer: the share spent on transfer.
        precision: "auto" takes bf16 autocast (float32 master weights) where bf16 matmuls were measured to be faster.
        data: names, files or folders for `data.load_text`; calibration_tokens: for gates and scales.
        evaluate_lengths, evaluate_tokens, evaluate_prompts, evaluate_precision: the final
            measurement; 0 tokens = none.
        reach: training positions go up to here, at most as far as the teacher's own, by a jump inside each shorter
            sequence, so that students of short sequences know longer texts; 0 = positions as they are.
        seed: of everything drawn at random. checkpoint_every: steps between checkpoints.

    Example:
        >>> Plan(keep="every:4").digest() == Plan.from_json(Plan(keep="every:4").to_json()).digest()
        True
    """

    name: str = "default"
    about: str = ""
    mixer: str = "hedgehog-window"
    options: Mapping[str, Any] = field(default_factory=dict)
    window: int = 128
    sinks: int = 4
    keep: str = "auto-heads:0.25"
    state_share: float = 0.0
    damage: str = "both"
    damage_tokens: int = 8192
    damage_prompts: int = 16
    learns: tuple[str, ...] = ("*",)
    transfer_loss: str = "output-mse"
    transfer_steps: int = 60
    transfer_lengths: tuple[int, ...] = (1024, 2048)
    transfer_tokens: int = 4096
    transfer_lr: float = 1e-2
    transfer_gate_lr: float = 5e-2
    transfer_pool: int = 24
    transfer_positions: int = 256
    transfer_far_sinks: int = 0
    distil: str = "lora"
    distil_steps: int = 120
    distil_lengths: tuple[int, ...] = (1024, 2048)
    distil_tokens: int = 2048
    distil_lr: float = 1e-3
    distil_mixer_lr: float = 1e-2
    distil_gate_lr: float = 5e-2
    distil_kl: float = 1.0
    distil_next: float = 0.0
    distil_retrieval: float = 0.25
    distil_positions: int = 0
    lora_rank: int = 16
    lora_targets: str = "attention"
    extend_steps: int = 0
    extend_lengths: tuple[int, ...] = (4096,)
    teacher_topk: int = 0
    budget: str | None = None
    budget_transfer: float = 0.35
    precision: str = "auto"
    data: tuple[str, ...] = ("wiki-sample", "docs")
    reach: int = 0
    calibration_tokens: int = 4096
    evaluate_lengths: tuple[int, ...] = (512, 2048, 8192)
    evaluate_tokens: int = 16384
    evaluate_prompts: int = 40
    evaluate_precision: str = "auto"
    seed: int = 0
    checkpoint_every: int = 20

    def __post_init__(self) -> None:
        typed_(self)
        problems = list(_range_problems(self))
        if problems:
            raise InputError("; ".join(problems))

    @property
    def far_sinks(self) -> int:
        """`transfer_far_sinks` where there are codes and a loss that teach them, else 0."""
        learned = self.options.get("map") == "product" and self.transfer_loss != "output-mse"
        return self.transfer_far_sinks if learned else 0

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Plan":
        """Read a plan back. Raises InputError on an unknown field (with the near miss) or a wrong type."""
        _check_names(cls, values)
        return cls(**dict(values))

    def digest(self) -> str:
        """Return 16 hex digits that name this plan, whatever the order of its JSON."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def change(self, changes: Mapping[str, Any]) -> "Plan":
        """Return a plan with some fields changed; texts are read as the field's type ("1024,2048" -> a tuple)."""
        return changed(self, changes)


def typed_(plan: Any) -> None:
    """Bring every field of a frozen plan to its exact type, or say what was expected."""
    kinds = get_type_hints(type(plan))
    for one in fields(plan):
        object.__setattr__(plan, one.name, _typed(one.name, getattr(plan, one.name), kinds[one.name]))


def changed(plan: Any, changes: Mapping[str, Any]) -> Any:
    """Return a plan of any kind with some fields changed, texts read as the field's type."""
    _check_names(type(plan), changes)
    kinds = get_type_hints(type(plan))
    return replace(plan, **{name: _read(name, value, kinds[name]) for name, value in changes.items()})


def _check_names(plan: Any, values: Mapping[str, Any]) -> None:
    known = [one.name for one in fields(plan)]
    for name in values:
        if name not in known:
            miss = near_miss(str(name), known)
            raise InputError(f"a plan has no field {name!r}.{miss} Fields: {', '.join(known)}.")


def _read(name: str, value: Any, kind: Any) -> Any:
    """Turn a text from the command line into the field's type; other values pass."""
    if not isinstance(value, str):
        return value
    try:
        if get_origin(kind) is tuple:
            inner = get_args(kind)[0]
            return tuple(inner(part.strip()) for part in value.split(",") if part.strip())
        if get_origin(kind) is types.UnionType:
            return None if value.lower() in ("", "none") else value
        if kind in (int, float):
            return kind(value)
        return value if kind is str else json.loads(value)
    except ValueError as error:
        raise InputError(f"plan field {name}: can't read {value!r} as {_say(kind)}") from error


def _say(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list of {_say(get_args(kind)[0])}"
    return {int: "a whole number", float: "a number", str: "a text"}.get(kind, "a JSON object")


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Return the value in its exact type, or say what was expected."""
    wrong = InputError(f"plan field {name} is {value!r}; expected {_say(kind)}")
    if get_origin(kind) is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise wrong
        return tuple(_typed(name, part, get_args(kind)[0]) for part in value)
    if get_origin(kind) is types.UnionType:
        return value if value is None else str(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise wrong
        return value
    if not isinstance(value, Mapping):
        raise wrong
    try:
        return json.loads(json.dumps(dict(value)))
    except (TypeError, ValueError) as error:
        raise InputError(f"plan field {name} holds something that is not JSON: {value!r}") from error


def _range_problems(plan: Plan):
    choices = {"mixer": MIXERS, "transfer_loss": LOSSES, "distil": DISTIL, "precision": PRECISIONS,
               "evaluate_precision": PRECISIONS, "damage": DAMAGE}  # fmt: skip
    for name, known in choices.items():
        value = getattr(plan, name)
        if value not in known:
            yield f"plan field {name} is {value!r}.{near_miss(value, known)} Known: {', '.join(known)}"
    at_least = {
        "window": 0, "sinks": 0, "transfer_steps": 0, "distil_steps": 0, "extend_steps": 0, "transfer_tokens": 1,
        "distil_tokens": 1, "lora_rank": 1, "teacher_topk": 0, "transfer_pool": 1, "calibration_tokens": 1,
        "damage_tokens": 1, "damage_prompts": 0, "evaluate_tokens": 0, "evaluate_prompts": 0, "checkpoint_every": 1,
        "transfer_lr": 0, "transfer_gate_lr": 0, "distil_lr": 0, "distil_mixer_lr": 0, "distil_gate_lr": 0,
        "distil_kl": 0, "distil_next": 0, "distil_positions": 0, "transfer_positions": 0, "seed": 0,
        "transfer_far_sinks": 0, "reach": 0,
    }  # fmt: skip
    for name, low in at_least.items():
        if not getattr(plan, name) >= low:
            yield f"plan field {name} is {getattr(plan, name)}; expected at least {low}"
    for name in ("distil_retrieval", "budget_transfer", "state_share"):
        if not 0 <= getattr(plan, name) <= 1:
            yield f"plan field {name} is {getattr(plan, name)}; expected a share from 0 to 1"
    for name in ("transfer_lengths", "distil_lengths", "extend_lengths", "evaluate_lengths"):
        if not getattr(plan, name) or min(getattr(plan, name)) < 2:
            yield f"plan field {name} is {list(getattr(plan, name))}; expected lengths of at least 2 tokens"
    for name in ("data", "learns"):
        if not getattr(plan, name):
            yield f"plan field {name} is empty; expected at least one name"
    if plan.state_share and plan.options.get("map") != "product":
        yield "plan field state_share gives out the codes of a product map; set it to 0 or options.map to product"
    if plan.distil != "none" and plan.distil_steps and not plan.distil_kl + plan.distil_next:
        yield "plan fields distil_kl and distil_next are both 0; nothing would be learned"
    for parse, value in ((parse_keep, plan.keep), (parse_budget, plan.budget)):
        try:
            parse(value)  # pyright: ignore[reportArgumentType]
        except InputError as error:
            yield str(error)


def parse_keep(keep: str) -> tuple[str, tuple[float, ...]]:
    """Read a keep rule.

    Returns:
        ("none", ()), ("all", ()), ("every", (n,)), ("layers", (0, 7, ...)), ("auto", (n,)) or
        ("auto-heads", (share,)).

    Example:
        >>> parse_keep("every:4"), parse_keep("0,7"), parse_keep("auto-heads:0.25")
        (('every', (4,)), ('layers', (0, 7)), ('auto-heads', (0.25,)))
    """
    text = keep.strip()
    if text in ("none", "all"):
        return text, ()
    if match := re.fullmatch(r"(every|auto):(\d+)", text):
        if int(match[2]) < 1 and match[1] == "every":
            raise InputError(f"keep {keep!r}: expected a step of at least 1")
        return match[1], (int(match[2]),)
    if match := re.fullmatch(r"auto-heads:(\d*\.?\d+)", text):
        if not 0 <= float(match[1]) <= 1:
            raise InputError(f"keep {keep!r}: expected a share of the key-value heads from 0 to 1")
        return "auto-heads", (float(match[1]),)
    if re.fullmatch(r"\d+(\s*,\s*\d+)*", text):
        return "layers", tuple(sorted({int(part) for part in text.split(",")}))
    miss = near_miss(text.split(":")[0], ("none", "all", "every", "auto", "auto-heads"))
    raise InputError(f"keep {keep!r} is no rule.{miss} Rules: none, all, every:4, 0,7,15, auto:N, auto-heads:F")


def parse_budget(budget: str | float | None) -> float | None:
    """Return a budget in seconds.

    Example:
        >>> parse_budget("15min"), parse_budget("1h"), parse_budget("90")
        (900.0, 3600.0, 90.0)
    """
    if budget is None:
        return None
    match = re.fullmatch(r"(\d*\.?\d+)\s*(s|sec|m|min|h)?", str(budget).strip())
    if not match or float(match[1]) <= 0:
        raise InputError(f"budget {budget!r}: expected a time such as 900, 15min or 1h")
    return float(match[1]) * {"m": 60, "min": 60, "h": 3600}.get(match[2] or "s", 1)
