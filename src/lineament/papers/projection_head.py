"""projection-head: why the layer below the projection head is the better one."""

from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="projection-head", authors="Xue, Gan, Ni, Joshi, Mirzasoleiman",
    title="Investigating the Benefits of Projection Head for Representation Learning",
    year=2024, venue="ICLR 2024", arxiv="2403.11391", room=("tasks", "nn"), status="works",
    summary=(
        "Explains why representations are taken below the head the loss acts on: training makes the weights of "
        "features more unequal with every layer, so lower layers treat features more evenly and keep those that "
        "vanish above. The library offers probes at every depth, read-outs of feature weights, and a fixed "
        "reweighting head."
    ),
    claim=(
        "In linear contrastive networks feature weights follow a power law in depth, so the layer before the "
        "head is better where the downstream feature is weak, and not where it is already the strongest."
    ),
    figures=(
        Figure("before against after the head, pre-training and task mismatched", "better before it", "abstract"),
        Figure("fixed reweighting head against a learned head", "comparable; values not read", "unverified"),
        Figure("digit on image, digit often dropped or very weak or strong", "better before the head", "secondary"),
    ),
    experiment=(
        "A two-layer linear net under the spectral loss must show the predicted weights, w after the head and "
        "the root of w before it, to 1 % for emerged features. Probes on planted features must favour the lower "
        "layer by at least 5 points when the label's feature is weak and not when it is strongest, and a "
        "retrained last layer under a spurious pixel must be at least as good below the head."
    ),
    keywords=(
        "contrastive learning", "projection head", "representation", "feature weighting", "spectral loss", "linear net",
    ),
    code=None, related=("grokking-li2", "hourglass-mlp"),
)  # fmt: skip

SCALES = Scales(  # steps of the law, of the probe's net; label draws; seeds on digits, steps of these
    smoke=(30, 20, 2, 1, 5), small=(6000, 1500, 20, 3, 400), full=(60_000, 6000, 100, 20, 3000),
)  # fmt: skip
SEED, STRENGTHS = 7400, (0.9, 0.7, 0.5, 0.3, 0.2, 0.1)
CASES = {"label's weight far below the others": (0.25, 4.0), "label's weight the largest": (4.0, 0.0)}  # noise, label's
RULES = {  # fixed before the first run, for means over seeds; (at least, at most)
    "law: largest relative error of emerged features": (0.0, 0.01),
    "law: features that emerged, of 6": (3, 6),
    "probe: before - after the head, label weak": (0.05, 1.0),
    "probe: before - after the head, label strongest": (-1.0, 0.0),
    "spurious pixel: before - after the head": (0.0, 1.0),
}


def experiment(scale: str = "small") -> Any:
    """Weigh features before and after the head, where theory says how and on digits, as `report.Evidence`."""
    import time

    from lineament.report import Evidence

    began, (law, steps, draws, seeds, digits) = time.perf_counter(), SCALES[scale]
    weights, error, emerged = _law(law)
    probes = [_probe(case, steps, draws) for case in CASES]
    runs = [_digits(SEED + i, digits) for i in range(seeds)]
    mean = {key: sum(run[key] for run in runs) / seeds for key in runs[0]}
    spurious = mean["spurious pixel, before"] - mean["spurious pixel, after"]
    last = [{"digits": k, "accuracy": v, "seeds": [run[k] for run in runs]} for k, v in mean.items()]
    return Evidence.judged(
        dict(zip(RULES, (error, emerged, *(row["before"] - row["after"] for row in probes), spurious), strict=True)),
        RULES, verdict=scale != "smoke", name=RECORD.slug, claim=RECORD.claim,
        rows=[*weights, *probes, *last], seeds=[SEED + i for i in range(seeds)],
        seconds=time.perf_counter() - began, notes="probes: 5 nearest of 40 labels; ridge beside them, without a rule",
    )  # fmt: skip


def _descend(net: Any, loss: Any, steps: int, batches: Any = lambda step: 0, **how: Any) -> None:
    from lineament import train

    settings = {"optimizer": "sgd", "betas": (0.0, 0.9), "schedule": "constant", "clip": None, **how}
    train.fit(net, batches, loss, train.FitConfig(steps=steps, log_every=max(1, steps), **settings))


def _law(steps: int) -> tuple[list[dict[str, Any]], float, int]:
    import torch

    from lineament import models, tasks
    from lineament._base.seeds import seeded

    c = torch.tensor(STRENGTHS)
    features = tasks.LinearFeatures(torch.eye(6), c, 1 - c)
    with seeded(SEED):
        net = models.deep_linear((6, 16, 8), scale=0.1, balanced=True)
    _descend(net, tasks.population_loss(features), steps, lr=0.05)
    before, after = tasks.feature_weights(net, features.directions)
    there = after > features.weights / 2
    wrong = torch.stack([after / features.weights, before / features.weights.sqrt()]).sub(1).abs()[:, there]
    of = {"feature": c, "after": after, "theory after": features.weights, "before": before,
          "theory before": features.weights.sqrt()}  # fmt: skip
    rows = [dict(zip(of, row, strict=True)) for row in torch.stack(list(of.values()), 1).tolist()]
    return rows, float(wrong.max()) if wrong.numel() else 1.0, int(there.sum())


def _probe(case: str, steps: int, draws: int) -> dict[str, Any]:
    import torch

    from lineament import models, tasks
    from lineament._base.seeds import seeded

    noise = torch.tensor([CASES[case][1]] + [CASES[case][0]] * 19)
    features = tasks.LinearFeatures.random(40, torch.ones(20), noise, seed=SEED)
    with seeded(SEED):
        net = models.deep_linear((40, 40, 20), scale=0.1, balanced=True)
    _descend(net, tasks.population_loss(features), steps, lr=0.02)
    row: dict[str, Any] = {"case": case, "label": float(features.weights[0]), "others": float(features.weights[1])}
    drawn = [[features.draw(n, seed=2 * i + j) for j, n in enumerate((40, 1000))] for i in range(draws)]
    pairs = [[(x, (u[:, 0] > 0).long()) for x, u in pair] for pair in drawn]
    ways: dict[str, Any] = {"": {"probe": "knn"}, ", ridge": {}, ", 20 directions": {"probe": "knn", "project": 20}}
    for name, how in ways.items():
        found = [tasks.probe_depths(net, torch.nn.Linear, *pair, **how) for pair in pairs]
        row |= {f"{at}{name}": sum(each[n] for each in found) / draws for at, n in (("before", "0"), ("after", "1"))}
    return row


def _digits(seed: int, steps: int) -> dict[str, float]:
    import torch

    from lineament import data, models, nn, tasks
    from lineament._base.seeds import seeded
    from lineament.tasks.classify import class_loss

    known, unseen = (data.load_images("digits", split=split, seed=seed) for split in ("train", "test"))
    draw = data.image_batches(known, 100, seed=seed)
    views = lambda step: tasks.shifted_views(draw(step)[0], seed=step)  # noqa: E731
    few = known[torch.cat([(known.labels == k).nonzero().flatten()[:10] for k in range(10)])]  # 100, balanced
    # to be probed without a corner that tells: it is random there
    pairs = [(tasks.spurious_corner(x.pixels, x.labels, 0.0, seed=seed), x.labels) for x in (few, unseen)]
    told = data.Images(tasks.spurious_corner(known.pixels, known.labels, 0.95, seed=seed), known.labels, 10)
    jobs: dict[str, Any] = {"spurious pixel": ("mlp", class_loss, data.image_batches(told, 100, seed=seed))}
    for kind in nn.HEADS:
        jobs[f"contrast, head {kind}"] = (kind, tasks.pair_loss(tasks.info_nce), views)
    found = dict[str, float]()
    for name, (kind, loss, batches) in jobs.items():
        with seeded(seed):
            encoder = torch.nn.Sequential(*models.dense_classifier((64, 128, 128)), torch.nn.ReLU())
            top = torch.nn.Linear(128, 10) if loss is class_loss else torch.nn.Identity()
            net = torch.nn.Sequential(encoder, nn.projection_head(kind, 128), top)
        _descend(net, loss, steps, batches, optimizer="adamw", betas=(0.9, 0.999), lr=1e-3)
        at = tasks.probe_depths(net, lambda part, _: part in ("0", "1"), *pairs)
        found |= {f"{name}, {side}": at[part] for side, part in (("before", "0"), ("after", "1"))}
    return found
