"""level-set-traversal: walk to another image while the model stays equally sure."""

from typing import Any

from .record import Figure, Paper, Scales

RECORD = Paper(
    slug="level-set-traversal",
    title="Exploring Geometry of Blind Spots in Vision Models",
    authors="Balasubramanian, Sriramanan, Sadasivan, Feizi",
    year=2023,
    venue="NeurIPS 2023 (spotlight)",
    arxiv="2310.19889",
    room=("explain",),
    status="works",
    summary=(
        "Level set traversal moves an image towards any target using only the part of the step orthogonal to "
        "the local gradient, so the model's confidence in the source class stays. It finds under-sensitivity: "
        "images that look like another class yet keep the label. Paths and triangles of high confidence measure "
        "how far such sets extend."
    ),
    claim=(
        "From a source image one can walk close to arbitrary targets at unchanged confidence, and the straight "
        "segment back stays confident."
    ),
    figures=(
        Figure(
            "ImageNet, CNN and transformer",
            "blind spots almost indistinguishable from arbitrary targets",
            "secondary",
        ),
        Figure("straight path from source to blind spot", "high confidence throughout", "secondary"),
        Figure("adversarially trained models", "larger triangles of high confidence", "secondary"),
        Figure("distance and triangle tables", "not checked", "unverified"),
    ),
    experiment=(
        "A small CNN on digits at 32x32 and about 90 source-target pairs; the baseline is the furthest point on "
        "the straight line that loses less than 0.2 confidence. Holds if the traversal ends at least 25 % "
        "closer than the line at higher confidence and the path from the source keeps a mean confidence above "
        "0.95."
    ),
    code="SriramB-98/blindspots-neurips-sub (no licence file)",
    keywords=("level set", "robustness", "under-sensitivity", "adversarial", "confidence", "image classification"),
    related=("linear-scope", "dynamic-lrp"),
)

SCALES = Scales(smoke=(1, 100, 3), small=(3, 600, 300), full=(5, 600, 400))  # seeds, steps of training, of the walk
RULES = {  # fixed before the first run: the worst seed of each; (at least, at most)
    "distance left, traversal / straight line": (0.0, 0.75),
    "confidence, traversal - straight line": (0.0, 1.0),
    "mean confidence on the way back": (0.95, 1.0),
}
PAIRS, PARALLEL = 90, (2e-3, 0.0, 5e-4, 8e-3)  # the first epsilon is the one that is judged


def experiment(scale: str = "small") -> Any:
    """Walk between digits along the level sets of a small CNN; return `report.Evidence`."""
    import time

    from lineament.report import Evidence

    began, (seeds, steps, walked) = time.perf_counter(), SCALES[scale]
    rows, found = [], []
    for seed in range(seeds):
        made = _run(seed, steps, walked)
        rows += made
        line, judged = made[0], made[1]
        found.append((judged["rmse"] / line["rmse"], judged["confidence"] - line["confidence"], judged["path, mean"]))
    ratio, lead, back = zip(*found, strict=True)
    return Evidence.judged(
        dict(zip(RULES, (max(ratio), min(lead), min(back)), strict=True)), RULES, verdict=scale != "smoke",
        name=RECORD.slug, claim=RECORD.claim, rows=rows, seeds=list(range(seeds)),
        seconds=time.perf_counter() - began,
        notes="Distances are to the target, means over pairs; triangles are of a source and two blind spots.",
    )  # fmt: skip


def _run(seed: int, steps: int, walked: int) -> list[dict[str, Any]]:
    """Train one net; return a row for the straight line and one per parallel step."""
    import torch
    from torch import nn
    from torch.nn.functional import interpolate

    from lineament import data, explain, train
    from lineament._base.seeds import seeded
    from lineament.data import Images
    from lineament.tasks.classify import accuracy, class_loss

    known, unseen = (
        Images(interpolate(x.pixels, size=32, mode="bilinear"), x.labels, x.classes)
        for x in (data.load_images("digits", split=split) for split in ("train", "test"))
    )
    with seeded(seed):
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1),
            nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10),
        )  # fmt: skip
    train.fit(net, data.image_batches(known, 64, seed=seed), class_loss, train.FitConfig(steps=steps, lr=2e-3))
    net.eval()
    right = net(unseen.pixels).argmax(1) == unseen.labels
    pixels, labels = unseen.pixels[right], unseen.labels[right]
    apart = labels != labels.roll(1)
    source, target, y = pixels[apart][:PAIRS], pixels.roll(1, 0)[apart][:PAIRS], labels[apart][:PAIRS]
    options: dict[str, Any] = {"labels": y, "steps": walked, "seed": seed}
    ways = {"straight line": explain.straight_line(net, source, target, labels=y)}
    ways |= {f"epsilon {e:g}": explain.blind_spots(net, source, target, parallel=e, **options) for e in PARALLEL}
    margins = explain.blind_spots(net, source, target, slope="margin", **options)
    others = explain.blind_spots(net, source, target.roll(1, 0), **options).images
    rows = []
    for name, found in (ways | {"epsilon 0.002, margin's gradient": margins}).items():
        back = explain.confidence_path(net, source, found.images, y)
        triangles = [
            explain.confidence_triangle(net, source[i], found.images[i], others[i], int(y[i])) for i in range(20)
        ]
        rows.append(
            {"way": name, "seed": seed, "accuracy": accuracy(net, unseen.pixels, unseen.labels)}
            | {key: value.mean().item() for key, value in found.distances().items()}
            | {"start": found.start.mean().item(), "confidence": found.confidence.mean().item(),
               "path, mean": back["confidence"].mean().item(),
               "path, mean of minima": back["confidence"].amin(1).mean().item(),
               "path, lowest margin": back["margin"].amin(1).mean().item(),
               "triangle, mean": torch.tensor([t["mean"] for t in triangles]).mean().item()}
        )  # fmt: skip
    return rows
