"""Where relevance ends: one column per kind of place, each summed from its own formula."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

COLUMNS = {
    "inputs": "what the inputs asked about received",
    "parameters": "learned tensors that stand for themselves: position embeddings, class tokens, added parameters",
    "biases": "of linear maps, convolutions and norms",
    "constants": "numbers and buffers added, and places filled with a constant",
    "epsilon": "taken by the stabiliser of a division",
    "stopped": "where a rule ends the flow: a constant attention pattern, a concept not chosen",
    "remainder": "what a tangent leaves of its function: softmax, exp, sigmoid, gradients of products",
}


@dataclass
class Ledger:
    """The balance of one run.

    Attributes:
        root: the relevance that was sent out.
        columns: column -> what ended there, in the unit of the root.
        inputs_absolute: the sum of |R| over the inputs; an error means little where it is far above the root.
        open: operators that were let through without a formula for what they lose; the balance then says nothing.
    """

    root: float = 0.0
    columns: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COLUMNS, 0.0))
    inputs_absolute: float = 0.0
    open: list[str] = field(default_factory=list)
    _pending: dict[str, list[Tensor]] = field(default_factory=dict, repr=False)

    def absorb(self, column: str, relevance: Tensor) -> None:
        """Add what ends here; summed in float64."""
        self._pending.setdefault(column, []).append(relevance.sum(dtype=torch.float64))

    def close(self) -> None:
        """Add up; called once at the end, so that a GPU is not waited for at every operator."""
        for column, parts in self._pending.items():
            total = float(torch.stack([part.reshape(()) for part in parts]).sum())
            self.columns[column] = self.columns.get(column, 0.0) + total
        self._pending.clear()

    @property
    def accounted(self) -> float:
        """The sum of all columns."""
        return sum(self.columns.values())

    @property
    def unaccounted(self) -> float:
        """What is missing or too much, as a share of the root."""
        return abs(self.root - self.accounted) / max(abs(self.root), 1e-300)

    @property
    def unaccounted_of_inputs(self) -> float:
        """The same as a share of the sum of |R| at the inputs, for roots near 0."""
        return abs(self.root - self.accounted) / max(self.inputs_absolute, 1e-300)

    def rows(self) -> list[dict[str, object]]:
        """Return the columns as rows of a table."""
        whole = self.root or 1.0
        rows: list[dict[str, object]] = [
            {"where": name, "relevance": value, "share": value / whole, "what": COLUMNS[name]}
            for name, value in self.columns.items()
        ]
        return [*rows, {"where": "unaccounted", "relevance": self.root - self.accounted, "share": self.unaccounted}]
