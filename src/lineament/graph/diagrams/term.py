"""A model as a typed term: values whose every axis has an identity, and operators that say which axes meet.

There are no views, transposes or broadcasts in a term. A value has its axes in an order of its own; an operator names
them by labels that hold inside it alone: the same label at two operands is one shared axis (a dot), a label without an
output is summed over (a cup), one that stands at an input and at the output runs past.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

OPAQUE = "opaque"
"""The kind of operators that the term has no meaning for; running it calls the operator itself."""


@dataclass(frozen=True)
class Axis:
    """A set of positions, with a word for what it is. Equal sizes don't make axes equal."""

    name: str
    size: int
    what: str = ""


@dataclass(frozen=True)
class Data:
    """A value.

    Attributes:
        axes: numbers of its axes, in order; one may stand twice (scores are tokens by tokens).
        origin: "input", "weight", "constant" or "op".
        name: of the argument, of the parameter or of the constant.
        cuts: of a weight that is part of a parameter: (dimension, start, stop) of the parameter, in order.
        dims: of inputs and weights: how many of the axes make up each dimension of the tensor, after the cuts.
    """

    axes: tuple[int, ...]
    origin: str
    name: str = ""
    cuts: tuple[tuple[int, int, int], ...] = ()
    dims: tuple[int, ...] = ()


@dataclass(frozen=True)
class Port:
    """A value at an operator: one label for each of its axes."""

    value: int
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """An operator: what it does to labelled axes.

    Attributes:
        kind: a key of `execute.MEANING`.
        inputs, outputs: its values.
        attrs: what else it needs, as plain values.
        frame: dotted name of the module it comes from.
    """

    kind: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    frame: str = ""

    @property
    def through(self) -> tuple[int, ...]:
        """Labels that run from an input to an output."""
        inward = {label for port in self.inputs for label in port.labels}
        return tuple(dict.fromkeys(label for port in self.outputs for label in port.labels if label in inward))


@dataclass(frozen=True)
class Result:
    """An output of the model: per dimension its axes, as places in a value or as sizes along which it is repeated."""

    value: int
    dims: tuple[tuple[int | Repeat, ...], ...]


@dataclass(frozen=True)
class Repeat:
    """A run of equal positions: the value does not have this axis."""

    size: int


@dataclass(frozen=True)
class Term:
    """A model's computation. Operators are in order; `constants` are tables that depend on shapes and buffers only."""

    axes: tuple[Axis, ...]
    values: tuple[Data, ...]
    ops: tuple[Op, ...]
    inputs: tuple[int, ...]
    results: tuple[Result, ...]
    constants: Mapping[int, Tensor] = field(repr=False)
    counts: Mapping[str, int] = field(default_factory=dict)
    """Operators of the trace by what became of them: "drawn", "constant", "opaque", and which are opaque."""

    def sizes(self, value: int) -> tuple[int, ...]:
        """Return the sizes of a value's axes."""
        return tuple(self.axes[axis].size for axis in self.values[value].axes)

    @property
    def opaque_share(self) -> float:
        """Opaque operators among all that are not constant."""
        return self.counts.get(OPAQUE, 0) / max(1, self.counts.get("operators", 0))

    def flops(self, op: Op) -> int:
        """Return twice the multiplications of a product that sums over something; 0 for every other operator."""
        factors = op.inputs[: len(op.inputs) - bool(op.attrs.get("bias"))]
        if op.kind != "einsum" or len(factors) < 2:
            return 0
        sizes = {label: n for port in factors for label, n in zip(port.labels, self.sizes(port.value), strict=True)}
        return 2 * math.prod(sizes.values()) if set(sizes) - set(op.outputs[0].labels) else 0

    def to_json(self) -> dict[str, Any]:
        """Return the term as plain values, without the entries of its constants."""
        named = {i: [self.axes[a].name for a in data.axes] for i, data in enumerate(self.values)}
        return {
            "axes": [{"name": axis.name, "size": axis.size, "what": axis.what} for axis in self.axes],
            "values": [
                {"axes": named[i], "origin": data.origin, "name": data.name, "cuts": [list(cut) for cut in data.cuts]}
                for i, data in enumerate(self.values)
            ],
            "ops": [
                {
                    "kind": op.kind, "frame": op.frame, "flops": self.flops(op),
                    "inputs": [{"value": p.value, "labels": list(p.labels)} for p in op.inputs],
                    "outputs": [{"value": p.value, "labels": list(p.labels)} for p in op.outputs],
                    "attrs": {key: _plain(value) for key, value in op.attrs.items()},
                }
                for op in self.ops
            ],
            "inputs": list(self.inputs), "results": [result.value for result in self.results],
            "operators": dict(self.counts), "opaque_share": self.opaque_share,
        }  # fmt: skip

    def signature(self, ops: Sequence[Op] | None = None, *, sizes: bool = True) -> tuple[Any, ...]:
        """Return what is left of a term (or of some of its operators) without names: equal for equal algorithms.

        Args:
            ops: some operators; None for all.
            sizes: False also forgets how large axes are.
        """
        chosen, numbers, axes = self.ops if ops is None else ops, {}, {}

        def axis(number: int) -> Any:
            place = axes.setdefault(number, len(axes))
            return (place, self.axes[number].size) if sizes else place

        def port(each: Port, labels: dict[int, int]) -> Any:
            data = self.values[each.value]
            seen = numbers.setdefault(each.value, len(numbers))
            named = tuple(labels.setdefault(label, len(labels)) for label in each.labels)
            return (seen, data.origin, named, tuple(map(axis, data.axes)))

        found = []
        for op in chosen:
            labels: dict[int, int] = {}
            sides = [tuple(port(each, labels) for each in side) for side in (op.inputs, op.outputs)]
            attrs = {key: _relabelled(key, value, labels) for key, value in op.attrs.items() if key not in UNSEEN}
            found.append((op.kind, *sides, repr(sorted(attrs.items()))))
        ends = () if ops is not None else tuple(numbers.get(result.value) for result in self.results)
        return (*found, ends)


LABELLED = ("over", "label", "joined", "shared", "spatial", "windows", "channels")
"""Attributes that hold labels."""
UNSEEN = ("fill", "source")
"""Attributes in which two spellings of one algorithm may differ."""


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if finite and isinstance(value, bool | int | float | str | None) else str(value)


def _relabelled(key: str, value: Any, labels: Mapping[int, int]) -> Any:
    if key not in LABELLED:
        return float(f"{value:.12g}") if isinstance(value, float) else value
    if isinstance(value, int):
        return labels.get(value, -1)
    return tuple(labels.get(label, -1) for label in value)
