"""Learning a group's table from a part of it: when does a net know the rest (grokking, arXiv:2509.21519)?"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lineament import train
from lineament._base.errors import InputError, unknown
from lineament._base.seeds import generator
from lineament.data import Group, load_group
from lineament.nn import TwoLayer

LOSSES = ("centred", "cross-entropy")
CRITICAL = 2.7482  # c of the authors' program
GROKKED = 0.95  # accuracy on unseen pairs


@dataclass(frozen=True, eq=False)
class GroupSplit:
    """The pairs of a group in two parts, differently for each seed.

    Attributes:
        known: [S, n, 2]. unseen: [S, M^2 - n, 2].
    """

    group: Group
    known: Tensor
    unseen: Tensor

    @classmethod
    def random(cls, group: Group, share: float, *, seeds: Sequence[int] = (0,)) -> "GroupSplit":
        """Draw the share of all pairs that is known.

        Raises:
            InputError: a part would be empty.
        """
        total = len(group) ** 2
        n = round(share * total)
        if not 1 <= n < total:
            raise InputError(f"a share of {share:g} of {total} pairs leaves a part empty; give one between 0 and 1")
        orders = torch.stack([torch.randperm(total, generator=generator(seed)) for seed in seeds])
        return cls(group, group.pairs[orders[:, :n]], group.pairs[orders[:, n:]])

    def labels(self, pairs: Tensor) -> Tensor:
        """Return the products [..., n] of pairs [..., n, 2]."""
        return self.group.table[pairs[..., 0], pairs[..., 1]]


@dataclass(frozen=True, kw_only=True)
class GrokConfig:
    """How a table is learned.

    Args:
        width: K, hidden units. activation: of `nn.two_layer.ACTIVATIONS`. loss: "centred" squares, or "cross-entropy".
        decay: eta. Coupled, as in Adam with L2: it is added to the loss, so decoupled decay of the same number is
            another thing by orders of magnitude. With Muon it is decoupled by the paper; set `fit.weight_decay` there.
        top: V's size at the start, 0 for none. residual: layers in between.
        seeds: nets side by side. every: epochs between two looks at unseen pairs.
        fit: epochs (full batch) and optimiser.
    """

    width: int = 256
    activation: str = "square"
    loss: str = "centred"
    decay: float = 2e-4
    top: float = 1.0
    residual: int = 0
    seeds: tuple[int, ...] = (0,)
    every: int = 25
    fit: train.FitConfig = field(
        default=train.FitConfig(steps=1500, lr=1e-3, schedule="constant", betas=(0.9, 0.999), clip=None)
    )

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise unknown("loss", self.loss, LOSSES)
        if self.every < 1 or not self.seeds:
            raise InputError(f"every {self.every} epochs, seeds {self.seeds}; expected 1 or more of both")


@dataclass(frozen=True, eq=False)
class Grokked:
    """Nets that learned a table, and how.

    Attributes:
        rows: one per seed and look: "epoch", "seed", "known" and "unseen" (accuracies), and what was watched.
    """

    net: TwoLayer
    split: GroupSplit
    rows: Sequence[Mapping[str, Any]]

    def epoch(self, seed: int, of: str = "unseen", share: float = GROKKED) -> float:
        """Return the first epoch at which a seed's accuracy was seen to reach a share; infinity if it never was."""
        return min((row["epoch"] for row in self.rows if row["seed"] == seed and row[of] >= share), default=math.inf)


def grok(
    split: GroupSplit, config: GrokConfig | None = None, *, until: float | None = None, out: str | Path | None = None,
    watch: Callable[[TwoLayer, GroupSplit], Sequence[Mapping[str, Any]]] | None = None,
) -> Grokked:  # fmt: skip
    """Learn the known pairs of a group with one net per seed; look at the unseen ones now and then.

    Args:
        split: as many seeds as `config.seeds`.
        until: stop when every seed has reached this accuracy on unseen pairs.
        out: folder to resume from; the rows are then those since the resumption.
        watch: (net, split) -> more numbers for every seed, `explain.stages` say.

    Raises:
        InputError: the split is of another number of seeds.
    """
    config = config or GrokConfig()
    if len(split.known) != len(config.seeds):
        raise InputError(f"the split is of {len(split.known)} seeds and the nets of {len(config.seeds)}")
    net = TwoLayer(
        len(split.group), config.width, activation=config.activation, seeds=config.seeds, top=config.top,
        residual=config.residual,
    )  # fmt: skip
    rows, reached = [], set()

    def look(step: int, numbers: Mapping[str, float]) -> bool:
        if (step + 1) % config.every and step + 1 != config.fit.steps:
            return False
        more = watch(net, split) if watch else [{}] * len(config.seeds)
        for seed, known, unseen, extra in zip(
            config.seeds, accuracies(net, split, split.known), accuracies(net, split, split.unseen), more, strict=True
        ):
            rows.append({"epoch": step + 1, "seed": seed, "known": known, "unseen": unseen, **extra})
            if until is not None and unseen >= until:
                reached.add(seed)
        return len(reached) == len(config.seeds)

    batch = (split.known, split.labels(split.known))
    train.fit(net, lambda step: batch, group_loss(config.loss, config.decay), config.fit, out=out, on_step=look,
              description=split.group.name)  # fmt: skip
    return Grokked(net, split, rows)


def group_loss(kind: str, decay: float) -> Callable[[nn.Module, Any], tuple[Tensor, Mapping[str, float]]]:
    """Return the loss, summed over nets so that each learns as if alone, with `decay |theta|^2 / 2` added.

    "centred": `|o' - y'|^2`, both less their means over classes, averaged over samples.
    """

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Mapping[str, float]]:
        scores, labels = net(batch[0]), batch[1]
        if kind == "cross-entropy":
            fit = cross_entropy(scores.movedim(-1, 1), labels, reduction="none").mean(1).sum()
        else:
            o = scores - scores.mean(-1, keepdim=True)
            right = o.gather(-1, labels[..., None])[..., 0]
            fit = (o.square().sum(-1) - 2 * right + 1 - 1 / scores.shape[-1]).mean(1).sum()
        if not decay:
            return fit, {}
        return fit + 0.5 * decay * torch.stack([p.square().sum() for p in net.parameters()]).sum(), {}

    return loss


@torch.no_grad()
def accuracies(net: TwoLayer, split: GroupSplit, pairs: Tensor) -> list[float]:
    """Return each net's share of right answers."""
    return (net(pairs).argmax(-1) == split.labels(pairs)).float().mean(1).tolist()


def critical_share(order: int, dim: int = 1) -> float:
    """Return the law's share of pairs at which irreps of a dimension are learned: `c log M / M`, times d / 2 from 2 on.

    Example:
        >>> critical_share(71) < critical_share(23)
        True
    """
    return CRITICAL * math.log(order) / order * max(1.0, dim / 2)


def one_share(value: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Learn one group from one share of its table: a run of `sample_scan`."""
    changes = dict(value["config"])
    config = GrokConfig(
        **{**changes, "seeds": tuple(changes["seeds"]), "fit": train.FitConfig(**changes["fit"])}  # from JSON
    )
    split = GroupSplit.random(load_group(value["group"]), value["share"], seeds=config.seeds)
    found = grok(split, config, until=GROKKED)
    epochs = [found.epoch(seed) for seed in config.seeds]
    best = [max(row["unseen"] for row in found.rows if row["seed"] == seed) for seed in config.seeds]
    return {"grokked": sum(map(math.isfinite, epochs)), "epochs": [e if math.isfinite(e) else None for e in epochs],
            "unseen": best}  # fmt: skip


def sample_scan(
    groups: Sequence[str], shares: Sequence[float], config: GrokConfig, out: str | Path, *, workers: int = 1,
    ray: str | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Learn every group from every share of its table; what is finished in `out` is read, not run.

    Returns:
        A row per group and share: how many seeds grokked, at which epochs, and the best accuracy on unseen pairs.
    """
    from dataclasses import asdict

    values = {
        f"{name}, {share:g}": {"group": name, "share": share, "config": asdict(config)}
        for name in groups
        for share in shares
    }
    found = train.sweep(f"{__name__}:one_share", values, out, workers=workers, ray=ray)
    return [{"group": values[name]["group"], "share": values[name]["share"], "order": len(load_group(
        values[name]["group"])), **result} for name, result in found.items()]  # fmt: skip


def smallest_shares(rows: Sequence[Mapping[str, Any]], seeds: int) -> dict[str, float]:
    """Return each group's smallest share at which so many seeds grokked; infinity if there is none."""
    groups = dict.fromkeys(row["group"] for row in rows)
    return {
        name: min((r["share"] for r in rows if r["group"] == name and r["grokked"] >= seeds), default=math.inf)
        for name in groups
    }


def law_fit(shares: Mapping[int, float]) -> tuple[float, float]:
    """Return c and R^2 of `p* = c log M / M` through the finite shares by group order, by least squares.

    Raises:
        InputError: fewer than two finite shares.
    """
    points = [(math.log(M) / M, p) for M, p in shares.items() if math.isfinite(p)]
    if len(points) < 2:
        raise InputError(f"{len(points)} groups reached a share; a law needs two or more")
    x, y = torch.tensor(points, dtype=torch.float64).T
    c = (x @ y) / (x @ x)
    return float(c), float(1 - (y - c * x).square().sum() / (y - y.mean()).square().sum().clamp_min(1e-30))
