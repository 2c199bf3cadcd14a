"""Perplexity, window by window, so that two models can be compared in pairs; and what a model gains from context."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament._base.seeds import generator
from lineament.data import Tokenizer, windows
from lineament.tasks.predictions import plain, token_nll


@dataclass(frozen=True)
class Perplexity:
    """How surprised a model is by text.

    Args:
        per_window: float64 [N], summed negative log likelihood of each window's scored tokens, nats.
        scored: tokens scored in each window.

    Example:
        >>> round(Perplexity(torch.tensor([20.0, 30.0]).double(), 10).value, 3)
        12.182
    """

    per_window: Tensor
    scored: int

    @classmethod
    def of(cls, nll: Tensor) -> "Perplexity":
        """Make it of the negative log likelihood of every scored token, [N, scored]."""
        return cls(nll.double().sum(1), nll.shape[1])

    @property
    def nll_sum(self) -> float:
        """Summed negative log likelihood, nats."""
        return float(self.per_window.sum())

    @property
    def tokens(self) -> int:
        """Tokens scored in all."""
        return len(self.per_window) * self.scored

    @property
    def nll(self) -> float:
        """Mean negative log likelihood of a token, nats."""
        return self.nll_sum / self.tokens

    @property
    def value(self) -> float:
        """The perplexity, e^nll."""
        return math.exp(min(self.nll, 700.0))


def perplexity(model: nn.Module, text: Tensor, *, batch_size: int = 1, last: int | None = None) -> Perplexity:
    """Score windows of text; each is read from its first token on, without anything before it.

    Args:
        model: a causal language model of transformers, in eval mode.
        text: int64 [N, T] windows (`lineament.data.windows`).
        batch_size: windows in a batch.
        last: score only the last so many tokens of each; None for all but the first.
    """
    return Perplexity.of(window_nll(model, text, batch_size=batch_size, last=last))


def window_nll(model: nn.Module, text: Tensor, *, batch_size: int = 1, last: int | None = None) -> Tensor:
    """Return the negative log likelihood of each scored token, float32 or wider [N, scored]; as `perplexity`."""
    if text.dim() != 2 or len(text) == 0:
        raise InputError(f"windows have shape {list(text.shape)}; expected [N, T] with at least one window")
    device = next(plain(model).parameters()).device
    return torch.cat([token_nll(model, batch.to(device), last=last).cpu() for batch in text.split(batch_size)])


def perplexity_by_length(
    model: nn.Module,
    docs: Sequence[str],
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    *,
    max_tokens: int = 32768,
    tokens_per_batch: int = 4096,
) -> dict[int, Perplexity]:
    """Score windows of several lengths out of the same documents.

    Args:
        model: a causal language model. docs: held-out text. tokenizer: the model's.
        lengths: tokens of a window.
        max_tokens: of each length.
        tokens_per_batch: windows are batched up to this many tokens.

    Returns:
        length -> score. A length that no document has raises InputError.
    """
    found = {length: windows(docs, tokenizer, length, max_tokens=max_tokens) for length in lengths}
    return {n: perplexity(model, text, batch_size=max(1, tokens_per_batch // n)) for n, text in found.items()}


def _paired(per_window: Tensor, draws: int, seed: int) -> Tensor:
    """Return the means of `draws` resamples of the windows: [draws] for [N], [draws, M] for [N, M]."""
    count = len(per_window)
    pick = torch.randint(count, (draws, count), generator=generator(seed))
    return per_window[pick].mean(1)


def _interval(drawn: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(drawn.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def bootstrap_ratio(
    student: Perplexity, teacher: Perplexity, *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the ratio of two perplexities and its 95 % interval, by a paired bootstrap over windows.

    Raises:
        InputError: the two were not scored on the same windows.

    Example:
        >>> student = Perplexity(torch.tensor([11.0, 21.0]).double(), 10)
        >>> teacher = Perplexity(torch.tensor([10.0, 20.0]).double(), 10)
        >>> [round(x, 4) for x in bootstrap_ratio(student, teacher)]  # the same gain in every window: no doubt
        [1.1052, 1.1052, 1.1052]
    """
    if student.per_window.shape != teacher.per_window.shape or student.scored != teacher.scored:
        raise InputError(
            f"student and teacher were scored on {len(student.per_window)} and {len(teacher.per_window)} windows "
            f"of {student.scored} and {teacher.scored} tokens; score both on the same ones"
        )
    gap = (student.per_window - teacher.per_window) / student.scored
    low, high = _interval(_paired(gap, draws, seed).exp())
    return math.exp(min(float(gap.mean()), 700.0)), low, high


@dataclass(frozen=True)
class ContextGain:
    """What reading more of the text before helps to predict its end.

    Args:
        short: score of the last tokens with little context. long: of the same tokens with all of it.
    """

    short: Perplexity
    long: Perplexity

    @property
    def per_window(self) -> Tensor:
        """float64 [N], nats per token gained in each window."""
        return (self.short.per_window - self.long.per_window) / self.short.scored

    @property
    def gain(self) -> float:
        """Nats per token gained; positive when context helps."""
        return float(self.per_window.mean())


def context_gain(
    model: nn.Module, text: Tensor, *, tail: int = 512, short: int = 512, batch_size: int = 1
) -> ContextGain:
    """Score the same last tokens of windows with the whole window and with little of it before them.

    Args:
        model: a causal language model.
        text: int64 [N, T] windows.
        tail: tokens scored, the last ones.
        short: tokens of context in front of them in the short reading; the long one has T - tail.
        batch_size: windows in a batch.

    Raises:
        InputError: the windows are no longer than `tail + short`.
    """
    if text.shape[1] <= tail + short:
        raise InputError(f"windows have {text.shape[1]} tokens; expected more than tail + short = {tail + short}")
    if short < 1:
        raise InputError(f"short is {short}; expected at least 1 token of context")
    near = perplexity(model, text[:, -(tail + short) :], batch_size=batch_size, last=tail)
    return ContextGain(near, perplexity(model, text, batch_size=batch_size, last=tail))


def gain_kept(
    student: ContextGain, teacher: ContextGain, *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Return which share of the teacher's gain from context the student has, and its 95 % interval (paired).

    All are nan where context gains the teacher nothing at all.
    """
    if student.per_window.shape != teacher.per_window.shape:
        raise InputError("student and teacher were scored on different windows; score both on the same ones")
    both = torch.stack([student.per_window, teacher.per_window], dim=1)
    drawn = _paired(both, draws, seed)
    low, high = _interval(drawn[:, 0] / drawn[:, 1])
    return (student.gain / teacher.gain if teacher.gain else math.nan), low, high
