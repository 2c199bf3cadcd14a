"""Which of many results nobody beats: the Pareto front."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def front(rows: Sequence[Mapping[str, Any]], cost: str, value: str) -> list[Mapping[str, Any]]:
    """Return the rows that no other row beats: none is at most as costly and at least as good, and better in one.

    Args:
        rows: each with both numbers. cost: the key to keep small. value: the key to make large.

    Returns:
        Those rows by rising cost; of equal ones all. A row with NaN is none of them.

    Example:
        >>> rows = [{"size": 1, "dB": 20}, {"size": 2, "dB": 19}, {"size": 3, "dB": 25}]
        >>> [row["size"] for row in front(rows, "size", "dB")]
        [1, 3]
    """

    def beaten(row: Mapping[str, Any]) -> bool:
        return any(
            other[cost] <= row[cost]
            and other[value] >= row[value]
            and (other[cost] < row[cost] or other[value] > row[value])
            for other in rows
        )

    rows = [row for row in rows if not (math.isnan(row[cost]) or math.isnan(row[value]))]
    return sorted((row for row in rows if not beaten(row)), key=lambda row: row[cost])
