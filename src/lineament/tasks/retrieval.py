"""Retrieval: facts hidden far back in ordinary text, asked for at the end, scored token by token.

Answers are scored teacher-forced: each token of the answer is predicted from everything before it, the true earlier
tokens of the answer included. The share predicted right is smooth where exact matches would jump.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError, unknown
from lineament._base.seeds import generator
from lineament.data import Tokenizer, beginning
from lineament.tasks.haystack import Haystack, insert
from lineament.tasks.predictions import hidden_states, logits_of, plain
from lineament.tasks.templates import KINDS, SETS, TEMPLATES, Wording

DIGITS = 5  # in a code, for kinds that ask for one
SHORT_DIGITS = 4  # in a code of a list or of a pair
WORDS = 3  # in a password
ENTRIES = 6  # in a key-value list
NEEDLES = 4  # facts of the multi- kinds
GOLDEN = 0.6180339887498949  # its multiples spread evenly between 0 and 1, for any count
SPARED = 8  # tokens that stay in front of every fact: the first ones are sinks, which every student sees


@dataclass(frozen=True)
class Prompt:
    """One prompt with its answer in place.

    Args:
        ids: int64 [T], exactly as long as asked for, the answer at the end.
        answer: bool [T], True where a token of the answer stands. Two needles have two answers and words between them.
        kind: a key of `FACTS`.
        distance: tokens between the (nearest) fact and the question's end.
    """

    ids: Tensor
    answer: Tensor
    kind: str
    distance: int

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.ids)

    @property
    def tail(self) -> int:
        """Tokens from the first one of the answer to the end."""
        return self.length - int(self.answer.int().argmax())

    @property
    def answer_ids(self) -> Tensor:
        """The answer's tokens, int64 [A]."""
        return self.ids[self.answer]


class Prompts(Sequence[Prompt]):
    """Prompts made when they are asked for; prompt i depends on the seed and on i only.

    The facts' places are spread evenly from just beyond `beyond` to the beginning of the text.
    """

    def __init__(
        self, make: Callable[[int, torch.Generator, float], Prompt], count: int, seed: int, offset: int = 0
    ) -> None:
        self._make, self._count, self._seed, self._offset = make, count, seed, offset

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        number = index % self._count + self._offset
        depth = (number * GOLDEN + 0.5) % 1.0
        return self._make(number, generator((self._seed * 1_000_003 + number) % 2**63), depth)


def make_prompts(
    tokenizer: Tokenizer,
    kind: str,
    length: int,
    count: int,
    *,
    filler: Sequence[str] | Haystack,
    templates: str = "test",
    seed: int = 0,
    beyond: int = 192,
    offset: int = 0,
) -> Prompts:
    """Make prompts of one kind and of exactly `length` tokens, answer included.

    Args:
        tokenizer: of the model.
        kind: "digits" (a code), "words" (three words), "two-needles" (two codes at different depths, both asked for),
            "key-value" (a list of six entries, one asked for); or four codes at different depths: "multi-key" (of four
            subjects, one asked for), "multi-value" (of one subject, asked for in their order), "multi-query" (of four
            subjects, all asked for).
        length: tokens of prompt and answer together.
        count: how many.
        filler: documents to hide the facts in (a `Haystack` made once saves time).
        templates: "test", "place" or "train": wordings, subjects and words that share nothing.
        seed: other seeds give other prompts.
        beyond: a fact ends at least this many tokens before the answer begins, so that no window reaches it.
        offset: number of the first prompt, to draw further ones of the same seed.

    Raises:
        InputError: unknown kind or templates, or the length leaves no room beyond `beyond`.
    """
    if kind not in FACTS:
        raise unknown("kind of retrieval", kind, FACTS)
    if templates not in SETS:
        raise unknown("set of templates", templates, SETS)
    hay = filler if isinstance(filler, Haystack) else Haystack(filler, tokenizer)
    prefix, wording = beginning(tokenizer), TEMPLATES[templates]

    def make(number: int, random: torch.Generator, depth: float) -> Prompt:
        facts, asked = FACTS[kind](wording, random)
        return _assemble(tokenizer, hay, prefix, facts, asked, random, kind, length, beyond, depth)

    return Prompts(make, count, seed, offset)


Asked = list[tuple[str, bool]]  # what stands at the end: (text, is it an answer?)
Facts = list[str]


def _pick(options: Sequence[str], count: int, random: torch.Generator) -> list[str]:
    order: list[int] = torch.randperm(len(options), generator=random).tolist()
    return [options[i] for i in order[:count]]


def _code(digits: int, random: torch.Generator) -> str:
    return "".join(map(str, torch.randint(10, (digits,), generator=random).tolist()))


def _choose(options: Sequence[Any], random: torch.Generator) -> Any:
    return options[int(torch.randint(len(options), (1,), generator=random))]


def _digits(wording: Wording, random: torch.Generator) -> tuple[Facts, Asked]:
    (before, after), (subject,) = _choose(wording.codes, random), _pick(wording.subjects, 1, random)
    before, code = before.format(x=subject), _code(DIGITS, random)
    return [f"{before} {code}{after}"], [(before, False), (f" {code}", True)]


def _words(wording: Wording, random: torch.Generator) -> tuple[Facts, Asked]:
    (before, after), (subject,) = _choose(wording.passwords, random), _pick(wording.subjects, 1, random)
    before, words = before.format(x=subject), ", ".join(_pick(wording.words, WORDS, random))
    first, *rest = words.split(", ")
    asked = [(before, False), (f" {first}", True)]
    for word in rest:
        asked += [(",", False), (f" {word}", True)]
    return [f"{before} {words}{after}"], asked


def _two(wording: Wording, random: torch.Generator, count: int = 2) -> tuple[Facts, Asked]:
    before, after = _choose(wording.codes, random)
    facts, asked = [], []
    for number, subject in enumerate(_pick(wording.subjects, count, random)):
        start, code = before.format(x=subject), _code(SHORT_DIGITS, random)
        facts.append(f"{start} {code}{after}")
        asked += [(start if number == 0 else f". {start}", False), (f" {code}", True)]
    return facts, asked


def _key_value(wording: Wording, random: torch.Generator) -> tuple[Facts, Asked]:
    heading, between = _choose(wording.lists, random)
    keys = _pick(wording.keys, ENTRIES, random)
    entries = [(f"{key}{between}", _code(SHORT_DIGITS, random)) for key in keys]
    start, code = _choose(entries, random)
    listed = "".join(f"\n{name} {value}." for name, value in entries)
    return [heading + listed], [(start, False), (f" {code}", True)]


def _multi_key(wording: Wording, random: torch.Generator) -> tuple[Facts, Asked]:
    facts, asked = _two(wording, random, NEEDLES)
    number = int(torch.randint(NEEDLES, (1,), generator=random))
    (before, _), code = asked[2 * number], asked[2 * number + 1]
    return facts, [(before.removeprefix(". "), False), code]


def _multi_value(wording: Wording, random: torch.Generator) -> tuple[Facts, Asked]:
    (before, after), (subject,) = _choose(wording.codes, random), _pick(wording.subjects, 1, random)
    start, codes = before.format(x=subject), []
    while len(codes) < NEEDLES:
        codes += [code for code in (_code(SHORT_DIGITS, random),) if code not in codes]
    asked: Asked = [(start, False)]
    for number, code in enumerate(codes):
        asked += [(",", False)] * (number > 0) + [(f" {code}", True)]
    return [f"{start} {code}{after}" for code in codes], asked


IN_ORDER = ("multi-value",)  # kinds whose facts stand in the text in the order in which they are asked for
FACTS: dict[str, Callable[[Wording, torch.Generator], tuple[Facts, Asked]]] = {
    "digits": _digits,
    "words": _words,
    "two-needles": _two,
    "key-value": _key_value,
    "multi-key": _multi_key,
    "multi-value": _multi_value,
    "multi-query": lambda wording, random: _two(wording, random, NEEDLES),
}


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenise without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def ending(tokenizer: Tokenizer, asked: Asked) -> tuple[list[int], list[bool]]:
    """Tokenise what stands at the end. A token of white space alone is given, not asked for."""
    ids, marks = token_ids(tokenizer, "\n\n"), []
    marks = [False] * len(ids)
    for text, is_answer in asked:
        piece = token_ids(tokenizer, text)
        blank = len(text) - len(text.lstrip()) if is_answer else 0
        spaces = len(token_ids(tokenizer, text[:blank])) if blank else 0
        apart = blank and piece[:spaces] == token_ids(tokenizer, text[:blank])
        ids += piece
        marks += [is_answer and not (apart and i < spaces) for i in range(len(piece))]
    return ids, marks


def _assemble(
    tokenizer: Tokenizer,
    hay: Haystack,
    prefix: list[int],
    facts: Facts,
    asked: Asked,
    random: torch.Generator,
    kind: str,
    length: int,
    beyond: int,
    depth: float,
) -> Prompt:
    needles = [token_ids(tokenizer, f"\n\n{fact}\n\n") for fact in facts]
    end, marks = ending(tokenizer, asked)
    lead = marks.index(True)
    room = length - len(prefix) - len(end) - sum(map(len, needles))
    nearest = max(0, beyond - lead)
    if room < nearest + SPARED:
        need = length - room + nearest + SPARED
        raise InputError(f"a {kind} prompt of {length} tokens has no room beyond {beyond}; give at least {need} tokens")
    farthest = room - SPARED
    places = [nearest + (farthest - nearest) * ((depth + n / len(needles)) % 1.0) for n in range(len(needles))]
    places = sorted(places, reverse=True) if kind in IN_ORDER else places
    pieces = hay.draw(room, random)
    body, behind = insert(pieces, [(n, int(p)) for n, p in zip(needles, places, strict=True)])
    ids = torch.cat([torch.tensor(prefix, dtype=torch.int64), body, torch.tensor(end)])
    answer = torch.zeros(len(ids), dtype=torch.bool)
    answer[-len(marks) :] = torch.tensor(marks)
    return Prompt(ids, answer, kind, min(behind) + lead)


def train_examples(
    tokenizer: Tokenizer,
    filler: Sequence[str] | Haystack,
    length: int,
    size: int,
    *,
    kinds: Sequence[str] = KINDS,
    templates: str = "train",
    seed: int = 0,
    beyond: int = 192,
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Return step -> (ids int64 [size, length], answer bool [size, length]) to train retrieval on; kinds take turns.

    A pure function of the step, without end.
    """
    hay = filler if isinstance(filler, Haystack) else Haystack(filler, tokenizer)
    of = {
        kind: make_prompts(
            tokenizer, kind, length, 2**62, filler=hay, templates=templates, seed=seed * 31 + n, beyond=beyond
        )
        for n, kind in enumerate(kinds)
    }

    def batch(step: int) -> tuple[Tensor, Tensor]:
        numbers = range(step * size, (step + 1) * size)
        made = [of[kinds[n % len(kinds)]][n] for n in numbers]
        return torch.stack([p.ids for p in made]), torch.stack([p.answer for p in made])

    return batch


@dataclass(frozen=True)
class Retrieval:
    """Scores of prompts, in their order.

    Args:
        right: int64 [N] answer tokens predicted right. total: int64 [N] answer tokens.
        nll: float64 [N] summed negative log likelihood of the answer, nats.
        distance: int64 [N] tokens from the nearest fact to the answer.
        body: int64 [N] number of the text that each was asked on; None when each has its own.
    """

    right: Tensor
    total: Tensor
    nll: Tensor
    distance: Tensor
    body: Tensor | None = None

    def take(self, chosen: Tensor) -> "Retrieval":
        """Return the scores of some prompts, given as bool [N]."""
        body = None if self.body is None else self.body[chosen]
        return Retrieval(self.right[chosen], self.total[chosen], self.nll[chosen], self.distance[chosen], body)

    @property
    def token_accuracy(self) -> float:
        """Share of answer tokens predicted right ("digits right")."""
        return float(self.right.sum() / self.total.sum())

    @property
    def exact(self) -> float:
        """Share of prompts with every answer token right."""
        return float((self.right == self.total).double().mean())

    @property
    def loss(self) -> float:
        """Mean negative log likelihood of an answer token, nats."""
        return float(self.nll.sum() / self.total.sum())


@torch.no_grad()
def score(model: nn.Module, prompts: Sequence[Prompt], *, batch_size: int = 1) -> Retrieval:
    """Score prompts teacher-forced.

    Args:
        model: a causal language model of transformers.
        prompts: prompts of equal lengths stand in one batch; kinds may be mixed.
        batch_size: prompts in a batch.
    """
    if len(prompts) == 0:
        raise InputError("there are no prompts to score")
    rows = [row for batch in _batched(prompts, batch_size) for row in _score_batch(model, batch)]
    right, total, nll, distance = zip(*rows, strict=True)
    return Retrieval(torch.tensor(right), torch.tensor(total), torch.tensor(nll).double(), torch.tensor(distance))


def _batched(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    batch: list[Prompt] = []
    for prompt in prompts:
        if batch and (len(batch) == size or prompt.length != batch[0].length):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def _score_batch(model: nn.Module, batch: list[Prompt]) -> Iterator[tuple[int, int, float, int]]:
    device = next(plain(model).parameters()).device
    ids = torch.stack([p.ids for p in batch]).to(device)
    hidden = hidden_states(model, ids)
    for row, prompt in enumerate(batch):
        at = prompt.answer.nonzero()[:, 0]
        right, nll = right_and_nll(model, hidden[row, at.to(device) - 1], ids[row, at.to(device)])
        yield right, len(at), nll, prompt.distance


def right_and_nll(model: nn.Module, hidden: Tensor, truth: Tensor) -> tuple[int, float]:
    """Return how many tokens [A] are predicted right from hidden states [A, D], and their summed loss in nats."""
    logits = logits_of(model, hidden)
    nll = torch.nn.functional.cross_entropy(logits, truth, reduction="sum")
    return int((logits.argmax(-1) == truth).sum()), float(nll)


def paired_points(
    student: Retrieval, teacher: Retrieval, *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Return how many percentage points of answer tokens the student lies above the teacher, with its 95 % interval.

    A paired bootstrap over prompts, or over texts where several prompts share one: both must have been scored on the
    same ones.
    """
    if not _same(student.total, teacher.total) or not _same(student.body, teacher.body):
        raise InputError("student and teacher were scored on different prompts; score both on the same ones")
    body = torch.arange(len(student.total)) if student.body is None else student.body
    group = body.unique(return_inverse=True)[1]
    zeros = torch.zeros(int(group.max()) + 1, dtype=torch.float64)
    gap = zeros.index_add(0, group, (student.right - teacher.right).double())
    total = zeros.index_add(0, group, student.total.double())
    pick = torch.randint(len(total), (draws, len(total)), generator=generator(seed))
    drawn = 100 * gap[pick].sum(1) / total[pick].sum(1)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(100 * gap.sum() / total.sum()), low, high


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
