"""Tiny algorithms as graphs of variables, run with some of their variables set: what a network is compared with.

An interchange intervention takes the value of a variable from another input (its source) and lets the rest follow from
the base input (Geiger et al. 2021, arXiv:2106.02997).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lineament._base.errors import InputError, near_miss
from lineament._base.seeds import generator

Function = tuple[Sequence[str], Callable[..., Tensor]]
"""Parents, and the function of their values (batched, one row per example)."""

CANDIDATES = 8  # drawn for each intervention that must or must not change the output
MASKS = 16  # variables up to which every subset has a number


@dataclass(frozen=True)
class Algorithm:
    """Variables, parents and functions.

    Args:
        name: for tables.
        inputs: the variables that are given.
        functions: variable -> (parents, function), in any order.
        output: the variable that answers: class numbers [N], int64.
        aligned: the variables to look for in a network; all but the output if none is named.

    Raises:
        InputError: a cycle, an unknown parent, an input that has a function, or an unknown output.

    Example:
        >>> both = Algorithm("and", ("a", "b"), {"out": (("a", "b"), lambda a, b: (a & b).long())}, "out")
        >>> both.run({"a": torch.tensor([True]), "b": torch.tensor([True])})["out"].tolist()
        [1]
    """

    name: str
    inputs: tuple[str, ...]
    functions: Mapping[str, Function]
    output: str
    aligned: tuple[str, ...] = ()
    order: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        twice = set(self.inputs) & set(self.functions)
        known = {*self.inputs, *self.functions}
        if twice:
            raise InputError(f"{self.name}: {sorted(twice)[0]!r} is an input and has a function; it can't be both")
        aligned = tuple(self.aligned) or tuple(v for v in self.functions if v != self.output)
        asked = [(f"parent of {v!r}", p) for v, (parents, _) in self.functions.items() for p in parents]
        for what, name in [*asked, *(("variable to align", v) for v in aligned)]:
            if name not in known or (what == "variable to align" and name in self.inputs):
                raise InputError(f"{self.name}: {name!r} is no {what}.{near_miss(name, self.functions)}")
        if self.output not in self.functions:
            raise InputError(f"{self.name}: the output {self.output!r} has no function; functions: "
                             f"{', '.join(self.functions) or 'none'}")  # fmt: skip
        object.__setattr__(self, "aligned", aligned)
        object.__setattr__(self, "order", self._order())

    def _order(self) -> tuple[str, ...]:
        """Return the variables, parents first."""
        done, left = list(self.inputs), list(self.functions)
        while left:
            ready = [v for v in left if all(p in done for p in self.functions[v][0])]
            if not ready:
                raise InputError(f"{self.name}: the graph has a cycle through {', '.join(left)}; a variable can't "
                                 "depend on itself")  # fmt: skip
            done, left = done + ready, [v for v in left if v not in ready]
        return tuple(done[len(self.inputs) :])

    def run(
        self, values: Mapping[str, Tensor], *, fixed: Mapping[str, tuple[Tensor, Tensor]] | None = None
    ) -> dict[str, Tensor]:
        """Return the value of every variable.

        Args:
            values: of the inputs, [N, ...] each.
            fixed: variable -> (rows where it is set [N] bool, the values it is set to [N, ...]); what depends on it
                follows.

        Raises:
            InputError: an input is missing.
        """
        missing = [v for v in self.inputs if v not in values]
        if missing:
            raise InputError(f"{self.name} needs the inputs {', '.join(self.inputs)}; {missing[0]!r} is missing")
        found = {v: values[v] for v in self.inputs}
        for v in self.order:
            parents, function = self.functions[v]
            value = function(*(found[p] for p in parents))
            if fixed and v in fixed:
                rows, new = fixed[v]
                value = torch.where(rows.view(-1, *[1] * (value.dim() - 1)), new, value)
            found[v] = value
        return found


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs of a network beside those of an algorithm.

    Args:
        inputs: of the model's forward by name, or a lone tensor; a row per example.
        values: of the algorithm's inputs, by name.
        positions: [N], the token at which the model is read and changed; the last (unmasked) one if None. Of no meaning
            for models without a token axis.
        choices: [N, C] class numbers of the model that may answer; the algorithm's output counts among them. All, in
            order, if None.
        partners: [N], for each row another that half of its sources are. Where a variable is compared with a value
            that hardly ever comes up again by chance (a vector), equal ones have to be offered.

    Raises:
        InputError: unequal numbers of rows.
    """

    inputs: Mapping[str, Tensor] | Tensor
    values: Mapping[str, Tensor]
    positions: Tensor | None = None
    choices: Tensor | None = None
    partners: Tensor | None = None

    def __post_init__(self) -> None:
        inputs = {"the input": self.inputs} if isinstance(self.inputs, Tensor) else self.inputs
        counts = {name: len(x) for name, x in [*inputs.items(), *self.values.items()]}
        others = (("positions", self.positions), ("choices", self.choices), ("partners", self.partners))
        counts |= {name: len(x) for name, x in others if x is not None}
        if len(set(counts.values())) != 1:
            raise InputError(f"examples have a row each in every tensor; given {counts}")
        if not len(self):
            raise InputError("there is no example")

    def __len__(self) -> int:
        return len(self.inputs if isinstance(self.inputs, Tensor) else next(iter(self.inputs.values())))


@dataclass(frozen=True, eq=False)
class Interventions:
    """Which rows of some examples are base and sources, and what the algorithm answers.

    Attributes:
        base: [N]. sources: [N, V], one per aligned variable. mask: [N, V] bool, the variables that are set.
        labels: [N], the algorithm's output under the intervention. before: [N], without it.
    """

    base: Tensor
    sources: Tensor
    mask: Tensor
    labels: Tensor
    before: Tensor

    @property
    def chance(self) -> float:
        """What can be had without looking: the commonest answer's share, or that of answers that stay as they were."""
        commonest = self.labels.bincount().max().item() / len(self.labels)
        return max(commonest, (self.labels == self.before).float().mean().item())


def counterfactual(
    algorithm: Algorithm, examples: Examples, base: Tensor, sources: Tensor, mask: Tensor
) -> Interventions:
    """Run an algorithm on base rows [N] with the masked variables [N, V] as they are on their source rows [N, V]."""
    natural = algorithm.run(examples.values)
    return _counterfactual(algorithm, examples, natural, base, sources, mask)


def _counterfactual(
    algorithm: Algorithm, examples: Examples, natural: Mapping[str, Tensor], base: Tensor, sources: Tensor, mask: Tensor
) -> Interventions:
    fixed = {v: (mask[:, j], natural[v][sources[:, j]]) for j, v in enumerate(algorithm.aligned)}
    labels = algorithm.run({v: examples.values[v][base] for v in algorithm.inputs}, fixed=fixed)[algorithm.output]
    return Interventions(base, sources, mask, labels.long(), natural[algorithm.output][base].long())


def interventions(
    algorithm: Algorithm, examples: Examples, *, changing: float | None = None
) -> Callable[[int, int], Interventions]:
    """Return (count, seed) -> interventions: base and sources drawn independently, any subset but the empty one.

    Half of the sources are the base's partner where examples have partners.

    Args:
        changing: share of interventions that change the algorithm's output; as it comes if None.

    Raises:
        InputError: the algorithm has no variable to align, or an input of it is missing.
    """
    variables = algorithm.aligned
    if not 1 <= len(variables) <= MASKS:
        raise InputError(f"{algorithm.name} has {len(variables)} variables to align; expected 1 to {MASKS}")
    if changing is not None and not 0 <= changing <= 1:
        raise InputError(f"changing is {changing}; expected a share from 0 to 1")
    natural = algorithm.run(examples.values)

    def plain(count: int, random: torch.Generator) -> Interventions:
        rows = torch.randint(len(examples), (count, 1 + len(variables)), generator=random)
        if examples.partners is not None:
            near = torch.randint(2, (count, len(variables)), generator=random) == 1
            rows[:, 1:] = torch.where(near, examples.partners[rows[:, :1]], rows[:, 1:])
        subset = torch.randint(1, 2 ** len(variables), (count, 1), generator=random)
        mask = (subset >> torch.arange(len(variables))) % 2 == 1
        return _counterfactual(algorithm, examples, natural, rows[:, 0], rows[:, 1:], mask)

    def draw(count: int, seed: int) -> Interventions:
        random = generator(seed)
        if changing is None:
            return plain(count, random)
        many, wanted = plain(count * CANDIDATES, random), round(count * changing)
        differs = many.labels != many.before
        kept = torch.cat([differs.nonzero()[:wanted, 0], (~differs).nonzero()[: count - wanted, 0]])
        if len(kept) < count:
            raise InputError(
                f"{algorithm.name}: {differs.float().mean():.1%} of interventions change the output; a share of "
                f"{changing:g} can't be drawn"
            )
        kept = kept[torch.randperm(count, generator=random)]
        return Interventions(many.base[kept], many.sources[kept], many.mask[kept], many.labels[kept], many.before[kept])

    return draw
