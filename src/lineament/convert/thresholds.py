"""What a student shall reach, fixed before the first run. A missed line is reported as missed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lineament.convert.plan import Plan, parse_budget, parse_keep


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One row of the table of goals.

    Args:
        name: what kind of run it is for. cache: share of the teacher's cache at 32k tokens.
        perplexity: {context: highest ratio to the teacher}.
        points: {context: most percentage points of answer tokens lost to the teacher}.
        above_off: percentage points that the student must score above itself with its linear state switched off.
        gain: share of the teacher's gain from context that is kept.
    """

    name: str
    cache: float
    perplexity: Mapping[int, float]
    points: Mapping[int, float] = field(default_factory=dict)
    above_off: float | None = None
    gain: float = 0.8


DEMO = Bar(
    name="15 minutes", cache=0.30, perplexity={512: 1.02, 2048: 1.04, 8192: 1.10},
    points={512: 3, 1024: 3, 4096: 10},
)  # fmt: skip
HOUR = Bar(
    name="one hour", cache=0.30, perplexity={512: 1.01, 2048: 1.03, 8192: 1.05}, points={512: 2, 1024: 2, 4096: 5}
)
NO_SOFTMAX = Bar(
    name="no softmax head, one hour", cache=0.02, perplexity={512: 1.04, 2048: 1.08, 8192: 1.12}, above_off=30
)
CACHE_CONTEXT = 32768
SLACK = 1.2  # a measured step count may end a little over its budget


def bar_of(plan: Plan) -> Bar:
    """Return the goals that a plan is held to.

    Example:
        >>> bar_of(Plan(budget="15min")).name, bar_of(Plan(keep="none")).name
        ('15 minutes', 'no softmax head, one hour')
    """
    if parse_keep(plan.keep)[0] == "none":
        return NO_SOFTMAX
    seconds = parse_budget(plan.budget)
    return HOUR if seconds is not None and seconds > 900 * SLACK else DEMO


def undecided(row: Mapping[str, Any]) -> bool:
    """Say whether a row's interval holds its goal: so few samples can't tell a pass from a miss.

    Example:
        >>> undecided({"low": 0.9, "high": 1.2, "goal": 1.1}), undecided({"low": 1.0, "high": 1.0, "goal": 1.1})
        (True, False)
    """
    low, high, goal = (row.get(name) for name in ("low", "high", "goal"))
    if low is None or high is None or goal is None:
        return False
    return low <= goal <= high


def verdict(value: float, goal: float | None, *, at_most: bool = True) -> str:
    """Say "pass", "miss" or nothing when there is no goal.

    Example:
        >>> verdict(1.01, 1.02), verdict(0.5, 0.8, at_most=False), verdict(3.0, None)
        ('pass', 'miss', '')
    """
    if goal is None:
        return ""
    return "pass" if (value <= goal if at_most else value >= goal) else "miss"
