"""One conversion: what is asked for and what it works on; every stage is given this."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lineament.convert.inspect import ModelInfo
from lineament.convert.plan import Plan
from lineament.convert.precision import resolve
from lineament.convert.processes import Sharding
from lineament.convert.prompts import MakePrompts, prompt_maker
from lineament.convert.text import Corpus, Documents, flat, make_corpus, require_length


@dataclass(frozen=True, kw_only=True)
class Job:
    """One conversion: the plan and everything it works on.

    Args:
        documents: {"train", "place", "test": {name: texts}}. name: the teacher's name as the user gave it.
        card: text of the teacher's own model card, if it has one. sharding: of both models while the student is
            distilled; None leaves them whole.
    """

    plan: Plan
    info: ModelInfo
    teacher: nn.Module
    tokenizer: Any
    documents: Documents
    name: str
    card: str = ""
    sharding: Sharding | None = None
    _corpora: dict[str, Corpus] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the teacher is."""
        return next(self.teacher.parameters()).device

    @property
    def precision(self) -> str:
        """The plan's precision with "auto" decided."""
        return resolve(self.plan.precision, self.device)

    def corpus(self, split: str) -> Corpus:
        """Return the tokenised documents of a split."""
        if split not in self._corpora:
            self._corpora[split] = make_corpus(self.documents[split], self.tokenizer, self.plan.seed)
        return self._corpora[split]

    @property
    def reach(self) -> int:
        """How far training positions go: as the plan says, within what the teacher was made for."""
        return min(self.plan.reach, self.info.positions or self.plan.reach)

    def prompts(self, split: str) -> MakePrompts:
        """Return the maker of retrieval prompts of a split ("train" or "place")."""
        return prompt_maker(
            self.tokenizer, flat(self.documents[split]), split, window=self.plan.window, seed=self.plan.seed
        )

    def require_text(self) -> None:
        """Check that the text is long enough for every batch of the plan."""
        plan = self.plan
        lengths = [*plan.transfer_lengths] * bool(plan.transfer_steps)
        lengths += [*plan.distil_lengths] * (plan.distil != "none")
        lengths += [*plan.extend_lengths] * bool(plan.extend_steps)
        if lengths:
            require_length(self.corpus("train"), max(lengths))
