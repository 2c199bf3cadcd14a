"""Depth traded for breadth: a stack of residual layers put side by side, wholly or in groups, and what that drops.

`h_i = h_{i-1} + F_i(h_{i-1})` multiplied out is the input, every layer alone, and compositions of two, three, ...
layers; with all layers reading the same input only the first two remain (Bermeitinger et al. 2023, arXiv:2309.08414).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lineament._base.errors import InputError
from lineament.graph import select, stream
from lineament.nn import SideBySide, Through
from lineament.nn.residual import check_groups

Layer = Callable[[Tensor], Tensor]


def groups_of(count: int, groups: int) -> tuple[tuple[int, ...], ...]:
    """Cut layers 0 to count - 1 into so many runs, sizes as even as possible: 1 is parallel, `count` sequential.

    Raises:
        InputError: fewer than one group, or more groups than layers.

    Example:
        >>> groups_of(5, 2)
        ((0, 1, 2), (3, 4))
    """
    if not 1 <= groups <= count:
        raise InputError(f"{groups} groups were asked of {count} layers; expected 1 to {count}")
    edges = [-(-i * count // groups) for i in range(groups + 1)]
    return tuple(tuple(range(a, b)) for a, b in itertools.pairwise(edges))


def side_by_side(
    model: nn.Module, layers: Sequence[str], groups: Sequence[Sequence[int]] | int = 1
) -> dict[str, nn.Module]:
    """Return the modules that let layers of a model run in groups, for `graph.swap` or `graph.swapped`.

    Nothing is copied and nothing changes before they are swapped in. The first layer of a group becomes `SideBySide`,
    the others pass on; caches keep working, as every layer keeps its own place.

    Args:
        model: any model that calls these layers one after the other with the hidden states first; widths are equal.
        layers: their names, in the order of their calls (`"model.layers.10"`, ...).
        groups: runs of positions in `layers` that shall read the same input, or their number (1: all of them).
            Positions that no group names stay alone.

    Returns:
        Name -> new module, for the layers that change.

    Raises:
        InputError: an unknown layer, a group that is no run of neighbours, or a layer in two groups.

    Example:
        >>> from lineament.graph import swapped
        >>> from lineament.nn import Residual
        >>> stack = nn.Sequential(*(Residual(nn.Linear(4, 4)) for _ in range(3)))
        >>> with swapped(stack, side_by_side(stack, ["0", "1", "2"])):
        ...     type(stack[0]).__name__, type(stack[2]).__name__
        ('SideBySide', 'Through')
    """
    found = [select(model, name)[name] for name in layers]
    runs = groups_of(len(found), groups) if isinstance(groups, int) else tuple(tuple(group) for group in groups)
    check_groups(runs, len(found))
    new: dict[str, nn.Module] = {}
    for run in runs:
        if len(run) > 1:
            new[layers[run[0]]] = SideBySide([found[i] for i in run])
            new |= {layers[i]: Through() for i in run[1:]}
    return new


@dataclass(frozen=True)
class Orders:
    """The output of a stack by order: `terms[k]` are the compositions of k layers; `output` is the stack's own."""

    terms: tuple[Tensor, ...]
    output: Tensor

    def partial(self, order: int) -> Tensor:
        """Return the sum of the terms up to an order; 1 is the parallel form."""
        return torch.stack(self.terms[: order + 1]).sum(0)

    def error(self, order: int) -> float:
        """Return `||output - partial|| / ||output||`."""
        return float((self.output - self.partial(order)).norm() / self.output.norm())

    def explained(self, order: int) -> float:
        """Return the share of what the stack adds to its input that orders up to this one explain (R^2)."""
        change = (self.output - self.terms[0]).double().square().sum()
        return 1 - float((self.output - self.partial(order)).double().square().sum() / change)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per order, for a table."""
        size = self.output.norm()
        return [
            {"order": k, "norm / output": float(term.norm() / size), "error": self.error(k),
             "share of the change explained": self.explained(k)} for k, term in enumerate(self.terms)
        ]  # fmt: skip


def orders(layers: Sequence[Layer], x: Tensor, *, most: int = 2) -> Orders:
    """Expand a stack of residual layers around its input, by order of composition.

    Order 0 is x, order 1 `sum_j F_j(x)`, order k > 1 the chains `J_{j_k} ... J_{j_2} F_{j_1}(x)` with the Jacobians at
    x. Exact for affine layers when `most` is their number; otherwise orders 0 to 2 are the first-order Taylor
    expansion, with an error of the third order in the size of the branches.

    Args:
        layers: callables h -> h + F(h), in order. x: [B, ...], what the first one gets.
        most: the last order; each one above the first costs a Jacobian-vector product per layer.

    Raises:
        InputError: `most` is below 1, or there are no layers.

    Example:
        >>> w = [torch.randn(3, 3, dtype=torch.double) for _ in range(2)]
        >>> found = orders([lambda h, w=w: h + h @ w.T for w in w], torch.ones(1, 3).double())
        >>> round(found.explained(2), 9)
        1.0
    """
    if most < 1 or not layers:
        raise InputError(f"{len(layers)} layers to order {most}; expected at least one layer and order 1")
    x = x.detach()
    sums: list[Tensor] = [torch.zeros_like(x) for _ in range(most)]  # of orders 1, 2, ...
    h = x
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the other attention kernels have no forward mode
        for layer in layers:
            h = layer(h)
            for k in range(most - 1, 0, -1):
                moved: Any = torch.func.jvp(lambda y, layer=layer: layer(y) - y, (x,), (sums[k - 1],))[1]
                sums[k] = sums[k] + moved
            sums[0] = sums[0] + (layer(x) - x)
    return Orders((x, *sums), h)


def decoder_orders(model: nn.Module, layers: Sequence[str], batch: Any, *, most: int = 2) -> Orders:
    """Expand some neighbouring layers of a decoder around the hidden states they get; see `orders`.

    Args:
        model: a decoder in eval mode. layers: names of neighbouring layers. batch: as for `graph.stream`; ids [B, T].
    """
    first, *_ = layers
    everything = [name for name, _ in model.named_modules() if _beside(name, first)]
    start = everything.index(first)
    steps = list(stream(model, everything[: start + len(layers)], batch))[start:]
    if [name for name, *_ in steps] != list(layers):
        raise InputError(f"{list(layers)} are not neighbouring layers")

    def alone(step: Any) -> Layer:
        _, layer, args, kwargs = step

        def run(h: Tensor) -> Tensor:
            given = ((h, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": h})
            out = layer(*given[0], **given[1])
            return out[0] if isinstance(out, tuple) else out

        return run

    _, _, args, kwargs = steps[0]
    hidden = args[0] if args else kwargs["hidden_states"]
    return orders([alone(step) for step in steps], hidden, most=most)


def _beside(name: str, first: str) -> bool:
    own, _, number = name.rpartition(".")
    return own == first.rpartition(".")[0] and number.isdigit()


def parallel_bound(lipschitz: Sequence[float]) -> float:
    """Bound `||sequential(x) - parallel(x)|| / ||x||` for branches with F(0) = 0 and these Lipschitz constants.

    `prod(1 + l_i) - 1 - sum l_i`: small only if the sum of the constants is.

    Example:
        >>> round(parallel_bound([0.1, 0.1]), 6)
        0.01
    """
    return math.prod(1 + one for one in lipschitz) - 1 - sum(lipschitz)


def parallel_error(model: nn.Module, layers: Sequence[str], groups: Any, *args: Any, **kwargs: Any) -> float:
    """Return `||y - y'|| / ||y||` of a model's output before and after its layers are put in groups."""
    from lineament.graph import swapped

    def run() -> Tensor:
        out = model(*args, **kwargs)
        return getattr(out, "logits", out)

    with torch.no_grad():
        before = run()
        new = side_by_side(model, layers, groups)
        if not new:
            return 0.0
        with swapped(model, new):
            return float((run() - before).norm() / before.norm())


def over_determination(samples: int, outputs: int, model: nn.Module) -> float:
    """Return Q = K M / P (samples, outputs, parameters); below 1 a model can memorise its training set."""
    return samples * outputs / sum(p.numel() for p in model.parameters())


@torch.no_grad()
def pair_costs(model: nn.Module, windows: Tensor, pairs: Sequence[Sequence[int]]) -> dict[tuple[int, ...], float]:
    """Measure what each group of a decoder's layers costs when it runs side by side, all else as it is.

    Args:
        model: a causal language model of `models.rebuilt.FAMILIES`. windows: int64 [N, T]. pairs: the groups.

    Returns:
        Group -> mean loss added, nats per token.
    """
    from lineament.models import widen
    from lineament.tasks import perplexity

    whole = perplexity(model, windows, batch_size=4).nll
    return {tuple(p): perplexity(widen(model, [p]), windows, batch_size=4).nll - whole for p in pairs}


def cheapest(costs: Mapping[tuple[int, ...], float], count: int) -> list[tuple[int, ...]]:
    """Choose so many groups without a common layer whose summed cost is least.

    Raises:
        InputError: there are not so many.

    Example:
        >>> cheapest({(0, 1): 0.3, (1, 2): 0.1, (2, 3): 0.3, (3, 4): 0.15}, 2)
        [(1, 2), (3, 4)]
    """
    best: dict[int, tuple[float, list[tuple[int, ...]]]] = {0: (0.0, [])}
    ends: list[tuple[int, dict[int, tuple[float, list[tuple[int, ...]]]]]] = [(-1, best)]
    for group in sorted(costs, key=lambda g: g[-1]):
        before = next(table for last, table in reversed(ends) if last < group[0])
        new = dict(ends[-1][1])
        for taken, (cost, chosen) in before.items():
            if taken + 1 not in new or cost + costs[group] < new[taken + 1][0]:
                new[taken + 1] = cost + costs[group], [*chosen, group]
        ends.append((group[-1], new))
    if count not in ends[-1][1]:
        raise InputError(f"there are no {count} groups without a common layer among {len(costs)}")
    return ends[-1][1][count][1]


def distilled(
    wide: nn.Module, teacher: nn.Module, batches: Callable[[int], Tensor], *, steps: int, lr: float = 3e-4,
    out: Any = None, seed: int = 0,
) -> nn.Module:  # fmt: skip
    """Tune the wide layers of a model towards what the model it came from predicts; in place.

    The loss is the Kullback-Leibler divergence of the predictions, so nothing is learned about the text itself. Other
    layers stay as they are.

    Args:
        wide: from `models.widen`. batches: step -> int64 [B, T]. out: folder for a checkpoint to go on from.
    """
    from lineament import train

    config: Any = wide.config
    widths = (getattr(config, "rebuilt", None) or {}).get("widths", [])
    wide.requires_grad_(False)
    for at, width in enumerate(widths):
        if width > 1:
            wide.get_submodule(f"model.layers.{at}").requires_grad_(True)

    def loss(model: Any, ids: Tensor) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            truth = teacher(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        ours = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        return nn.functional.kl_div(ours.flatten(0, 1), truth.flatten(0, 1), log_target=True, reduction="batchmean"), {}

    settings = train.FitConfig(steps=steps, lr=lr, warmup=min(5, steps), seed=seed, checkpoint_every=20)
    train.fit(wide, batches, loss, settings, out=out, description="tune")
    return wide.requires_grad_(True).eval()
