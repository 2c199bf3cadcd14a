"""How a model is trained, as one frozen value; and the learning rate of every step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lineament._base.errors import InputError, unknown

SCHEDULES = ("cosine", "linear", "constant", "wsd")
OPTIMIZERS = ("adamw", "sgd", "kar3", "muon")
PRECISIONS = ("fp32", "bf16")
DECAY_SHARE = 0.2  # of the steps, at the end of warm-up, stable, decay


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """What `fit` needs to know beside the model, its batches and its loss.

    Args:
        steps: optimiser steps.
        lr: peak learning rate, or {glob over parameter names: rate}, where the first glob that matches counts.
        schedule: "cosine" or "linear" to 0, "constant", or "wsd" (constant, then linear to 0 over the last fifth).
        warmup: steps of linear rise to the peak.
        weight_decay: decoupled; not applied to tensors with fewer than two axes.
        clip: largest norm of the gradient; None leaves it.
        accumulate: batches per step; several processes share them.
        precision: "fp32", or "bf16" autocast over float32 master weights.
        betas: of AdamW, and of Kar3's two averages (0.5 and 0.95 as published); the first is SGD's and Muon's momentum.
        optimizer: a name of `OPTIMIZERS`, or {glob over parameter names: name}, where the first glob that matches
            counts. "muon" is torch's, for matrices, without Nesterov: {"*.weight": "muon", "*": "adamw"}.
        seed: of what is drawn during training (dropout).
        checkpoint_every, log_every: steps.

    Raises:
        InputError: a name is unknown or a number is out of range.
    """

    steps: int
    lr: float | Mapping[str, float] = 1e-3
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    clip: float | None = 1.0
    accumulate: int = 1
    precision: str = "fp32"
    optimizer: str | Mapping[str, str] = "adamw"
    seed: int = 0
    checkpoint_every: int = 50
    log_every: int = 1

    def __post_init__(self) -> None:
        for kind, value, known in (
            ("schedule", self.schedule, SCHEDULES),
            *(("optimizer", name, OPTIMIZERS) for name in self._optimizers().values()),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise unknown(kind, value, known)
        for name, low in (("steps", 0), ("warmup", 0), ("accumulate", 1), ("checkpoint_every", 1), ("log_every", 1)):
            if getattr(self, name) < low:
                raise InputError(f"FitConfig.{name} is {getattr(self, name)}; expected at least {low}")
        rates = self.lr.values() if isinstance(self.lr, Mapping) else (self.lr,)
        if not all(number >= 0 for number in (*rates, self.weight_decay)):
            raise InputError(f"lr is {self.lr} and weight_decay {self.weight_decay}; expected at least 0")
        if self.clip is not None and not self.clip > 0:
            raise InputError(
                f"FitConfig.clip is {self.clip}; expected a norm above 0, or None to leave gradients alone"
            )

    def rate(self, name: str) -> float | None:
        """Return the peak learning rate of a parameter, or None when no glob matches its name.

        Example:
            >>> FitConfig(steps=1, lr={"*.gate": 0.1, "*": 0.01}).rate("layer.gate")
            0.1
        """
        if not isinstance(self.lr, Mapping):
            return self.lr
        return next((rate for glob, rate in self.lr.items() if fnmatchcase(name, glob)), None)

    def optimizer_of(self, name: str) -> str | None:
        """Return the name of a parameter's optimiser, or None when no glob matches its name."""
        return next((each for glob, each in self._optimizers().items() if fnmatchcase(name, glob)), None)

    def _optimizers(self) -> Mapping[str, str]:
        return self.optimizer if isinstance(self.optimizer, Mapping) else {"*": self.optimizer}

    def factor(self, step: int) -> float:
        """Return what the peak learning rate is multiplied by at a step, counted from 0.

        Example:
            >>> tuple(round(FitConfig(steps=4, schedule="linear", warmup=2).factor(step), 2) for step in range(4))
            (0.5, 1.0, 1.0, 0.5)
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "linear":
            return 1 - done
        if self.schedule == "wsd":
            return min(1.0, (1 - done) / DECAY_SHARE)
        return 1.0
