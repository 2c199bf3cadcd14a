"""A model as the affine map it is for one input: every operator's decisions are taken, the rest is replayed on probes.

Bottom up from the input, an operator passes a probe u on by an affine map Phi with Phi(x) = what it gave for x: linear
ones as they are, phi with phi(0) = 0 by the mask phi(x) / x, norms by the scale of x, attention by the pattern of x,
maxima by the places of x, gates a b by a(x) b(u) / 2 + a(u) b(x) / 2, anything else by its tangent. The operators'
kinds are those of the relevance engine's rules, and so are the islands, scales and patterns found in the graph.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lineament._base.errors import InputError
from lineament.explain import attention, norms, operators, products
from lineament.explain.operators import OPERATORS
from lineament.explain.products import NEAR_ZERO
from lineament.explain.structure import is_activation, is_scale, island
from lineament.explain.sweep import Step, Sweep

Place = tuple[int, int]
"""(node, output)."""

CHOICES = {"center": ("data", "probe"), "gate": ("half", "linear"), "offset": ("tangent", "mask")}
SELECTING = {
    "MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "Max", "Min", "Amax", "Amin", "Topk", "Sort",
    "Maximum", "Minimum", "Cummax", "Median", "Kthvalue",
}  # fmt: skip
"""Operators that choose among their inputs: places are decided by x."""
_DECIDED = {"Softmax", "SafeSoftmax", "Round", "Floor", "Ceil", "Trunc", "Sign", "Sgn"}


@dataclass(frozen=True)
class Part:
    """One operator's affine map: probes at `needs` -> its outputs."""

    needs: list[Place]
    run: Callable[..., Sequence[Any]]
    kind: str


@dataclass(frozen=True)
class Guards:
    """Masks phi(x) / x are ill-conditioned near 0, where the slope stands in for them.

    Attributes:
        guarded: how many elements the slope stood in for. elements: of how many.
        largest: the largest |mask|.
    """

    guarded: int = 0
    elements: int = 0
    largest: float = 0.0


@dataclass
class Node:
    """An operator as a rule sees it: the engine's `Step`, and which of its inputs carry a probe."""

    step: Step
    carried: Sequence[bool]
    choices: dict[str, str]
    guards: list[Guards] = field(default_factory=list)

    def probes(self) -> list[int]:
        """Return the edges that carry a probe."""
        return [i for i in self.step.live() if self.carried[self.step.edges[i][0]]]

    def apply(self, positions: Sequence[int]) -> Callable[..., tuple[Any, ...]]:
        """Return the operator as a function of some of its inputs, the others being as for x."""
        call, tracked = self.step.tape.calls[self.step.index], self.step.tracked()
        if call is None:
            raise InputError(f"{self.step.tape.of(self.step.index)} can't be replayed: its call was not seen")
        values = {i: self.step.value(i) for i in tracked if i not in positions}

        def run(*probes: Tensor) -> tuple[Any, ...]:
            given = values | dict(zip(positions, probes, strict=True))
            return call.apply([given[i] for i in tracked])

        return run

    def part(self, positions: Sequence[int], run: Callable[..., Sequence[Any]], kind: str) -> Part:
        """Return the part with its places."""
        return Part([self.step.edges[i] for i in positions], run, kind)


def linear(n: Node) -> Part:
    """As it is, in all inputs that carry a probe together."""
    positions = n.probes()
    return n.part(positions, n.apply(positions), "linear")


def selecting(n: Node) -> Part:
    """Take u where x was taken: the derivative, which is linear."""
    positions = n.probes()
    along = _derivative(n, positions)
    return n.part(positions, along, "selection")


def tangent(n: Node) -> Part:
    """f(x) + f'(x) (u - x)."""
    positions = n.probes()
    x, along = [n.step.value(i) for i in positions], _derivative(n, positions)
    with torch.no_grad():
        y = n.apply(positions)(*x)

    def run(*probes: Tensor) -> list[Any]:
        # masked scores are -inf in both
        moved = along(*(torch.where(each.isfinite(), u - each, 0.0) for u, each in zip(probes, x, strict=True)))
        return [a if b is None else a + b for a, b in zip(y, moved, strict=True)]

    return n.part(positions, run, "tangent")


def _derivative(n: Node, positions: Sequence[int]) -> Callable[..., list[Any]]:
    """Return the derivative at x; None for outputs that are whole numbers."""
    f, x = n.apply(positions), tuple(n.step.value(i) for i in positions)
    with torch.no_grad():
        floats = [isinstance(y, Tensor) and y.is_floating_point() for y in f(*x)]

    def along(*probes: Tensor) -> list[Any]:
        def smooth(*inputs: Tensor) -> tuple[Tensor, ...]:
            return tuple(y for y, real in zip(f(*inputs), floats, strict=True) if real)

        found = iter(torch.func.jvp(smooth, x, probes)[1])
        return [next(found) if real else None for real in floats]

    return along


def activation(n: Node) -> Part:
    """phi(x) / x u, near 0 phi'(0) u."""
    (position,) = n.probes()
    x = n.step.value(position)
    return n.part([position], _masked(n, x, lambda: _derivative(n, [position])(torch.ones_like(x))[0]), "mask")


def offset(n: Node) -> Part:
    """A function with f(0) != 0 by its tangent, or by the mask f(x) / x with the tangent near 0."""
    positions = n.probes()
    plain = len(positions) == 1 and list(n.step.shape(positions[0])) == list(n.step.result().shape)
    if n.choices["offset"] == "tangent" or not plain or n.step.name not in operators.SLOPES:
        return tangent(n)
    x, y, near = n.step.value(positions[0]), n.step.result(), tangent(n).run
    small = x.abs() < NEAR_ZERO
    mask = torch.where(small, 0.0, y / torch.where(small, 1.0, x))
    n.guards.append(_guards(small, mask))
    return n.part(positions, lambda u: [torch.where(small, near(u)[0], u * mask)], "mask")


def _masked(n: Node, x: Tensor, slope: Callable[[], Tensor]) -> Callable[..., list[Tensor]]:
    small = x.abs() < NEAR_ZERO
    mask = n.step.result() / torch.where(small, 1.0, x)
    if bool(small.any()):
        mask = torch.where(small, slope(), mask)
    n.guards.append(_guards(small, mask))
    return lambda u: [u * mask]


def _guards(small: Tensor, mask: Tensor) -> Guards:
    return Guards(int(small.sum()), small.numel(), float(mask.abs().max()) if mask.numel() else 0.0)


def power(n: Node) -> Part:
    """x^p: an activation for p > 0, else its tangent."""
    p = n.step.argument("exponent")
    return (activation if isinstance(p, int | float) and p > 0 else tangent)(n)


def product(n: Node) -> Part:
    """a b: linear in one; a function of one tensor is masked; a norm's scale is a constant; else a gate."""
    s, positions = n.step, n.probes()
    leaf = island(s.tape, s.index) if len(s.live()) == 2 else None
    if leaf is not None and n.carried[leaf[0]]:
        x = s.sweep.values.get(*leaf)
        return Part([leaf], _masked(n, x, lambda: products.slope_at_zero(s, leaf, x)), "mask")
    scale = [i for i in positions if is_scale(s.tape, s.edges[i][0])]
    if len(positions) == 2 and len(scale) == 1:
        positions = [1 - scale[0]]
    elif len(positions) == 2 and s.rules.gate == "linear":
        gates = [i for i in positions if is_activation(s.tape, s.edges[i][0])]
        positions = [1 - gates[0]] if len(gates) == 1 else positions
    if len(positions) == 2:
        return _quotient(n) if s.name == "Div" else bilinear(n, 0, 1)
    if s.name == "Div" and positions == [1]:
        return tangent(n)
    return n.part(positions, n.apply(positions), "scale" if scale else "linear")


def _quotient(n: Node) -> Part:
    """a / b as a gate a (1 / b), the reciprocal masked."""
    a, b = n.step.value(0), n.step.value(1)
    return n.part([0, 1], lambda u, w: [u / b / 2 + w * a / b**2 / 2], "gate")


def bilinear(n: Node, first: int, second: int) -> Part:
    """Half of op(a(x), b(u)) and half of op(a(u), b(x)); an added input goes with both."""
    positions = n.probes()
    sides = [[i for i in positions if i != other] for other in (second, first)]
    runs = [n.apply(side) for side in sides]

    def run(*probes: Tensor) -> list[Tensor]:
        given = dict(zip(positions, probes, strict=True))
        a, b = (f(*(given[i] for i in side))[0] for f, side in zip(runs, sides, strict=True))
        return [(a + b) / 2]

    return n.part(positions, run, "gate")


def matrix_product(n: Node) -> Part:
    """W u + b, or two factors that both carry a probe."""
    first, second = operators.OPERANDS[n.step.name]
    both = {first, second} <= set(n.probes())
    return bilinear(n, first, second) if both else linear(n)


def addcmul(n: Node) -> Part:
    """c + a b."""
    return bilinear(n, 1, 2) if {1, 2} <= set(n.probes()) else linear(n)


def glu(n: Node) -> Part:
    """a sigmoid(b): half of each, the sigmoid by its tangent."""
    dim = n.step.argument("dim", -1)
    a, b = n.step.value(0).chunk(2, dim)
    gate = b.sigmoid()
    slope = gate * (1 - gate)

    def run(u: Tensor) -> list[Tensor]:
        v, w = u.chunk(2, dim)
        return [(v * gate + a * (gate + slope * (w - b))) / 2]

    return n.part([0], run, "gate")


def solve(n: Node) -> Part:
    """A^-1 B with A as for x, where B carries a probe."""
    positions = [1] if 1 in n.probes() else [0]
    return n.part([1], n.apply([1]), "linear") if positions == [1] else tangent(n)


def prelu(n: Node) -> Part:
    """Slopes decided by x."""
    x, weight = n.step.value(0), n.step.value(1)
    along = (1, -1, *[1] * (x.dim() - 2)) if weight.numel() > 1 and weight.dim() == 1 else weight.shape
    mask = torch.where(x > 0, 1.0, weight.reshape(along))
    return n.part([0], lambda u: [u * mask], "mask")


def fused_attention(n: Node) -> Part:
    """The pattern of x on the values of u."""
    q, v = n.step.shape(0), n.step.shape(2)
    p, groups = attention.pattern(n.step), q[-3] // v[-3]
    return n.part([2], lambda u: [p @ (u.repeat_interleave(groups, -3) if groups > 1 else u)], "pattern")


def layer_norm(n: Node) -> Part:
    """gamma (u - mean) / sigma + beta."""
    dims = list(range(-len(n.step.argument("normalized_shape")), 0))
    return _norm(n, lambda h: h.mean(dims, keepdim=True), norms.wide(n.step.saved("result2")))


def rms_norm(n: Node) -> Part:
    """gamma u / rms(x)."""
    x, eps = n.step.value(0), n.step.argument("eps")
    dims = list(range(-len(n.step.argument("normalized_shape")), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _norm(n, None, (x.square().mean(dims, keepdim=True) + eps).rsqrt())


def group_norm(n: Node) -> Part:
    """As `layer_norm`, over each group of channels."""
    shape, groups = n.step.shape(0), n.step.argument("group")
    along = (shape[0], shape[1], *[1] * (len(shape) - 2))

    def spread(of_groups: Tensor) -> Tensor:
        return of_groups.unsqueeze(-1).expand(*of_groups.shape, shape[1] // groups).reshape(along)

    def mean(h: Tensor) -> Tensor:
        return spread(h.reshape(shape[0], groups, -1).mean(-1))

    return _norm(n, mean, spread(norms.wide(n.step.saved("result2"))), channels=True)


def batch_norm(n: Node) -> Part:
    """With running statistics affine as it is; else an instance norm."""
    s, shape = n.step, n.step.shape(0)
    along, dims = (1, -1, *[1] * (len(shape) - 2)), [0, *range(2, len(shape))]
    if s.argument("training"):
        rstd = (s.value(0).var(dims, unbiased=False, keepdim=True) + s.argument("eps")).rsqrt()
        return _norm(n, lambda h: h.mean(dims, keepdim=True), rstd, channels=True)
    scale, shift = norms.batch_affine(s)
    shift = torch.as_tensor(shift).view(along)
    return n.part([0], lambda u: [u * scale.view(along) + shift], "linear")


def _norm(n: Node, mean: Callable[[Tensor], Tensor] | None, rstd: Tensor, channels: bool = False) -> Part:
    shape = n.step.shape(0)
    affine = [norms.affine(n.step, name) for name in ("weight", "bias")]
    if channels:
        affine = [None if a is None else a.view(1, -1, *[1] * (len(shape) - 2)) for a in affine]
    weight, bias = affine
    middle = mean(n.step.value(0)) if mean is not None and n.choices["center"] == "data" else None

    def run(u: Tensor) -> list[Tensor]:
        u = u if mean is None else u - (mean(u) if middle is None else middle)
        u = u * (rstd if weight is None else rstd * weight)
        return [u if bias is None else u + bias]

    return n.part([0], run, "norm")


KINDS: dict[Callable[..., None], Callable[[Node], Part]] = {
    operators.arranging: linear, operators.summing: linear, operators.cast: linear, operators.negation: linear,
    operators.activation: activation, operators.power: power, operators.tangent: offset, operators.prelu: prelu,
    operators.linear: matrix_product, operators.solve: solve, products.product: product, products.glu: glu,
    products.addcmul: addcmul, attention.fused: fused_attention, norms.layer_norm: layer_norm,
    norms.rms_norm: rms_norm, norms.group_norm: group_norm, norms.batch_norm: batch_norm,
}  # fmt: skip
"""Rule of the relevance engine -> how such an operator is replayed."""


def part_of(n: Node) -> Part:
    """Return an operator's affine map; one that the engine has no rule for goes by its tangent."""
    name = n.step.name
    if name in SELECTING:
        return selecting(n)
    rule = OPERATORS.get(name)
    return (tangent if rule is None else KINDS[rule])(n)


@dataclass(frozen=True)
class Program:
    """The affine map, kept runnable.

    Attributes:
        parts: (node, its part), from the input up. leaf, root: where it begins and ends.
        last: place -> the part after which it is let go.
        kinds: kind of part -> how many. guards: of its masks.
    """

    parts: list[tuple[int, Part]]
    leaf: Place
    root: Place
    last: dict[Place, int]
    kinds: Counter[str]
    guards: Guards

    def __call__(self, probe: Tensor) -> Tensor:
        """Run a probe of the input's shape."""
        values: dict[Place, Any] = {self.leaf: probe}
        for at, (index, part) in enumerate(self.parts):
            outputs = part.run(*(values[place] for place in part.needs))
            for place in set(part.needs):
                if self.last[place] == at:
                    del values[place]
            values |= {(index, k): y for k, y in enumerate(outputs) if (index, k) in self.last}
        return values[self.root]


def compiled(sweep: Sweep, leaf: int, root: Place, choices: dict[str, str]) -> Program:
    """Take the decisions of every operator between an input and the output.

    Args:
        sweep: holds the tape and its values; the tape's nodes are let go on the way.
        leaf: the node of the input. root: of the output. choices: of `CHOICES`.

    Raises:
        InputError: the output depends on the input through decisions only, or an operator's call was not seen.
    """
    tape, values = sweep.tape, sweep.values
    carried = _carried(sweep, leaf)
    if not carried[root[0]] or root[0] == leaf:
        raise InputError("the output depends on the input only through decisions (patterns, roundings), if at all")
    needed, parts, guards = {root[0]}, list[tuple[int, Part]](), list[Guards]()
    for index in range(len(tape.nodes)):
        if index in needed and index != leaf:
            with torch.no_grad():
                part = part_of(Node(Step(sweep, index, {}), carried, choices, guards))
            parts.append((index, part))
            needed.update(child for child, _ in part.needs)
        values.release(index)
    parts.reverse()
    last = {place: at for at, (_, part) in enumerate(parts) for place in part.needs} | {root: len(parts)}
    total = Guards(
        sum(g.guarded for g in guards), sum(g.elements for g in guards), max((g.largest for g in guards), default=0.0)
    )
    return Program(parts, (leaf, 0), root, last, Counter(part.kind for _, part in parts), total)


def _carried(sweep: Sweep, leaf: int) -> list[bool]:
    """Say for each node whether a probe passes it: what is decided by x alone carries none."""
    tape = sweep.tape
    found = [False] * len(tape.nodes)
    for i in reversed(range(len(found))):
        name = tape.names[i]
        edges = [(position, child) for position, (child, _) in enumerate(tape.edges[i]) if child >= 0]
        if name.startswith("ScaledDotProduct"):
            edges = [edge for edge in edges if edge[0] == 2]
        found[i] = i == leaf or (name not in _DECIDED and any(found[child] for _, child in edges))
    return found
