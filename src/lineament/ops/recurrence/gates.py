"""The floor under log decays."""

from torch import Tensor

LOG_DECAY_FLOOR = -1e3  # exp is 0 there in float64 too, and sums over a chunk stay finite


def floored(log_decay: Tensor, wide) -> Tensor:
    """Return log decays in the dtype `wide`, clamped at -1e3; the gradient is 0 where they were clamped.

    Example:
        >>> import torch
        >>> floored(torch.tensor([0.0, -torch.inf]), torch.float64).tolist()
        [0.0, -1000.0]
    """
    return log_decay.to(wide).clamp(min=LOG_DECAY_FLOOR)
