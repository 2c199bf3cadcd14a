"""Options that depend on the tensor: a number, a gradient over the layers, or a number per part of the name."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lineament._base.errors import InputError

Setting = Any
"""A number; a gradient `[0, .5, 1]` over the layers; {part of the name: setting}; or mergekit's [{filter, value}]."""

_WORDS = {float: "finite number", int: "whole number", bool: "true or false", str: "word"}
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def evaluate(setting: Setting, name: str, t: float) -> Any:
    """Return what a setting says for one tensor; None where no filter fits.

    Args:
        setting: see `Setting`. Filters are parts of names, `"*"` or no filter fits all; the first that fits counts.
        name: of the tensor. t: place of its layer, 0 (the first, and what belongs to no layer) to 1 (the last).

    Example:
        >>> evaluate([0, 1, 0], "layers.3.w", 0.25), evaluate({"mlp": 0.2, "*": [0, 1]}, "layers.0.attn.w", 0.5)
        (0.5, 0.5)
    """
    if isinstance(setting, Mapping) and set(setting) <= {"value", "filter"} and "value" in setting:
        setting = [setting]
    elif isinstance(setting, Mapping):
        setting = [{"filter": part, "value": value} for part, value in setting.items()]
    if not isinstance(setting, list | tuple):
        return setting
    if all(not isinstance(each, Mapping) for each in setting):
        return _along(setting, t)
    for each in setting:
        part = each.get("filter") if isinstance(each, Mapping) else None
        if part is None or part == "*" or part in name:
            return evaluate(each["value"] if isinstance(each, Mapping) else each, name, t)
    return None


def _along(values: Sequence[Any], t: float) -> Any:
    if not values:
        return None
    values = [number(value) if isinstance(value, str) else value for value in values]
    place = t * (len(values) - 1)
    below = int(place)
    if any(isinstance(value, bool | str) for value in values):
        return values[below]
    above = min(below + 1, len(values) - 1)
    return (1 - (place - below)) * values[below] + (place - below) * values[above]


def number(text: Any) -> Any:
    """Read "1e-4", which YAML takes for text, as a number; other text stays.

    Example:
        >>> number("1e-4"), number("l1")
        (0.0001, 'l1')
    """
    try:
        return float(text)
    except ValueError:
        return text


def check_setting(setting: Setting, what: str, kind: type) -> None:
    """Check a setting's form and the type of every value in it before any tensor is looked at.

    Raises:
        InputError: a value of another type, an empty list, a mapping without a value.
    """
    if isinstance(setting, Mapping):
        if set(setting) <= {"value", "filter"} and "value" not in setting:
            raise InputError(f"{what} has a filter and no value: {dict(setting)}")
        parts = [setting.get("filter")] if "value" in setting else setting
        if odd := [part for part in parts if not isinstance(part, str | None)]:
            raise InputError(f"{what} has the filter {odd[0]!r}; expected text, a part of tensors' names (in quotes)")
        values: Iterable[Any] = [setting["value"]] if "value" in setting else setting.values()
        for value in values:
            check_setting(value, what, kind)
        return
    if isinstance(setting, list | tuple):
        if not setting:
            raise InputError(f"{what} is an empty list; expected a number, a gradient or filters")
        for value in setting:
            check_setting(value, what, kind)
        return
    value = number(setting) if isinstance(setting, str) and kind is float else setting
    allowed: dict[type, Any] = {bool: bool, float: int | float, int: int, str: str | bool}
    fits = isinstance(value, allowed[kind]) and (kind in (bool, str) or not isinstance(value, bool))
    if not fits or value != value or value in (float("inf"), -float("inf")):
        raise InputError(f"{what} is {setting!r}; expected a {_WORDS[kind]}")


def layer_places(names: Iterable[str]) -> dict[str, float]:
    """Return each tensor's place along the layers of its stack: 0 for the first, 1 for the last, 0 outside.

    Example:
        >>> layer_places(["embed.w", "layers.0.w", "layers.1.w", "layers.2.w"])
        {'embed.w': 0.0, 'layers.0.w': 0.0, 'layers.1.w': 0.5, 'layers.2.w': 1.0}
    """
    found = {name: _LAYER.search(name) for name in names}
    most: dict[str, int] = {}
    for name, match in found.items():
        if match:
            stack = name[: match.start(1)]
            most[stack] = max(most.get(stack, 0), int(match[1]))
    places = {}
    for name, match in found.items():
        last = most[name[: match.start(1)]] if match else 0
        places[name] = int(match[1]) / last if match and last else float(bool(match))
    return places
