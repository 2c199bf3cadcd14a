"""Dynamic sparse training: weak edges are dropped and as many grown, at random, by gradient or by Hebb's rule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lineament._base.errors import InputError, unknown
from lineament._base.seeds import generator
from lineament.nn.masked import MaskedLinear

GROWTHS = ("random", "gradient", "hebbian")
_EPS = 1e-6  # units of a smaller deviation are dead: their correlation is 0/0


@dataclass(frozen=True, kw_only=True)
class Rewiring:
    """When and how edges are moved.

    Args:
        every: steps from one rewiring to the next. start: the first step that may rewire; before it weights are noise.
        until: no rewiring from this step on; the share of edges moved falls to 0 by a half cosine up to there.
        share: of a layer's live edges that is moved at step 0, 0.1 to 0.3 as a rule.
        grow: "random" (SET), "gradient" (RigL: the largest |dL/dW|), or "hebbian" (the largest correlation of input and
            activated output over the last batches).
        signed: take correlations with their sign, not their size.
        bonus: added to the scores of edges inside a group, after they are scaled to [0, 1]; 0 lets groups dissolve.
        per_block: keep the number of edges inside groups, and between them, each as it is.
        momentum: of the running averages behind correlations.
        seed: of random growth.

    Raises:
        InputError: an unknown rule or a number out of range.
    """

    every: int
    until: int
    start: int = 0
    share: float = 0.3
    grow: str = "random"
    signed: bool = False
    bonus: float = 0.0
    per_block: bool = False
    momentum: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if self.grow not in GROWTHS:
            raise unknown("growth", self.grow, GROWTHS)
        if self.every < 1 or self.start < 0 or not 0 <= self.share <= 1 or not 0 <= self.momentum < 1:
            raise InputError(f"every {self.every}, start {self.start}, share {self.share}, momentum {self.momentum}: "
                             "expected every >= 1, start >= 0, share in [0, 1], momentum in [0, 1)")  # fmt: skip

    def moved(self, step: int) -> float:
        """Return the share of live edges that moves after a step, counted from 1; 0 where nothing is due.

        Example:
            >>> rule = Rewiring(every=10, until=100, share=0.2)
            >>> tuple(round(rule.moved(step), 3) for step in (5, 10, 50, 100))
            (0.0, 0.195, 0.1, 0.0)
        """
        if step % self.every or step < max(1, self.start) or step >= self.until:
            return 0.0
        return self.share / 2 * (1 + math.cos(math.pi * step / self.until))


class _Coactivity(nn.Module):
    """Running averages of a layer's input x and activated output y, of their squares and of their products."""

    x: Tensor
    y: Tensor
    yx: Tensor
    batches: Tensor

    def __init__(self, layer: MaskedLinear, momentum: float) -> None:
        super().__init__()
        (outputs, inputs), self.momentum = layer.mask.shape, momentum
        for name, shape in (("x", (inputs,)), ("xx", (inputs,)), ("y", (outputs,)), ("yy", (outputs,)),
                            ("yx", (outputs, inputs)), ("batches", ())):  # fmt: skip
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32, device=layer.mask.device))

    @torch.no_grad()
    def see(self, x: Tensor, y: Tensor) -> None:
        """Take in a batch; the first one is taken whole."""
        x, y = x.flatten(0, -2).float(), y.flatten(0, -2).float()
        means = {"x": x.mean(0), "xx": x.square().mean(0), "y": y.mean(0), "yy": y.square().mean(0),
                 "yx": y.T @ x / len(x)}  # fmt: skip
        share = 1 - self.momentum if self.batches > 0 else 1.0
        for name, value in means.items():
            self.get_buffer(name).lerp_(value, share)
        self.batches += 1

    def correlation(self) -> Tensor:
        """[O, I]; 0 where a unit is dead."""
        y, x = ((self.get_buffer(2 * a) - self.get_buffer(a).square()).clamp_min(0).sqrt() for a in "yx")
        alive = (y > _EPS)[:, None] & (x > _EPS)
        found = (self.yx - self.y[:, None] * self.x) / (y[:, None] * x).clamp_min(_EPS**2)
        return torch.where(alive, found, 0.0)


@contextmanager
def rewired(model: nn.Module, rule: Rewiring, *, activation: Any = torch.relu) -> Iterator[list[dict[str, Any]]]:
    """Train with rewiring: while the block runs, the edges of all `MaskedLinear` layers move as the rule says.

    Works with any optimiser and with `train.fit`, whose checkpoints hold the masks and all that rewiring knows. A moved
    edge starts at weight 0, and the optimiser's moments of dropped and of grown edges are set to 0.

    Args:
        model: its masked layers must all learn in one optimiser.
        rule: when and how.
        activation: what follows each masked layer, for correlations.

    Yields:
        A list that fills: one mapping per rewiring and layer, with step, layer, moved, inside (share of edges inside
        groups) and modularity.

    Raises:
        InputError: the model has no masked layer.
    """
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)
    }
    if not layers:
        raise InputError(f"this {type(model).__name__} has no MaskedLinear layer to rewire")
    log: list[dict[str, Any]] = []

    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for number, (name, layer) in enumerate(layers.items()):
            if id(layer.weight) not in mine:
                continue
            step = int(layer.rewiring_step.add_(1))
            if share := rule.moved(step):
                moved = _rewire(layer, rule, share, optimizer, rule.seed * 1_000_003 + step * 1009 + number)
                mask = layer.groups()
                log.append({"step": step, "layer": name, "moved": moved, "inside": mask.inside,
                            "modularity": mask.modularity})  # fmt: skip

    with ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(_knowing(layer, rule, activation))
        stack.callback(register_optimizer_step_post_hook(after).remove)
        yield log


@contextmanager
def _knowing(layer: Any, rule: Rewiring, activation: Any) -> Iterator[None]:
    """Give a layer, for a while, what its rewiring has to know; buffers, so that checkpoints hold it."""

    def watch(module: Any, inputs: Any) -> None:
        layer.watched = rule.moved(int(layer.rewiring_step) + 1) > 0

    def see(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if layer.training and torch.is_grad_enabled():
            layer.coactivity.see(inputs[0].detach(), activation(output.detach()))

    layer.register_buffer("rewiring_step", torch.zeros((), dtype=torch.long))
    handle = None
    if rule.grow == "hebbian":
        layer.coactivity = _Coactivity(layer, rule.momentum)
        handle = layer.register_forward_hook(see)
    elif rule.grow == "gradient":
        handle = layer.register_forward_pre_hook(watch)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
        if rule.grow == "hebbian":
            del layer.coactivity
        del layer.rewiring_step
        layer.watched, layer.effective = False, None


@torch.no_grad()
def _rewire(layer: MaskedLinear, rule: Rewiring, share: float, optimizer: torch.optim.Optimizer, seed: int) -> int:
    """Move a share of a layer's edges; return how many."""
    same = layer.groups().same_group
    blocks = [same, ~same] if rule.per_block else [torch.ones_like(same)]
    score = _scores(layer, rule, seed)
    score = score / score.abs().max().clamp_min(1e-30) + rule.bonus * same
    moved = torch.zeros_like(same)
    for block in blocks:
        live, dead = layer.mask & block, ~layer.mask & block
        count = min(int(share * int(live.sum())), int(dead.sum()))
        if count:
            weak = layer.weight.abs().masked_fill(~live, torch.inf).flatten().topk(count, largest=False).indices
            grown = score.masked_fill(~dead, -torch.inf).flatten().topk(count).indices
            moved.view(-1)[weak] = moved.view(-1)[grown] = True
    layer.mask ^= moved
    layer.weight[moved] = 0.0
    for value in optimizer.state.get(layer.weight, {}).values():
        if isinstance(value, Tensor) and value.shape == layer.weight.shape:
            value[moved] = 0.0
    return int(moved.sum()) // 2


def _scores(layer: Any, rule: Rewiring, seed: int) -> Tensor:
    if rule.grow == "random":
        return torch.rand(layer.mask.shape, generator=generator(seed)).to(layer.mask.device)
    if rule.grow == "hebbian":
        found = layer.coactivity.correlation()
        return found if rule.signed else found.abs()
    if layer.effective is None or layer.effective.grad is None:
        raise InputError("the gradient of a masked layer was not kept: begin `rewired` before the forward pass")
    return layer.effective.grad.abs().to(torch.float32)
