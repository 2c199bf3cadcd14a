"""Which precision training runs in: bfloat16 autocast over float32 master weights where the machine is fast at it."""

import torch

from lineament._base.errors import InputError


def fast_bf16(device: torch.device) -> bool:
    """Say whether bf16 matmuls are fast there (matrix units on CPU, any recent GPU)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return True
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in probes)


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
