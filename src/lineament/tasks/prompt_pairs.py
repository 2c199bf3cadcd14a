"""Pairs of prompts in plain English that differ in one thing, with the answer of each: what circuits are found on.

Indirect objects (Wang et al. 2022, arXiv:2211.00593) and greater-than (Hanna et al. 2023, arXiv:2305.00586) by
generator, others from a JSON file.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineament._base.errors import InputError, unknown
from lineament._base.seeds import generator
from lineament.data import going_on
from lineament.tasks.algorithms import Algorithm, Examples
from lineament.tasks.templates import phrases

NAMES = phrases(
    "Mary, John, Tom, James, Dan, Sarah, Anna, Kate, Paul, Mark, Peter, Laura, Alice, David, Jack, Emma, Mike, Susan, "
    "Robert, Michael, Daniel, Emily, Lisa, Jane, Steve, Kevin, Brian, George, Henry, William, Rachel, Ben, Sam, Alex, "
    "Adam, Jessica, Amy, Karen, Maria"
)
PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station")
THINGS = ("ring", "kiss", "bone", "basketball", "computer", "necklace", "drink", "snack")
EVENTS = ("war", "siege", "festival", "journey", "project", "strike", "trial", "exhibition", "reign", "dispute")
SAYINGS = (
    "Then, {a} and {b} went to the {place}. {giver} gave a {thing} to",
    "When {a} and {b} got a {thing} at the {place}, {giver} decided to give it to",
    "After {a} and {b} went to the {place}, {giver} gave a {thing} to",
)


@dataclass(frozen=True)
class Pair:
    """Two prompts of the same length; `answer` goes on from the clean one, `distractor` does not (any of several)."""

    clean: str
    corrupt: str
    answer: tuple[str, ...]
    distractor: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Pairs as token numbers.

    Attributes:
        clean, corrupt: [B, T], longer prompts deciding T; what stands behind a shorter one is read by nobody.
        answer, distractor: [B, N], -1 where a row has fewer.
        last: [B], the position of each prompt's last token.
    """

    clean: Tensor
    corrupt: Tensor
    answer: Tensor
    distractor: Tensor
    last: Tensor

    def rows(self, chosen: Sequence[int] | Tensor) -> "Encoded":
        """Return some pairs, no longer than they need be."""
        at = torch.as_tensor(chosen, dtype=torch.long)
        length = int(self.last[at].max()) + 1 if len(at) else 0
        prompts = (self.clean[at, :length], self.corrupt[at, :length])
        return Encoded(*prompts, self.answer[at], self.distractor[at], self.last[at])


def indirect_object_pairs(count: int, *, seed: int = 0, fits: Callable[[str], bool] | None = None) -> list[Pair]:
    """Return "When Mary and John went to the store, John gave a drink to" - Mary; corrupt, Mary gives.

    Args:
        count: how many. seed: of the draws.
        fits: which names may be used, those of one token say.

    Example:
        >>> pair = indirect_object_pairs(1)[0]
        >>> pair.answer != pair.distractor, pair.clean.count(pair.distractor[0].strip())
        (True, 2)
    """
    names = [name for name in NAMES if fits is None or fits(f" {name}")]
    if len(names) < 2:
        raise InputError("the tokenizer has none of the generator's names as one token; give a task file")
    random, found = generator(seed), []

    def one_of(known: Sequence[str]) -> str:
        return known[int(torch.randint(len(known), (), generator=random))]

    for _ in range(count):
        a, b = (names[i] for i in torch.randperm(len(names), generator=random)[:2].tolist())
        giver, other = (a, b) if int(torch.randint(2, (), generator=random)) else (b, a)
        saying, place, thing = one_of(SAYINGS), one_of(PLACES), one_of(THINGS)
        said = [saying.format(a=a, b=b, place=place, thing=thing, giver=each) for each in (giver, other)]
        found.append(Pair(said[0], said[1], (f" {other}",), (f" {giver}",)))
    return found


INDIRECT_OBJECT = Algorithm(
    "indirect object", ("second",),
    {"second is it": (("second",), lambda second: second), "out": (("second is it",), lambda v: v.long())}, "out",
)  # fmt: skip
"""Answers with the name mentioned second if that is the indirect object, else with the first (of two choices)."""


def mention_examples(tokenizer: Any, pairs: Sequence[Pair]) -> Examples:
    """Return prompts of `indirect_object_pairs` as examples of `INDIRECT_OBJECT`, read at their last token.

    Draw those to learn from and those to measure on with disjoint names (`fits`), lest a map learns names.
    """
    encoded = encode(tokenizer, pairs)
    said = [[pair.clean.index(name[0].strip()) for name in (pair.answer, pair.distractor)] for pair in pairs]
    second = torch.tensor([answer > other for answer, other in said])
    names = torch.cat([encoded.answer, encoded.distractor], 1)
    choices = torch.where(second[:, None], names.flip(1), names)
    return Examples({"input_ids": encoded.clean}, {"second": second}, positions=encoded.last, choices=choices)


def greater_than_pairs(count: int, *, seed: int = 0, fits: Callable[[str], bool] | None = None) -> list[Pair]:
    """Return "The war lasted from the year 1744 to the year 17" - a digit above 4; corrupt, from the year 1704.

    The answer is the next digit: those above the tens against those below (the tens themselves depend on the digit
    after them, so they count for neither).

    Example:
        >>> pair = greater_than_pairs(1)[0]
        >>> min(pair.answer) > max(pair.distractor)
        True
    """
    random, found = generator(seed), []
    for _ in range(count):
        event = EVENTS[int(torch.randint(len(EVENTS), (), generator=random))]
        century, tens = (int(torch.randint(low, high, (), generator=random)) for low, high in ((11, 18), (2, 8)))
        ones = int(torch.randint(10, (), generator=random))
        said = [f"The {event} lasted from the year {century}{t}{ones} to the year {century}" for t in (tens, 0)]
        found.append(
            Pair(said[0], said[1], tuple(str(d) for d in range(tens + 1, 10)), tuple(str(d) for d in range(tens)))
        )
    return found


TASKS: dict[str, Callable[..., list[Pair]]] = {"ioi": indirect_object_pairs, "greater-than": greater_than_pairs}


def read_pairs(path: str | Path) -> list[Pair]:
    """Read a task file: {"prompts": [{"clean": ..., "corrupt": ..., "answer": ..., "distractor": ...}, ...]}.

    Answers and distractors are a word or a list of words.

    Raises:
        InputError: no such file, or not of that form; the prompt and the field are named.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected a task file or one of {', '.join(TASKS)}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    prompts = value.get("prompts") if isinstance(value, dict) else value
    if not isinstance(prompts, list) or not prompts:
        raise InputError(
            f'{path} has no prompts; expected {{"prompts": [{{"clean", "corrupt", "answer", "distractor"}}]}}'
        )
    return [_pair(each, f"{path}, prompt {index}") for index, each in enumerate(prompts)]


def _pair(value: Any, at: str) -> Pair:
    fields = ("clean", "corrupt", "answer", "distractor")
    if not isinstance(value, dict):
        raise InputError(f"{at}: expected an object with {', '.join(fields)}")
    for name in value:
        if name not in fields:
            raise unknown(f"field in {at}:", name, fields)
    parts = []
    for name in fields:
        given = value.get(name)
        words = [given] if isinstance(given, str) or name in ("clean", "corrupt") else given
        if not isinstance(words, list) or not words or not all(isinstance(x, str) and x.strip() for x in words):
            raise InputError(f"{at}: {name} is {given!r}; expected text")
        parts.append(tuple(words))
    return Pair(parts[0][0], parts[1][0], parts[2], parts[3])


def encode(tokenizer: Any, pairs: Sequence[Pair]) -> Encoded:
    """Turn pairs into token numbers.

    Raises:
        InputError: clean and corrupt prompt have unequal numbers of tokens or are the same, or an answer begins like
            its distractor; the pair is named.
    """
    if not pairs:
        raise InputError("there is no pair of prompts")
    clean, corrupt, answers, distractors = [], [], [], []
    for index, pair in enumerate(pairs):
        one, other = (tokenizer(text)["input_ids"] for text in (pair.clean, pair.corrupt))
        if len(one) != len(other):
            first = next(
                (i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other))
            )
            words = [tokenizer.convert_ids_to_tokens(ids[first : first + 4]) for ids in (one, other)]
            raise InputError(
                f"pair {index}: the clean prompt has {len(one)} tokens and the corrupt one {len(other)}, so positions "
                f"can't be compared; they part at token {first}: {words[0]} and {words[1]}. Use words of as many tokens"
            )
        if one == other:
            raise InputError(f"pair {index}: clean and corrupt prompt are the same: {pair.clean!r}")
        starts = [_first_tokens(tokenizer, pair.clean, words) for words in (pair.answer, pair.distractor)]
        if set(starts[0]) & set(starts[1]):
            raise InputError(f"pair {index}: {pair.answer[0]!r} and {pair.distractor[0]!r} begin with the same token")
        for known, new in zip((clean, corrupt, answers, distractors), (one, other, *starts), strict=True):
            known.append(new)
    last = torch.tensor([len(ids) - 1 for ids in clean])
    prompts, wanted = [_filled(x, 0) for x in (clean, corrupt)], [_filled(x, -1) for x in (answers, distractors)]
    return Encoded(prompts[0], prompts[1], wanted[0], wanted[1], last)


def one_token(tokenizer: Any, word: str) -> bool:
    """Return whether a tokenizer has a word, in the middle of a sentence, as one token."""
    try:
        return len(going_on(tokenizer, "Then", word)) == 1
    except InputError:  # a word without a token
        return False


def _first_tokens(tokenizer: Any, prompt: str, words: Sequence[str]) -> list[int]:
    found = []
    for word in words:
        lead = "" if word.startswith(" ") or prompt.endswith((" ", "\n")) or word.isdigit() else " "
        found.append(going_on(tokenizer, prompt, lead + word)[0])
    return list(dict.fromkeys(found))


def _filled(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
