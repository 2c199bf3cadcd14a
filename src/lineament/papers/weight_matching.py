"""weight-matching: permute one network onto another, for any traced architecture."""

from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="weight-matching",
    title=(
        "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching: With Insights into Other "
        "Permutation Search Methods"
    ),
    authors="Ito, Yamada, Kumagai",
    year=2025,
    venue="ICLR 2025",
    arxiv="2402.04051",
    room=("weights", "graph"),
    status="works",
    summary=(
        "Hidden units can be permuted without changing a network; weight matching finds the permutation that "
        "lines one model up with another so that they can be averaged. The paper finds that matching hardly "
        "shortens the distance but aligns the singular vectors of large singular values. The library derives "
        "the symmetry group from the traced graph instead of a hand-written table."
    ),
    claim=(
        "Matching removes most of the loss barrier between independently trained networks although it shortens "
        "their distance little, because it aligns the leading singular vectors."
    ),
    figures=(
        Figure("distance between the models, cut by matching", "6 to 20 % only", "secondary"),
        Figure(
            "alignment of leading singular vectors, MLP: before / after",
            "about 0 / up to about 0.8",
            "secondary",
        ),
        Figure("straight-through estimator, same alignment", "about 0 although its barrier is low", "secondary"),
        Figure(
            "three models matched to one anchor, barrier",
            "lower with matching than with the straight-through estimator",
            "abstract",
        ),
        Figure("Git Re-Basin, ResNet20 at 32 times the width, CIFAR-10, test barrier", "zero", "unverified"),
    ),
    experiment=(
        "Independently trained pairs: MLPs on digits and ResNet20-size nets, before and after matching, with "
        "REPAIR and REPAIR alone as the control, 3 pairs each. Holds if for MLPs the barrier falls at least 5 "
        "times while distance falls under 35 % and leading alignment exceeds 0.3 and the mean over all vectors, "
        "and for ResNets matching with REPAIR is below REPAIR alone in every pair with a mean of at most 0.7 of "
        "it and 0.6 of the barrier before."
    ),
    code=None,
    keywords=(
        "permutation symmetry", "weight matching", "git re-basin", "linear mode connectivity", "repair",
        "model merging", "singular vectors",
    ),
    related=("lmc-landscape", "neural-circuit-diagrams", "fireq"),
)  # fmt: skip

SCALES = Scales(  # pairs; width, epochs and straight-through steps of the MLPs; epochs and orders of the ResNets
    smoke=(1, 16, 2, 3, 1, 1), small=(3, 128, 60, 300, 25, 10), full=(5, 512, 60, 1500, 40, 10),
)  # fmt: skip
SEED = 1000  # other seeds than the pilot's
RULES = {  # fixed before the first run; the worst of all pairs, but for the ratios of means; (at least, at most)
    "MLP: barrier before / after matching": (5.0, 1e9),
    "MLP: distance after / before": (0.65, 1.0),
    "MLP: R(0.3) after": (0.3, 1.0),
    "MLP: R(0.3) - R(0) after": (0.0, 1.0),
    "MLP: R(0.3) of straight-through": (-0.1, 0.1),
    "ResNet: matching and REPAIR / REPAIR alone": (0.0, 1.0),
    "ResNet: the same, of means": (0.0, 0.7),
    "ResNet: matching and REPAIR / before, of means": (0.0, 0.6),
}
ARMS, NONE = ("before", "matched", "repaired", BOTH := "matched and repaired"), 1e-3  # a barrier below NONE is none


def experiment(scale: str = "small") -> Any:
    """Match independently trained pairs of MLPs and ResNet20-size nets on digits, as `report.Evidence`."""
    import time

    from lineament.report import Evidence

    began, (pairs, *dense, epochs, orders) = time.perf_counter(), SCALES[scale]
    rows = [row for i in range(pairs) for row in _mlp(i, *dense)]
    rows += [row for i in range(pairs) for row in _resnet(i, epochs, orders)]
    return Evidence.judged(
        _found(rows), RULES, verdict=scale != "smoke", name=RECORD.slug, claim=RECORD.claim, rows=rows,
        seeds=[SEED + i for i in range(3 * pairs)], seconds=time.perf_counter() - began,
        notes="barriers on test data, 11 places; third: between two nets that were both matched to another",
    )  # fmt: skip


def _found(rows: list[dict[str, Any]]) -> dict[str, float]:
    def of(net: str, measure: str, arm: str) -> list[float]:
        return [row[arm] for row in rows if row["net"] == net and row["measure"] == measure]

    loss: Any = {(net, arm): of(net, "loss", arm) for net in ("MLP", "ResNet") for arm in ARMS}
    leading, both, alone = of("MLP", "R(0.3)", "matched"), loss["ResNet", BOTH], loss["ResNet", "repaired"]
    values = (
        min(x / max(y, NONE) for x, y in zip(loss["MLP", "before"], loss["MLP", "matched"], strict=True)),
        min(of("MLP", "distance", "matched")), min(leading),
        min(x - y for x, y in zip(leading, of("MLP", "R(0)", "matched"), strict=True)),
        max(of("MLP", "R(0.3)", "straight-through"), key=abs), max(x / y for x, y in zip(both, alone, strict=True)),
        sum(both) / sum(alone), sum(both) / sum(loss["ResNet", "before"]),
    )  # fmt: skip
    return dict(zip(RULES, values, strict=True))


def _mlp(pair: int, width: int, epochs: int, steps: int) -> list[dict[str, Any]]:
    import dataclasses

    from lineament import data, weights
    from lineament.weights.straight_through import RECIPE

    images, of = weights.images_in_batches("digits")
    test = {"test": of["test"]}
    nets = weights.classifiers("MLP", images, range(SEED + 3 * pair, SEED + 3 * pair + 3), epochs=epochs, width=width)
    a, b, c = (net.state_dict() for net in nets)
    found = weights.compared(nets[0], a, b, test, mend=of["train"], seed=pair)
    draws = data.image_batches(images, min(1000, len(images)), seed=pair)
    config: Any = {"config": dataclasses.replace(RECIPE, steps=steps), "model": nets[0], "seed": pair}
    moved = weights.straight_through(a, b, found.group, draws, None, **config).apply(b)
    third = weights.match([a, c], found.group, seed=pair)[1].apply(c)
    through, lie = weights.path(nets[0], a, moved, test), weights.alignment(a, moved)
    rows = [
        {"measure": "loss", **found.row(), "straight-through": through.barrier},
        {"measure": "accuracy", **found.row("accuracy"), "straight-through": through.rise("accuracy")},
        {"measure": "distance", "before": 1.0, "matched": found.after.distance / found.before.distance},
        {"measure": "R(0)", "before": found.before.score, "matched": found.after.score},
        {"measure": "R(0.3)", "before": found.before.leading, "matched": found.after.leading,
         "straight-through": lie.leading},
        {"measure": "third", "matched": weights.path(nets[0], found.matched, third, test).barrier},
    ]  # fmt: skip
    return [{"net": "MLP", "pair": pair, **row} for row in rows]


def _resnet(pair: int, epochs: int, orders: int) -> list[dict[str, Any]]:
    from lineament import weights

    images, of = weights.images_in_batches("digits")
    nets = weights.classifiers("ResNet", images, [SEED + 500 + 2 * pair + i for i in range(2)], epochs=epochs)
    a, b = (net.state_dict() for net in nets)
    found = weights.compared(nets[0], a, b, {"test": of["test"]}, mend=of["train"], restarts=orders, seed=pair)
    return [{"net": "ResNet", "pair": pair, "measure": m, **found.row(m)} for m in ("loss", "accuracy")]
