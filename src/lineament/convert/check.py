"""Everything that can be wrong with a conversion, found before anything is loaded, copied or trained."""

from collections.abc import Iterator
from pathlib import Path

from lineament import io
from lineament._base.errors import InputError
from lineament.convert.inspect import ModelInfo, disk_bytes, memory_plan
from lineament.convert.plan import Plan, parse_keep
from lineament.convert.transfer import UNNORMALISED
from lineament.models.adapters import PREFIX, softcap_refusal
from lineament.nn.build import options_of

NEEDS_WINDOW = ("lolcats",)


def check(plan: Plan, info: ModelInfo, out: Path | None = None, *, memory: int | None = None) -> list[str]:
    """Name every problem of a plan on a model; an empty list means that it can run.

    Args:
        info: the model's shape. out: where the student shall go (its disk is asked). memory: bytes there are;
            None asks the system.

    Example:
        >>> from lineament.convert.inspect import ModelInfo
        >>> tiny = ModelInfo(name="tiny", kind="llama", layers=2, heads=4, key_heads=2, head_width=8, width=32,
        ...                  vocabulary=64)
        >>> check(Plan(keep="0,7"), tiny)
        ["keep '0,7' names layer 7; the model has layers 0 to 1"]
    """
    return [
        *_layers(plan, info),
        *_keep(plan, info),
        *_mixer(plan),
        *_lengths(plan, info),
        *_room(plan, info, out, memory),
    ]


def require_fit(plan: Plan, info: ModelInfo, out: Path | None = None) -> None:
    """Raise InputError with every problem that `check` finds."""
    if problems := check(plan, info, out):
        raise InputError("; ".join(problems))


def _layers(plan: Plan, info: ModelInfo) -> Iterator[str]:
    if info.kind.startswith(PREFIX):
        yield f"{info.name} is a student already; convert its teacher"
    rule, numbers = parse_keep(plan.keep)
    if rule != "all" and (reason := softcap_refusal(info.softcap, plan.mixer, rule == "auto-heads" and numbers[0] > 0)):
        yield reason
    if info.kept_layers and len(info.kept_layers) == info.layers:
        yield (
            f"every layer of the model attends to a sliding window of {info.sliding_window} tokens already, so nothing "
            "is left to convert; to convert it as full attention, set sliding_window to null in its config.json "
            "(config.sliding_window = None of a loaded model) and see what that costs first"
        )


def _keep(plan: Plan, info: ModelInfo) -> Iterator[str]:
    rule, numbers = parse_keep(plan.keep)
    last = info.layers - 1
    if rule == "layers":
        for number in numbers:
            if number > last:
                yield f"keep {plan.keep!r} names layer {int(number)}; the model has layers 0 to {last}"
    free = info.layers - len(info.kept_layers)
    if rule == "auto" and numbers[0] > free:
        yield f"keep {plan.keep!r} asks for {int(numbers[0])} layers; the model has {free} to convert"
    if rule == "every" and numbers[0] > info.layers:
        yield f"keep {plan.keep!r} keeps nothing in {info.layers} layers; say none, or a smaller step"
    if info.heads % info.key_heads:
        yield f"the model has {info.heads} query and {info.key_heads} key-value heads; the one must divide the other"


def _mixer(plan: Plan) -> Iterator[str]:
    known = options_of(plan.mixer)
    for name in plan.options:
        if name not in known:
            yield f"the mixer {plan.mixer} has no option {name!r}; it has {', '.join(sorted(known)) or 'none'}"
    if plan.mixer in UNNORMALISED and plan.transfer_loss != "output-mse" and plan.transfer_steps:
        yield f"transfer_loss {plan.transfer_loss!r} compares attention weights, {plan.mixer} has none; use output-mse"
    if plan.mixer == "softmax-window" and not plan.window + plan.sinks:
        yield "softmax-window with window 0 and sinks 0 attends to nothing; give a window"
    if plan.mixer in NEEDS_WINDOW and not plan.window:
        yield f"{plan.mixer} needs a window of at least 1; use hedgehog for the form without"


def _lengths(plan: Plan, info: ModelInfo) -> Iterator[str]:
    if not info.positions:
        return
    for name in ("transfer_lengths", "distil_lengths", "extend_lengths"):
        if name == "extend_lengths" and not plan.extend_steps:
            continue
        longest = max(getattr(plan, name))
        if longest > info.positions:
            half = max(2, info.positions // 2)
            yield (
                f"{name} has {longest}; the model was made for {info.positions} positions; "
                f"--set {name}={half},{info.positions}"
            )


def _room(plan: Plan, info: ModelInfo, out: Path | None, memory: int | None) -> Iterator[str]:
    if not info.parameters:
        return
    if out is not None:
        need, free = disk_bytes(info, plan), io.free_bytes(out)
        if free < need:
            yield f"{out} needs about {io.human_bytes(need)} of disk, {io.human_bytes(free)} are free"
    have = _system_memory() if memory is None else memory
    stage, need = max(memory_plan(info, plan).items(), key=lambda pair: pair[1])
    if have and need > have:
        yield (
            f"{stage} needs about {io.human_bytes(need)} of memory, the machine has {io.human_bytes(have)}; "
            "use shorter lengths, fewer tokens per step, or distil=mixers"
        )


def _system_memory() -> int:
    """Return the machine's memory in bytes, 0 when the system does not say."""
    import os

    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
