"""Recall over made-up alphabets, for models trained from scratch: what was said far back must be said again.

A task is a value; its examples are drawn when asked for, from the seed and the number of the batch only. Tokens of an
alphabet of `vocab` are, in order: two marks, the keys, the values, the filler. Needles over real text, for models with
a tokenizer, are in `retrieval`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError, unknown
from lineament._base.seeds import generator
from lineament.tasks.predictions import hidden_states, logits_of
from lineament.tasks.retrieval import Retrieval

Batch = tuple[Tensor, Tensor]
SEPARATOR, QUESTION = 0, 1  # the two marks: before a fact (or a copy), before a question
FILLER_SHARE = 0.25  # of the alphabet, where there is room for filler


@dataclass(frozen=True, kw_only=True)
class Recall:
    """One task: what is asked, of how long a text, in how many words.

    Attributes:
        task: a key of `RECALLS`:
            "mqar": pairs of a key and its value, then `queries` of those keys, each followed by its value.
            "needle", "multi-key", "multi-value", "multi-query": facts (mark, key, value) hidden in filler; at the end
            one key is asked for, one of several, one with several values (in order), or several.
            "copying": a string, a mark, the string again. "palindrome": the string again from its end.
            "overwrite": every key twice with different values, in any order, then all keys with their last value.
            "induction": what followed the one marked place.
        length: tokens T of an example. vocab: size of the alphabet.
        pairs: facts hidden (mqar, overwrite, multi-*). queries: keys asked for (mqar, multi-query).
        seed: other seeds give other examples.

    Example:
        >>> ids, answer = Recall(task="mqar", length=32, vocab=16, pairs=4, queries=12).batch(0, 2)
        >>> ids.shape, answer.sum(1).tolist()
        (torch.Size([2, 32]), [12, 12])
    """

    task: str = "mqar"
    length: int = 128
    vocab: int = 64
    pairs: int = 8
    queries: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in RECALLS:
            raise unknown("recall task", self.task, RECALLS)
        if self.pairs < 1 or self.queries < 1:
            raise InputError(f"pairs={self.pairs}, queries={self.queries}; expected at least 1 of each")
        RECALLS[self.task](self, 0, generator(0))  # says what does not fit

    def batch(self, number: int, size: int) -> Batch:
        """Return example block `number`: ids int64 [size, T], and bool [size, T], true where an answer stands."""
        return RECALLS[self.task](self, size, generator((self.seed * 1_000_003 + number) % 2**63))

    def batches(self, size: int) -> Callable[[int], Batch]:
        """Return number -> batch, without end: what `train.fit` learns from."""
        return lambda number: self.batch(number, size)


@dataclass(frozen=True)
class _Alphabet:
    """First token and number of keys, values and filler."""

    keys: tuple[int, int]
    values: tuple[int, int]
    filler: tuple[int, int]

    @classmethod
    def of(cls, vocab: int, *, marks: int, filler: bool) -> "_Alphabet":
        last = max(int(vocab * FILLER_SHARE), 1) if filler else 0
        each = (vocab - marks - last) // 2
        return cls((marks, each), (marks + each, each), (vocab - last, last))


def _draw(part: tuple[int, int], shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return part[0] + torch.randint(max(part[1], 1), shape, generator=random)


def _distinct(part: tuple[int, int], size: int, count: int, random: torch.Generator) -> Tensor:
    """Draw [size, count] different members per row."""
    return part[0] + torch.rand(size, part[1], generator=random).argsort(1)[:, :count]


def _places(size: int, room: int, blocks: int, width: int, random: torch.Generator) -> Tensor:
    """Return where `blocks` blocks of `width` begin among `room` further tokens, [size, blocks], in order."""
    chosen = torch.rand(size, room + blocks, generator=random).argsort(1)[:, :blocks].sort(1).values
    return chosen + torch.arange(blocks) * (width - 1)


def _need(task: Recall, length: int, alphabet: _Alphabet, keys: int, values: int = 1) -> None:
    if task.length < length:
        raise InputError(f"{task.task} with {task.pairs} pairs and {task.queries} queries needs {length} tokens; "
                         f"length={task.length}")  # fmt: skip
    if alphabet.keys[1] < keys or alphabet.values[1] < values:
        raise InputError(
            f"{task.task} needs {keys} keys and {values} values, but vocab={task.vocab} leaves {alphabet.keys[1]} of "
            "each; take a larger one"
        )


def _mqar(task: Recall, size: int, random: torch.Generator) -> Batch:
    pairs, queries, head = task.pairs, task.queries, 2 * task.pairs
    room = task.length - head - 2 * queries
    alphabet = _Alphabet.of(task.vocab, marks=0, filler=room > 0)
    _need(task, head + 2 * queries, alphabet, pairs)
    keys, values = _distinct(alphabet.keys, size, pairs, random), _draw(alphabet.values, (size, pairs), random)
    ids = _draw(alphabet.filler, (size, task.length), random)
    ids[:, :head] = torch.stack([keys, values], -1).flatten(1)
    asked = torch.randint(pairs, (size, queries), generator=random)
    at = head + _places(size, room, queries, 2, random)
    ids.scatter_(1, at, keys.gather(1, asked)).scatter_(1, at + 1, values.gather(1, asked))
    return ids, torch.zeros(size, task.length, dtype=torch.bool).scatter_(1, at + 1, True)


def _needles(task: Recall, size: int, random: torch.Generator, *, keys: int, values: int = 1, asked: int = 1) -> Batch:
    """Hide keys x values facts of three tokens; ask for `asked` of the keys, each with its values in order."""
    alphabet, facts = _Alphabet.of(task.vocab, marks=2, filler=True), keys * values
    tail = asked * (2 + values)
    room = task.length - tail - 3 * facts
    _need(task, 3 * facts + tail, alphabet, keys, values)
    ids = _draw(alphabet.filler, (size, task.length), random)
    names = _distinct(alphabet.keys, size, keys, random)
    held = torch.stack(
        [_distinct(alphabet.values, size, values, random) for _ in range(keys)], 1
    )  # [size, keys, values]
    order = torch.rand(size, facts, generator=random).argsort(1)  # which fact stands in which place
    at = _places(size, room, facts, 3, random)
    key = names.repeat_interleave(values, 1).gather(1, order)
    value = held.flatten(1).gather(1, order)
    ids.scatter_(1, at, SEPARATOR).scatter_(1, at + 1, key).scatter_(1, at + 2, value)
    chosen = torch.rand(size, keys, generator=random).argsort(1)[:, :asked]
    place = at.gather(1, order.argsort(1)).view(size, keys, values)  # where each key's facts stand
    ordered = held.gather(2, place.argsort(2))
    answers = ordered.gather(1, chosen[..., None].expand(-1, -1, values))
    marks = torch.full((size, asked, 1), QUESTION)
    ids[:, task.length - tail :] = torch.cat([marks, names.gather(1, chosen)[..., None], answers], 2).flatten(1)
    answer = torch.zeros(size, task.length, dtype=torch.bool)
    answer[:, task.length - tail :] = (torch.arange(tail) % (2 + values)) >= 2
    return ids, answer


def _overwrite(task: Recall, size: int, random: torch.Generator) -> Batch:
    pairs, total = task.pairs, 6 * task.pairs
    alphabet = _Alphabet.of(task.vocab, marks=2, filler=False)
    _need(task, total, alphabet, pairs, 2)
    keys = _distinct(alphabet.keys, size, pairs, random).repeat(1, 2)
    values = torch.stack([_distinct(alphabet.values, size, 2, random) for _ in range(pairs)], 1).mT.flatten(1)
    order = torch.rand(size, 2 * pairs, generator=random).argsort(1)
    last = order.argsort(1).view(size, 2, pairs).argmax(1, keepdim=True)  # which of its two writes a key had last
    held = values.view(size, 2, pairs).gather(1, last)[:, 0]
    asked = torch.rand(size, pairs, generator=random).argsort(1)
    written = torch.stack([keys.gather(1, order), values.gather(1, order)], -1).flatten(1)
    queries = torch.stack([keys.gather(1, asked), held.gather(1, asked)], -1).flatten(1)
    ids = torch.cat([torch.full((size, task.length - total), SEPARATOR), written, queries], 1)
    answer = torch.zeros(size, task.length, dtype=torch.bool)
    answer[:, task.length - 2 * pairs + 1 :: 2] = True
    return ids, answer


def _palindrome(task: Recall, size: int, random: torch.Generator) -> Batch:
    ids, answer = _copying(task, size, random)
    half = (task.length - 1) // 2
    ids[:, -half:] = ids[:, -half:].flip(1)
    return ids, answer


def _copying(task: Recall, size: int, random: torch.Generator) -> Batch:
    half = (task.length - 1) // 2
    _need(task, 3, _Alphabet((1, 1), (1, task.vocab - 1), (1, task.vocab - 1)), 1)
    ids = _draw((1, task.vocab - 1), (size, task.length), random)
    ids[:, -half:] = ids[:, -2 * half - 1 : -half - 1]
    ids[:, -half - 1] = SEPARATOR
    answer = torch.zeros(size, task.length, dtype=torch.bool)
    answer[:, -half:] = True
    return ids, answer


def _induction(task: Recall, size: int, random: torch.Generator) -> Batch:
    _need(task, 4, _Alphabet((1, 1), (1, task.vocab - 1), (1, task.vocab - 1)), 1)
    ids = _draw((1, task.vocab - 1), (size, task.length), random)
    at = torch.randint(task.length - 3, (size, 1), generator=random)
    ids.scatter_(1, at, SEPARATOR)
    ids[:, -2] = SEPARATOR
    ids[:, -1:] = ids.gather(1, at + 1)
    answer = torch.zeros(size, task.length, dtype=torch.bool)
    answer[:, -1] = True
    return ids, answer


RECALLS: dict[str, Callable[[Recall, int, torch.Generator], Batch]] = {
    "mqar": _mqar,
    "needle": lambda task, size, random: _needles(task, size, random, keys=1),
    "multi-key": lambda task, size, random: _needles(task, size, random, keys=task.pairs),
    "multi-value": lambda task, size, random: _needles(task, size, random, keys=1, values=task.pairs),
    "multi-query": lambda task, size, random: _needles(
        task, size, random, keys=task.pairs, asked=min(task.queries, task.pairs)
    ),
    "copying": _copying,
    "palindrome": _palindrome,
    "overwrite": _overwrite,
    "induction": _induction,
}


def recall_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Return the mean loss of the answer tokens in nats, and the share of them predicted right: for `train.fit`.

    Args:
        model: a causal language model. batch: ids [B, T] and where the answers stand, bool [B, T].
    """
    ids, answer = batch
    row, at = answer.nonzero(as_tuple=True)
    hidden = hidden_states(model, ids)[row, at - 1]
    logits, truth = logits_of(model, hidden), ids[row, at]
    loss = nn.functional.cross_entropy(logits, truth)
    return loss, {"right": float((logits.detach().argmax(-1) == truth).double().mean())}


@torch.no_grad()
def score_recall(model: nn.Module, task: Recall, *, count: int = 512, size: int = 64) -> Retrieval:
    """Score a model on the first `count` examples of a task (give it a seed that was not trained on).

    Returns:
        right and total answer tokens per example, and their summed loss; `token_accuracy` and `exact` are shares of
        tokens and of examples.
    """
    if count < 1:
        raise InputError(f"count={count}; expected at least 1 example")
    device = next(model.parameters()).device
    rows: list[tuple[Tensor, ...]] = []
    for number in range(-(-count // size)):
        left = count - number * size
        ids, answer = (x[:left].to(device) for x in task.batch(number, size))
        row, at = answer.nonzero(as_tuple=True)
        logits, truth = logits_of(model, hidden_states(model, ids)[row, at - 1]), ids[row, at]
        nll = nn.functional.cross_entropy(logits, truth, reduction="none").double()
        none = torch.zeros(len(ids), dtype=torch.float64, device=device)
        right = none.index_add(0, row, (logits.argmax(-1) == truth).double())
        rows.append((right.long(), answer.sum(1), none.index_add(0, row, nll), _distance(ids, answer)))
    right, total, nll, distance = (torch.cat(part).cpu() for part in zip(*rows, strict=True))
    return Retrieval(right, total, nll, distance)


def _distance(ids: Tensor, answer: Tensor) -> Tensor:
    """Tokens between the last time an example's first answer was said before and where it is asked for."""
    first = answer.int().argmax(1, keepdim=True)
    at = torch.arange(ids.shape[1], device=ids.device)
    said = (ids == ids.gather(1, first)) & (at < first)
    return (first - 1 - torch.where(said, at, -1).amax(1, keepdim=True))[:, 0]
