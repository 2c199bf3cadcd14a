"""From documents to tokens: held-out splits by document, rows packed to length, windows inside one document."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from lineament._base.errors import InputError
from lineament._base.seeds import generator


class Tokenizer(Protocol):
    """What is asked of a tokenizer; every one of transformers has it."""

    def __call__(self, text: Any, **options: Any) -> Any: ...


def split_documents(docs: Iterable[str], fractions: Mapping[str, float], seed: int = 0) -> dict[str, list[str]]:
    """Split documents by a hash of their text, so that where one goes depends on nothing but itself and the seed.

    The sizes are right on average only; equal texts always go together, and a document stays where it is when others
    come or go.

    Args:
        docs: the documents.
        fractions: name -> share, positive, adding to at most 1. What is left over is in no split.
        seed: another seed is another split.

    Returns:
        name -> documents, in their given order.

    Example:
        >>> parts = split_documents([str(i) for i in range(1000)], {"train": 0.9, "test": 0.1})
        >>> sum(len(part) for part in parts.values()), 60 < len(parts["test"]) < 140
        (1000, True)
    """
    if not fractions or any(f <= 0 for f in fractions.values()) or sum(fractions.values()) > 1 + 1e-9:
        raise InputError(f"fractions are {dict(fractions)}; expected positive shares that add to at most 1")
    parts: dict[str, list[str]] = {name: [] for name in fractions}
    for document in docs:
        digest = hashlib.blake2b(document.encode(), digest_size=8, salt=(seed % 2**64).to_bytes(8, "big")).digest()
        place, total = int.from_bytes(digest, "big") / 2**64, 0.0
        for name, fraction in fractions.items():
            total += fraction
            if place < total:
                parts[name].append(document)
                break
    return parts


def beginning(tokenizer: Tokenizer) -> list[int]:
    """Return what a tokenizer puts in front of every text: its beginning-of-sequence token, or nothing.

    Models trained with one (Gemma, Llama) lean on it; texts are cut and packed with it in front.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None or tokenizer("")["input_ids"][:1] != [bos]:
        return []
    return [int(bos)]


def tokenize(docs: Sequence[str], tokenizer: Tokenizer) -> list[Tensor]:
    """Return the token ids of each document, int64 [T], without special tokens."""
    if not docs:
        raise InputError(
            "there is no text: the list of documents is empty. The held-out part of few may be: give a folder or .jsonl"
        )
    ids = tokenizer(list(docs), add_special_tokens=False, verbose=False)["input_ids"]
    return [torch.tensor(i, dtype=torch.int64) for i in ids]


@dataclass(frozen=True)
class PackedTokens:
    """Rows of tokens of equal length, and which document each token belongs to.

    `position_ids` restart at every document (and at every row), which is how attention knows the boundaries.
    """

    input_ids: Tensor  # int64 [N, length]
    position_ids: Tensor  # int64 [N, length]
    document: Tensor  # int64 [N, length], index into the documents given

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, index: Tensor | slice) -> dict[str, Tensor]:
        """Return some rows as keyword arguments of a model."""
        return {"input_ids": self.input_ids[index], "position_ids": self.position_ids[index]}


def pack(
    docs: Sequence[str], tokenizer: Tokenizer, length: int, *, boundaries: bool = True, end: int | None = None
) -> PackedTokens:
    """Put documents one behind another, each with the tokenizer's beginning token if any, and cut them into rows.

    Args:
        docs: the documents.
        tokenizer: text -> ids, called without special tokens.
        length: tokens in a row. The last, incomplete row is dropped.
        boundaries: position ids restart at each document; False lets them run through the row, as if it were one text.
        end: an id put behind every document, if any.

    Raises:
        InputError: there are fewer than `length` tokens in all.
    """
    if length < 1:
        raise InputError(f"length is {length}; expected at least 1 token")
    front, back = (
        torch.tensor(beginning(tokenizer), dtype=torch.int64),
        torch.tensor([] if end is None else [end]).long(),
    )
    ids = [torch.cat([front, i, back]) for i in tokenize(docs, tokenizer)]
    flat, lengths = torch.cat(ids), torch.tensor([len(i) for i in ids])
    rows = len(flat) // length
    if rows == 0:
        raise InputError(f"the text has {len(flat)} tokens; expected at least one row of {length}: give more text")
    document = torch.repeat_interleave(torch.arange(len(ids)), lengths)[: rows * length].view(rows, length)
    at = torch.arange(length).expand(rows, length)
    if boundaries:
        new = torch.ones_like(document, dtype=torch.bool)
        new[:, 1:] = document[:, 1:] != document[:, :-1]
        start = torch.where(new, at, 0).cummax(dim=1).values
        at = at - start
    return PackedTokens(flat[: rows * length].view(rows, length), at.contiguous(), document)


def windows(docs: Sequence[str], tokenizer: Tokenizer, length: int, *, max_tokens: int | None = None) -> Tensor:
    """Cut windows that each lie inside one document, for scoring.

    The first window of every document comes first, then every second one, and so on: however few tokens are asked
    for, they come from as many documents as possible. Windows do not overlap; each begins with the tokenizer's
    beginning-of-sequence token if it has the habit of putting one.

    Args:
        docs: the documents.
        tokenizer: text -> ids, called without special tokens.
        length: tokens in a window.
        max_tokens: stop before going beyond this many tokens (at least one window is returned); None for all.

    Returns:
        int64 [N, length].

    Raises:
        InputError: no document is long enough.
    """
    ids = tokenize(docs, tokenizer)
    front = torch.tensor(beginning(tokenizer), dtype=torch.int64)
    own = length - len(front)
    if own < 1:
        raise InputError(f"length is {length}; expected at least {len(front) + 1} tokens")
    found = [(n, d, i[n * own : (n + 1) * own]) for d, i in enumerate(ids) for n in range(len(i) // own)]
    if not found:
        longest = max(len(i) for i in ids)
        raise InputError(
            f"no document has {length} tokens, the longest has {longest}; give longer texts or a shorter length"
        )
    found.sort(key=lambda item: item[:2])
    count = len(found) if max_tokens is None else max(1, max_tokens // length)
    return torch.stack([torch.cat([front, window]) for _, _, window in found[:count]])


def batches(packed: PackedTokens, size: int, *, seed: int = 0) -> Callable[[int], dict[str, Tensor]]:
    """Return a function step -> batch that goes through all rows in a new random order each epoch.

    The batch is a pure function of the step, so that training can go on from any step without replaying the ones
    before it.

    Args:
        packed: the rows.
        size: rows in a batch, at most all of them.
        seed: of the orders.

    Returns:
        step -> {"input_ids": [size, length], "position_ids": [size, length]}.
    """
    rows = epoch_rows(len(packed), size, seed=seed, what="rows")
    return lambda step: packed.rows(rows(step))


def epoch_rows(count: int, size: int, *, seed: int, what: str) -> Callable[[int], Tensor]:
    """Return a function step -> [size] of `count` numbers, in a new random order each epoch.

    Raises:
        InputError: fewer than a batch.
    """
    per_epoch = count // size if size > 0 else 0
    if per_epoch < 1:
        raise InputError(f"a batch of {size} {what} was asked of {count}; give more {what} or a smaller batch")

    @lru_cache(maxsize=1)
    def order(epoch: int) -> Tensor:
        return torch.randperm(count, generator=generator(seed * 1_000_003 + epoch))

    def rows(step: int) -> Tensor:
        epoch, at = divmod(step, per_epoch)
        return order(epoch)[at * size : (at + 1) * size]

    return rows
