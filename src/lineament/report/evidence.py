"""What was measured, beside what was claimed."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from typing import Any

from rich.table import Table

from lineament._base.errors import InputError, near_miss
from lineament.report.machine import machine, versions
from lineament.report.tables import table


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The result of an experiment: a claim, the threshold fixed before the run, what was measured, and whether it held.

    Args:
        name: what was done.
        rows: the measurements, one mapping per line, system and baseline side by side.
        claim: what is claimed, with its size and direction.
        threshold: the rule in words, written before the run.
        passed: True or False by that rule; None where there is no verdict.
        seeds: of the runs behind the rows.
        seconds: of wall clock.
        notes: what a reader should know besides.
        versions: of the packages, filled in.
        machine: what it ran on, filled in.

    Example:
        >>> found = Evidence(name="cache", rows=[{"tokens": 32768, "ratio": 0.29}], threshold="<= 0.30", passed=True)
        >>> Evidence.from_json(found.to_json()) == found
        True
    """

    name: str
    rows: Sequence[Mapping[str, Any]] = ()
    claim: str = ""
    threshold: str = ""
    passed: bool | None = None
    seeds: Sequence[int] = ()
    seconds: float = 0.0
    notes: str = ""
    versions: Mapping[str, str] = field(default_factory=versions)
    machine: Mapping[str, Any] = field(default_factory=machine)

    def __post_init__(self) -> None:
        # plain JSON values from here on, so that what is read back equals what was written
        for name in ("rows", "seeds", "versions", "machine"):
            object.__setattr__(self, name, _plain(getattr(self, name)))

    @classmethod
    def judged(
        cls,
        found: Mapping[str, float],
        rules: Mapping[str, tuple[float, float]],
        *,
        verdict: bool = True,
        **fields: Any,
    ) -> "Evidence":
        """Build evidence whose verdict is that every number lies in its interval.

        Args:
            found: the number of every rule. rules: name -> (at least, at most), fixed before the run.
            verdict: False where the scale is too small for one.
            fields: the others; `rows` come before those of the rules.

        Example:
            >>> Evidence.judged({"lead": 0.2}, {"lead": (0.1, 9.0)}, name="recall").passed
            True
        """
        made = [
            {"what": rule, "found": found[rule], "at least": low, "at most": high, "held": low <= found[rule] <= high}
            for rule, (low, high) in rules.items()
        ]
        words = "; ".join(f"{rule} from {low:g} to {high:g}" for rule, (low, high) in rules.items())
        passed = all(row["held"] for row in made) if verdict else None
        return cls(**{**fields, "rows": [*fields.get("rows", ()), *made], "threshold": words, "passed": passed})

    def to_json(self) -> dict[str, Any]:
        """Return a value for `json.dumps`; numbers that JSON lacks (NaN, infinity) become null."""
        return finite(asdict(self))

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | str) -> "Evidence":
        """Read what `to_json` gave, or its text.

        Raises:
            InputError: not an Evidence; the field is named.
        """
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise InputError(f"this is not evidence: not valid JSON ({error})") from None
        if not isinstance(value, Mapping) or "name" not in value:
            raise InputError("this is not evidence: expected a JSON object with at least a name")
        known = [each.name for each in fields(cls)]
        for key in value:
            if key not in known:
                raise InputError(f"evidence has no field {key!r}.{near_miss(key, known)} Known: {', '.join(known)}.")
        return cls(**value)

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        return {True: "held", False: "did not hold", None: "no verdict"}[self.passed]

    def table(self) -> Table:
        """Lay the rows out for the terminal, the verdict above them."""
        return table(self.rows, title=f"{self.name}: {self.verdict}")

    def tables(self) -> list[Table]:
        """Lay them out as several tables: rows that follow one another with the same keys share one."""
        runs = [list(run) for _, run in groupby(self.rows, key=list)]
        return [table(run, title=None if i else f"{self.name}: {self.verdict}") for i, run in enumerate(runs)]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "tolist"):  # numbers and arrays of numpy and torch
        return _plain(value.tolist())
    return str(value)


def finite(value: Any) -> Any:
    """Return a value of mappings and lists with None for the numbers that JSON lacks: NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
