"""How close a student's predictions are to its teacher's: divergence and agreement, next token by next token."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lineament._base.backends import widest
from lineament._base.errors import InputError
from lineament.tasks.predictions import CHUNK, hidden_states, logits_of, plain


@dataclass(frozen=True)
class Agreement:
    """Means over tokens.

    Args:
        kl: KL(teacher || student) in nats per token.
        top1: share of tokens at which both find the same next token most likely.
        tokens: predictions compared.
        per_window: float64 [N], KL of each window, nats per token.
    """

    kl: float
    top1: float
    tokens: int
    per_window: Tensor


@torch.no_grad()
def agreement(student: nn.Module, teacher: nn.Module, text: Tensor, *, last: int | None = None) -> Agreement:
    """Compare next-token predictions on windows, at every position or at the last ones.

    Args:
        student, teacher: causal language models over one vocabulary.
        text: int64 [N, T] windows.
        last: compare the predictions of the last so many tokens; None for all but the first token's.

    Raises:
        InputError: the vocabularies differ, or more predictions are asked for than a window has.
    """
    if text.dim() != 2 or len(text) == 0 or text.shape[1] < 2:
        raise InputError(f"windows have shape {list(text.shape)}; expected [N, T] with T >= 2 and at least one window")
    if last is not None and not 1 <= last < text.shape[1]:
        raise InputError(f"the last {last} of {text.shape[1]} tokens were asked for; expected 1 to {text.shape[1] - 1}")
    first = 0 if last is None else text.shape[1] - last - 1
    sums, same, count = [], 0, 0
    for window in text.split(1):
        ours, theirs = (_hidden(model, window)[:, first:-1] for model in (student, teacher))
        total = 0.0
        for at in range(0, ours.shape[1], CHUNK):
            part = slice(at, at + CHUNK)
            divergence, agreed = _compare(logits_of(student, ours[:, part]), logits_of(teacher, theirs[:, part]))
            total, same = total + divergence, same + agreed
        sums.append(total / ours.shape[1])
        count += ours.shape[1]
    per_window = torch.tensor(sums, dtype=torch.float64)
    return Agreement(float(per_window.mean()), same / count, count, per_window)


def _hidden(model: nn.Module, window: Tensor) -> Tensor:
    return hidden_states(model, window.to(next(plain(model).parameters()).device))


def _compare(ours: Tensor, theirs: Tensor) -> tuple[float, int]:
    if ours.shape[-1] != theirs.shape[-1]:
        raise InputError(
            f"the student predicts {ours.shape[-1]} tokens and the teacher {theirs.shape[-1]}; "
            "both must share one vocabulary"
        )
    student, teacher = ours.log_softmax(-1), theirs.to(ours.device).log_softmax(-1)
    divergence = (teacher.exp() * (teacher - student)).sum(dtype=widest(ours.device))
    return float(divergence), int((student.argmax(-1) == teacher.argmax(-1)).sum())
