"""Kar3: steps of fixed size along the signs of the gradient and of two of its averages."""

from collections.abc import Callable
from typing import Any

import torch

from lineament._base.errors import InputError


class Kar3(torch.optim.Optimizer):
    """`p <- p - lr (sign g + sign m1 + sign m2)`, and only then `m_i <- beta_i m_i + (1 - beta_i) g`.

    Zhang 2024 (arXiv:2401.17948). There is no weight decay but what a group asks for (decoupled).

    Args:
        params, lr: as every optimiser's. betas: of the averages.

    Example:
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> p.grad = torch.tensor([-3.0, 0.0])
        >>> Kar3([p], lr=0.5).step()
        >>> p.tolist()
        [1.5, 2.0]
    """

    def __init__(
        self, params: Any, lr: float = 1.215e-3, betas: tuple[float, float] = (0.5, 0.95), weight_decay: float = 0.0
    ) -> None:
        if not lr >= 0 or not all(0 <= beta < 1 for beta in betas):
            raise InputError(f"lr {lr} and betas {betas}; expected lr >= 0 and betas from 0 to below 1")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state.update(fast=torch.zeros_like(p), slow=torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (p.grad.sign() + state["fast"].sign() + state["slow"].sign()))
                for name, beta in zip(("fast", "slow"), group["betas"], strict=True):
                    state[name].lerp_(p.grad, 1 - beta)
        return loss
