"""Several questions on one text: the text is read once, each question is asked after it as if it were the only one.

A text of 4096 tokens with eight questions costs little more than one prompt of that length, and a model is asked eight
times. Questions on one text are not independent draws: compare models by drawing texts (`paired_points` does).
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError, unknown
from lineament._base.seeds import generator
from lineament.data import Tokenizer, beginning
from lineament.tasks.cost import new_cache
from lineament.tasks.haystack import Haystack, insert
from lineament.tasks.predictions import hidden_states, plain
from lineament.tasks.retrieval import (
    ENTRIES,
    FACTS,
    GOLDEN,
    SPARED,
    Prompt,
    Retrieval,
    ending,
    right_and_nll,
    token_ids,
)
from lineament.tasks.templates import KINDS, SETS, TEMPLATES, Wording

QUESTIONS = 2 * len(KINDS)  # on a text that is long enough; else half as many, a quarter, one
TRIALS = 4 * len(KINDS)  # texts drawn to see how many questions fit
SUBJECTS = {"digits": 1, "words": 1, "two-needles": 2, "key-value": 0}  # that a fact of each kind is about


@dataclass(frozen=True)
class Body:
    """One text and the questions on it.

    Args:
        ids: int64 [T], the text with every fact in it.
        prompts: text, question and answer together, each a prompt of its own; all begin with `ids`.
    """

    ids: Tensor
    prompts: tuple[Prompt, ...]

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return len(self.ids)


@dataclass(frozen=True)
class _Question:
    """A question before it has a text: what is asked, and what must stand in the text for it."""

    kind: str
    needles: list[list[int]]
    ending: list[int]
    marks: list[bool]

    @property
    def lead(self) -> int:
        """Tokens between the text's end and the answer."""
        return self.marks.index(True)

    @property
    def tokens(self) -> int:
        """Tokens of its facts."""
        return sum(map(len, self.needles))


def make_bodies(
    tokenizer: Tokenizer,
    length: int,
    questions: int,
    *,
    filler: Sequence[str] | Haystack,
    templates: str = "test",
    seed: int = 0,
    beyond: int = 192,
) -> list[Body]:
    """Make texts that have `questions` questions in all; text and longest question are `length` tokens together.

    A text has two questions of every kind of `KINDS`, about different subjects. Where their facts would fill more than
    half of it, all texts have half as many questions, and so on; the kinds then take turns from text to text. Text i
    depends on the seed and on i only.

    Args:
        tokenizer: of the model.
        length: tokens of the text, the longest question and its answer; shorter questions end earlier.
        questions: at least so many in all; the last text has all of its own.
        filler: documents to hide the facts in (a `Haystack` made once saves time).
        templates: "test", "place" or "train": wordings, subjects and words that share nothing.
        seed: other seeds give other texts.
        beyond: a fact ends at least this many tokens before its answer begins, so that no window reaches it.

    Raises:
        InputError: unknown templates, or the length leaves no room beyond `beyond` for a single question.
    """
    if templates not in SETS:
        raise unknown("set of templates", templates, SETS)
    hay, wording = filler if isinstance(filler, Haystack) else Haystack(filler, tokenizer), TEMPLATES[templates]
    size = _size(tokenizer, length, wording, beyond)
    return [
        _body(hay, tokenizer, length, number, size, wording, seed=seed, beyond=beyond)
        for number in range(-(-questions // size))
    ]


def _size(tokenizer: Tokenizer, length: int, wording: Wording, beyond: int) -> int:
    """Return how many questions every text of a length has: as many as fit whatever is drawn."""
    random, size = generator(0), QUESTIONS
    while True:
        drawn = [_questions(tokenizer, number, size, wording, random) for number in range(TRIALS)]
        spare = min(_spare(tokenizer, asked, length, beyond) for asked in drawn)
        if spare >= 0:
            return size
        if size == 1:
            need = length - spare
            raise InputError(f"a text of {length} tokens has no room for facts beyond {beyond}; give at least {need}")
        size //= 2


def _spare(tokenizer: Tokenizer, asked: Sequence[_Question], length: int, beyond: int) -> int:
    """Return how many tokens are left where every fact has its place; negative when some are missing."""
    facts, longest = sum(one.tokens for one in asked), max(len(one.ending) for one in asked)
    nearest = max(0, beyond - min(one.lead for one in asked))
    free = length - longest - len(beginning(tokenizer)) - facts - nearest - SPARED
    return free if len(asked) == 1 else min(free, length - longest - 2 * facts)


def _body(
    hay: Haystack,
    tokenizer: Tokenizer,
    length: int,
    number: int,
    size: int,
    wording: Wording,
    *,
    seed: int,
    beyond: int,
) -> Body:
    prefix, random = beginning(tokenizer), generator((seed * 1_000_003 + number) % 2**63)
    asked = _questions(tokenizer, number, size, wording, random)
    while _spare(tokenizer, asked, length, beyond) < 0:  # longer than all that `_size` has seen
        asked = _questions(tokenizer, number, size, wording, random)
    facts, longest = sum(one.tokens for one in asked), max(len(one.ending) for one in asked)
    room = length - longest - len(prefix) - facts
    places = [
        (needle, place)
        for i, one in enumerate(asked)
        for needle, place in zip(one.needles, _places(one, number * size + i, room, beyond), strict=True)
    ]
    text, behind = insert(hay.draw(room, random), places)
    ids, left = torch.cat([torch.tensor(prefix, dtype=torch.int64), text]), iter(behind)
    return Body(ids, tuple(_prompt(ids, one, min(next(left) for _ in one.needles)) for one in asked))


def _questions(
    tokenizer: Tokenizer, number: int, size: int, wording: Wording, random: torch.Generator
) -> list[_Question]:
    """Draw the questions of a text, kinds in turn; no two of them share a subject or a name in a list."""
    subjects, keys = (
        [options[i] for i in torch.randperm(len(options), generator=random).tolist()]
        for options in (wording.subjects, wording.keys)
    )
    made = []
    for turn in range(size):
        kind = KINDS[(number * size + turn) % len(KINDS)]
        own, subjects = subjects[: SUBJECTS[kind]], subjects[SUBJECTS[kind] :]
        listed = keys[:ENTRIES]
        keys = keys[ENTRIES:] if kind == "key-value" else keys
        facts, asked = FACTS[kind](replace(wording, subjects=tuple(own), keys=tuple(listed)), random)
        needles = [token_ids(tokenizer, f"\n\n{fact}\n\n") for fact in facts]
        made.append(_Question(kind, needles, *ending(tokenizer, asked)))
    return made


def _places(one: _Question, number: int, room: int, beyond: int) -> list[int]:
    """Return how many tokens of filler shall stand behind each fact of a question, spread by its number."""
    nearest, count = max(0, beyond - one.lead), len(one.needles)
    depths = [(number * GOLDEN + 0.5 + n / count) % 1.0 for n in range(count)]
    return [int(nearest + (room - SPARED - nearest) * depth) for depth in depths]


def _prompt(ids: Tensor, one: _Question, behind: int) -> Prompt:
    answer = torch.cat([torch.zeros(len(ids), dtype=torch.bool), torch.tensor(one.marks)])
    return Prompt(torch.cat([ids, torch.tensor(one.ending)]), answer, one.kind, behind + one.lead)


@torch.no_grad()
def score_bodies(model: nn.Module, bodies: Sequence[Body]) -> Retrieval:
    """Score every question of every text, teacher-forced: as `score` on all prompts, but each text is read once.

    Args:
        model: a causal language model of transformers, a student or not.
        bodies: from `make_bodies`.

    Returns:
        Scores in the order of the texts and their questions; `Retrieval.body` numbers the texts.
    """
    if len(bodies) == 0:
        raise InputError("there are no texts to score")
    rows = [(*row, number) for number, body in enumerate(bodies) for row in _score_body(model, body)]
    right, total, nll, distance, number = map(torch.tensor, zip(*rows, strict=True))
    return Retrieval(right, total, nll.double(), distance, number)


def _score_body(model: nn.Module, body: Body) -> Iterator[tuple[int, int, float, int]]:
    device = next(plain(model).parameters()).device
    cache = new_cache(model, body.length)
    hidden_states(model, body.ids[None].to(device), cache=cache)
    for prompt in body.prompts:
        asked, at = prompt.ids[body.length :].to(device), prompt.answer[body.length :].nonzero()[:, 0].to(device)
        hidden = hidden_states(model, asked[None], cache=copy.deepcopy(cache))[0]  # asking writes into the cache
        right, nll = right_and_nll(model, hidden[at - 1], asked[at])
        yield right, len(at), nll, prompt.distance
