"""Rows as tables: the same few rules for the terminal and the page."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text  # never markup: what stands in brackets is data

Row = Mapping[str, Any]


def table(rows: Sequence[Row], *, title: str | None = None, columns: Iterable[str] | None = None) -> Table:
    """Lay rows out for the terminal.

    Args:
        rows: one mapping per line; a value a row lacks stays empty.
        title: above the table.
        columns: which keys, in which order; all in order of appearance if None.

    Returns:
        A rich table; numbers stand to the right.

    Example:
        >>> table([{"model": "teacher", "perplexity": 21.0437}]).row_count
        1
    """
    names = list(columns) if columns is not None else columns_of(rows)
    head = None if title is None else Text(title, style="table.title")
    result = Table(title=head, title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in names:
        number = numeric(rows, name)  # words make room before numbers do
        result.add_column(
            Text(name.replace("_", " ")), justify="right" if number else "left", overflow="fold", no_wrap=number
        )
    for row in rows:
        result.add_row(*(Text(cell(row.get(name))) for name in names))
    return result


def cell(value: Any) -> str:
    """Write one value for people: four significant digits, a dash for nothing, an interval in brackets.

    Example:
        >>> cell(21.0437), cell(None), cell((0.98, 1.0214)), cell(True), cell(134515008)
        ('21.04', '-', '[0.98, 1.021]', 'yes', '134,515,008')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {cell(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return f"[{', '.join(cell(each) for each in value)}]"
    return str(value)


def columns_of(rows: Sequence[Row]) -> list[str]:
    """List the keys of all rows in order of appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def numeric(rows: Sequence[Row], name: str) -> bool:
    """Say whether a column holds numbers or intervals only."""
    found = [row[name] for row in rows if row.get(name) is not None]
    return bool(found) and all(isinstance(x, int | float | list | tuple) and not isinstance(x, bool) for x in found)


def _number(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    text = f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return "0" if text == "-0" else text
