"""Alignment maps: does a layer hold the variables of an algorithm, so that exchanging them does what it should?

Distributed alignment search (Geiger et al. 2023, arXiv:2303.02536) with interchangeable families of maps (Sutter et al.
2025, arXiv:2507.08802). What the latter prove must stand beside every result: for countable inputs, if every layer is
injective on them, interventions at the layer can reach every output, variables can be matched in order and the model
solves the task, then SOME bijection aligns it with ANY algorithm. Accuracy under interventions therefore means nothing
without a limit on the map: report the family, compare with an untrained copy (`complexity`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lineament import train
from lineament._base.errors import InputError, unknown
from lineament._base.seeds import seeded
from lineament.explain.interchange import Blocks, Layer, check_blocks, frozen
from lineament.graph import Where
from lineament.nn import BIJECTIONS, Reordered
from lineament.tasks import Algorithm, Examples, Interventions, interventions

OBJECTIVES = ("choices", "all", "difference")
ADAM = train.FitConfig(
    steps=2000, lr=1e-3, schedule="constant", betas=(0.9, 0.999), clip=None, checkpoint_every=1000
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """How an alignment is looked for.

    Args:
        map: a name of `nn.BIJECTIONS` ("rotation", "linear", "reversible"), "neurons" for a greedy choice of
            coordinates, or a function of the width that makes a bijection.
        size: coordinates per variable; the width shared by the variables, at most half each, if None.
        objective: cross-entropy among the examples' "choices", or "all" classes; "difference": the logit's lead.
        changing: share of the interventions that change the algorithm's output; as it comes if None.
        batch: interventions a step. tests: interventions the result is measured on. seed: of map and draws.
        fit: how the map learns.

    Raises:
        InputError: a name is unknown or a number out of range.
    """

    map: str | Callable[[int], nn.Module] = "rotation"
    size: int | None = None
    objective: str = "choices"
    changing: float | None = None
    batch: int = 1024
    tests: int = 10_000
    seed: int = 0
    fit: train.FitConfig = field(default=ADAM)

    def __post_init__(self) -> None:
        if isinstance(self.map, str) and self.map not in (*BIJECTIONS, "neurons"):
            raise unknown("alignment map", self.map, (*BIJECTIONS, "neurons"))
        if self.objective not in OBJECTIVES:
            raise unknown("objective", self.objective, OBJECTIVES)
        for name in ("batch", "tests"):
            if getattr(self, name) < 1:
                raise InputError(f"AlignConfig.{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True, eq=False)
class Alignment:
    """A map that was found, and how well interventions through it do what the algorithm says.

    Attributes:
        layer: its name. algorithm: its name. map: phi, in eval mode. blocks: variable -> coordinates of phi's image.
        iia: interchange-intervention accuracy on unseen examples.
        chance: what can be had without looking: the commonest answer, or leaving the answer as it was.
        accuracy: of the model itself on the task.
        parameters: that phi may choose.
        drift: largest |phi^-1(phi(h)) - h| over the largest |h|.
    """

    layer: str
    algorithm: str
    map: nn.Module
    blocks: Blocks
    iia: float
    chance: float
    accuracy: float
    parameters: int
    drift: float

    @property
    def gain(self) -> float:
        """Where the accuracy stands between chance (0) and all right (1)."""
        return (self.iia - self.chance) / max(1e-9, 1 - self.chance)

    def row(self) -> dict[str, Any]:
        """Return the numbers, for tables."""
        return {"layer": self.layer, "algorithm": self.algorithm, "parameters": self.parameters, "IIA": self.iia,
                "chance": self.chance, "accuracy": self.accuracy, "drift": self.drift}  # fmt: skip


def align(
    model: nn.Module, layer: Where, algorithm: Algorithm, examples: Examples, unseen: Examples,
    config: AlignConfig | None = None, *, out: str | Path | None = None,
) -> Alignment:  # fmt: skip
    """Look for an algorithm's variables in a layer: learn the map under which exchanging them works.

    The model is frozen; the map learns by the cross-entropy of the model's answer under random interventions to the
    algorithm's. It is measured on interventions among unseen examples.

    Args:
        model: any module in eval mode; half precision is fine, the map is computed in float32.
        layer: a module (`Where`), whose output is looked at; a name that ends in ":input" for what it receives.
        algorithm: variables, parents, functions. examples: to learn from. unseen: to measure on; share nothing with
            the former that a map could learn by heart (names, say).
        config: the family of maps and how it learns; a rotation if None.
        out: folder to resume from after an interruption.

    Returns:
        The map with its accuracy beside chance. Read with `complexity`: a rich enough map aligns anything.

    Raises:
        InputError: no such layer; variables wider than the layer; an input of the algorithm is missing; the model has
        fewer classes than the algorithm; it would drop out.

    Example:
        >>> from lineament.tasks import ALGORITHMS, equality_examples, learned_mlp
        >>> net = learned_mlp("hierarchical", steps=1)
        >>> known, unseen = (equality_examples("hierarchical", 64, seed=seed) for seed in (0, 1))
        >>> few = AlignConfig(batch=8, tests=100, fit=train.FitConfig(steps=2))
        >>> found = align(net, "0", ALGORITHMS["both equalities"], known, unseen, few)
        >>> found.blocks["right"], 0 <= found.iia <= 1
        (slice(8, 16, None), True)
    """
    config = config or AlignConfig()
    known = Layer(model, layer, examples, batch=config.batch)
    other = Layer(model, layer, unseen, batch=config.batch)
    blocks = _blocks(algorithm, known.hidden.shape[1], config.size)
    draws = [interventions(algorithm, e, changing=config.changing) for e in (examples, unseen)]
    measured = draws[1](config.tests, config.seed)
    right = algorithm.run(unseen.values)[algorithm.output].long()
    _check_classes(other, torch.cat([right, measured.labels]))
    with frozen(model), seeded(config.seed):
        if config.map == "neurons":
            phi = _greedy(known, blocks, draws[0](config.batch, config.seed + 1))
        else:
            phi = _learned(known, blocks, draws[0], config, out)
    phi.eval()
    everything = torch.arange(len(unseen))
    with torch.no_grad():
        device = next((p.device for p in phi.parameters()), other.hidden.device)
        h = other.hidden.to(device)
        drift = (phi.inverse(phi(h), h) - h).abs().max() / h.abs().max().clamp_min(1e-30)  # pyright: ignore[reportCallIssue]
    return Alignment(
        known.name, algorithm.name, phi, blocks, iia=accuracy_under(other, phi, blocks, measured),
        chance=measured.chance, accuracy=_accuracy(other, everything, right), drift=float(drift),
        parameters=sum(p.numel() for p in phi.parameters()),
    )  # fmt: skip


@torch.no_grad()
def accuracy_under(layer: Layer, phi: nn.Module, blocks: Blocks, drawn: Interventions) -> float:
    """Return the share of interventions after which the model's answer is the algorithm's."""
    right = 0
    for at in torch.arange(len(drawn.base)).split(layer.batch):
        some = Interventions(drawn.base[at], drawn.sources[at], drawn.mask[at], drawn.labels[at], drawn.before[at])
        scores = layer.among(layer.answers(some.base, layer.exchanged(phi, blocks, some)), some.base)
        right += int((scores.argmax(1).cpu() == some.labels).sum())
    return right / len(drawn.base)


@torch.no_grad()
def _accuracy(layer: Layer, rows: Tensor, labels: Tensor) -> float:
    parts = zip(rows.split(layer.batch), labels.split(layer.batch), strict=True)
    right = sum(int((layer.among(layer.answers(at), at).argmax(1).cpu() == y).sum()) for at, y in parts)
    return right / len(rows)


def _blocks(algorithm: Algorithm, width: int, size: int | None) -> dict[str, slice]:
    variables = algorithm.aligned
    size = width // max(2, len(variables)) if size is None else size
    if size < 1 or size * len(variables) > width:
        raise InputError(
            f"{len(variables)} variables of {size} coordinates each do not fit a layer {width} wide; size can be 1 to "
            f"{width // max(1, len(variables))}"
        )
    blocks = {v: slice(i * size, (i + 1) * size) for i, v in enumerate(variables)}
    check_blocks(blocks, width)
    return blocks


def _check_classes(layer: Layer, labels: Tensor) -> None:
    first = torch.arange(1)
    with torch.no_grad():
        count = layer.among(layer.answers(first), first).shape[1]
    if int(labels.min()) < 0 or int(labels.max()) >= count:
        raise InputError(
            f"the algorithm answers {int(labels.min())} to {int(labels.max())} and the model has {count} answers; its "
            "output is to be a class number, or one among the examples' choices"
        )


def _learned(
    layer: Layer, blocks: Blocks, draw: Callable[[int, int], Interventions], config: AlignConfig, out: Any
) -> nn.Module:
    width = layer.hidden.shape[1]
    phi = (BIJECTIONS[config.map] if isinstance(config.map, str) else config.map)(width)
    if not any(p.requires_grad for p in phi.parameters()):
        return phi

    def loss(phi: nn.Module, drawn: Interventions) -> tuple[Tensor, Mapping[str, float]]:
        scores = layer.answers(drawn.base, layer.exchanged(phi, blocks, drawn))
        labels = drawn.labels.to(scores.device)
        choices = layer.examples.choices
        if config.objective == "all":
            wanted = labels if choices is None else choices[drawn.base].to(labels).gather(1, labels[:, None])[:, 0]
            return cross_entropy(scores, wanted), {}
        scores = layer.among(scores, drawn.base)
        if config.objective == "choices":
            return cross_entropy(scores, labels), {}
        others = scores.scatter(1, labels[:, None], -torch.inf).amax(1)
        return (others - scores.gather(1, labels[:, None])[:, 0]).mean(), {}

    train.fit(phi, lambda step: draw(config.batch, config.seed * 1_000_003 + step + 2), loss, config.fit, out=out,
              description=f"align {layer.name}")  # fmt: skip
    return phi


def _greedy(layer: Layer, blocks: Blocks, drawn: Interventions) -> nn.Module:
    """Give each variable the neurons that help most, one after the other; `width x size x variables` evaluations."""
    width, chosen = layer.hidden.shape[1], {v: [] for v in blocks}

    def accuracy() -> float:
        taken = [i for mine in chosen.values() for i in mine]
        order = Reordered([*taken, *(i for i in range(width) if i not in taken)])
        ends = torch.tensor([len(mine) for mine in chosen.values()]).cumsum(0).tolist()
        now = {v: slice(end - len(chosen[v]), end) for v, end in zip(chosen, ends, strict=True)}
        return accuracy_under(layer, order.to(layer.hidden.device), now, drawn)

    for _ in range(next(iter(blocks.values())).stop):
        for mine in chosen.values():
            free = [i for i in range(width) if all(i not in taken for taken in chosen.values())]
            found = []
            for i in free:
                mine.append(i)
                found.append(accuracy())
                mine.pop()
            mine.append(free[max(range(len(free)), key=found.__getitem__)])
    taken = [i for mine in chosen.values() for i in mine]
    return Reordered([*taken, *(i for i in range(width) if i not in taken)])
