"""The door: a teacher, a plan and a folder in; a student with its evidence out. Can be killed and gone on with."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from lineament import io
from lineament._base.errors import InputError
from lineament.convert import stages
from lineament.convert.card import card_in
from lineament.convert.check import require_fit
from lineament.convert.folders import load, look
from lineament.convert.job import Job
from lineament.convert.parts import teacher_digest
from lineament.convert.plan import Plan
from lineament.convert.plans import plan as plan_named
from lineament.convert.precision import denormals_flushed
from lineament.convert.processes import is_main, join_processes, shared_folder, wait_for_all, whole_models
from lineament.convert.progress import Progress
from lineament.convert.text import load_documents
from lineament.models.load import find_model
from lineament.models.place import find_dtype
from lineament.report import Evidence
from lineament.train.sharded import require_shardable

SCRATCH = "work"


def run(
    model: str | Path | tuple[Any, Any],
    plan: Plan | str = "default",
    out: str | Path = "student",
    *,
    budget: str | float | None = None,
    resume: bool = True,
    dtype: str | None = None,
) -> Evidence:
    """Convert a pretrained softmax transformer to a linear-time student.

    Stages: damage (what stays softmax) -> inherit -> transfer -> distil -> extend -> evaluate -> save. Work happens
    in `OUT.partial`; `OUT` appears complete or not at all, and the same call goes on after a kill, ending with
    bit-identical weights on the same machine. Under `accelerate launch` every process trains on a batch of its own and
    the gradients are averaged; a run must go on with as many processes as it began with. With FSDP2, teacher and
    student are sharded while the student is distilled.

    Args:
        model: a folder, a Hub name, a GGUF file, "smollm2", or (model, tokenizer) already loaded.
        plan: a `Plan`, a name of `PLANS` or a JSON file.
        out: folder for the student; must not exist.
        budget: training time such as "15min"; replaces the plan's own and its step counts.
        resume: go on from `OUT.partial` when it is there; False refuses it.
        dtype: "fp32", "bf16" or "fp16", of the saved weights; None takes the teacher's. What the mixers have learned is
            saved as exactly as it was trained.

    Returns:
        What was measured, also saved as evidence.json.

    Raises:
        InputError: the model, the plan, the dtype, the text or the folder won't do; nothing was made.
        KeyboardInterrupt: the step in progress was finished and saved; the same call goes on.
    """
    sharding = join_processes()
    plan, saved = plan_named(plan), None if dtype is None else find_dtype(dtype)
    if budget is not None:
        plan = plan.change({"budget": str(budget)})
    out = Path(out)
    if out.exists():
        raise InputError(f"{out} exists already; choose another folder or remove it")
    with whole_models():
        job = replace(_job(model, plan, out, saved), sharding=sharding)
        if sharding is not None:
            require_shardable(job.teacher)  # now, not after hours of transfer
        with shared_folder(out, resume=resume, scratch=SCRATCH) as partial:
            _same_work(partial / SCRATCH / "asked.json", job)
            with Progress(quiet=not is_main()) as progress, denormals_flushed():
                return convert_in(job, partial, partial / SCRATCH, progress)


def _job(model: str | Path | tuple[Any, Any], plan: Plan, out: Path, saved: torch.dtype | None) -> Job:
    """Check a plan on a model, load both with the text, and put the model where it computes."""
    require_fit(plan, look(model, weights=False), out)  # what a config says, before weights are fetched
    require_fit(plan, info := look(model), out)
    info = info if saved is None else replace(info, dtype=str(saved).removeprefix("torch."))
    documents = load_documents(plan.data)
    teacher, tokenizer = load(model)
    if not isinstance(model, tuple):
        teacher.to(PartialState().device)
    job = Job(
        plan=plan, info=info, teacher=teacher, tokenizer=tokenizer, documents=documents, name=info.name,
        card="" if isinstance(model, tuple) else card_in(find_model(model)),
    )  # fmt: skip
    job.require_text()
    return job


def convert_in(job: Job, partial: Path, work: Path, progress: Progress) -> Evidence:
    """Run all stages of a job in its folders; each leaves a file that a later call starts from."""
    job = stages.settled(job, work)
    table = stages.damage(job, work, progress)
    full = stages.kept(job, table)
    student = stages.inherit(job, full, table, work, progress)
    job = replace(job, plan=stages.resolved(job, student, work, progress))
    stages.transfer_all(job, student, work, progress)
    student = stages.rounded(job, stages.distil_all(job, student, work, progress))
    evidence = stages.evaluation(job, student, full, work, progress)
    stages.save(job, student, full, table, evidence, partial, progress)
    return evidence


def _same_work(path: Path, job: Job) -> None:
    """Refuse to go on with the partial work of another plan, model or text.

    Work begun by versions that wrote down no digests is told apart by plan and name alone.
    """
    text = json.dumps(job.documents, sort_keys=True)
    asked = {
        "plan": job.plan.to_json(), "model": job.name, "weights": teacher_digest(job.teacher),
        "text": hashlib.sha256(text.encode()).hexdigest()[:32],
    }  # fmt: skip
    if is_main() and not path.exists():
        io.write_json(path, asked)
    wait_for_all()
    before = json.loads(path.read_text(encoding="utf-8"))
    fields = sorted({*asked["plan"], *before["plan"]})
    changed = [one for one in fields if asked["plan"].get(one) != before["plan"].get(one)]
    said = {
        "plan": f"plan fields {', '.join(changed)}", "model": f"model {before['model']}",
        "weights": f"weights of {job.name}, which has changed since",
        "text": f"text: {', '.join(job.plan.data)} has changed since",
    }  # fmt: skip
    if other := next((what for name, what in said.items() if name in before and before[name] != asked[name]), None):
        raise InputError(f"{path.parent.parent} was begun with other {other}; remove it or give another folder")


def clear_partial(out: str | Path) -> None:
    """Remove what an unfinished run left for `out`."""
    shutil.rmtree(io.partial_path(out), ignore_errors=True)


__all__ = ["clear_partial", "convert_in", "run"]
