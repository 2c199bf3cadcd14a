"""Look for gates that no recurrence should be given; costs a pass over them, so only on request."""

import torch
from torch import Tensor

from lineament._base.errors import InputError


def check_gates(log_decay: Tensor | None = None, beta: Tensor | None = None, *, most: float = 1.0) -> None:
    """Raise if a gate is out of its range, naming the tensor, the place and the number.

    Args:
        log_decay: any shape; wanted: <= 0, -inf allowed, not NaN.
        beta: any shape; wanted: from 0 to `most` (1, or 2 where negative eigenvalues are allowed), not NaN.

    Raises:
        InputError: one that isn't, the first in memory order.

    Example:
        >>> check_gates(torch.tensor([[-0.1, 0.3]]))
        Traceback (most recent call last):
            ...
        lineament._base.errors.InputError: log_decay is 0.3 at [0, 1]; expected a number from -inf to 0
    """
    for name, x, least, limit in (("log_decay", log_decay, -torch.inf, 0.0), ("beta", beta, 0.0, most)):
        if x is None:
            continue
        wrong = ~((x >= least) & (x <= limit))
        if wrong.any():
            place = wrong.nonzero()[0].tolist()
            value, range_ = x[tuple(place)].item(), f"from {least:g} to {limit:g}"
            raise InputError(f"{name} is {value:.6g} at {place}; expected a number {range_}")
