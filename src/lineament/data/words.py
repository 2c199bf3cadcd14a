"""Words and tokens: what a word's tokens are where it stands, and what each token of a text adds to it."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from lineament._base.errors import InputError


def going_on(tokenizer: Any, text: str, word: str) -> list[int]:
    """Return the token numbers of a word where it goes on from a text.

    Tokenised alone, a word may get a token of its own for the beginning of a text (Llama 2's "▁" before " Paris"). The
    word is taken alone only where the text's last token is another with the word behind it.

    Args:
        word: with its space in front, if it has one.

    Raises:
        InputError: the tokenizer makes nothing of the word, or has no token for a part of it.
    """
    whole, before = (tokenizer(said, add_special_tokens=False)["input_ids"] for said in (text + word, text))
    count = len(before)
    found = whole[count:] if whole[:count] == before else []
    found = found or tokenizer(word, add_special_tokens=False)["input_ids"]
    if not found:
        raise InputError(f"the tokenizer makes no token of {word!r}")
    if getattr(tokenizer, "unk_token_id", None) in found and tokenizer.unk_token not in word:
        raise InputError(
            f"the tokenizer has no token for {word!r}, only its {tokenizer.unk_token!r}; give another word"
        )
    return found


BEHIND = 16  # tokens that a token is decoded with; no character is spread over more


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return what each token adds to the text of those before it; spaces in front are kept.

    A token that completes no character is shown as it decodes alone.
    """

    def text(start: int, stop: int) -> str:
        return tokenizer.decode(list(ids[start:stop]), clean_up_tokenization_spaces=False) if stop > start else ""

    found = []
    for i, one in enumerate(ids):
        start = max(0, i - BEHIND)
        before, now = text(start, i), text(start, i + 1)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, now, strict=False)))
        found.append(now[same:] or tokenizer.decode([one]))
    return found
