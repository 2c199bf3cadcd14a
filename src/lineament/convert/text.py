"""The text of a conversion: documents by name, split by document, handed out as token windows by step number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lineament._base.errors import InputError
from lineament._base.seeds import generator
from lineament.data import load_text, split_documents

SHARES = {"test": 0.2, "calibration": 0.15, "train": 0.65}
SPLIT_SEED = 0


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents of one split, drawn from by step number so that a run can go on at any step.

    Args:
        documents: token ids of each document. seed: of the drawing.
    """

    documents: tuple[Tensor, ...]
    seed: int = 0

    def batch(self, step: int, length: int, rows: int) -> Tensor:
        """Return [rows, length] token ids, each row inside one document where one is long enough.

        The same step always gives the same rows. Shorter documents follow one another inside a row only when
        no document is long enough.
        """
        draw = generator(self.seed * 1_000_003 + step)
        long = [one for one in self.documents if len(one) >= length] or [self._joined(length)]
        sizes = torch.tensor([len(one) - length + 1 for one in long], dtype=torch.float64)
        chosen = torch.multinomial(sizes, rows, replacement=True, generator=draw).tolist()
        starts = torch.rand(rows, generator=draw, dtype=torch.float64).tolist()
        offsets = [int(start * (len(long[one]) - length + 1)) for one, start in zip(chosen, starts, strict=True)]
        return torch.stack([long[one][at : at + length] for one, at in zip(chosen, offsets, strict=True)])

    def _joined(self, length: int) -> Tensor:
        joined = torch.cat(self.documents)
        if len(joined) < length:
            raise InputError(
                f"the text has {len(joined)} tokens and one batch needs {length}; give more text or shorter lengths"
            )
        return joined


def tokenised(documents: Sequence[str], tokenizer: Any) -> tuple[Tensor, ...]:
    """Return the token ids of every document, empty ones left out."""
    ids = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in documents)
    return tuple(torch.tensor(one, dtype=torch.long) for one in ids if len(one))


def load_documents(names: Sequence[str]) -> dict[str, list[str]]:
    """Load text by name and split it by document into test, calibration and train (always in the same way).

    Raises:
        InputError: a name is unknown, or there is no text.
    """
    documents: dict[str, list[str]] = {split: [] for split in SHARES}
    for name in names:
        found = [text for text in load_text(name) if text.strip()]
        if not found:
            raise InputError(f"there is no text in {name!r}; give a file or folder with text, or a known data name")
        for split, texts in _split(found).items():
            documents[split].extend(texts)
    return documents


def _split(texts: list[str]) -> Mapping[str, list[str]]:
    """Split by document; a text in a single document is cut, so that each part has its share."""
    if len(texts) >= 8:
        return split_documents(texts, SHARES, seed=SPLIT_SEED)
    parts: dict[str, list[str]] = {split: [] for split in SHARES}
    for text in texts:
        at = 0
        for split, share in SHARES.items():
            end = at + max(1, round(share * len(text)))
            parts[split].append(text[at : len(text) if split == "train" else end])
            at = end
    return {split: [text for text in found if text.strip()] for split, found in parts.items()}


def require_length(documents: Mapping[str, list[str]], tokenizer: Any, length: int, split: str = "train") -> None:
    """Raise InputError when the text of a split is shorter than one batch of `length` tokens."""
    have = 0
    for text in documents.get(split, ()):
        have += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if have >= length:
            return
    raise InputError(f"the text has {have} tokens for {split} and one batch needs {length}; give more text")
