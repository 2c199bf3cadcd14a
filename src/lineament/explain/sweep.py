"""The sweep: relevance goes from the root to the leaves, one rule per operator, each node once.

A message at a tensor z has two parts, and rules take whichever suits them: relevance R, or coefficients rho that stand
for R = z rho. Linear operators pass coefficients on by their transpose, which divides by nothing and needs no values;
R becomes coefficients by R / z only where a rule wants that.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.explain.ledger import Ledger
from lineament.explain.linear import Epsilon, LinearRule, divide, times, wide
from lineament.explain.operators import OPERATORS, is_linear
from lineament.explain.recording import Slot
from lineament.explain.rules import Rules
from lineament.explain.structure import absorbed_by
from lineament.explain.tape import LEAF, Promises, Tape, Values, unreadable

OperatorRule = Callable[["Step"], None]


@dataclass
class Message:
    """What arrived at one tensor: relevance, coefficients, or both (they add up)."""

    rel: Tensor | None = None
    coef: Tensor | None = None

    def add(self, rel: Tensor | None, coef: Tensor | None) -> None:
        """Sum up; what came before may be seen elsewhere, so nothing is written in place."""
        if rel is not None:
            self.rel = rel if self.rel is None else self.rel + rel
        if coef is not None:
            self.coef = coef if self.coef is None else self.coef + coef


@dataclass
class Plan:
    """Which rule each node gets, decided before the first message is sent."""

    rules: list[Rules]
    operators: list[OperatorRule | None]
    merged: dict[int, int]
    """Product -> the bias or batch norm that is one linear map with it, and back."""
    first: int | None

    def linear_rule(self, index: int) -> LinearRule:
        """Return the rule of a linear map."""
        first = self.rules[index].first
        return first if first is not None and index == self.first else self.rules[index].linear


def plan(tape: Tape, rules: Rules, model: nn.Module) -> Plan:
    """Choose a rule for every node that relevance can reach.

    Raises:
        InputError: operators without a rule, each with the modules it came from.
    """
    own = rules.by_module(model)
    chosen = [_nearest(own, module, rules) for module in tape.modules]
    missing: Counter[tuple[str, str]] = Counter()
    operators: list[OperatorRule | None] = []
    for index, name in enumerate(tape.names):
        rule = chosen[index].operators.get(name) or OPERATORS.get(name)
        needed = tape.live[index] and index not in tape.leaves and name != LEAF
        if needed and rule is None and chosen[index].unknown == "raise":
            missing[name, tape.modules[index]] += 1
        operators.append(rule)
    if missing:
        listed = "; ".join(f"{n} x {name} in {module or 'the model'}" for (name, module), n in missing.most_common(5))
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise InputError(
            f"no rule for {listed}{more}. Give one, Rules(operators={{{next(iter(missing))[0]!r}: my_rule}}), or "
            "unknown='vjp' to let the gradient through with an open ledger"
        )
    linears = [i for i in range(len(tape.names)) if is_linear(tape, i)]
    first = max(linears, default=None) if rules.first is not None else None
    if first is not None:
        chosen[first] = replace(chosen[first], first=rules.first)
    found = Plan(chosen, operators, {}, first)
    for index in linears:
        user = absorbed_by(tape, index)
        folds = user is not None and (tape.names[user] == "Add" or chosen[index].batchnorm == "fold")
        if user is not None and folds and found.linear_rule(index) != Epsilon():
            found.merged[index], found.merged[user] = user, index
    return found


def _nearest(own: Mapping[str, Rules], module: str, rules: Rules) -> Rules:
    while own:
        if module in own:
            return own[module]
        if not module:
            break
        module = module.rpartition(".")[0]
    return rules


@dataclass
class Sweep:
    """One run down a tape."""

    tape: Tape
    plan: Plan
    counting: bool = True
    """Keep the ledger; without, values that only it needs are not computed."""
    ledger: Ledger = field(default_factory=Ledger)
    tapped: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    """(node, output) -> names of the taps there."""
    channels: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    coefficients_only: bool = False
    """At taps and inputs, give coefficients rather than relevance (the ledger then says nothing)."""

    def __post_init__(self) -> None:
        self.values = Values(self.tape)
        self.inbox: dict[int, dict[int, Message]] = {}
        self.folded: dict[int, tuple[Tensor | None, Tensor]] = {}  # product -> scale and shift of what follows it
        self.at: dict[str, list[Tensor]] = {}
        self.inputs: dict[str, list[Tensor]] = {}

    @property
    def promises(self) -> Promises:
        """What had to be looked up below."""
        return self.values.promises

    def seed(self, index: int, k: int, coef: Tensor) -> None:
        """Put the first message at an output."""
        self.inbox.setdefault(index, {}).setdefault(k, Message()).add(None, coef)

    def run(self) -> None:
        """Send everything down; nodes and values are let go as the sweep passes them."""
        with torch.no_grad():
            for index in range(len(self.tape.nodes)):
                messages = self.inbox.pop(index, None)
                if messages:
                    self.visit(Step(self, index, messages))
                self.release(index)
        self.ledger.close()

    def release(self, index: int) -> None:
        """Let a node go that no message will reach any more."""
        self.values.release(index)
        self.folded.pop(index, None)

    def visit(self, step: "Step") -> None:
        """Hand on what arrived at a node."""
        index, tape = step.index, self.tape
        for k in list(step.messages):
            self._tap(step, k)
        if index in tape.leaves:
            found = step.coef(0) if self.coefficients_only else step.rel(0)
            self.inputs.setdefault(tape.leaves[index], []).append(found)
            self.ledger.absorb("inputs", found)
            self.ledger.absorb("inputs_absolute", found.abs())
            return
        rule = self.plan.operators[index]
        if rule is None:
            self.ledger.open.append(tape.of(index))
            step.pass_on()
        else:
            rule(step)

    def _tap(self, step: "Step", k: int) -> None:
        """Keep what arrived at a tap, and stop the channels that were not chosen."""
        place = (step.index, k)
        chosen = self.channels.get(place)
        if chosen is not None:
            rel = step.rel(k)
            axis = 1 if rel.dim() > 3 else rel.dim() - 1
            kept = torch.zeros_like(rel).index_copy(axis, (at := torch.tensor(chosen, device=rel.device)),
                                                    rel.index_select(axis, at))  # fmt: skip
            self.ledger.absorb("stopped", rel - kept)
            step.messages[k] = Message(rel=kept)
        for name in self.tapped.get(place, ()):
            self.at.setdefault(name, []).append(step.coef(k) if self.coefficients_only else step.rel(k))


@dataclass
class Step:
    """One node with its messages: what a rule sees and sends.

    An own rule is a function of this: read `coef()` or `rel()`, `value(edge)`, `result()`, then `send(edge, ...)` and
    `absorb(column, ...)` what goes nowhere.
    """

    sweep: Sweep
    index: int
    messages: dict[int, Message]

    @property
    def tape(self) -> Tape:
        """The graph."""
        return self.sweep.tape

    @property
    def name(self) -> str:
        """The node's name, "Mul" say."""
        return self.tape.names[self.index]

    @property
    def rules(self) -> Rules:
        """The rule set of the module this operator is in."""
        return self.sweep.plan.rules[self.index]

    @property
    def ledger(self) -> Ledger:
        """The run's ledger."""
        return self.sweep.ledger

    @property
    def edges(self) -> list[tuple[int, int]]:
        """(child, its output) per input."""
        return self.tape.edges[self.index]

    @property
    def counting(self) -> bool:
        """Whether a ledger is kept."""
        return self.sweep.counting

    def live(self) -> list[int]:
        """Return the edges that lead to an input of the model."""
        return [i for i, (child, _) in enumerate(self.edges) if child >= 0 and self.tape.live[child]]

    def value(self, position: int) -> Tensor:
        """Return the input of an edge, in float32 or wider."""
        child, k = self.edges[position]
        assert child >= 0, f"edge {position} of {self.tape.of(self.index)} is a constant; ask for the operand"
        return wide(self.sweep.values.get(child, k, asker=self.index))

    def result(self, k: int = 0) -> Tensor:
        """Return an output, in float32 or wider."""
        return wide(self.sweep.values.get(self.index, k))

    def saved(self, name: str) -> Any:
        """Return what the node saved under a name."""
        return self.sweep.values.read(self.index, f"_saved_{name}")

    def shape(self, position: int) -> torch.Size:
        """Return the shape of an edge's tensor."""
        child, k = self.edges[position]
        return self.tape.shapes[child][k]

    def argument(self, name: str, default: Any = None) -> Any:
        """Return an argument of the operator by its schema's name; a tracked tensor's value."""
        call = self.tape.calls[self.index]
        found = default if call is None else call.argument(name, default)
        return self.value(self.tracked()[found.index]) if isinstance(found, Slot) else found

    def operand(self, position: int) -> Any:
        """Return an operand by its position among the operator's arguments, tracked or not."""
        call = self.tape.calls[self.index]
        if call is None:
            raise InputError(f"the operands of {self.tape.of(self.index)} were not seen")
        found = call.args[position]
        found = self.value(self.tracked()[found.index]) if isinstance(found, Slot) else found
        return wide(found) if isinstance(found, Tensor) else found

    def tracked(self) -> list[int]:
        """Return the edges that lead anywhere, in the order of the call's slots."""
        return [i for i, (child, _) in enumerate(self.edges) if child >= 0]

    def coef(self, k: int = 0) -> Tensor:
        """Return the message as coefficients: rho, with R = z rho."""
        message = self.messages.get(k)
        if message is None:
            return torch.zeros(self.tape.shapes[self.index][k], device=self._device())
        if message.rel is None:
            assert message.coef is not None
            return message.coef
        t = divide(message.rel, self.result(k), self.ledger)
        return t if message.coef is None else message.coef + t

    def rel(self, k: int = 0) -> Tensor:
        """Return the message as relevance."""
        message = self.messages[k]
        if message.coef is None:
            assert message.rel is not None
            return message.rel
        found = times(self.result(k), message.coef)
        return found if message.rel is None else found + message.rel

    def send(self, position: int, *, rel: Tensor | None = None, coef: Tensor | None = None, bias: bool = False) -> None:
        """Pass a message to an edge; relevance of what no input lies under ends in the ledger."""
        child, k = self.edges[position]
        if child < 0:
            return
        shape = self.tape.shapes[child][k]
        rel, coef = (None if x is None else x.sum_to_size(shape) for x in (rel, coef))
        if self.tape.live[child]:
            self.sweep.inbox.setdefault(child, {}).setdefault(k, Message()).add(rel, coef)
        elif self.counting:
            if coef is not None:
                coef = times(self.value(position), coef)
            for part in (rel, coef):
                if part is not None:
                    self.absorb("biases" if bias or self._is_bias(child) else "parameters", part)

    def absorb(self, column: str, relevance: Tensor) -> None:
        """End relevance here."""
        self.ledger.absorb(column, relevance)

    def vjp(self, *grads: Tensor | None) -> list[Tensor | None]:
        """Apply the node's own transposed derivative to one message per output; broadcasting is undone."""
        node = self.tape.nodes[self.index]
        node = node if callable(node) else node.apply  # a Function written in Python
        try:
            found = node(*grads)
        except RuntimeError as error:
            half = self.half()
            if half is None or "type" not in str(error):
                raise unreadable(error, self.tape.of(self.index)) from error
            found = node(*(None if g is None else g.to(half) for g in grads))
        found = found if isinstance(found, tuple) else (found,)
        pairs = zip(found, self.edges, strict=False)
        return [
            None if g is None or child < 0 else wide(g).sum_to_size(self.tape.shapes[child][k])  # pyright: ignore[reportArgumentType]
            for g, (child, k) in pairs
        ]

    def half(self) -> torch.dtype | None:
        """Return the half-precision type this node computes in, if it does."""
        types = [meta.dtype for meta in self.tape.nodes[self.index]._input_metadata]
        return next((t for t in types if t in (torch.bfloat16, torch.float16)), None)

    def pass_on(self) -> None:
        """Hand both parts of the message on by the node's own transpose."""
        for part in ("rel", "coef"):
            given = [getattr(self.messages.get(k), part, None) for k in range(len(self.tape.shapes[self.index]))]
            if all(x is None for x in given):
                continue
            for position, found in enumerate(self.vjp(*given)):
                if found is not None:
                    self.send(position, **{part: found})  # pyright: ignore[reportArgumentType]

    def _is_bias(self, child: int) -> bool:
        return self.name == "Add" and self.tape.names[child] == LEAF and len(self.tape.shapes[child][0]) == 1

    def _device(self) -> torch.device:
        return self.tape.nodes[self.index]._input_metadata[0].device
