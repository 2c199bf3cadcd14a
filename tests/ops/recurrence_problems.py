"""Seeded inputs for the recurrence, and its outputs with all gradients."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lineament.ops.recurrence import decayed_attention, delta_rule

NAMES = ("q", "k", "v", "beta", "log_decay", "state")
GATES = ("none", "head", "channel")


@dataclass(frozen=True)
class Problem:
    """Inputs of one call; beta is None for decayed attention, log_decay for no decay."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    log_decay: Tensor | None
    state: Tensor | None

    def map(self, change) -> "Problem":
        return Problem(*(None if x is None else change(x) for x in self.tensors()))

    def tensors(self):
        return [getattr(self, name) for name in NAMES]

    def cut(self, start, stop, state=None) -> "Problem":
        part = replace(self, state=None).map(lambda x: x[:, start:stop])
        return replace(part, state=self.state if state is None else state)


def problem(
    T=70,
    heads=(2, 2, 2),
    *,
    B=2,
    K=6,
    V=5,
    gate="head",
    delta=True,
    state=True,
    dtype=torch.float64,
    seed=0,
    strength=1.0,
) -> Problem:
    """Draw inputs; `strength` is the mean of -log_decay."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    Hq, Hk, Hv = heads
    Hs = max(Hk, Hv)
    decay = {"none": None, "head": (B, T, Hs), "channel": (B, T, Hs, K)}[gate]
    made = Problem(
        draw(B, T, Hq, K),
        normalize(draw(B, T, Hk, K), dim=-1),
        draw(B, T, Hv, V),
        draw(B, T, Hs).sigmoid() if delta else None,
        None if decay is None else -strength * draw(*decay).abs(),
        draw(B, Hs, K, V) if state else None,
    )
    return made.map(lambda x: x.to(dtype))


def run(p: Problem, backend="auto", **options):
    """Return (o, state)."""
    options |= {"state": p.state, "backend": backend}
    if p.beta is None:
        return decayed_attention(p.q, p.k, p.v, p.log_decay, **options)
    return delta_rule(p.q, p.k, p.v, p.beta, p.log_decay, **options)


def everything(p: Problem, backend="auto", **options) -> dict[str, Tensor]:
    """Return o, the last state and the gradients of a fixed function of both, by name."""
    p = p.map(lambda x: x.detach().clone().requires_grad_())
    o, last = run(p, backend, **options)
    loss = (o.double() * waves(o)).sum() + (last.double() * waves(last)).sum()
    named = {name: x for name, x in zip(NAMES, p.tensors(), strict=True) if x is not None}
    grads = torch.autograd.grad(loss, list(named.values()))
    return {"o": o.detach(), "last": last.detach()} | dict(zip(named, grads, strict=True))


def waves(x: Tensor) -> Tensor:
    """Return fixed weights between -1 and 1 in x's shape."""
    return torch.arange(x.numel(), dtype=torch.float64, device=x.device).mul(0.7).sin().view(x.shape)


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest error of every tensor relative to its largest entry."""
    errors = {}
    for name, x in wanted.items():
        scale = x.abs().max().clamp(min=1e-12).double()
        errors[name] = ((found[name].double() - x.double()).abs().max() / scale).item()
    return errors
