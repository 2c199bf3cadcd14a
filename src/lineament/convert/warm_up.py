"""How long the steps of a conversion take on this machine, measured before a budget is turned into step counts."""

from typing import Any

from torch import nn

from lineament.convert import distil as distillation
from lineament.convert import transfer as transferring
from lineament.convert.budget import Timing, lengths_in_turn, seconds_per_step
from lineament.convert.draws import draws, pool_windows
from lineament.convert.job import Job
from lineament.convert.parts import converted, lora_targets, parts
from lineament.convert.precision import autocast
from lineament.convert.processes import in_shards
from lineament.convert.progress import Clock
from lineament.convert.transfer import LayerPool


def measure_timing(job: Job, student: nn.Module) -> Timing:
    """Time the pool, one transfer step of all layers and one distillation step; no weight changes."""
    pool, step = transfer_seconds(job, student)
    return Timing(pool=pool, transfer_step=step, distil_step=distil_seconds(job, student))


def transfer_seconds(job: Job, student: nn.Module) -> tuple[float, float]:
    """Return the seconds that the pool takes, and those of one step of every layer (each kind of layer timed once)."""
    plan, found = job.plan, parts(job.teacher)
    fillings = {m.layer: m.filling for m in converted(student).values() if list(m.filling.parameters())}
    if not plan.transfer_steps or not fillings:
        return 0.0, 0.0
    rows, (windows, answers) = max(1, plan.transfer_tokens // min(plan.transfer_lengths)), pool_windows(job)
    first = min(fillings)
    for _ in range(2):  # the first pass through a model is slower
        clock = Clock()
        pools = transferring.pooled_layers(
            job.teacher, found.layers, found.attentions, windows[:rows], full_heads={}, precision=job.precision,
            last=first,
        )  # fmt: skip
        pool = list(pools)[-1][1]
    pool_seconds = clock.seconds() / (first + 1) / rows * len(windows) * (max(fillings) + 1)
    known: dict[Any, float] = {}
    configs = {m.layer: m.config for m in converted(student).values()}
    for layer, filling in fillings.items():
        shape = tuple(tuple(p.shape) for p in filling.parameters())
        if shape not in known:
            own = _some_heads(pool, configs[layer].key_heads - len(configs[layer].full_heads))
            known[shape] = seconds_per_step(
                filling, transferring.transfer_loss(plan.transfer_loss),
                transferring.pool_batches(own, plan, answers),
                context=lambda: autocast(job.precision, job.device), steps=lengths_in_turn(plan.transfer_lengths),
            )  # fmt: skip
    seconds = sum(known[tuple(tuple(p.shape) for p in one.parameters())] for one in fillings.values())
    return pool_seconds, seconds


def _some_heads(pool: LayerPool, heads: int) -> LayerPool:
    """Take the first key-value heads of a pool and the query heads that belong to them."""
    groups = pool.q[0].shape[2] // pool.k[0].shape[2]
    q, target = ([x[:, :, : heads * groups] for x in xs] for xs in (pool.q, pool.target))
    k, v = ([x[:, :, :heads] for x in xs] for xs in (pool.k, pool.v))
    return LayerPool(q, k, v, target, pool.x)


def distil_seconds(job: Job, student: nn.Module) -> float:
    """Return the seconds of one distillation step, the teacher's pass included."""
    plan = job.plan
    if plan.distil == "none" or not plan.distil_steps:
        return 0.0
    model = distillation.learners(student, plan, lora_targets(student, plan.lora_targets))
    model.train()
    device = job.device
    with in_shards(job.sharding, model, job.teacher, parts(job.teacher).layers, device) as (learner, guide):
        teacher = distillation.Teacher(guide, job.precision)
        seconds = seconds_per_step(
            learner, distillation.make_loss(teacher, plan), draws(job, plan.distil_lengths),
            context=lambda: autocast(job.precision, device), steps=lengths_in_turn(plan.distil_lengths),
        )  # fmt: skip
    distillation.unwrapped(model).eval()
    return seconds
