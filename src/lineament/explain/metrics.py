"""What is measured of an output when parts of a model are changed."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.explain.places import run
from lineament.explain.recording import check_mode
from lineament.explain.targets import scores_of


@dataclass(frozen=True, eq=False)
class LogitDifference:
    """The answer's logit less the distractor's, a number per row; of logits, since after a softmax it outweighs all.

    It knows batches that are repeated, as exact methods repeat them, and can be cut into rows.

    Args:
        answer, distractor: token numbers [B], or [B, N] of several with -1 for none, which count by their mean.
        at: [B], where along the output's positions the answer is read; the last one if None.
        nothing, whole: [B], values that shall become 0 and 1; see `between`.

    Raises:
        InputError: answers and distractors of unequal numbers of rows, or a token that is both in a row.

    Example:
        >>> metric = LogitDifference(torch.tensor([1]), torch.tensor([0]))
        >>> metric(torch.tensor([[[0.0, 0.0], [1.0, 3.0]]]))
        tensor([2.])
    """

    answer: Tensor
    distractor: Tensor
    at: Tensor | None = None
    nothing: Tensor | None = None
    whole: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.answer) != len(self.distractor):
            raise InputError(
                f"{len(self.answer)} answers and {len(self.distractor)} distractors; expected a pair a row"
            )
        answers, distractors = (x if x.dim() == 2 else x[:, None] for x in (self.answer, self.distractor))
        if bool(((answers[:, :, None] == distractors[:, None]) & (answers >= 0)[:, :, None]).any()):
            raise InputError("an answer is its own distractor; nothing could tell them apart")

    def __call__(self, output: Any) -> Tensor:
        """Return the difference, [B] or [copies * B]."""
        logits, rows = scores_of(output), len(self.answer)
        if logits.dim() != 3 or len(logits) % rows:
            raise InputError(f"a metric of {rows} rows was given logits {list(logits.shape)}")
        copies = len(logits) // rows
        at = self.at if self.at is not None else torch.full((rows,), logits.shape[1] - 1)
        read = logits[torch.arange(len(logits)), at.repeat(copies)]
        found = _mean_at(read, self.answer) - _mean_at(read, self.distractor)
        if self.nothing is None or self.whole is None:
            return found
        nothing, whole = (x.repeat(copies).to(found) for x in (self.nothing, self.whole))
        return (found - nothing) / (whole - nothing)

    def rows(self, start: int, stop: int) -> "LogitDifference":
        """Return the metric of some rows."""
        some = (None if x is None else x[start:stop] for x in (self.at, self.nothing, self.whole))
        return LogitDifference(self.answer[start:stop], self.distractor[start:stop], *some)

    def between(self, model: nn.Module, clean: Mapping[str, Any], corrupt: Mapping[str, Any]) -> "LogitDifference":
        """Return the same metric as a share of the way from the corrupt run, 0, to the clean one, 1, row by row.

        Raises:
            InputError: a row whose two runs do not differ, or a model that would drop out.
        """
        check_mode(model)
        plain = replace(self, nothing=None, whole=None)
        with torch.no_grad():
            whole, nothing = (plain(run(model, inputs)) for inputs in (clean, corrupt))
        same = ((whole - nothing).abs() < 1e-6).nonzero().flatten().tolist()
        if same:
            raise InputError(f"in row {same[0]} clean and corrupt run give the same difference, so there is no share")
        return replace(plain, nothing=nothing, whole=whole)


def _mean_at(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean logit [copies * B] of each row's tokens."""
    ids = (ids if ids.dim() == 2 else ids[:, None]).to(logits.device)
    ids = ids.repeat(len(logits) // len(ids), 1)
    there = ids >= 0
    return (logits.gather(1, ids.clamp_min(0)) * there).sum(1) / there.sum(1)
