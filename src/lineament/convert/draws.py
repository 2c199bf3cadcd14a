"""What a conversion trains on, drawn by step number: the pool of transfer, the batches of distillation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lineament.convert import distil as distillation
from lineament.convert.job import Job
from lineament.convert.positions import jumped_positions, model_inputs
from lineament.graph.stream import Batch


def windows_of(job: Job, ids: Sequence[Tensor], seed: int) -> list[Batch]:
    """Return a teacher's arguments for windows [1, T] of ids, their positions spread as the plan says."""
    return [model_inputs(one, jumped_positions(one, job.reach, seed + at)) for at, one in enumerate(ids)]


def pool_windows(job: Job) -> tuple[list[Batch], list[Tensor]]:
    """Return the windows of the transfer pool, training text and a share of retrieval prompts, and their answers."""
    plan = job.plan
    length = max(plan.transfer_lengths)
    asked = round(plan.distil_retrieval * plan.transfer_pool)
    windows = [job.corpus("train").batch(step, length, 1) for step in range(plan.transfer_pool - asked)]
    answers = [torch.zeros_like(one, dtype=torch.bool) for one in windows]
    if asked:
        ids, answer = job.prompts("train")(length, asked, 0)
        windows, answers = windows + list(ids.split(1)), answers + list(answer.split(1))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(plan.seed)).tolist()
    return windows_of(job, [windows[one] for one in order], job.plan.seed * 4001), [answers[one] for one in order]


def draws(job: Job, lengths: Sequence[int], offset: int = 0) -> distillation.Batches:
    """Return the batches of distillation by step number."""
    prompts = job.prompts("train") if job.plan.distil_retrieval else None
    return distillation.batches(job.plan, job.corpus("train"), prompts, lengths, offset=offset, reach=job.reach)
