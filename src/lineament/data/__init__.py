"""Text and images by name: what installed packages carry, the user's files, the Hub; text as tokens; finite groups."""

from collections.abc import Callable
from pathlib import Path

from lineament._base.errors import InputError, near_miss
from lineament.data.carriers import cloud_docs, docstrings, python_source, python_topics
from lineament.data.files import SUFFIXES, from_hub, from_path
from lineament.data.groups import Group, Irrep, generated, irreps, load_group, product, purity
from lineament.data.images import IMAGES, Images, image_batches, load_images, normalized
from lineament.data.packing import (
    PackedTokens,
    Tokenizer,
    batches,
    beginning,
    epoch_rows,
    pack,
    split_documents,
    tokenize,
    windows,
)
from lineament.data.patches import load_patches
from lineament.data.wiki import wiki_sample
from lineament.data.words import going_on, pieces

__all__ = [
    "IMAGES",
    "NAMES",
    "SPLITS",
    "Group",
    "Images",
    "Irrep",
    "PackedTokens",
    "Tokenizer",
    "batches",
    "beginning",
    "epoch_rows",
    "generated",
    "going_on",
    "image_batches",
    "irreps",
    "load_group",
    "load_images",
    "load_patches",
    "load_text",
    "normalized",
    "pack",
    "pieces",
    "product",
    "purity",
    "split_documents",
    "tokenize",
    "windows",
]

NAMES: dict[str, Callable[[], list[str]]] = {
    "wiki-sample": wiki_sample,
    "docs": docstrings,
    "python-topics": python_topics,
    "python-source": python_source,
    "cloud-docs": cloud_docs,
}
SPLITS = {"train": 0.7, "place": 0.1, "test": 0.2}  # to learn from, to choose by, to report


def load_text(name_or_path: str | Path, *, split: str | None = None, seed: int = 0) -> list[str]:
    """Return documents by name, or from a file or folder.

    Args:
        name_or_path: a key of `NAMES`, a file (.txt, .md, .jsonl with the field "text"), a folder of such files, or
            "hub:owner/name" ("hub:owner/name:configuration") for a data set of the Hub.
        split: None for everything; "train", "place" or "test" for a fixed share of the documents (70, 10 and 20 %, by a
            hash of the text). For the Hub: the data set's own split, "train" if None.
        seed: of the split.

    Raises:
        InputError: nothing of that name, the package that carries it is missing, or there is no text in it.

    Example:
        >>> topics = load_text("python-topics")
        >>> len(topics) > 50, "assert" in topics[0]
        (True, True)
    """
    name = str(name_or_path)
    if name.startswith("hub:"):
        return from_hub(name.removeprefix("hub:"), split or "train")
    if split is not None and split not in SPLITS:
        raise InputError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}{near_miss(split, SPLITS)}")
    documents = NAMES[name]() if name in NAMES else _from_path(name)
    return documents if split is None else split_documents(documents, SPLITS, seed)[split]


def _from_path(name: str) -> list[str]:
    path = Path(name).expanduser()
    looks_like_a_path = path.exists() or len(path.parts) > 1 or path.suffix in SUFFIXES
    if looks_like_a_path:
        return from_path(path)
    known = ", ".join(NAMES)
    hint = near_miss(name, NAMES)
    raise InputError(f"unknown data {name!r}.{hint} Known: {known}, hub:NAME, or a text file or folder.")
