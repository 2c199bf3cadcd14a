"""`check_rule`: the relevance rule of one operator, held to laws that any rule must keep."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import unknown
from lineament._base.seeds import generator, seeded
from lineament.testing.compare import same

SETS = ("attnlrp", "gamma", "dynamic", "relp", "gradient-x-input")
"""Rule sets tried: coefficients arrive, relevance arrives, shares by size, and both tangents."""


class _Around(nn.Module):
    """The operator between two linear layers, so that messages of both kinds reach it and leave it."""

    def __init__(self, op: Callable[[Tensor], Tensor], x: Tensor) -> None:
        super().__init__()
        self.op = op
        with seeded(0):
            self.before = nn.Linear(x.shape[-1], x.shape[-1], dtype=torch.float64)
            nn.init.eye_(self.before.weight)
            y = op(self.before(x))
            self.after = nn.Linear(y[0].numel(), 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.op(self.before(x)).flatten(1))


@dataclass(frozen=True)
class _Trial:
    name: str
    model: _Around
    x: Tensor

    def explain(self, rules: str, x: Tensor | None = None, model: nn.Module | None = None) -> Any:
        from lineament.explain import relevance

        return relevance(model or self.model, {"x": self.x if x is None else x}, target=1, rules=rules, at="before")


def check_rule(
    name: str, op: Callable[[Tensor], Tensor], shape: tuple[int, ...], *, laws: Iterable[str] | None = None,
    positive: bool = False,
) -> list[str]:  # fmt: skip
    """Hold the rule of an operator to its laws.

    Laws: `covered` (the node is in the graph and has a rule of its own), `conserves` (every ledger closes to 1e-9, with
    messages of both kinds), `single` (to 1e-4 in float32), `gradient` (gradient x input equals autograd's), `rows` (two
    rows together are two rows alone), `pure` (a second run gives the same bits and the input is as it was).

    Args:
        name: the autograd node, "Gelu" say.
        op: [B, ...] -> [B, ...], using it.
        shape: of its input, with the batch first.
        laws: some of `RULE_LAWS`; all if None.
        positive: give it positive numbers.

    Returns:
        The laws that were checked.

    Raises:
        AssertionError: a law is broken; the message says which and by how much.

    Example:
        >>> check_rule("Gelu", torch.nn.functional.gelu, (2, 5), laws=["covered", "conserves"])
        ['covered', 'conserves']
    """
    wanted = list(RULE_LAWS if laws is None else laws)
    for law in wanted:
        if law not in RULE_LAWS:
            raise unknown("law", law, RULE_LAWS)
    x = torch.randn(*shape, generator=generator(1), dtype=torch.float64)
    x = x.abs() + 1.5 if positive else x
    trial = _Trial(name, _Around(op, x), x)
    for law in wanted:
        RULE_LAWS[law](trial)
    return wanted


def _covered(trial: _Trial) -> None:
    from lineament.explain import coverage

    rows = {row["operator"]: row for row in coverage(trial.model, {"x": trial.x}, target=1)}
    if trial.name not in rows:
        raise AssertionError(f"covered: the operator makes {', '.join(rows)}, no {trial.name}")
    if not all(row["covered"] for row in rows.values()):
        raise AssertionError(f"covered: no rule for {[name for name, row in rows.items() if not row['covered']]}")


def _conserves(
    trial: _Trial, dtype: torch.dtype = torch.float64, most: float = 1e-9, sets: Iterable[str] = SETS
) -> None:
    model = trial.model.to(dtype)
    try:
        for rules in sets:
            found = trial.explain(rules, trial.x.to(dtype), model)
            size = max(abs(found.ledger.root), found.ledger.inputs_absolute)
            error = abs(found.ledger.root - found.ledger.accounted) / size
            if not error <= most or found.ledger.open:
                raise AssertionError(f"conserves, {rules}, {dtype}: {error:.1e} of {found.ledger.columns} is missing")
    finally:
        trial.model.to(torch.float64)


def _single(trial: _Trial) -> None:
    _conserves(trial, torch.float32, 1e-4, SETS[:2])


def _gradient(trial: _Trial) -> None:
    x = trial.x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(trial.model(x)[:, 1].sum(), x)
    same(trial.explain("gradient-x-input").inputs["x"], slope * trial.x, 1e-9, "gradient: gradient x input")


def _rows(trial: _Trial) -> None:
    for rules in SETS[:2]:
        both = trial.explain(rules).inputs["x"]
        alone = torch.cat([trial.explain(rules, row[None]).inputs["x"] for row in trial.x])
        same(both, alone, 1e-7, f"rows, {rules}")


def _pure(trial: _Trial) -> None:
    before = trial.x.clone()
    first, second = (trial.explain("attnlrp").inputs["x"] for _ in range(2))
    same(first, second, 0.0, "pure: a second run")
    same(trial.x, before, 0.0, "pure: the input afterwards")


RULE_LAWS: dict[str, Callable[[_Trial], None]] = {
    "covered": _covered,
    "conserves": _conserves,
    "single": _single,
    "gradient": _gradient,
    "rows": _rows,
    "pure": _pure,
}
"""The laws of `check_rule`, by name."""
