"""g2gnet: sparse layers in which groups of units talk to partner groups."""

from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="g2gnet",
    title="Neuro-inspired Ensemble-to-Ensemble Communication Primitives for Sparse and Efficient ANNs",
    authors="Konstantaropoulos, Smirnakis, Papadopouli",
    year=2025,
    venue=None,
    arxiv="2508.14140",
    room=("nn", "models"),
    status="works",
    summary=(
        "Splits the units of feed-forward layers into groups that connect densely to their partner group in the "
        "next layer and sparsely to the others, after functional connectivity in mouse visual cortex. Edges may "
        "be pruned and regrown during training, also by a Hebbian rule on correlated activity."
    ),
    claim=("At up to 75 % sparsity, group-structured connections are at least as accurate as the dense network."),
    figures=(
        Figure("sparsity", "up to 75 %", "abstract"),
        Figure("accuracy over dense on Fashion-MNIST, CIFAR-10 and CIFAR-100", "up to +4.3 points", "abstract"),
        Figure("which data set gives the largest gain", "not read", "unverified"),
        Figure("further gain by dynamic and Hebbian rewiring", "positive, size not read", "unverified"),
    ),
    experiment=(
        "An MLP on 300 digit images: dense, random mask and group mask at 75 % sparsity, with and without "
        "rewiring, 5 seeds. Holds if the group mask is at least as accurate as dense and as a random mask of "
        "equal density; rewiring is reported as it falls."
    ),
    code=None,
    keywords=("sparsity", "dynamic sparse training", "hebbian", "modularity", "neuroscience"),
    related=("hourglass-mlp", "shallow-parallel", "configurable-bricks"),
)

SCALES = Scales(smoke=(1, 2, 64), small=(5, 60, 256), full=(20, 200, 512))  # seeds; epochs; width
SEED, IMAGES, TEST, BATCH, DENSITY, GROUPS = 6300, 300, 500, 50, 0.25, 5
ARMS: dict[str, tuple[dict[str, Any], str | None, float]] = {  # mask, rule of growth, weight decay
    "dense": ({"groups": 1}, None, 0.0), "dense, weight decay": ({"groups": 1}, None, 0.1),
    "random mask": ({"groups": 1, "inside": DENSITY}, None, 0.0),
    "G2G": ({"groups": GROUPS}, None, 0.0), "G2G, whole units": ({"groups": GROUPS, "pattern": "units"}, None, 0.0),
    **{f"G2G, {rule} regrowth": ({"groups": GROUPS}, rule, 0.0) for rule in ("random", "gradient", "hebbian")},
}  # fmt: skip
RULES = {  # fixed before the first run, for means over seeds; (at least, at most)
    "G2G over dense, accuracy": (0.0, 1.0),
    "G2G over a random mask of equal density, accuracy": (0.0, 1.0),
}


def experiment(scale: str = "small") -> Any:
    """Train dense, randomly masked and group-masked nets on few digits, with and without rewiring, as `Evidence`."""
    import time

    from lineament.report import Evidence

    began, (count, epochs, width) = time.perf_counter(), SCALES[scale]
    runs = [_run(SEED + 10 * i, epochs, width) for i in range(count)]
    rows = [{"arm": arm, **{k: sum(run[arm][k] for run in runs) / count for k in runs[0][arm]},
             "seeds": [run[arm]["accuracy"] for run in runs]} for arm in ARMS]  # fmt: skip
    of = {row["arm"]: row["accuracy"] for row in rows}
    found = dict(zip(RULES, (of["G2G"] - of["dense"], of["G2G"] - of["random mask"]), strict=True))
    return Evidence.judged(
        found, RULES, verdict=scale != "smoke", name=RECORD.slug, claim=RECORD.claim, rows=rows,
        seeds=[SEED + 10 * i for i in range(count)], seconds=time.perf_counter() - began,
        notes="hidden layers are masked, first and last are dense; inside and modularity after training",
    )  # fmt: skip


def _run(seed: int, epochs: int, width: int) -> dict[str, dict[str, float]]:
    import contextlib

    from lineament import data, models, nn, train
    from lineament._base.seeds import seeded
    from lineament.tasks.classify import accuracy, class_loss

    known, unseen = (data.load_images("digits", split=split, seed=seed) for split in ("train", "test"))
    known, unseen = known[:IMAGES], unseen[:TEST]
    found, steps = {}, epochs * (IMAGES // BATCH)
    for arm, (mask, grow, decay) in ARMS.items():
        how = mask if mask["groups"] == 1 else {**mask, "between": nn.between_for(DENSITY, GROUPS)}
        with seeded(seed):
            net = models.masked_classifier((64, width, width, width, 10), seed=seed, **how)
        config = train.FitConfig(steps=steps, lr=1e-3, schedule="constant", betas=(0.9, 0.999), clip=None, seed=seed,
                                 weight_decay=decay, log_every=steps)  # fmt: skip
        moving: Any = contextlib.nullcontext()
        if grow:  # from the third epoch on, for three quarters of the run
            per = IMAGES // BATCH
            rule = nn.Rewiring(every=2 * per, start=2 * per, until=3 * steps // 4, share=0.2, grow=grow, seed=seed)
            moving = nn.rewired(net, rule)
        with moving:
            train.fit(net, data.image_batches(known, BATCH, seed=seed), class_loss, config)
        layer: Any = net[3]
        middle = layer.groups()
        found[arm] = {"accuracy": accuracy(net, unseen.pixels, unseen.labels), "density": middle.density,
                      "inside": middle.inside, "modularity": middle.modularity}  # fmt: skip
    return found
