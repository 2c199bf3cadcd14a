"""Patches of the photographs that scikit-learn carries."""

import torch
from torch import Tensor

from lineament._base.errors import InputError, unknown
from lineament._base.extras import folder, require

PHOTOGRAPHS = ("china.jpg", "flower.jpg")
TRAIN_SHARE = 0.9  # of the width: training patches lie left of the cut, test patches right of it


def load_patches(size: int = 12, *, split: str = "train", stride: int = 6) -> Tensor:
    """Return square grey patches of two natural photographs, of 427 x 640 pixels each.

    Patches for training come from the left nine tenths of each photograph, patches for testing from the rest: no pixel
    is in both.

    Args:
        size: pixels along a side. split: "train" or "test". stride: pixels from one patch to the next.

    Returns:
        float32 [N, 1, size, size] in [0, 1] (luma of ITU-R 601).

    Raises:
        InputError: scikit-learn or Pillow is missing, or no patch of that size fits.
    """
    if split not in ("train", "test"):
        raise unknown("split", split, ("train", "test"))
    image = require("PIL.Image", extra="vision")
    found = []
    for name in PHOTOGRAPHS:
        with image.open(folder("sklearn", package="scikit-learn") / "datasets" / "images" / name) as opened:
            grey = opened.convert("L")
            pixels = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(grey.height, grey.width)
        cut = int(TRAIN_SHARE * pixels.shape[1])
        part = pixels[:, :cut] if split == "train" else pixels[:, cut:]
        if size < 1 or stride < 1 or size > min(part.shape):
            raise InputError(f"no patch of {size} pixels every {stride} fits into {list(part.shape)}")
        found.append(part.unfold(0, size, stride).unfold(1, size, stride).reshape(-1, 1, size, size))
    return torch.cat(found).float() / 255
