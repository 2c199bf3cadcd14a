"""shallow-parallel: a residual stack with its layers side by side."""

import itertools
from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="shallow-parallel",
    title="Make Deep Networks Shallow Again",
    authors="Bermeitinger, Hrycej, Handschuh",
    year=2023,
    venue="KDIR 2023",
    arxiv="2309.08414",
    room=("weights", "nn", "models"),
    status="works",
    summary=(
        "Multiplying out a residual stack gives the identity, each layer alone, and compositions of several "
        "layers. Without the compositions it is a single broad layer with the same parameters. The library "
        "converts a stack to this form and to orders in between, and reports how much of the output each order "
        "explains."
    ),
    claim="At equal parameters the parallel form reaches about the same loss as the sequential one.",
    figures=(
        Figure("trained combinations, MNIST and CIFAR-10", "6,912", "abstract"),
        Figure("sequential against parallel, training and validation loss", "about equal", "abstract"),
        Figure("detail", "shallow sometimes better on validation, deep slightly better on training", "secondary"),
    ),
    experiment=(
        "Residual stacks of 2 to 16 dense layers on digits, sequential and parallel, 3 seeds. Holds if test "
        "accuracies differ by less than 1.5 points at every depth and the gap in test loss, parallel minus "
        "deep, falls with depth; training losses are not equal at this size, and that is reported."
    ),
    code=None,
    keywords=("residual network", "depth", "parallel layers", "taylor expansion", "shallow network"),
    related=("depth-efficiency", "hourglass-mlp"),
)

SCALES = Scales(smoke=(1, 2, (2, 4)), small=(3, 30, (2, 4, 8, 16)), full=(10, 30, (2, 4, 8, 16, 32)))
WIDTH, BATCH = 32, 32  # seeds, epochs, layers above
RULES = {  # fixed before the first run, for means over seeds; (at least, at most)
    "largest difference in test accuracy": (0.0, 0.015),
    "largest rise of the gap in test loss from one depth to the next": (-99.0, 0.0),
}


def experiment(scale: str = "small") -> Any:
    """Train residual stacks of growing depth, sequential and parallel, on digits; return `report.Evidence`."""
    import time

    from lineament.report import Evidence

    began, (seeds, epochs, depths) = time.perf_counter(), SCALES[scale]
    runs = {n: [_run(seed, epochs, n) for seed in range(seeds)] for n in depths}
    mean = {n: {key: sum(run[key] for run in own) / seeds for key in own[0]} for n, own in runs.items()}
    gaps = [row["parallel test loss"] - row["deep test loss"] for row in mean.values()]
    found = (
        max(abs(row["parallel test accuracy"] - row["deep test accuracy"]) for row in mean.values()),
        max(b - a for a, b in itertools.pairwise(gaps)),
    )
    return Evidence.judged(
        dict(zip(RULES, found, strict=True)), RULES, verdict=scale != "smoke", name=RECORD.slug, claim=RECORD.claim,
        rows=[{"layers": n, **row} for n, row in mean.items()], seeds=list(range(seeds)),
        seconds=time.perf_counter() - began,
        notes="Q = samples x classes / parameters. 'converted': the trained deep stack put side by side, untuned. "
        "Orders are of the trained deep stack on test images.",
    )  # fmt: skip


def _run(seed: int, epochs: int, layers: int) -> dict[str, float]:
    import torch

    from lineament import data, graph, models, train, weights
    from lineament._base.seeds import seeded
    from lineament.tasks.classify import accuracy, class_loss

    known, unseen = (data.load_images("digits", split=split, seed=seed) for split in ("train", "test"))
    steps = epochs * (len(known) // BATCH)
    config = train.FitConfig(steps=steps, lr=1e-3, schedule="constant", betas=(0.9, 0.999), clip=None, seed=seed,
                             log_every=steps, checkpoint_every=steps)  # fmt: skip
    found: dict[str, float] = {}

    @torch.no_grad()
    def score(form: str, model: Any) -> None:
        for name, part in (("train", known), ("test", unseen)):
            found[f"{form} {name} loss"] = float(class_loss(model, (part.pixels, part.labels))[0])
        found[f"{form} test accuracy"] = accuracy(model, unseen.pixels, unseen.labels)

    for form in ("parallel", "deep"):
        with seeded(seed):
            model = models.residual_classifier(64, WIDTH, layers, 10, side_by_side=form == "parallel")
        train.fit(model, data.image_batches(known, BATCH, seed=seed), class_loss, config)
        score(form, model.eval())
    found["Q"] = weights.over_determination(len(known), 10, model)  # of the deep one; the other has as many
    stack: Any = model[2]
    expanded = weights.orders(list(stack), model[:2](unseen.pixels))
    names = [f"2.{i}" for i in range(layers)]
    found |= {f"explained by orders to {k}": expanded.explained(k) for k in (1, 2)}
    with graph.swapped(model, weights.side_by_side(model, names)):
        score("converted", model)
    return found
