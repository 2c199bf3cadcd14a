"""grokking-li2: a three-stage theory of when grokking sets in."""

from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="grokking-li2",
    title="Provable Scaling Laws of Feature Emergence from Learning Dynamics of Grokking",
    authors="Yuandong Tian",
    year=2025, venue=None, arxiv="2509.21519", room=("explain", "train", "data"), status="works",
    summary=(
        "A theory of grokking in two-layer networks in three stages: random features, features that each climb "
        "an energy on their own, and features that repel each other. On group arithmetic the maxima of the "
        "energy are the irreducible representations, which gives a law for the data needed. The library offers "
        "the groups, the energy, stage diagnostics and sample scans."
    ),
    claim=(
        "Weight decay drives feature learning, the features found are Fourier modes of the group, and the "
        "training share needed falls with group size."
    ),
    figures=(
        Figure("modular addition, M = 71, 40 % of the data", "groks with weight decay 2e-4, not without", "paper"),
        Figure("training share at the generalisation boundary", "proportional to log M / M", "paper"),
        Figure("off-diagonal share of the feature Gram matrices in stage two", "at most 8 %", "paper"),
        Figure("Muon against Adam at small width, M = 71", "lower test loss", "paper"),
    ),
    experiment=(
        "Energy ascent for M = 11 must give pure frequencies; modular addition with M = 23 is trained with and "
        "without weight decay, and the training share is scanned for M = 13, 23, 31. Holds if the decayed run "
        "groks within 1500 epochs in at least 4 of 5 seeds while the undecayed one stays below 0.8, and the "
        "critical share falls with M."
    ),
    code="yuandong-tian/understanding (CC BY-NC 4.0)",
    keywords=("grokking", "modular addition", "group theory", "feature learning", "muon", "scaling law"),
    related=("projection-head", "lmc-landscape"),
)  # fmt: skip

SCALES = Scales(
    smoke={"climb": 20, "epochs": 4, "orders": (5,), "seeds": 2, "scan": (5, 7), "shares": (0.5,), "each": 2},
    small={"climb": 3000, "epochs": 1500, "orders": (23,), "seeds": 5, "scan": (13, 23, 31),
           "shares": (0.25, 0.35, 0.45, 0.55, 0.65, 0.75), "each": 3},
    full={"climb": 3000, "epochs": 1500, "orders": (23, 31), "seeds": 5, "scan": (13, 17, 23, 31, 43, 53, 71),
          "shares": tuple(round(0.15 + 0.05 * i, 2) for i in range(13)), "each": 15},
)  # fmt: skip
RULES = {  # fixed before the first run; (at least, at most)
    "ascent, M = 11: smallest purity": (0.999, 1.001),
    "ascent, M = 11: largest |4 E / M - 1|": (0.0, 1e-3),
    "ascent, M = 11: frequencies hit": (5.0, 5.0),
    "decay 2e-4: seeds of 5 that grok": (4.0, 5.0),
    "no decay: best accuracy on unseen pairs": (0.0, 0.8),
    "largest step of the critical share as M grows": (-1.0, -0.01),
}
LAW = {"p* = c log M / M: R2": (0.9, 1.0)}  # of "full"
KNOWN = {23: 0.7, 31: 0.6}  # shares of the pairs that are learned; else one half


def experiment(scale: str = "small") -> Any:
    """Climb the energy, grok with and without decay, scan the share that is needed; return `report.Evidence`."""
    import math
    import time
    from itertools import pairwise
    from tempfile import TemporaryDirectory

    from lineament import tasks
    from lineament.report import Evidence

    began, size = time.perf_counter(), SCALES[scale]
    climbed, found = _climb(size["climb"])
    rows, grokked, best = [climbed], [], []
    for order in size["orders"]:
        made = [_learn(order, decay, size["epochs"], size["seeds"]) for decay in (2e-4, 0.0)]
        rows += [row for some in made for row in some]
        grokked.append(sum(math.isfinite(row["95 % unseen"]) for row in made[0]))
        best.append(max(row["unseen, best"] for row in made[1]))
    config = tasks.GrokConfig(seeds=tuple(range(size["each"])), fit=_fit(size["epochs"]))
    with TemporaryDirectory() as folder:
        scanned = tasks.sample_scan([f"Z{M}" for M in size["scan"]], size["shares"], config, folder)
    rows += [{key: value for key, value in row.items() if key != "order"} for row in scanned]
    wanted = math.ceil(2 / 3 * size["each"])
    least = {int(name[1:]): share for name, share in tasks.smallest_shares(scanned, wanted).items()}
    rows += [{"M": M, "critical share": p, "c log M / M": tasks.critical_share(M)} for M, p in least.items()]
    steps = [min(q, 1.0) - min(p, 1.0) for p, q in pairwise(least.values())]  # never reached: 1
    numbers, rules = [*found, min(grokked), max(best), max(steps)], RULES
    if scale == "full":
        c, fit = tasks.law_fit(least)
        rows, numbers, rules = [*rows, {"c": c}, *_optimizers()], [*numbers, fit], RULES | LAW
    return Evidence.judged(
        dict(zip(rules, map(float, numbers), strict=True)), rules, verdict=scale != "smoke", name=RECORD.slug,
        claim=RECORD.claim, rows=rows, seeds=list(range(size["seeds"])), seconds=time.perf_counter() - began,
        notes="Adam with L2 in the loss (coupled). Infinity: not within the epochs. Each seed has its own pairs.",
    )  # fmt: skip


def _fit(epochs: int, **changes: Any) -> Any:
    from dataclasses import replace

    from lineament import tasks

    return replace(tasks.GrokConfig().fit, steps=epochs, **changes)


def _climb(steps: int) -> tuple[dict[str, Any], list[float]]:
    from lineament import data, explain

    group = data.load_group("Z11")
    w = explain.ascend(group, units=64, steps=steps)
    share, which = data.purity(w[:11], data.irreps(group))
    E = explain.energy(w, group.pairs, group.table.flatten())
    off = (4 * E / 11 - 1).abs().max().item()
    row = {"group": "Z11", "units": 64, "energy, mean": E.mean().item(), "purity, smallest": share.min().item(),
           "units on each frequency": which.bincount(minlength=6)[1:].tolist()}  # fmt: skip
    return row, [share.min().item(), off, len(which.unique())]


def _learn(order: int, decay: float, epochs: int, seeds: int) -> list[dict[str, Any]]:
    """Return a row per seed: when it knew its pairs and the others, and what its features are like at the end."""
    from lineament import data, explain, tasks

    group, count = data.load_group(f"Z{order}"), tuple(range(seeds))
    split = tasks.GroupSplit.random(group, KNOWN.get(order, 0.5), seeds=count)
    config = tasks.GrokConfig(decay=decay, seeds=count, fit=_fit(epochs))
    found = tasks.grok(split, config, watch=explain.Stages(group))
    rows: list[dict[str, Any]] = []
    for seed in count:
        mine = [row for row in found.rows if row["seed"] == seed]
        rows.append(
            {"M": order, "decay": decay, "seed": seed, "99 % known": found.epoch(seed, "known", 0.99),
             "95 % unseen": found.epoch(seed), "unseen, best": max(row["unseen"] for row in mine),
             **{key: mine[-1][key] for key in ("purity", "modes", "F off-diagonal", "FF off-diagonal")}}
        )  # fmt: skip
    return rows


def _optimizers() -> list[dict[str, Any]]:
    """Return Muon on W beside Adam, at a small width."""
    from lineament import data, tasks

    split = tasks.GroupSplit.random(data.load_group("Z71"), 0.4, seeds=range(3))
    rows = []
    for name in ("adamw", "muon"):
        for width in (64, 128, 256):
            fit = _fit(1500, optimizer={"W.*": name, "*": "adamw"}, betas=(0.95, 0.999), lr={"W.*": 5e-3, "*": 1e-3})
            found = tasks.grok(split, tasks.GrokConfig(width=width, seeds=(0, 1, 2), fit=fit))
            best = [max(row["unseen"] for row in found.rows if row["seed"] == seed) for seed in range(3)]
            rows.append({"optimizer": name, "K": width, "M": 71, "unseen, best": best})
    return rows
