"""atlas: one learned coefficient per parameter block and task vector."""

from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="atlas",
    title="Knowledge Composition using Task Vectors with Learned Anisotropic Scaling",
    authors="Zhang, Albert, Rodriguez-Opazo, van den Hengel, Abbasnejad",
    year=2024,
    venue="NeurIPS 2024",
    arxiv="2407.02880",
    room=("weights",),
    status="works",
    summary=(
        "aTLAS adds task vectors to a pre-trained model with a separate learned coefficient for every tensor "
        "instead of one scalar per task vector. The few thousand coefficients are fitted by gradient descent on "
        "a small set for addition, negation, few-shot or test-time adaptation, and the summed weights cost "
        "nothing at inference. A gradient rule picks the best task vectors under a budget."
    ),
    claim=(
        "Learned block-wise coefficients compose task vectors clearly better than the best single scalar per vector."
    ),
    figures=(
        Figure("ViT-B/32, addition over 8 tasks, mean accuracy: scalar search / aTLAS", "70.12 / 84.98", "paper"),
        Figure(
            "ViT-B/32, negation, target accuracy (lower is better): scalar search / aTLAS",
            "23.22 / 18.76",
            "paper",
        ),
        Figure("ViT-B/32, 22 data sets, 1 / 4 / 16 shots (zero-shot 60.4)", "66.0 / 70.0 / 72.8", "paper"),
        Figure("ViT-B/32, 22 data sets, test-time adaptation with UFM (zero-shot 60.4)", "66.9", "paper"),
        Figure("ViT-L/14, addition over 8 tasks: scalar search / aTLAS", "82.93 / 91.36", "paper"),
    ),
    experiment=(
        "An MLP on scikit-learn digits is fine-tuned on four transformed domains, and coefficients are fitted "
        "on 200 validation samples. Holds if the block-wise coefficients beat the best single scalar by at "
        "least 10 points of mean test accuracy."
    ),
    code="fredzzhang/atlas (no licence file)",
    keywords=("task vector", "task arithmetic", "model merging", "few-shot", "anisotropic scaling"),
    related=("rws", "i-lora", "configurable-bricks"),
)

SCALES = Scales(
    smoke=(1, 20, 10),
    small=(3, 1500, 300),
    full=(10, 1500, 300),
)  # seeds; steps of a network, of lambda
RULES = {"mean accuracy of aTLAS over the best scalar's": (0.10, 1.0)}  # fixed before the first run; mean over seeds
DOMAINS: list[Any] = [  # a quarter turn, a mirror, a negative, a transposition two columns on
    lambda x: x.rot90(1, (2, 3)), lambda x: x.flip(3), lambda x: 1 - x, lambda x: x.transpose(2, 3).roll(2, 3)
]  # fmt: skip
ARMS = ("zero-shot", "each its own", "best scalar", "aTLAS", "aTLAS x 4", "aTLAS, budget 1 blockwise",
        "aTLAS, budget 1 random")  # fmt: skip


def experiment(scale: str = "small") -> Any:
    """Compose four digit domains by one scalar and by learned blockwise coefficients; return `report.Evidence`."""
    import time

    from lineament.report import Evidence

    began, (count, *steps) = time.perf_counter(), SCALES[scale]
    runs = [_run(seed, *steps) for seed in range(count)]
    mean = {arm: sum(run[arm] for run in runs) / count for arm in ARMS}
    gains = [run["aTLAS"] - run["best scalar"] for run in runs]
    rows: list[dict[str, Any]] = [
        {"arm": arm, "accuracy": mean[arm], "seeds": [run[arm] for run in runs]} for arm in ARMS
    ]
    rows.append({"arm": "aTLAS over the best scalar", "accuracy": sum(gains) / count, "seeds": gains})
    return Evidence.judged(
        dict(zip(RULES, [sum(gains) / count], strict=True)), RULES, verdict=scale != "smoke", name=RECORD.slug,
        claim=RECORD.claim, rows=rows, seeds=list(range(count)), seconds=time.perf_counter() - began,
        notes="Mean accuracy over four domains, on digits nobody trained on.",
    )  # fmt: skip


def _run(seed: int, training: int, fitting: int) -> dict[str, float]:
    import torch
    from torch import nn

    from lineament import data, train, weights
    from lineament._base.seeds import generator, seeded
    from lineament.tasks.classify import accuracy, class_loss
    from lineament.weights import compose

    known, unseen = (data.load_images("digits", split=split, seed=seed) for split in ("train", "test"))
    place, known = known[:200], known[200:]
    with seeded(seed):
        base = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    def learn(model: Any, view: Any, steps: int) -> Any:
        draw = data.image_batches(known, 64, seed=seed)
        config = train.FitConfig(steps=steps, lr=1e-3, seed=seed, log_every=1000)
        train.fit(model, lambda i: (view(draw(i)[0]), draw(i)[1]), class_loss, config)
        return weights.Point.open(model)

    def score(model: Any, images: Any = unseen) -> float:
        return sum(accuracy(model, view(images.pixels), images.labels) for view in DOMAINS) / len(DOMAINS)

    start = learn(base, lambda x: x, training)
    views = {"zero-shot": score(base)}
    vectors, own = [], 0.0
    for view in DOMAINS:
        vectors.append(learn(base, view, training // 3) - start)
        own += accuracy(base, view(unseen.pixels), unseen.labels) / len(DOMAINS)
        start.load_into(base)

    def loss(model: Any, batch: Any) -> Any:
        rows = batch if batch is not None else torch.arange(len(place))
        losses = [class_loss(model, (view(place.pixels[rows]), place.labels[rows]))[0] for view in DOMAINS]
        return torch.stack(losses).mean()

    def fit(given: list[Any], parts: int = 1) -> float:
        composed = compose.Composed(base, given, parts=parts, seed=seed)
        config = train.FitConfig(steps=fitting, lr=0.05, weight_decay=0.1, seed=seed, log_every=1000)
        draws = [torch.randint(200, (64,), generator=generator(seed * 10_000 + i)) for i in range(fitting)]
        train.fit(composed, draws.__getitem__, lambda m, b: (loss(m, b), {}), config)
        return score(composed)

    composed = compose.Composed(base, vectors)
    grads = compose.coefficient_gradients(composed, [None], loss)
    one = {rule: compose.choose_vectors(vectors, grads, 1, rule=rule, blocks=composed.blocks, seed=seed)
           for rule in ("blockwise", "random")}  # fmt: skip
    compose.best_scalar(composed, lambda model: score(model, place))
    found = (
        views["zero-shot"],
        own,
        score(composed),
        fit(vectors),
        fit(vectors, 4),
        fit(one["blockwise"]),
        fit(one["random"]),
    )
    return dict(zip(ARMS, found, strict=True))
