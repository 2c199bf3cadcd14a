"""Several implementations of one function, and the choice between them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lineament._base.errors import unknown

Usable = Callable[..., str | None]
_PLAIN: ContextVar[bool] = ContextVar("plain_autograd", default=False)


@contextmanager
def plain_autograd() -> Iterator[None]:
    """Have "auto" take the backend made of ordinary differentiable operators while the block runs.

    An explanation follows the autograd graph, where an own backward would be one opaque node.
    """
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def wants_plain_autograd() -> bool:
    """Say whether a `plain_autograd` block is running."""
    return _PLAIN.get()


def always(*tensors: Tensor | None) -> str | None:
    """Say that a backend can run anywhere."""
    return None


def widest(device: torch.device) -> torch.dtype:
    """Return the widest float that a device has: float64, or float32 on Apple's GPUs.

    Example:
        >>> widest(torch.device("cpu")), widest(torch.device("mps"))
        (torch.float64, torch.float32)
    """
    return torch.float32 if device.type == "mps" else torch.float64


@cache
def _resolve(target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")
    return getattr(import_module(module), function)


@dataclass(frozen=True)
class Backend:
    """An implementation: where it is ("module:function", imported when taken), and why it can't run, if so."""

    target: str
    usable: Usable = always
    plain: bool = False
    """Made of ordinary differentiable operators alone."""

    def load(self) -> Callable[..., Any]:
        return _resolve(self.target)


def usable(table: Mapping[str, Backend], *tensors: Tensor | None) -> list[str]:
    """List the names in `table` that can run on these tensors, best first."""
    return [name for name, backend in table.items() if backend.usable(*tensors) is None]


def choose(table: Mapping[str, Backend], name: str, *tensors: Tensor | None) -> Callable[..., Any]:
    """Return the implementation called `name`; "auto" is the first of the table that can run on these tensors.

    Raises:
        InputError: no such backend. RuntimeError: the forced backend can't run here (with the reason).
    """
    if name == "auto":
        for backend in table.values():
            if backend.usable(*tensors) is None and (backend.plain or not wants_plain_autograd()):
                return backend.load()
        raise RuntimeError(f"no backend can run here: {why(table, *tensors)}")
    if name not in table:
        raise unknown("backend", name, ["auto", *table])
    reason = table[name].usable(*tensors)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} can't run here: {reason}")
    return table[name].load()


def why(table: Mapping[str, Backend], *tensors: Tensor | None) -> str:
    """Explain what "auto" takes on these tensors and why the better ones were passed over."""
    lines = []
    for name, backend in table.items():
        reason = backend.usable(*tensors)
        lines.append(f"{name}: {'chosen' if reason is None else reason}")
        if reason is None:
            break
    return "; ".join(lines)
