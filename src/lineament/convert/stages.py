"""The stages of a conversion. Each reads what the one before left, and leaves a file that a later run starts from."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from lineament import io
from lineament._base.seeds import seeded
from lineament.convert import distil as distillation
from lineament.convert import measure, select
from lineament.convert import transfer as transferring
from lineament.convert.budget import resolve_budget
from lineament.convert.card import licence_of, model_card
from lineament.convert.draws import draws, pool_windows, windows_of
from lineament.convert.evaluate import evaluate, untrained_window
from lineament.convert.inherit import calibrate, mixer_configs
from lineament.convert.job import Job
from lineament.convert.parts import Parts, converted, lora_targets, parts, teacher_digest
from lineament.convert.plan import Plan, parse_budget
from lineament.convert.precision import autocast, resolve
from lineament.convert.processes import any_process, in_shards, is_main, wait_for_all
from lineament.convert.progress import Progress
from lineament.convert.select import DamageTable, Heads
from lineament.convert.thresholds import bar_of
from lineament.convert.warm_up import measure_timing
from lineament.graph.stream import Batch
from lineament.models.student import build_student
from lineament.report import Evidence

FEW = 10  # distillation steps; 5 were seen to gain nothing on prose


def _once(path: Path, make: Callable[[], None], *, together: bool = False) -> None:
    """Let the main process make a file that is not there yet; all go on when it is.

    Args:
        together: every process makes it, since models are sharded in it; `make` then lets the main process write.
    """
    missing = not path.exists()
    if together:
        missing = any_process(missing)  # all have looked before one writes
    if missing and (together or is_main()):
        make()
    wait_for_all()


def settled(job: Job, work: Path) -> Job:
    """Decide an "auto" precision by a clock, once: a run that goes on must compute as the one before."""
    path = work / "precision.json"
    chosen = {name: resolve(getattr(job.plan, name), job.device) for name in ("precision", "evaluate_precision")}

    def make() -> None:
        io.write_json(path, chosen)

    _once(path, make)
    return replace(job, plan=job.plan.change(json.loads(path.read_text(encoding="utf-8"))))


def damage(job: Job, work: Path, progress: Progress) -> DamageTable | None:
    """Find the damage table that the keep rule needs: shipped, kept from an earlier run, or measured now."""
    plan, path = job.plan, work / "damage.json"
    if not select.needs_table(plan):
        return None
    digest = teacher_digest(job.teacher)

    def make() -> None:
        window, sinks = select.exact_part(plan)
        table = select.shipped_table(digest, window=window, sinks=sinks)
        if table is None:
            progress.stage("damage", f"what each key-value head is worth ({plan.damage})")
            table = damage_table(job, digest, progress.count)
        else:
            progress.stage("damage", "table of this very model, shipped with the package")
        table.save(path)

    _once(path, make)
    return DamageTable.load(path)


def damage_table(job: Job, digest: str, on_progress: Callable[[int, int], None] | None = None) -> DamageTable:
    """Measure (or estimate) damage on calibration text and "place" prompts."""
    plan, found = job.plan, parts(job.teacher)
    window, sinks = select.exact_part(plan)
    corpus = job.corpus("place")
    longest = min(2048, job.info.positions or 2048, plan.damage_tokens, *_shortest(job))
    first = min(window + sinks, longest // 2)
    rows = max(1, plan.damage_tokens // longest)
    samples = [select.text_sample(corpus.batch(step, longest, 1), first=first) for step in range(rows)]
    if plan.damage_prompts:
        length = min(512, job.info.positions or 512)
        samples += select.answer_samples(*job.prompts("place")(length, plan.damage_prompts, 0))
    on = [replace_device(sample, job.device) for sample in samples]
    inside = (job.teacher, found.layers, found.attentions, on)
    about = {"data": list(plan.data), "seed": plan.seed, "length": longest, "layers": sorted(found.shapes)}
    method = measure.estimate_damage if plan.damage == "gates" else measure.measure_damage
    with autocast(job.precision, job.device):
        table = method(
            *inside, key_heads=job.info.key_heads, window=window, sinks=sinks, teacher=digest, free=found.shapes,
            about=about, on_progress=on_progress,
        )  # fmt: skip
        if plan.damage == "both":
            table = measure.with_slopes(
                table, *inside, key_heads=job.info.key_heads, free=found.shapes, on_progress=on_progress
            )
    return table


def _shortest(job: Job) -> list[int]:
    return [job.corpus("place").tokens]


def replace_device(sample: select.Sample, device: torch.device) -> select.Sample:
    """Move a sample to a device."""
    return select.Sample(sample.kind, *(one.to(device) for one in (sample.ids, sample.rows, sample.positions)))


def kept(job: Job, table: DamageTable | None) -> Heads:
    """Apply the keep rule to the layers that a conversion may touch."""
    info = job.info
    return select.kept_heads(job.plan, info.layers, info.key_heads, table, sliding=info.kept_layers)


def inherit(job: Job, full: Heads, table: DamageTable | None, work: Path, progress: Progress) -> nn.Module:
    """Build the student and set its codes and gates from calibration text; the second time, read them back.

    One without any mixer, when every head stays softmax, has nothing to inherit.
    """
    if not mixer_configs(job.plan, parts(job.teacher).shapes, full):
        return build_student(job.teacher, {}).eval()
    progress.stage("inherit", f"{job.plan.mixer} in place of softmax")
    found, plan, path = parts(job.teacher), job.plan, work / "inherit.safetensors"
    codes = select.allotted_codes(plan, found.shapes, full, table) if plan.state_share and table else None
    with seeded(plan.seed):
        student = build_student(job.teacher, mixer_configs(plan, found.shapes, full, codes)).eval()
    fillings = _fillings(student)

    def make() -> None:
        length = min(max(plan.transfer_lengths), plan.calibration_tokens, *_shortest(job))
        rows = max(1, plan.calibration_tokens // length)
        ids = [job.corpus("place").batch(step, length, 1) for step in range(rows)]
        windows = windows_of(job, ids, plan.seed * 4001 + 1_000_000)
        for layer, pool in _pools(job, found, windows, full, fillings):
            if layer in fillings:
                calibrate(fillings[layer], pool, window=plan.window, sinks=plan.sinks, sink_code=plan.far_sinks > 0)
        _save_fillings(fillings, path)

    _once(path, make)
    _load_fillings(fillings, path)
    return student


def _pools(job: Job, found: Parts, windows: Sequence[Batch], full: Heads, fillings: Mapping[int, nn.Module]):
    return transferring.pooled_layers(
        job.teacher, found.layers, found.attentions, windows, full_heads=full, precision=job.precision,
        last=max(fillings, default=-1),
    )  # fmt: skip


def _fillings(student: nn.Module) -> dict[int, nn.Module]:
    """Return {layer: filling} of the student's converted layers."""
    return {mixer.layer: mixer.filling for mixer in converted(student).values()}


def _save_fillings(fillings: Mapping[int, nn.Module], path: Path) -> None:
    tensors = {
        f"{layer}.{name}": tensor.detach().cpu().contiguous()
        for layer, filling in fillings.items()
        for name, tensor in filling.state_dict().items()
    }
    io.save_tensors(tensors, path)


def _load_fillings(fillings: Mapping[int, nn.Module], path: Path) -> None:
    weights = io.open_weights(path)
    for layer, filling in fillings.items():
        names = [name for name in weights.names if name.startswith(f"{layer}.")]
        filling.load_state_dict({name.partition(".")[2]: weights.load(name) for name in names})


def resolved(job: Job, student: nn.Module, work: Path, progress: Progress) -> Plan:
    """Turn the budget into step counts by a measured warm-up, written down before step 1."""
    path = work / "plan.json"

    def make() -> None:
        plan, timing = job.plan, None
        if plan.budget is not None:
            progress.stage("warm-up", f"how much fits into {plan.budget}")
            timing = measure_timing(job, student)
            plan = resolve_budget(plan, timing)
            held = plan.transfer_pool / job.plan.transfer_pool
            least = timing.seconds(plan.transfer_steps, plan.distil_steps + plan.extend_steps, held)
            if least > (parse_budget(plan.budget) or least):
                progress.note(f"{plan.budget} are too short: the pool and the fewest steps take about {least:.0f} s")
            progress.note(
                f"{plan.transfer_steps} transfer steps per layer on {plan.transfer_pool} windows, "
                f"{plan.distil_steps} distillation steps"
            )
            if plan.distil != "none" and plan.distil_steps < FEW:
                progress.note("so few may leave it no better than untrained window and sinks; a longer budget helps")
        if is_main():
            io.write_json(path, {"plan": plan.to_json(), "timing": timing.to_json() if timing else None})

    _once(path, make, together=job.sharding is not None)
    return Plan.from_json(json.loads(path.read_text(encoding="utf-8"))["plan"])


def _full(student: nn.Module) -> Heads:
    return {mixer.layer: tuple(mixer.config.full_heads) for mixer in converted(student).values()}


def transfer_all(job: Job, student: nn.Module, work: Path, progress: Progress) -> None:
    """Train the mixers layer by layer on the teacher's activations; afterwards the student holds them."""
    plan, found = job.plan, parts(job.teacher)
    fillings = {layer: one for layer, one in _fillings(student).items() if list(one.parameters())}
    if not plan.transfer_steps or not fillings:
        return
    progress.stage("transfer", f"{len(fillings)} layers, {plan.transfer_steps} steps each, {plan.transfer_loss}")

    windows, answers = pool_windows(job)

    def said(layer: int, numbers: dict[str, float]) -> None:
        progress.note(f"layer {layer}: relative error {numbers['before']:.4f} -> {numbers['after']:.4f}")

    transferring.transfer(
        job.teacher, found.layers, found.attentions, fillings, windows, plan, work / "transfer",
        full_heads=_full(student), precision=job.precision, answers=answers, on_layer=said,
    )  # fmt: skip
    student.to(job.device)  # training may have moved the mixers to an accelerator


def distil_all(job: Job, student: nn.Module, work: Path, progress: Progress) -> nn.Module:
    """Distil end to end, then at greater lengths when the plan asks; LoRA is merged when both are done."""
    plan, path = job.plan, work / "distilled.safetensors"
    steps = [("distil", plan.distil_steps, plan.distil_lengths), ("extend", plan.extend_steps, plan.extend_lengths)]
    if plan.distil == "none" or not plan.distil_steps + plan.extend_steps:
        return student
    if path.exists():
        weights = io.open_weights(path)
        student.load_state_dict({name: weights.load(name) for name in weights.names}, strict=False)
        return student.eval().requires_grad_(False)
    cache = work / "teacher" if plan.teacher_topk else None
    model = distillation.learners(student, plan, lora_targets(student, plan.lora_targets))
    offset, processes, device = 0, PartialState().num_processes, job.device
    with in_shards(job.sharding, model, job.teacher, parts(job.teacher).layers, device) as (learner, guide):
        teacher = distillation.Teacher(guide, job.precision, cache, plan.teacher_topk)
        for name, count, lengths in steps:
            if count:
                progress.stage(
                    name, f"{count} steps at {'/'.join(map(str, lengths))} tokens, {plan.distil}, {job.precision}"
                )
                draw = transferring.side_by_side(draws(job, lengths, offset), len(lengths), processes)
                distillation.distil(learner, teacher, plan, draw, count, work / name, precision=job.precision)
            offset += count * processes
    if cache is not None:
        progress.note(f"cache of the teacher's logits: {io.human_bytes(teacher.nbytes())}")
    student = distillation.merged(model).eval().requires_grad_(False).to(device)
    _once(path, lambda: _save_distilled(student, path))
    return student


def _save_distilled(student: nn.Module, path: Path) -> None:
    tensors = {name: one.detach().cpu().contiguous() for name, one in student.named_parameters()}
    io.save_tensors(tensors, path)


@torch.no_grad()
def rounded(job: Job, student: nn.Module) -> nn.Module:
    """Round a student's weights to the dtype they are saved in, so that what is measured is what is saved."""
    for one in _teachers_part(student):
        one.copy_(one.to(getattr(torch, job.info.dtype)))
    return student


def _teachers_part(student: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that the teacher has too: mixers keep the exactness that they were trained in."""
    return (one for name, one in student.named_parameters() if ".mixer." not in name and one.is_floating_point())


def evaluation(job: Job, student: nn.Module, full: Heads, work: Path, progress: Progress) -> Evidence:
    """Measure the student beside its teacher and the baselines."""
    plan, path = job.plan, work / "evidence.json"

    def make() -> None:
        progress.stage("evaluate", "beside the teacher, the state switched off, and window + sinks untrained")
        if not plan.evaluate_tokens:
            io.write_json(path, _unmeasured(plan).to_json())
            return
        limit = job.info.positions or max(plan.evaluate_lengths)
        evidence = evaluate(
            student, job.teacher, job.tokenizer, texts=job.documents["test"], bar=bar_of(plan),
            untrained=untrained_window(job.teacher, student),
            lengths=[n for n in plan.evaluate_lengths if n <= limit], tokens=plan.evaluate_tokens,
            prompts=plan.evaluate_prompts, seed=plan.seed, precision=plan.evaluate_precision,
            on_row=lambda row: progress.note(say_row(row)), folder=work / "scores",
        )  # fmt: skip
        io.write_json(path, evidence.to_json())

    _once(path, make)
    return Evidence.from_json(json.loads(path.read_text(encoding="utf-8")))


def _unmeasured(plan: Plan) -> Evidence:
    return Evidence(
        name="conversion", rows=[], claim="not measured", threshold="none set", passed=None, seeds=[plan.seed],
        seconds=0.0, notes="the plan asked for no evaluation (evaluate_tokens=0)",
    )  # fmt: skip


def say_row(row: Mapping[str, Any]) -> str:
    """Return one measured row as a line of text."""
    shown = [f"{row['measure']}:"]
    for name in ("student", "teacher", "ratio", "state_off", "untrained"):
        if isinstance(row.get(name), int | float):
            shown.append(f"{name.replace('_', ' ')} {row[name]:.4g}")
    return " ".join([*shown, row.get("verdict") or row.get("note") or ""])


def save(
    job: Job,
    student: nn.Module,
    full: Heads,
    table: DamageTable | None,
    evidence: Evidence,
    partial: Path,
    progress: Progress,
) -> None:
    """Write the student as an ordinary transformers folder, with card, plan, evidence and damage table."""
    progress.stage("save", f"{partial}, {job.info.dtype}")
    if is_main():
        for one in _teachers_part(student):
            one.data = one.data.to(getattr(torch, job.info.dtype))
        student.save_pretrained(partial)  # pyright: ignore[reportCallIssue]
        job.tokenizer.save_pretrained(partial)
        io.write_json(partial / "evidence.json", evidence.to_json())
        io.write_json(partial / "plan.json", job.plan.to_json())
        about = {"teacher": job.name, "teacher_digest": teacher_digest(job.teacher), "plan": job.plan.to_json()}
        io.write_json(partial / "lineament.json", about)
        if table is not None:
            table.save(partial / "damage.json")
            io.write_bytes(partial / "damage.png", table.figure(full))
        card = model_card(
            title=f"{Path(job.name).name} in linear time", teacher=job.name, plan=job.plan, rows=evidence.rows,
            notes=evidence.notes, full=full, heads=job.info.layers * job.info.key_heads,
            licence=licence_of(job.teacher.config, job.card),
        )  # fmt: skip
        io.write_text(partial / "README.md", card)
    wait_for_all()
