"""Arithmetic that autocast must not take in half precision: sums over many tokens, states, normalisers."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which operators on `device` keep their inputs' dtypes; nothing is entered where they do.

    Example:
        >>> x = torch.ones(1, 1)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     inside = x @ x
        ...     with without_autocast(x.device):
        ...         kept = x @ x
        >>> inside.dtype, kept.dtype
        (torch.bfloat16, torch.float32)
    """
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):  # (not on "meta", for one)
        return torch.autocast(kind, enabled=False)
    return nullcontext()
