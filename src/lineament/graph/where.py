"""Choosing modules of any model by one `Where`, and saying what is there when nothing fits."""

import re
from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import nn

from lineament._base.errors import InputError, near_miss

Where = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""A glob over dotted names (`*` also crosses dots), a class, or a predicate of name and module."""


def select(model: nn.Module, where: Where) -> dict[str, nn.Module]:
    """Find modules by name, class or predicate.

    A module that stands in several places (a shared layer) is listed under each of its names. The model itself has the
    empty name; a glob other than `""` never means it.

    Args:
        model: any module.
        where: `"*.self_attn"`, `nn.Linear` (subclasses too), or `lambda name, module: ...`.

    Returns:
        Name -> module, in the model's order; never empty.

    Raises:
        InputError: nothing matches; the message lists what the model has.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> list(select(model, nn.Linear)), list(select(model, "1"))
        (['0', '2'], ['1'])
    """
    found = {
        name: module for name, module in model.named_modules(remove_duplicate=False) if _matches(where, name, module)
    }
    if not found:
        raise InputError(_nothing(model, where))
    return found


def outline(model: nn.Module) -> dict[str, tuple[str, int]]:
    """Summarise a model's modules: name with numbers as `*` -> (class, how many).

    Example:
        >>> outline(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
        {'*': ('Linear', 2)}
    """
    found: dict[str, tuple[str, int]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
            kind, count = found.get(pattern, (type(module).__name__, 0))
            same = kind if kind == type(module).__name__ else f"{kind}, ..."
            found[pattern] = (same, count + 1)
    return found


def _matches(where: Where, name: str, module: nn.Module) -> bool:
    if isinstance(where, str):
        return name == where if not where or not name else fnmatchcase(name, where)
    if isinstance(where, type):
        return isinstance(module, where)
    return bool(where(name, module))


def _nothing(model: nn.Module, where: Where) -> str:
    there = outline(model)
    if isinstance(where, str):
        asked, hint = (
            f"no module is called {where!r}",
            near_miss(where, [*there, *(n for n, _ in model.named_modules())]),
        )
    elif isinstance(where, type):
        kinds = {type(module).__name__ for module in model.modules()}
        asked, hint = f"no module is a {where.__name__}", near_miss(where.__name__, kinds)
    else:
        asked, hint = f"no module fits the predicate {getattr(where, '__name__', where)!r}", ""
    listed = [f"{name} ({kind}{f' x{count}' if count > 1 else ''})" for name, (kind, count) in there.items()]
    more = f", and {len(listed) - 20} more" if len(listed) > 20 else ""
    return f"{asked} in {type(model).__name__}.{hint} There are: {', '.join(listed[:20]) or 'no submodules'}{more}"
