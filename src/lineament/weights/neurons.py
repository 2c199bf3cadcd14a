"""Neurons of feed-forward layers: how much each says, how many can stay silent, and what they are for.

A neuron is one input of an output map (`down_proj`, or the last `Linear` of an MLP): what it holds is its activation
a_i, what it says is |a_i| times the norm of its column. Xiao et al. 2024, arXiv:2409.02877, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError, unknown
from lineament.graph import Where, capture, patch, select
from lineament.weights.evaluate import Loss, score

INDICATORS = ("activation", "magnitude")
OUTPUTS = "*.mlp.down_proj"  # where most decoders have their feed-forward layers' output maps


def columns(linear: nn.Module) -> Tensor:
    """Return the norm of every neuron's column, [F].

    Raises:
        InputError: the module is no `Linear`.
    """
    if not isinstance(linear, nn.Linear):
        raise InputError(f"the output map is a {type(linear).__name__}; expected nn.Linear ({OUTPUTS}, say)")
    return linear.weight.detach().norm(dim=0)


def indicator(linear: nn.Module, activations: Tensor, by: str = "magnitude") -> Tensor:
    """Return how much each neuron says: |a_i|, or with "magnitude" |a_i| ||W_out[:, i]||. [..., F]."""
    if by not in INDICATORS:
        raise unknown("indicator", by, INDICATORS)
    return activations.abs() * columns(linear) if by == "magnitude" else activations.abs()


@torch.no_grad()
def activations(model: nn.Module, where: Where, batch: Any) -> dict[str, Tensor]:
    """Return the activations of all neurons for one batch, {layer: [..., F]}.

    Args:
        model: any module. where: its output maps, `Linear` modules (`"*.mlp.down_proj"`).
        batch: a tensor, or a mapping of keyword arguments.
    """
    for linear in select(model, where).values():
        columns(linear)
    with capture(model, where, inputs=True, outputs=False, stop=True) as seen:
        model(**batch) if isinstance(batch, Mapping) else model(batch)
    return {name: seen.inputs(name)[0][0][0] for name in seen}


def activity(model: nn.Module, where: Where, batches: Iterable[Any], *, by: str = "magnitude") -> list[dict[str, Any]]:
    """Measure how evenly a token's neurons speak, layer by layer.

    Returns:
        Per layer: the mean shares of neurons below 0.2 and 0.05 of the token's largest, the first also without the one
        neuron that is largest on average (a single giant would hide all others), and the share of |a| > 0.
    """
    maps, found = select(model, where), dict[str, list[Tensor]]()
    for batch in batches:
        for name, a in activations(model, where, batch).items():
            m = indicator(maps[name], a, by).flatten(0, -2)
            found.setdefault(name, []).append(torch.cat([m, (a != 0).to(m).flatten(0, -2).mean(-1, keepdim=True)], 1))
    rows = []
    for name, parts in found.items():
        both = torch.cat(parts)
        m, awake = both[:, :-1], both[:, -1]
        giant = m.mean(0).argmax()
        rest = m.index_fill(1, giant, 0.0)
        top, second = m.amax(1, keepdim=True), rest.amax(1, keepdim=True)
        rows.append({
            "layer": name, "below 0.2": float((m < 0.2 * top).float().mean()),
            "below 0.2 without the giant": float((rest < 0.2 * second).float().mean()),
            "below 0.05": float((m < 0.05 * top).float().mean()), "active": float(awake.mean()),
        })  # fmt: skip
    return rows


@contextmanager
def quietest_silent(model: nn.Module, where: Where, share: float, *, by: str = "magnitude") -> Iterator[nn.Module]:
    """Run a block in which every token's quietest neurons are zero in every layer.

    Args:
        share: of the neurons of a layer, 0 to below 1; 0 changes nothing, to the bit.

    Raises:
        InputError: a share outside that, an unknown indicator.
    """
    if not 0 <= share < 1:
        raise InputError(f"the share is {share}; expected 0 to below 1")

    def quieter(linear: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> Tensor | None:
        a = args[0]
        count = round(share * a.shape[-1])
        if not count:
            return None
        silent = indicator(linear, a, by).topk(count, -1, largest=False).indices
        return nn.functional.linear(a.scatter(-1, silent, 0.0), linear.weight, linear.bias)

    with patch(model, {where: quieter}):
        yield model


@contextmanager
def without(model: nn.Module, neurons: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Run a block in which some neurons are zero; `neurons` are {output map: indices [n]}."""

    def cut(indices: Tensor) -> Callable[..., Tensor]:
        def run(linear: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> Tensor:
            return nn.functional.linear(args[0].index_fill(-1, indices, 0.0), linear.weight, linear.bias)

        return run

    with patch(model, {name: cut(indices) for name, indices in neurons.items()}):
        yield model


def sparsity_curve(
    model: nn.Module, where: Where, batches: Sequence[Any], shares: Sequence[float], *, by: str = "magnitude",
    loss: Loss | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Score a model with growing shares of every token's quietest neurons silent; what an oracle could skip.

    Args:
        batches: (inputs, labels), or mappings with labels for a model that gives its own loss.

    Returns:
        Per share: "silent", "loss", and the ratio of perplexities to the whole model's, exp(loss - loss at 0).
    """
    whole = score(model, batches, loss)["loss"][0]
    rows = []
    for share in shares:
        with quietest_silent(model, where, share, by=by):
            value = score(model, batches, loss)["loss"][0]
        ratio = float(torch.tensor(value - whole, dtype=torch.double).exp())
        rows.append({"silent": float(share), "loss": value, "ratio": ratio})
    return rows


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Return how well each column ranks the positives first: `sum_n (R_n - R_{n-1}) P_n` over distinct scores.

    Args:
        scores: [N, F]. labels: [N], true for positives.

    Returns:
        float64 [F]; equal scores are one threshold, as in scikit-learn. Random scores give the share of positives.

    Raises:
        InputError: no positives, or other lengths.

    Example:
        >>> average_precision(torch.tensor([[0.9], [0.8], [0.1]]), torch.tensor([1, 0, 1])).item()
        0.8333333333333333
    """
    if len(scores) != len(labels) or not bool(labels.any()):
        raise InputError(f"{len(scores)} scores and {len(labels)} labels; expected as many, and a positive among them")
    ordered, index = scores.sort(0, descending=True)
    hits = labels.bool()[index].double().cumsum(0)
    rank = torch.arange(1, len(scores) + 1, dtype=torch.double, device=scores.device)[:, None]
    last = torch.ones_like(ordered, dtype=torch.bool)  # of the instances that share a score
    last[:-1] = ordered[1:] != ordered[:-1]
    before = torch.where(last, hits, 0.0).cummax(0).values.roll(1, 0)
    before[0] = 0.0
    return (torch.where(last, (hits - before) * hits / rank, 0.0)).sum(0) / hits[-1]


def function_scores(
    model: nn.Module, where: Where, instances: Mapping[str, Sequence[Any]]
) -> dict[str, dict[str, Tensor]]:
    """Score every neuron for every function: does it speak up for that function's instances?

    An instance's value is the mean of |a| over its tokens, and the score the average precision of telling the function
    from the others; chance is the function's share of the instances.

    Args:
        instances: function -> inputs, one batch of one instance each (a tensor [1, ...] or keyword arguments).

    Returns:
        {layer: {function: float64 [F]}}.

    Raises:
        InputError: fewer than two functions, or one without instances.
    """
    if len(instances) < 2 or not all(len(own) for own in instances.values()):
        raise InputError("functionality needs at least two functions with instances each")
    labels, means = [], dict[str, list[Tensor]]()
    for function, own in instances.items():
        for batch in own:
            labels.append(function)
            for name, a in activations(model, where, batch).items():
                means.setdefault(name, []).append(a.abs().flatten(0, -2).mean(0).float().cpu())
    is_own = {f: torch.tensor([label == f for label in labels]) for f in instances}
    return {
        name: {f: average_precision(torch.stack(rows), own) for f, own in is_own.items()}
        for name, rows in means.items()
    }


def specificity(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each function's scores less the best of the others: neurons good at everything come out at 0 or below."""
    return {f: own - torch.stack([other for g, other in scores.items() if g != f]).amax(0) for f, own in scores.items()}


def top(scores: Mapping[str, Mapping[str, Tensor]], function: str, share: float = 0.05) -> dict[str, Tensor]:
    """Return the best neurons for a function in every layer, {layer: indices}."""
    return {name: own[function].topk(max(1, round(share * len(own[function])))).indices for name, own in scores.items()}


def overlap(scores: Mapping[str, Mapping[str, Tensor]], f: str, g: str, share: float = 0.05) -> float:
    """Return which part of the best neurons for f are among the best for g, averaged over layers; chance is `share`."""
    first, second = top(scores, f, share), top(scores, g, share)
    return sum(float(torch.isin(first[n], second[n]).float().mean()) for n in first) / len(first)


def damage(
    model: nn.Module, scores: Mapping[str, Mapping[str, Tensor]], batches: Mapping[str, Sequence[Any]], *,
    share: float = 0.05, loss: Loss | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Take out each function's best neurons and measure every function's loss.

    Args:
        scores: from `function_scores`, or `specificity` of each layer. batches: function -> held-out
            batches as for `score`.

    Returns:
        {function pruned: {function scored: rise of the loss in nats}}; of perplexities it is `exp(rise) - 1`.
    """
    whole = {g: score(model, own, loss)["loss"][0] for g, own in batches.items()}
    found: dict[str, dict[str, float]] = {}
    for f in batches:
        with without(model, top(scores, f, share)):
            found[f] = {g: score(model, own, loss)["loss"][0] - whole[g] for g, own in batches.items()}
    return found


def quiet_loss(loss: Loss, where: Where, weight: float) -> Loss:
    """Return a loss with `weight` times the summed |a| of a token's neurons added: training then leaves few speaking.

    Args:
        loss: (model, batch) -> (scalar, numbers). where: output maps. weight: of the mean over tokens of that sum.
    """

    def run(model: Any, batch: Any) -> tuple[Tensor, Mapping[str, float]]:
        with capture(model, where, inputs=True, outputs=False, detach=False) as seen:
            value, numbers = loss(model, batch)
        held = [seen.inputs(name)[0][0][0] for name in seen]
        return value + weight * sum(a.abs().sum(-1).mean() for a in held), numbers

    return run
