"""lmc-landscape: why late forks share a valley and early ones do not."""

import itertools
from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="lmc-landscape",
    title="Landscaping Linear Mode Connectivity",
    authors="Singh, Adilova, Kamp, Fischer, Schölkopf, Hofmann",
    year=2024,
    venue="HiLD workshop at ICML 2024",
    arxiv="2406.16300",
    room=("weights",),
    status="works",
    summary=(
        "Explains geometrically when two runs that share their first steps stay connected by a straight "
        "low-loss line: training descends a mountainside, and an early fork puts a ridge between the two runs. "
        "It comes with distances and angles from the fork, barrier curves, and second-order estimates for the "
        "whole network and for each layer."
    ),
    claim=(
        "The barrier falls as the fork happens later, and a second-order estimate ranks the barriers of single layers."
    ),
    figures=(
        Figure("barrier against the time of the fork", "shrinks as the fork happens later", "abstract"),
        Figure("barrier formula against measured height", "tracks it, also per layer; values not read", "unverified"),
        Figure("barriers of single layers", "often near zero when the full barrier is large", "secondary"),
    ),
    experiment=(
        "MLPs on digits with label noise are forked after 0, 8 and 30 epochs, and independent MLPs and "
        "ResNet20-size nets are matched and repaired. Holds if the full barrier falls monotonically at least 3 "
        "times with a layer-wise Spearman correlation of 0.8, matching cuts each MLP barrier 5 times, and for "
        "ResNets matching with REPAIR stays below REPAIR alone with a mean of at most 0.7 of it."
    ),
    code=None,
    keywords=("linear mode connectivity", "loss landscape", "barrier", "hessian", "interpolation", "ridge"),
    related=("weight-matching", "i-lora", "rws"),
)

SCALES = Scales(  # forks at these epochs, seeds of each, epochs after it; pairs, epochs of the MLPs and of the ResNets
    smoke=((0, 1), 1, 1, 1, 1, 1), small=((0, 8, 30), 3, 60, 3, 60, 25),
    full=((0, 1, 2, 4, 8, 16, 30), 3, 60, 5, 60, 40),
)  # fmt: skip
SEED, SIZES, NOISE, NONE = 2000, (64, 128, 128, 128, 10), 0.3, 1e-3  # a barrier below NONE is none
RULES = {  # fixed before the first run; (at least, at most)
    "smallest fall of the mean barrier from fork to fork": (0.0, 1e9),
    "mean barrier of the first fork / of the last": (3.0, 1e9),
    "mean Spearman of barriers per layer and their estimates, first fork": (0.8, 1.0),
    "MLP: barrier before / after matching, worst pair": (5.0, 1e9),
    "ResNet: matching and REPAIR / REPAIR alone, worst pair": (0.0, 1.0),
    "ResNet: the same, of means": (0.0, 0.7),
}
BOTH = "matched and repaired"


def experiment(scale: str = "small") -> Any:
    """Fork runs late and early, and match runs that share nothing, as `report.Evidence`."""
    import time

    from lineament.report import Evidence

    began, (forks, seeds, epochs, pairs, dense, residual) = time.perf_counter(), SCALES[scale]
    forked = [_fork(k, seed, epochs, layers=k == forks[0]) for k in forks for seed in range(seeds)]
    apart = [_apart(net, i, dense if net == "MLP" else residual) for net in ("MLP", "ResNet") for i in range(pairs)]
    return Evidence.judged(
        _found(forked, apart), RULES, verdict=scale != "smoke", name=RECORD.slug, claim=RECORD.claim,
        rows=forked + apart, seeds=[SEED + i for i in range(seeds)], seconds=time.perf_counter() - began,
        notes="forked: barrier on the noisy training data; apart: on test data, before, matched, repaired, both",
    )  # fmt: skip


def _found(forked: list[dict[str, Any]], apart: list[dict[str, Any]]) -> dict[str, float]:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    times = sorted({row["fork at epoch"] for row in forked})
    heights = [mean([row["barrier"] for row in forked if row["fork at epoch"] == k]) for k in times]
    dense, nets = ([row for row in apart if row["net"] == net] for net in ("MLP", "ResNet"))
    values = (
        min(a - b for a, b in itertools.pairwise(heights)), heights[0] / max(heights[-1], NONE),
        mean([row["Spearman"] for row in forked if "Spearman" in row]),
        min(row["before"] / max(row["matched"], NONE) for row in dense),
        max(row[BOTH] / row["repaired"] for row in nets),
        sum(row[BOTH] for row in nets) / sum(row["repaired"] for row in nets),
    )  # fmt: skip
    return dict(zip(RULES, values, strict=True))


def _fork(epoch: int, seed: int, epochs: int, *, layers: bool) -> dict[str, Any]:
    import dataclasses

    import torch
    from scipy.stats import spearmanr

    from lineament import data, models, train, weights
    from lineament._base.seeds import generator, seeded

    (images,) = data.normalized([data.load_images("digits", split="train")])
    draw = generator(SEED + seed)
    wrong = torch.rand(len(images), generator=draw) < NOISE
    labels = torch.where(wrong, torch.randint(0, 10, (len(images),), generator=draw), images.labels)
    images = dataclasses.replace(images, labels=labels)
    with seeded(SEED + seed):
        model = models.dense_classifier(SIZES)
    per, everything = len(images) // 32, [(images.pixels, images.labels)]
    config = train.FitConfig(steps=epochs * per, lr=0.1, schedule="constant", optimizer="sgd", betas=(0.9, 0.999),
                             clip=None, checkpoint_every=10**9, log_every=10**9)  # fmt: skip
    runs = weights.fork(
        model, lambda each: data.image_batches(images, 32, seed=1000 * seed + each), config, shared=epoch * per
    )
    lie = weights.geometry(model, runs.parting, runs.a, runs.b)
    line = weights.path(model, runs.a, runs.b, everything)
    estimate = weights.second_order(model, runs.a, runs.b, everything)
    row = {"net": "MLP", "fork at epoch": epoch, "seed": seed, "barrier": line.barrier, "angle": lie.angle,
           "distance": lie.distance, "estimate": estimate.barrier, "quadratic": estimate.quadratic}  # fmt: skip
    if layers:
        ranks = []
        for ends in ((runs.a, runs.b), (runs.b, runs.a)):
            measured = weights.layerwise(model, *ends, everything)
            guess = weights.second_order(model, *ends, everything, block=weights.module_of).blocks
            ranks.append(float(spearmanr(list(measured.values()), [guess[name] for name in measured]).statistic))
        row["Spearman"] = sum(ranks) / 2
    return row


def _apart(net: str, pair: int, epochs: int) -> dict[str, Any]:
    from lineament import weights

    images, of = weights.images_in_batches("digits")
    nets = weights.classifiers(net, images, [SEED + 500 + 2 * pair + i for i in range(2)], epochs=epochs)
    a, b = (each.state_dict() for each in nets)
    how = {"mend": of["train"], "restarts": 10 if net == "ResNet" else 3, "seed": pair}
    found = weights.compared(nets[0], a, b, {"test": of["test"]}, **how)
    lie = weights.geometry(nets[0], {name: 0 * x for name, x in a.items()}, a, found.matched)
    return {"net": net, "pair": pair, **found.row(), "angle": lie.angle, "distance": lie.distance}
