"""Models and students by name: looked at without their weights, loaded, measured, reported."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lineament import io
from lineament._base.errors import InputError
from lineament.convert.inspect import Inspection, ModelInfo, info_from_config, inspection
from lineament.convert.plan import Plan, parse_keep
from lineament.convert.select import Heads, kept_heads
from lineament.convert.text import load_documents
from lineament.convert.thresholds import bar_of
from lineament.models.adapters import adapter_for
from lineament.models.place import find_device, find_dtype
from lineament.report import Evidence

Model = str | Path | tuple[Any, Any]
SAVED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ENCODER_HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def look(model: Model, *, weights: bool = True) -> ModelInfo:
    """Read a model's shape from its config and the headers of its weights, loading none of them.

    Args:
        weights: whether to look at the weights' headers; without, a Hub name costs a few small files, and no
            parameters are counted.

    Raises:
        InputError: nothing there, not a model, weights missing or broken, a pickle, an encoder, no tokenizer, or a
            family without an adapter (the error names its attention modules).
    """
    if isinstance(model, tuple):
        config = model[0].config
        name = getattr(config, "_name_or_path", "") or type(model[0]).__name__
        count = sum(one.numel() for one in model[0].parameters())
        dtype = _named(next(model[0].parameters()).dtype)
        return info_from_config(_convertible(str(name), config), name=str(name), parameters=count, dtype=dtype)
    from transformers import AutoConfig

    from lineament.models.load import find_model

    folder = find_model(model, weights=weights)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; expected a transformers model folder")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{folder}/config.json is not a model's config: {error}") from None
    sizes: Counter[torch.dtype] = Counter()
    if weights:
        held = io.open_weights(folder)
        for one in held.names:
            sizes[held.dtype(one)] += math.prod(held.shape(one))
    info = info_from_config(
        _convertible(str(model), config), name=str(model), parameters=sizes.total(),
        weight_bytes=max((one.itemsize for one in sizes), default=4),
        dtype=_named(max(sizes, key=sizes.__getitem__, default=torch.float32)),
    )  # fmt: skip
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise InputError(f"{folder} has no tokenizer; save it there (tokenizer.save_pretrained)")
    return info


def _named(dtype: torch.dtype) -> str:
    """Return the name of a dtype that students are saved in: quantised weights are trained, and saved, in float32."""
    return str(dtype).removeprefix("torch.") if dtype in SAVED else "float32"


def _convertible(name: str, config: Any) -> Any:
    """Return a config; refuse encoders, which attend in both directions, and families without an adapter."""
    names: list[str] = list(getattr(config, "architectures", None) or [])
    both_ways = getattr(config, "is_encoder_decoder", False) or any(one.endswith(ENCODER_HEADS) for one in names)
    if both_ways or (names and not any("LM" in one or "Conditional" in one for one in names)):
        raise InputError(
            f"{name} is an encoder ({', '.join(names)}); this plan is for decoders, such as LlamaForCausalLM"
        )
    try:
        adapter_for(config)
    except InputError as error:
        adapter_for(_without_weights(config, error))  # names the attention modules
    return config


def _without_weights(config: Any, refusal: InputError) -> nn.Module:
    """Build a model on no device, for the names of its parts; where that fails there is only the first refusal."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception:
        raise refusal from None


def load(model: Model, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer onto the CPU and check that its weights are numbers.

    Raises:
        InputError: a tensor holds NaN or infinity (named), the tokenizer is missing, or the model is spread over
            devices.
    """
    from lineament.models.student import require_own_forward

    if isinstance(model, tuple):
        teacher, tokenizer = model
    else:
        from lineament.models.load import load_teacher

        teacher, tokenizer = load_teacher(model, dtype=dtype)
    require_own_forward(teacher)
    io.check_finite(dict(teacher.named_parameters()), source=str(getattr(teacher.config, "_name_or_path", "the model")))
    if tokenizer is None:
        raise InputError("the model has no tokenizer; give (model, tokenizer)")
    return teacher.eval().requires_grad_(False), tokenizer


def inspect(model: Model, plan: Plan | str = "default", *, contexts: Sequence[int] = (2048, 8192, 32768)) -> Inspection:
    """Show what a plan would do to a model: layers, cache bytes against context, memory. No weights are loaded.

    Raises:
        InputError: the model can't be read, a context of 0, or the plan does not fit it.
    """
    from lineament.convert.check import require_fit
    from lineament.convert.plans import plan as plan_named

    plan = plan_named(plan)
    if any(context < 1 for context in contexts):
        raise InputError(f"contexts are {list(contexts)}; expected at least 1 token each")
    require_fit(plan, look(model, weights=False))
    require_fit(plan, info := look(model))
    full: Heads | None = None
    if not parse_keep(plan.keep)[0].startswith("auto"):
        full = kept_heads(plan, info.layers, info.key_heads, sliding=info.kept_layers)
    return inspection(info, plan, full, contexts)


def evaluate_folder(
    student: str | Path,
    teacher: str | Path | None = None,
    *,
    lengths: Sequence[int] = (512, 2048, 8192),
    tokens: int = 32768,
    prompts: int = 40,
    data: Sequence[str] | None = None,
    speed: bool = True,
    lm_eval_tasks: Sequence[str] = (),
    seed: int = 0,
    precision: str = "fp32",
    saved: bool = False,
    on_row: Callable[[Any], None] | None = None,
    page: str | Path | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    folder: str | Path | None = None,
) -> Evidence:
    """Measure a student's folder beside its teacher.

    Args:
        student: folder of a converted model. teacher: default: the one named in the student's plan.
        data: text names; default: those of the student's plan. Only the test split is read.
        lm_eval_tasks: tasks of lm-eval run on the student as well (needs the extra eval).
        precision: of the quality, see `evaluate`. saved: take the quality from the evidence saved with the student,
            and measure only bytes and speed. on_row: called with each row as it is measured.
        page: write a one-file report here, with texts by both models.
        device, dtype: of both models, see `models.find_device` and `models.find_dtype`.
        folder: keeps what each model scored, so that the same call goes on after a kill.

    Raises:
        InputError: no teacher is known, a length below 2, no such device or dtype, or a folder can't be read.
    """
    from lineament.convert.evaluate import cost_rows, evaluate, untrained_window

    if wrong := [length for length in lengths if length < 2]:
        raise InputError(f"length {wrong[0]}: expected a context of at least 2 tokens")
    about = _about(Path(student))
    teacher = teacher or about.get("teacher")
    if teacher is None:
        raise InputError(f"{student} does not name its teacher; give --teacher")
    home, width = find_device(device), find_dtype(dtype)
    (ours, tokenizer), (theirs, _) = load(student, width), load(teacher, width)
    ours, theirs = ours.to(home), theirs.to(home)
    plan = Plan.from_json(about["plan"]) if "plan" in about else None
    names = tuple(data or (plan.data if plan else ("wiki-sample", "docs")))
    bar = bar_of(plan) if plan else None
    if saved:
        evidence = _with_costs(Path(student), cost_rows(ours, theirs, bar=bar, speed=speed, on_row=on_row))
    else:
        evidence = evaluate(
            ours, theirs, tokenizer, texts=load_documents(names)["test"], tokens=tokens, prompts=prompts, speed=speed,
            lengths=lengths, bar=bar, seed=seed, precision=precision, on_row=on_row,
            untrained=untrained_window(theirs, ours), folder=Path(folder) if folder else None,
        )  # fmt: skip
    evidence = _with_lm_eval(evidence, ours, tokenizer, lm_eval_tasks) if lm_eval_tasks else evidence
    if page is not None:
        _with_texts(evidence, Path(page), {"teacher": theirs, "student": ours}, tokenizer)
    return evidence


def _with_texts(evidence: Evidence, page: Path, models: dict[str, nn.Module], tokenizer: Any) -> None:
    from lineament.convert.pages import report_page, written

    report_page(evidence, page, extra=[written(models, tokenizer)])


def _with_costs(student: Path, costs: Sequence[Any]) -> Evidence:
    """Return the evidence saved with a student, its rows on bytes and speed replaced by `costs`."""
    from lineament.convert.evaluate import COSTS, passed

    before = Evidence.from_json(io.read_json(student / "evidence.json"))
    rows = [*(row for row in before.rows if not row["measure"].startswith(COSTS)), *costs]
    return replace(before, rows=rows, passed=passed(rows))


def _about(student: Path) -> dict[str, Any]:
    path = student / "lineament.json"
    return io.read_json(path) if path.is_file() else {}


def _with_lm_eval(evidence: Evidence, model: nn.Module, tokenizer: Any, tasks: Sequence[str]) -> Evidence:
    from lineament._base.extras import require

    lm_eval = require("lm_eval", extra="eval")
    wrapped = lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer)
    results = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks))["results"]
    rows = [
        {"measure": f"lm-eval {task} {name}", "student": value}
        for task, found in results.items()
        for name, value in found.items()
        if isinstance(value, float)
    ]
    return replace(evidence, rows=[*evidence.rows, *rows])


def write_report(evidence: Evidence, path: str | Path) -> Path:
    """Write an evaluation as one HTML file with its table and curves."""
    from lineament.convert.pages import report_page

    return report_page(evidence, Path(path))
