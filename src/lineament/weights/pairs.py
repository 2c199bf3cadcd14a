"""Nets trained apart, and the line between two of them: as it is, matched, mended, both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from lineament import data, models, train
from lineament._base.errors import unknown
from lineament._base.seeds import seeded
from lineament.weights.alignment import Alignment, alignment
from lineament.weights.evaluate import Loss, prediction_loss
from lineament.weights.match import match
from lineament.weights.path import Path, path
from lineament.weights.symmetry import Symmetry, symmetry

ARMS = ("before", "matched", "repaired", "matched and repaired")


def trained(
    build: Callable[[], nn.Module], images: data.Images, *, epochs: int, batch: int, seed: int, **config: Any
) -> nn.Module:
    """Train a classifier from its own beginning, in its own order; returned in eval mode.

    Args:
        config: fields of `train.FitConfig` but the steps.
    """
    with seeded(seed):
        model = build().train()
    steps = epochs * (len(images) // batch)
    settings = train.FitConfig(steps=steps, seed=seed, checkpoint_every=steps, log_every=steps, **config)
    train.fit(model, data.image_batches(images, batch, seed=seed), prediction_loss, settings)
    return model.eval()


def classifiers(kind: str, images: data.Images, seeds: Sequence[int], *, epochs: int, width: int = 128) -> list[Any]:
    """Train small classifiers that share nothing but the data.

    Args:
        kind: "MLP" (three hidden layers of `width`, Adam 1e-3, batches of 32) or "ResNet" (the size of ResNet20, Adam
            with one cycle to 4e-3, batches of 64).
        seeds: one per net: of its beginning and its order.
    """
    if kind not in ("MLP", "ResNet"):
        raise unknown("kind of classifier", kind, ("MLP", "ResNet"))
    size = images.pixels[0].numel()
    if kind == "ResNet":
        warmup = 3 * epochs * (len(images) // 64) // 10
        how: dict[str, Any] = {"batch": 64, "lr": 4e-3, "warmup": warmup}
        build: Callable[[], nn.Module] = models.ResidualClassifier
    else:
        how = {"batch": 32, "lr": 1e-3, "schedule": "constant"}
        build = partial(models.dense_classifier, (size, width, width, width, images.classes))
    return [trained(build, images, epochs=epochs, seed=seed, betas=(0.9, 0.999), **how) for seed in seeds]


def images_in_batches(name: str, rows: int = 300) -> tuple[data.Images, dict[str, list[tuple[Tensor, Tensor]]]]:
    """Return the standardised training images of a data set, and {"train", "test"} as batches in a fixed order."""
    parts = data.normalized(data.load_images(name, split=split) for split in data.images.SPLITS)
    cut = [[(x.pixels[i : i + rows], x.labels[i : i + rows]) for i in range(0, len(x), rows)] for x in parts]
    return parts[0], dict(zip(data.images.SPLITS, cut, strict=True))


@dataclass(frozen=True)
class Compared:
    """Two nets on one line: the path of each arm, how they lie before and after, and b as matched."""

    paths: Mapping[str, Path]
    before: Alignment
    after: Alignment
    matched: Mapping[str, Tensor]
    group: Symmetry

    def row(self, number: str = "loss") -> dict[str, float]:
        """Return the barrier of each arm on the first data set."""
        return {arm: found.rise(number) for arm, found in self.paths.items()}


def compared(
    model: nn.Module, a: Mapping[str, Tensor], b: Mapping[str, Tensor], splits: Mapping[str, Sequence[Any]], *,
    mend: Sequence[Any], restarts: int = 3, seed: int = 0, points: int = 11, loss: Loss | None = None,
) -> Compared:  # fmt: skip
    """Measure the line between two nets before and after matching, with and without REPAIR.

    Args:
        splits: data set -> batches, of (pixels, labels) or as `loss` takes them; the first gives the barrier.
        mend: batches of training data for REPAIR (batch-norm nets: for their statistics).
        loss: (model, batch) -> (scalar, numbers); cross entropy and accuracy if None.
    """
    first = splits[next(iter(splits))][0]
    group = symmetry(model, (first if isinstance(first, Tensor) else first[0])[:2])
    moved = match([a, b], group, restarts=restarts, seed=seed)[1].apply(dict(b))
    ends = {"before": (b, None), "matched": (moved, None), "repaired": (b, mend), "matched and repaired": (moved, mend)}
    paths = {
        arm: path(model, a, end, splits, points=points, reset=reset, loss=loss) for arm, (end, reset) in ends.items()
    }
    return Compared(paths, alignment(a, b), alignment(a, moved), moved, group)
