"""The text of a conversion: documents by name, split by document, handed out as token windows by step number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lineament._base.errors import InputError
from lineament._base.seeds import generator
from lineament.data import SPLITS, beginning, load_text, split_documents, tokenize

MOST_CHARACTERS = 4_000_000  # of one name in one split: about a million tokens, seconds to tokenise
FEW = 8  # a text of fewer documents is cut, so that each split has its share

Documents = Mapping[str, Mapping[str, Sequence[str]]]


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents of one split, drawn from by step number so that a run can go on at any step.

    Args:
        sources: token ids of each document, by source; sources take turns. front: ids put before every row.
        seed: of the drawing.
    """

    sources: tuple[tuple[Tensor, ...], ...]
    front: tuple[int, ...] = ()
    seed: int = 0

    def batch(self, step: int, length: int, rows: int) -> Tensor:
        """Return [rows, length] token ids, each row inside one document where one is long enough.

        The same step always gives the same rows. Shorter documents follow one another inside a row only when
        no document of the source is long enough.
        """
        draw = generator(self.seed * 1_000_003 + step)
        own = length - len(self.front)
        found = []
        for row in range(rows):
            source = self.sources[(step * rows + row) % len(self.sources)]
            long = [one for one in source if len(one) >= own] or [self._joined(source, own)]
            sizes = torch.tensor([len(one) - own + 1 for one in long], dtype=torch.float64)
            document = long[int(torch.multinomial(sizes, 1, generator=draw))]
            at = int(torch.randint(len(document) - own + 1, (1,), generator=draw))
            found.append(torch.cat([torch.tensor(self.front, dtype=torch.long), document[at : at + own]]))
        return torch.stack(found)

    def _joined(self, source: Sequence[Tensor], length: int) -> Tensor:
        joined = torch.cat(list(source))
        if len(joined) < length:
            joined = torch.cat([one for some in self.sources for one in some])
        if len(joined) < length:
            raise InputError(
                f"the text has {len(joined)} tokens and one batch needs {length}; give more text or shorter lengths"
            )
        return joined

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(len(one) for some in self.sources for one in some)


def make_corpus(documents: Mapping[str, Sequence[str]], tokenizer: Any, seed: int = 0) -> Corpus:
    """Tokenise {name: documents} of one split."""
    sources = tuple(
        tuple(one for one in tokenize(texts, tokenizer) if len(one)) for texts in documents.values() if texts
    )
    return Corpus(sources, tuple(beginning(tokenizer)), seed)


def load_documents(names: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Load text by name and split it by document, always in the same way.

    Returns:
        {"train", "place", "test": {name: documents}}.

    Raises:
        InputError: a name is unknown, or there is no text.
    """
    documents: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    for name in names:
        found = [text for text in load_text(name) if text.strip()]
        if not found:
            raise InputError(f"there is no text in {name!r}; give a file or folder with text, or a known data name")
        for split, texts in _split(found).items():
            documents[split][name] = _capped(texts)
    return documents


def _capped(texts: Sequence[str]) -> list[str]:
    taken, size = [], 0
    for text in texts:
        if size >= MOST_CHARACTERS:
            break
        taken.append(text)
        size += len(text)
    return taken


def _split(texts: list[str]) -> dict[str, list[str]]:
    parts = split_documents(texts, SPLITS) if len(texts) >= FEW else {}
    if parts and all(parts.values()):
        return parts
    parts = {split: [] for split in SPLITS}
    for text in texts:
        at = 0
        for split, share in SPLITS.items():
            end = at + max(1, round(share * len(text)))
            parts[split].append(text[at : len(text) if split == "test" else end])
            at = end
    return {split: [text for text in found if text.strip()] for split, found in parts.items()}


def flat(documents: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the documents of all names of one split."""
    return [text for texts in documents.values() for text in texts]


def require_length(corpus: Corpus, length: int) -> None:
    """Raise InputError when a text is shorter than one batch of `length` tokens."""
    if corpus.tokens < length:
        raise InputError(
            f"the text has {corpus.tokens} tokens to train on and one batch needs {length}; give more text"
        )
