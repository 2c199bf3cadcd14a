"""One task after another by LoRA: sequentially, with replay, with a slow adapter; and how much is forgotten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lineament import train
from lineament._base.errors import InputError, unknown
from lineament.data.packing import epoch_rows
from lineament.graph import Where
from lineament.weights.evaluate import Loss
from lineament.weights.fast_slow import ADAPTERS, FastSlow, Reservoir, replay_loss

CONTINUAL = ("sequential", "replay", "i-lora")


@dataclass(frozen=True)
class Lesson:
    """One task of a stream: its name, its training rows (a tuple or mapping of tensors), and what it is scored on."""

    name: str
    rows: Any
    test: Any

    def __len__(self) -> int:
        return len(pytree.tree_leaves(self.rows)[0])


@dataclass(frozen=True)
class Stream:
    """What a stream of tasks left behind.

    Attributes:
        names: of the tasks, in order.
        scores: adapter -> [T, T]: the score on task j after task i.
        points: adapter -> its point after each task, for `line`.
    """

    names: tuple[str, ...]
    scores: Mapping[str, Sequence[Sequence[float]]]
    points: Mapping[str, Sequence[Mapping[str, Tensor]]]

    def average(self, adapter: str = "fast") -> float:
        """Return the mean score over all tasks after the last."""
        return average(self.scores[adapter])

    def forgetting(self, adapter: str = "fast") -> float:
        """Return `mean_{j<T} (max_i a_ij - a_Tj)`."""
        return forgetting(self.scores[adapter])

    def backward_transfer(self, adapter: str = "fast") -> float:
        """Return `mean_{j<T} (a_Tj - a_jj)`; negative when tasks are forgotten."""
        return backward_transfer(self.scores[adapter])


def average(scores: Sequence[Sequence[float]]) -> float:
    """Return the mean of the last row of a table of scores [T, T], a_ij of task j after task i.

    Example:
        >>> average([[0.9, 0.1], [0.5, 0.8]])
        0.65
    """
    _check_square(scores)
    return sum(scores[-1]) / len(scores)


def forgetting(scores: Sequence[Sequence[float]]) -> float:
    """Return how far each task but the last has fallen from its best: `mean_{j<T} (max_i a_ij - a_Tj)`.

    Example:
        >>> forgetting([[0.9, 0.1], [0.5, 0.8]])
        0.4
    """
    _check_square(scores)
    past = range(len(scores) - 1)
    return sum(max(row[j] for row in scores) - scores[-1][j] for j in past) / max(1, len(past))


def backward_transfer(scores: Sequence[Sequence[float]]) -> float:
    """Return how far each task but the last has moved since it was learned: `mean_{j<T} (a_Tj - a_jj)`.

    Example:
        >>> backward_transfer([[0.9, 0.1], [0.5, 0.8]])
        -0.4
    """
    _check_square(scores)
    past = range(len(scores) - 1)
    return sum(scores[-1][j] - scores[j][j] for j in past) / max(1, len(past))


def continual(
    learner: FastSlow, lessons: Sequence[Lesson], config: train.FitConfig, score: Callable[[Any, Any], float], *,
    method: str = "i-lora", batch: int = 32, memory: int = 500, loss: Loss | None = None, consistency: float = 1.0,
    hidden: Where | None = None, target: str = "slow", out: str | Path | None = None,
) -> Stream:  # fmt: skip
    """Teach a model one task after another and score every task after each.

    Training all tasks at once is a stream of one lesson that holds all rows; an adapter per task is a stream each.

    Args:
        learner: a model with a fast and a slow adapter; taught in place. The slow one is averaged whatever the method.
        config: of each task; its seed is counted on by one per task.
        score: (model, `lesson.test`) -> number, higher is better.
        method: "sequential"; "replay" (as many rows of earlier tasks as new ones in every step); or "i-lora" (replay,
            and the fast adapter tied to the slow one, see `replay_loss` for consistency, hidden and target).
        batch: rows of a step. memory: rows kept of all earlier tasks. They are taken in when a task is over, so that a
            step is a function of its number and an interrupted run goes on to the same bits.
        out: folder of the runs' checkpoints, one per task; called again it goes on where it was.

    Raises:
        InputError: an unknown method, no tasks, fewer rows than a batch.
    """
    if method not in CONTINUAL:
        raise unknown("method", method, CONTINUAL)
    if not lessons:
        raise InputError("there are no tasks to learn")
    kept = Reservoir(memory, seed=config.seed)
    strength = consistency if method == "i-lora" else 0.0
    objective = replay_loss(learner, loss, consistency=strength, hidden=hidden, target=target)
    scores: dict[str, list[list[float]]] = {adapter: [] for adapter in ADAPTERS}
    points: dict[str, list[dict[str, Tensor]]] = {adapter: [] for adapter in ADAPTERS}
    for index, lesson in enumerate(lessons):
        settings = replace(config, seed=config.seed + index)
        replaying = kept if index and method != "sequential" else None
        train.fit(
            learner.train(), _batches(lesson, batch, settings.seed, replaying), objective, settings,
            out=None if out is None else Path(out) / f"task-{index}",
            on_step=lambda step, numbers: learner.average_(), description=lesson.name,
        )  # fmt: skip
        kept.add(lesson.rows)
        learner.eval()
        for adapter in ADAPTERS:
            points[adapter].append(learner.point(adapter))
            with learner.using(adapter) as model, torch.no_grad():
                scores[adapter].append([float(score(model, each.test)) for each in lessons])
    return Stream(tuple(lesson.name for lesson in lessons), scores, points)


def _batches(lesson: Lesson, size: int, seed: int, memory: Reservoir | None) -> Callable[[int], tuple[Any, Any]]:
    rows = epoch_rows(len(lesson), size, seed=seed, what="rows")

    def batches(step: int) -> tuple[Any, Any]:
        at = rows(step)
        current = pytree.tree_map(lambda x: x[at], lesson.rows)
        return current, None if memory is None else memory.draw(size, seed=seed * 1_000_003 + step)

    return batches


def _check_square(scores: Sequence[Sequence[float]]) -> None:
    if not scores or any(len(row) != len(scores) for row in scores):
        raise InputError(f"scores have rows of {[len(row) for row in scores]}; expected one row and column per task")
