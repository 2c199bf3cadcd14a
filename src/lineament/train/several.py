"""Several optimisers as one, each for its own parameters: Muon for the matrices and AdamW for the rest, say."""

from collections.abc import Callable, Sequence

import torch


class Several(torch.optim.Optimizer):
    """Step several optimisers together; state and groups are one, so that it is saved and restored as one.

    Example:
        >>> a, b = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
        >>> both = Several([torch.optim.SGD([a], lr=0.5), torch.optim.SGD([b], lr=0.1)])
        >>> (a + b).sum().backward()
        >>> both.step(), [round(p.item(), 1) for p in (a, b)]
        (None, [0.5, 0.9])
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__(
            [{**group, "part": index} for index, part in enumerate(parts) for group in part.param_groups], {}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore
        """Step every one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, part in enumerate(self.parts):  # a restored state comes with other dicts
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["part"] == index]
            part.step()
        return loss
