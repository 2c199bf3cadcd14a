"""Any model in float64 throughout, where its own code asks for less too."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class InDouble(TorchFunctionMode):
    """Runs a block in float64: wherever a real type is asked for, it is this one. Weights and inputs are as given.

    Transformers' norms and softmax cast to float32, so that a model in float64 is not exact without it.

    Example:
        >>> with InDouble():
        ...     torch.ones(1, dtype=torch.float64).to(torch.float32).dtype
        torch.float64
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            return args[0].double()
        return func(*map(_widened, args), **{key: _widened(value) for key, value in (kwargs or {}).items()})


def _widened(x: Any) -> Any:
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x
