"""Where a model computes and in which dtype, asked for by name."""

import torch
from accelerate import PartialState

from lineament._base.errors import InputError, unknown

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_device(name: str = "auto") -> torch.device:
    """Return a device by name ("cpu", "cuda:1", "mps", ...); "auto" is this process's accelerator, or else the CPU.

    Raises:
        InputError: there is no such device here.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device(PartialState().device or "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without that backend
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"device {name!r} can't be used: {reason}") from None
    return device


def find_dtype(name: str) -> torch.dtype:
    """Return the dtype of weights by name.

    Raises:
        InputError: unknown.

    Example:
        >>> find_dtype("bf16")
        torch.bfloat16
    """
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name]
