"""From a time budget to step counts: a measured warm-up, written down before step 1."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.seeds import seeded
from lineament.convert.plan import Plan, parse_budget
from lineament.train import to_device

MARGIN = 0.92  # checkpoints, logging and a busy machine take their part
LEAST = 2  # steps
POOL_SHARE, POOL_LEAST = 0.5, 4  # of the time for transfer that its pool may take, if that leaves so many windows
PER_WINDOW = 10  # steps of transfer at most, where distillation can have the rest; the hours measured took up to 9


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds measured on this machine: carrying the plan's whole pool through the teacher, one transfer step of all
    layers together, one distillation step."""

    pool: float
    transfer_step: float
    distil_step: float

    def seconds(self, transfer_steps: int, distil_steps: int, pool: float = 1.0) -> float:
        """Return about how long so many steps take, with a share of the pool."""
        return pool * self.pool + transfer_steps * self.transfer_step + distil_steps * self.distil_step

    def to_json(self) -> dict[str, float]:
        """Return plain JSON values."""
        return asdict(self)


def seconds_per_step(
    module: nn.Module,
    loss: Callable[[nn.Module, Any], tuple[Tensor, dict[str, float]]],
    batches: Callable[[int], Any],
    *,
    context: Callable[[], Any],
    steps: int = 2,
    optimiser: float = 1.05,
) -> float:
    """Time forward and backward of a few steps without changing a weight.

    Every batch is run once before the clock starts: the first of a length may take half as long again.

    Args:
        batches: index -> batch, moved to where the module is, as `train.fit` does.
        context: makes the autocast context. optimiser: factor for the update, which is not run.
    """
    device = next(module.parameters()).device
    with seeded(0):
        for turn in range(2 * steps):
            if turn == steps:
                _finish()
                start = time.perf_counter()
            with context():
                value, _ = loss(module, to_device(batches(turn % steps), device))
            if value.requires_grad:
                value.backward()
            module.zero_grad(set_to_none=True)
    _finish()
    return (time.perf_counter() - start) / steps * optimiser


def _finish() -> None:
    """Wait for a GPU, which works on while the clock is read."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def resolve_budget(plan: Plan, timing: Timing) -> Plan:
    """Return the plan with its step counts replaced by what the budget holds.

    A pool that would take more than half of the time for transfer is made smaller: on a slow machine a few windows seen
    often are worth more than many that no step has time for. Where steps are quick (a GPU, few layers to convert) each
    window is seen ten times, and distillation, which draws new text at every step, takes what is left.

    Example:
        >>> timing = Timing(pool=10.0, transfer_step=1.0, distil_step=2.0)
        >>> found = resolve_budget(Plan(budget="100", budget_transfer=0.5), timing)
        >>> found.transfer_steps, found.distil_steps
        (36, 23)
    """
    seconds = parse_budget(plan.budget)
    if seconds is None:
        return plan
    seconds *= MARGIN
    transfer = plan.transfer_steps > 0 and timing.transfer_step > 0
    distil = plan.distil != "none" and plan.distil_steps > 0 and timing.distil_step > 0
    share = plan.budget_transfer if transfer and distil else 1.0
    changes: dict[str, int] = {}
    spent = 0.0
    if transfer:
        each, step, room = timing.pool / plan.transfer_pool, timing.transfer_step, share * seconds
        fits = max(POOL_SHARE * room / each, room / (each + PER_WINDOW * step)) if each else plan.transfer_pool
        windows = min(plan.transfer_pool, max(POOL_LEAST, int(fits)))
        steps = max(LEAST, int((room - windows * each) / step))
        steps = min(steps, PER_WINDOW * windows) if distil else steps
        spent = min(room, windows * each + steps * step)
        changes |= {"transfer_pool": windows, "transfer_steps": steps}
    if distil:
        steps = max(LEAST, int((seconds - spent) / timing.distil_step))
        extend = round(steps * plan.extend_steps / max(1, plan.distil_steps + plan.extend_steps))
        changes |= {"distil_steps": steps - extend, "extend_steps": extend}
    return plan.change(changes)


def lengths_in_turn(lengths: Sequence[int]) -> int:
    """Return how many steps a fair timing takes: one of each length, at most four."""
    return min(4, len(lengths))
