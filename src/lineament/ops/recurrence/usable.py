"""Why an optional backend can't run on these tensors (None: it can). Nothing is imported to find out."""

import os

import torch
from torch import Tensor

from lineament._base.extras import available

WIDEST = 256


def needs_triton(q: Tensor, *others: Tensor | None) -> str | None:
    """Triton needs its package and a GPU, or a CPU under its interpreter (TRITON_INTERPRET=1, for tests)."""
    if not available("triton"):
        return "triton is not installed; pip install 'lineament[gpu]'"
    if q.shape[-1] > WIDEST:
        return f"the Triton kernels hold a whole key, up to {WIDEST} wide, and q has K={q.shape[-1]}"
    if q.is_cuda or (q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"triton kernels need a GPU and q is on {q.device.type} (TRITON_INTERPRET=1 interprets them, for tests)"


def needs_fla(q: Tensor, *others: Tensor | None) -> str | None:
    """flash-linear-attention needs its packages and a GPU."""
    if not available("fla"):
        return "fla-core is not installed; pip install 'lineament[gpu]'"
    if not available("triton"):
        return "fla needs triton, which is not installed; pip install 'lineament[gpu]'"
    if not q.is_cuda:
        return f"fla's kernels need a GPU and q is on {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"fla's delta kernels take bfloat16 or float16 and q is {q.dtype}"
    return None if q.shape[-1] <= WIDEST else f"fla's kernels take keys up to {WIDEST} wide and q has K={q.shape[-1]}"
