"""A blind spot to look at: a classifier by name and two pictures in, numbers and a page out."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineament.explain.blindspots import BlindSpots, blind_spots, confidence_path, straight_line
from lineament.explain.reading import picture_of
from lineament.report import Picture, Section, Tiles, curve, page, table


@dataclass(frozen=True, kw_only=True)
class Walked:
    """A walk from one picture towards another.

    Attributes:
        model, label: the classifier and the source's class. found: the walk. line: the straight line's furthest point.
        path: the confidence along the straight line from the source to the blind spot, at 11 points.
    """

    model: str
    label: str
    found: BlindSpots
    line: BlindSpots
    path: list[float]

    def numbers(self) -> dict[str, Any]:
        """Return what to see first."""
        own, line = self.found.distances(), self.line.distances()
        return {
            "class": self.label, "confidence at the source": float(self.found.start),
            "at the blind spot": float(self.found.confidence), "distance to the target left": float(own["share"]),
            "left by the straight line": float(line["share"]), "SSIM with the target": float(own["ssim"]),
            "lowest on the way back": min(self.path),
        }  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return everything but the pictures, for `json.dumps`."""
        return {"model": self.model, "start": float(self.found.start), "confidence": float(self.found.confidence),
                "path": self.path, **self.numbers()}  # fmt: skip

    def tables(self) -> list[Any]:
        """Return rich tables."""
        return [
            table([{"what": k, "value": v} for k, v in self.numbers().items()], title=f"blind spot of {self.model}")
        ]

    def write_html(self, file: str | Path) -> Path:
        """Write a page with the three pictures and the confidence on the way back."""
        shown = {"source": self.found.sources, "blind spot": self.found.images, "target": self.found.targets}
        pictures = [Picture(_png(x[0]), f"The {name}", name) for name, x in shown.items()]
        shares = [i / (len(self.path) - 1) for i in range(len(self.path))]
        series, words = {"confidence": (shares, self.path)}, "from source to blind spot"
        drawn = [curve(series, xlabel=words, ylabel="confidence", dark=dark) for dark in (False, True)]
        back = Picture(drawn[0], "Confidence along the straight line from source to blind spot", "", drawn[1])
        sections = [Section("What the classifier takes for the same", [Tiles(self.numbers()), *pictures]),
                    Section("The straight line", [back])]  # fmt: skip
        return page(f"A blind spot of {self.model}", sections, file)


def walk(model: str, image: str | Path, target: str | Path, **options: Any) -> Walked:
    """Walk from one picture towards another along the level set of an image classifier.

    Args:
        model: folder or Hub name of a transformers image classifier.
        image, target: picture files.
        options: steps, rate, parallel, tolerance, slope, stop, seed of `blind_spots`.

    Raises:
        InputError: no such model, or no picture.
    """
    net, source, processor = picture_of(model, Path(image))
    aim = picture_of(model, Path(target))[1]
    mean, std = (
        torch.tensor(getattr(processor, name, None) or [default]).view(1, -1, 1, 1)
        for name, default in (("image_mean", 0.0), ("image_std", 1.0))
    )
    if not getattr(processor, "do_normalize", True):
        mean, std = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)

    def classifier(x: Tensor) -> Any:
        return net(pixel_values=(x - mean) / std)

    pair = [(x * std + mean).clamp(0, 1) for x in (source, aim)]
    found = blind_spots(classifier, *pair, **options)
    line = straight_line(classifier, *pair, labels=found.labels, tolerance=options.get("tolerance", 0.2))
    back = confidence_path(classifier, pair[0], found.images, found.labels)["confidence"][0].tolist()
    labels: Any = net.config.id2label or {}
    label = int(found.labels)
    return Walked(model=model, label=str(labels.get(label, label)), found=found, line=line, path=back)


def _png(image: Tensor) -> bytes:
    from PIL import Image

    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1).numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((256, 256), Image.Resampling.NEAREST).save(stream, format="PNG")
    return stream.getvalue()
