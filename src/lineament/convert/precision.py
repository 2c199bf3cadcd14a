"""Which precision training runs in: bfloat16 autocast over float32 master weights where the machine is fast at it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from lineament._base.errors import InputError

GAIN = 1.25  # bf16 matmuls must be so many times as fast: casts and softmax in float32 take their part


def fast_bf16(device: torch.device) -> bool:
    """Say whether bf16 matmuls are fast there (any recent GPU; a CPU is asked with a clock)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "mps" or _gain() > GAIN


@cache
def _gain() -> float:
    """Time a layer-sized product in float32 and bfloat16 on this CPU; flags of the processor say too little."""
    best = []
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.ones(1024, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            torch.mm(x, w)
            seconds.append(time.perf_counter() - start)
        best.append(min(seconds))
    return best[0] / best[1]


def resolve(precision: str, device: torch.device) -> str:
    """Turn "auto" into "bf16" or "fp32".

    Example:
        >>> resolve("fp32", torch.device("cpu"))
        'fp32'
    """
    if precision == "auto":
        return "bf16" if fast_bf16(device) else "fp32"
    if precision not in ("bf16", "fp32"):
        raise InputError(f"precision {precision!r}; expected auto, bf16 or fp32")
    return precision


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the autocast context of a resolved precision (a no-op for fp32)."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Count numbers below 1e-38 as 0 for the time of a block: on a CPU one of them costs as much as a hundred."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
