# pyright: reportArgumentType=false, reportCallIssue=false
"""What the Triton kernels are compiled for and launched with, and the clock and pairs that several of them read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lineament.ops.recurrence.triton_channel import pairs_kernel
from lineament.ops.recurrence.triton_tiles import NEVER, clock_kernel

CHUNK, CHUNK_WIDE, ROWS = 64, 32, 16
LEAST = 16  # the narrowest matrix product Triton compiles
TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}

# Keys and values of a block (None: all), warps and stages, without decay, with one per head, and with one per channel,
# in bfloat16: about the quickest of those tried on an H100 (docs/speed.md). A variant is "few" where states are too few
# to fill the card, and "saved" where the delta rule's walk keeps them.
TUNED: dict[str, tuple[tuple[int | None, int | None, int, int], ...]] = {
    "states_kernel": ((None, 64, 4, 2), (None, 64, 4, 2), (None, 128, 8, 2)),
    "states_kernel, few": ((64, 32, 4, 3), (64, 32, 4, 3), (32, 128, 4, 2)),
    "states_kernel, delta": ((None, 64, 4, 3), (None, 64, 4, 1), (None, 64, 4, 2)),
    "states_kernel, delta, saved": ((None, 64, 4, 2), (None, 64, 4, 2), (None, 64, 4, 2)),
    "states_kernel, delta, few": ((None, 32, 4, 3), (None, 32, 4, 3), (None, 32, 4, 1)),
    "outputs_kernel": ((None, 128, 4, 2), (None, 128, 4, 2), (None, 64, 4, 2)),
    "own_writes_backward_kernel": ((None, 128, 4, 2), (None, 128, 4, 2), (None, 128, 4, 2)),
    "states_backward_kernel": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 128, 4, 2)),
    "states_backward_kernel, few": ((64, 32, 4, 3), (64, 32, 4, 3), (32, 64, 4, 2)),
    "states_backward_kernel, delta": ((None, 64, 4, 1), (None, 64, 8, 3), (None, 64, 4, 2)),
    "states_backward_kernel, delta, few": ((None, 32, 4, 3), (None, 32, 4, 3), (None, 32, 8, 2)),
    "inputs_backward_kernel": ((None, 128, 4, 2), (None, 128, 8, 2), (None, 64, 8, 2)),
    "inputs_backward_kernel, delta": ((None, 64, 4, 2), (None, 64, 8, 2), (None, 128, 8, 2)),
    "pairs_kernel": ((128, None, 4, 1),) * 3,
    "pairs_backward_kernel": ((64, None, 4, 2),) * 3,
    "solve_kernel": ((None, 128, 2, 2),) * 3,
    "solve_backward_kernel": ((None, 64, 4, 1), (None, 64, 4, 2), (None, 128, 4, 1)),
}
FITTING: dict[tuple, dict[str, int]] = {}  # smaller choices, where TUNED needs more shared memory than the card has
SWITCH = RLock()
WIDE = {"BK": 32, "BV": 32, "num_stages": 1}  # at most, for full products: they hold their operands in registers


def constants(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, chunk_size: int | None
) -> dict[str, Any]:
    """Return what the kernels are compiled for, by the names of their arguments.

    And `dtype`, that of what only products read: states, pairs, what a chunk writes.
    """
    _, Hs, K, V = state.shape
    types = {x.dtype for x in (q, k, v)}
    narrow = types == {torch.bfloat16} and state.dtype == torch.float32 and q.is_cuda  # (not in the interpreter,
    # whose products take bfloat16's bits for integers)
    largest, stored = (CHUNK, torch.bfloat16) if narrow else (CHUNK_WIDE, state.dtype)
    return {
        "Hq": q.shape[2], "Hk": k.shape[2], "Hv": v.shape[2], "Hs": Hs, "R": max(1, q.shape[2] // Hs),
        "K": K, "V": V, "KP": max(LEAST, triton.next_power_of_2(K)), "VP": max(LEAST, triton.next_power_of_2(V)),
        "C": max(LEAST, min(chunk_size or largest, largest)), "GATE": 0 if log_decay is None else log_decay.dim() - 2,
        "ROWS": ROWS, "DT": TYPES[state.dtype], "OT": TYPES[stored], "dtype": stored,
        "PRECISION": "tf32" if types & {torch.bfloat16, torch.float16} else "ieee",
    }  # fmt: skip


def launch(kernel: Any, rows: int, c: dict[str, Any], *tensors: Any, variant: str = "", **more: Any) -> None:
    """Launch a kernel on `rows` chunks or states, each cut into blocks of value and of key channels.

    A kernel that takes BV but not VP is one program a block of values, one that takes BK but not KP one a block of
    keys. Blocks that don't fit into the card's shared memory are halved, once for all.
    """
    delta = "delta" if "DELTA" in kernel.arg_names and c["DELTA"] else ""
    name = ", ".join(filter(None, (kernel.__name__, delta, variant)))
    case = (name, c["KP"], c["VP"], c["C"], c["GATE"], c["dtype"])
    while True:
        tuned = FITTING.get(case) or blocks(name, c)
        given = {n: value for n, value in (c | tuned | more).items() if n in kernel.arg_names}
        if "BK" in kernel.arg_names:
            given.setdefault("BK", c["KP"])
        values = triton.cdiv(c["V"], given["BV"]) if "BV" in given and "VP" not in given else 1
        keys = triton.cdiv(c["K"], given["BK"]) if "BK" in given and "KP" not in given else 1
        options = {n: tuned[n] for n in ("num_warps", "num_stages")}
        try:
            with safe_products(next(x for x in tensors if x is not None)):
                kernel[(rows * values, keys)](*tensors, **given, **options)
            return
        except triton.OutOfResources:
            FITTING[case] = smaller(tuned)


def blocks(name: str, c: dict[str, Any]) -> dict[str, int]:
    """Return a kernel's blocks, warps and stages, no wider than the channels."""
    found = zip(("BK", "BV", "num_warps", "num_stages"), TUNED[name][c["GATE"]], strict=True)
    tuned = {n: value for n, value in found if value is not None}
    if c["dtype"] != torch.bfloat16:
        tuned |= {n: min(most, tuned[n]) for n, most in WIDE.items() if n in tuned}
        tuned["num_warps"] = max(4, tuned["num_warps"])
    return tuned | {n: min(tuned[n], c[width]) for n, width in (("BV", "VP"), ("BK", "KP")) if n in tuned}


def smaller(tuned: dict[str, int]) -> dict[str, int]:
    """Return the next choice that takes less shared memory: one stage, then halves of the widest block."""
    if tuned["num_stages"] > 1:
        return tuned | {"num_stages": 1}
    widest = max((n for n in ("BV", "BK") if n in tuned), key=lambda n: tuned[n])
    if tuned[widest] <= LEAST:
        raise RuntimeError("the Triton kernels need more shared memory than this GPU has; use another backend")
    return tuned | {widest: tuned[widest] // 2}


@contextmanager
def safe_products(x: Tensor) -> Iterator[None]:
    """Compile where Hopper's own matrix instruction is assembled right, or else without it (`setting`)."""
    found = setting(x.device) if x.is_cuda else None
    if found is None:
        yield
        return
    name, value = found
    with SWITCH:  # (backward passes launch from threads of their own)
        before = os.environ.get(name)
        os.environ[name] = value
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


@cache
def setting(device: torch.device) -> tuple[str, str] | None:
    """Return the environment variable to compile under, and its value; None where none is needed.

    ptxas before 13.1 assembles some kernels with wgmma to wrong results or illegal reads on compute capability 9.0
    (fla-org/flash-linear-attention#640, #1262). Triton up to 3.8 gives Hopper such a one, though from 3.7.1 on it
    brings a newer one for Blackwell, which assembles for Hopper too. Without any, wgmma is switched off.
    """
    if torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        nvidia = triton.knobs.nvidia
        if recent(nvidia.ptxas.version):
            return None
        from triton.backends.nvidia.compiler import get_ptxas_version

        get_ptxas_version(90)  # kept by Triton as part of the keys of its cache: others' kernels get the older one
        newer = nvidia.ptxas_blackwell
        # A path set by `knobs` would win over the environment.
        if recent(newer.version) and "ptxas" not in vars(nvidia):
            return "TRITON_PTXAS_PATH", newer.path
    except (AttributeError, ImportError, OSError, RuntimeError, ValueError):  # another Triton: nothing is known
        pass
    return "DISABLE_MMA_V3", "1"


def recent(version: str) -> bool:
    """Say whether a ptxas of this version ("13.1") gets wgmma right."""
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= (13, 1)


def clock_of(log_decay: Tensor | None, c: dict[str, Any]) -> Tensor | None:
    """Sum the gates [B, T, Hs] or [B, T, Hs, K] from each chunk's start."""
    if log_decay is None:
        return None
    narrow = c["dtype"] == torch.bfloat16
    clock = torch.empty_like(log_decay, dtype=torch.float32 if narrow else torch.float64)
    return _sum(log_decay, clock, c["C"], NEVER if narrow else float("-inf"), BACKWARD=False)


def gates_gradient(grad_clock: Tensor, c: dict[str, Any]) -> Tensor:
    """Turn the clock's gradient into the gates': a sum from each chunk's end."""
    return _sum(grad_clock, torch.empty_like(grad_clock), c["C"], 0.0, BACKWARD=True)


def _sum(x: Tensor, out: Tensor, C: int, floor: float, *, BACKWARD: bool) -> Tensor:
    B, T, W = x.shape[0], x.shape[1], x[0, 0].numel()
    BW = min(64, triton.next_power_of_2(W))
    clock_kernel[(B * triton.cdiv(T, C), triton.cdiv(W, BW))](x, out, T, floor, W=W, C=C, BW=BW, BACKWARD=BACKWARD)
    return out


def stored_pairs(x: Tensor, k: Tensor, clock: Tensor | None, c: dict[str, Any], *, strict: bool) -> Tensor | None:
    """Return the pairs that kernels read from memory where decays are per channel: [B, T, Hs R, C] (strict: R = 1)."""
    if c["GATE"] != 2:
        return None
    B, T, Hx, _ = x.shape
    R = 1 if strict else c["R"]
    stored = x.new_empty(B, T, c["Hs"] * R, c["C"], dtype=c["dtype"])
    rows = B * c["Hs"] * R * triton.cdiv(T, c["C"])
    launch(pairs_kernel, rows, c | {"R": R, "Hx": Hx, "STRICT": strict}, x, k, clock, stored, T)
    return stored


def processors(x: Tensor) -> int:
    """Return the number of the card's multiprocessors (1 where the interpreter runs)."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
