"""Loops over one token's numbers, compiled by numba (extra `cpu`): when they can run, and what they are handed.

At one token, operators are bound by their calls and by a pass over the state each; a loop reads it once.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineament._base import extras

DTYPES = (torch.float32, torch.float64)
LARGE, THREADS = 2**21, 4  # numbers in a state, and threads, beyond which operators on all threads catch up
# infinities are values here: a decay or a log scale of -inf
OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "arcp", "nsz"}}
available = cache(extras.available)


def refused(changed: Tensor, *tensors: Tensor) -> str | None:
    """Say why a compiled loop can't run on what it changes in place and on a token's tensors; None when it can."""
    if not available("numba"):
        return "numba is not installed (pip install 'lineament[cpu]')"
    if changed.device.type != "cpu":
        return f"on {changed.device.type}, not the CPU"
    if changed.dtype not in DTYPES or any(x.dtype != changed.dtype for x in tensors):
        found = next((x.dtype for x in tensors if x.dtype != changed.dtype), changed.dtype)
        return f"{found} beside a state in {changed.dtype}; all must be float32 or all float64"
    if not changed.is_contiguous():
        return "a state that is a view"
    if changed.numel() > LARGE and torch.get_num_threads() > THREADS:
        return f"a state of {changed.numel()} numbers, faster by operators on {torch.get_num_threads()} threads"
    if torch.compiler.is_compiling():
        return "inside a compiled graph"
    return None


def arrays(*tensors: Tensor) -> list[Any]:
    """Return numpy arrays on the tensors' own memory, or on a contiguous copy: one layout, compiled once."""
    return [(x.detach() if x.requires_grad else x).contiguous().numpy() for x in tensors]


def written(*tensors: Tensor) -> list[Any]:
    """Return numpy arrays on the memory of what a loop changes or fills, which must not be a copy."""
    assert all(x.is_contiguous() for x in tensors)
    return arrays(*tensors)


def _digest(function: Callable[..., Any]) -> str:
    """Name the content of a function's file and, since their names do the same, of the loops that it imports."""
    called = [x.py_func.__qualname__ for x in function.__globals__.values() if hasattr(x, "py_func")]
    file = Path(function.__code__.co_filename)
    content = file.read_bytes() if file.is_file() else function.__code__.co_code  # a frozen program has no files
    return hashlib.sha256(content + " ".join(sorted(called)).encode()).hexdigest()[:12]


def loop(function: Callable[..., Any], signature: tuple[Any, ...] | None = None) -> Callable[..., Any]:
    """Compile at the first call (at once for one signature if given), and keep the result where there is a place.

    numba keeps results by a function's name and its file's time, and doesn't notice when a file that it calls into has
    changed; so the name says what stands in all of them.
    """
    from numba import njit

    function.__qualname__ = f"{function.__name__}_{_digest(function)}"
    try:
        return njit(signature, cache=True, **OPTIONS)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return njit(signature, **OPTIONS)(function)
