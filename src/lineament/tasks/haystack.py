"""Filler text as tokens, cut where sentences end, for facts to be hidden in."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from lineament._base.errors import InputError
from lineament.data import Tokenizer

_LONGEST_PIECE = 64  # tokens; text without full stops (code) is cut here, so that a fact can go anywhere


class Haystack:
    """Documents as lists of short pieces of tokens; a document is tokenised when it is first drawn.

    Args:
        docs: the filler.
        tokenizer: text -> ids.
    """

    def __init__(self, docs: Sequence[str], tokenizer: Tokenizer) -> None:
        self.docs = [document for document in docs if document.strip()]
        if not self.docs:
            raise InputError("retrieval prompts need filler text; the list of documents is empty")
        self.tokenizer = tokenizer
        self._pieces: dict[int, list[list[int]]] = {}

    def _document(self, index: int) -> list[list[int]]:
        if index not in self._pieces:
            sentences = re.split(r"(?<=[.!?:;])(?=\s)|(?<=\n)(?=\n)", self.docs[index].strip())
            ids = self.tokenizer([s for s in sentences if s], add_special_tokens=False, verbose=False)["input_ids"]
            starts = ((i, at) for i in ids for at in range(0, len(i), _LONGEST_PIECE))
            self._pieces[index] = [i[at : at + _LONGEST_PIECE] for i, at in starts]
        return self._pieces[index]

    def draw(self, tokens: int, random: torch.Generator) -> list[list[int]]:
        """Return running text of exactly so many tokens as pieces; it ends where a sentence ends."""
        index = int(torch.randint(len(self.docs), (1,), generator=random))
        pieces = self._document(index)
        at = int(torch.randint(len(pieces), (1,), generator=random)) if pieces else 0
        taken: list[list[int]] = []
        missing = tokens
        for _ in range(2 * tokens + len(self.docs)):
            if missing <= 0:
                break
            if at >= len(pieces):  # the document is over: the next one follows
                index, at = (index + 1) % len(self.docs), 0
                pieces = self._document(index)
                continue
            taken.append(pieces[at])
            missing -= len(pieces[at])
            at += 1
        if missing > 0:
            raise InputError(f"the filler text has no tokens to make {tokens} of; give real text")
        if missing < 0:
            taken[0], short = taken[0][-missing:], taken[0]  # the first sentence loses its beginning
            if not taken[0]:
                taken = _shorten([short, *taken[1:]], -missing)
        return taken


def _shorten(pieces: list[list[int]], excess: int) -> list[list[int]]:
    while excess:
        cut = min(excess, len(pieces[0]))
        pieces = ([pieces[0][cut:]] if cut < len(pieces[0]) else []) + pieces[1:]
        excess -= cut
    return pieces


def insert(pieces: list[list[int]], facts: Sequence[tuple[list[int], int]]) -> tuple[Tensor, list[int]]:
    """Put facts between pieces and join everything.

    Args:
        pieces: the filler.
        facts: (ids, wanted distance in filler tokens from the end of the filler to the end of the fact).

    Returns:
        int64 [T], and for each fact how many tokens lie between its end and the end of the whole.
    """
    lengths = [len(p) for p in pieces]
    left = [sum(lengths[i:]) for i in range(len(pieces) + 1)]  # filler tokens behind each gap
    order = sorted(range(len(facts)), key=lambda f: -facts[f][1])
    joined: list[int] = []
    ends = [0] * len(facts)
    gap = 0
    for fact in order:
        ids, distance = facts[fact]
        allowed = [i for i in range(gap, len(left)) if left[i] >= distance] or [gap]
        stop = allowed[-1]  # the last gap that is at least so far back
        joined += [token for piece in pieces[gap:stop] for token in piece] + ids
        ends[fact], gap = len(joined), stop
    joined += [token for piece in pieces[gap:] for token in piece]
    return torch.tensor(joined, dtype=torch.int64), [len(joined) - end for end in ends]
