"""Products of tensors: by a constant, by the scale of a norm, of a tensor with a function of itself, and gates."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lineament.explain.linear import divide, wide
from lineament.explain.structure import is_activation, is_scale, island

if TYPE_CHECKING:
    from lineament.explain.sweep import Step

NEAR_ZERO = 1e-6
"""|x| below which phi(x) / x is replaced by the slope."""


def product(s: "Step") -> None:
    """a * b: a constant takes nothing; an island is a unary function; the scale of a norm is frozen; else a gate."""
    live = s.live()
    if len(live) == 1 or (s.name == "Div" and not isinstance(s.operand(1), Tensor)):
        _scaled(s, live[0])
        return
    leaf = None if s.rules.activation == "gradient" else island(s.tape, s.index)
    if leaf is not None:
        _island(s, leaf)
        return
    scale = [i for i in live if is_scale(s.tape, s.edges[i][0])] if s.rules.norm != "gradient" else []
    if len(scale) == 1:
        _scaled(s, 1 - scale[0])
        return
    _gate(s)


def _scaled(s: "Step", position: int) -> None:
    """One factor carries all: R passes whole, coefficients times the other factor."""
    message = s.messages[0]
    if s.name == "Div" and position == 1:  # constant / x
        _reciprocal(s)
        return
    coef = None
    if message.coef is not None:
        other = s.operand(1 - position)
        coef = message.coef * other if s.name == "Mul" else message.coef / other
    s.send(position, rel=message.rel, coef=coef)


def _reciprocal(s: "Step") -> None:
    """Take the tangent of a / x for a constant a: -a / x^2, which leaves 2 a / x."""
    c, y = s.coef(), s.result()
    s.send(1, coef=-c * y / s.operand(1))
    s.absorb("remainder", 2 * y * c)


def _gate(s: "Step") -> None:
    kind = s.rules.gate
    if kind == "absolute":
        a, b = s.value(0).abs(), s.value(1).abs()
        b = 1 / b if s.name == "Div" else b
        t = divide(s.rel(), a + b, s.ledger)
        s.send(0, rel=a * t)
        s.send(1, rel=b * t)
        return
    c = s.coef()
    if kind == "linear":
        gates = [i for i in (0, 1) if is_activation(s.tape, s.edges[i][0])]
        if len(gates) == 1:
            other = s.value(gates[0])
            s.send(1 - gates[0], coef=c * other if s.name == "Mul" else c / other)
            return
    a, b = s.value(0), s.value(1)
    first, second = (c * b, c * a) if s.name == "Mul" else (c / b, c * a / b**2)
    if kind != "gradient":
        s.send(0, coef=first / 2)
        s.send(1, coef=second / 2)
        return
    sign = 1 if s.name == "Mul" else -1
    s.send(0, coef=first)
    s.send(1, coef=sign * second)
    s.absorb("remainder", -sign * s.result() * c)


def _island(s: "Step", leaf: tuple[int, int]) -> None:
    """A function of one tensor in several nodes: R passes whole, in one step."""
    from lineament.explain.sweep import Message

    inbox = s.sweep.inbox.setdefault(leaf[0], {}).setdefault(leaf[1], Message())
    message, coef = s.messages[0], None
    if message.coef is not None:
        x, y = wide(s.sweep.values.get(*leaf, asker=s.index)), s.result()
        small = x.abs() < NEAR_ZERO
        ratio = y / torch.where(small, 1.0, x)
        if bool(small.any()):
            ratio = torch.where(small, slope_at_zero(s, leaf, x), ratio)
        coef = message.coef * ratio
    inbox.add(message.rel, coef)


def slope_at_zero(s: "Step", leaf: tuple[int, int], x: Tensor) -> Tensor:
    """phi'(0), as a secant around 0."""
    step = 1e-3 if x.dtype == torch.float32 else 1e-5
    up, down = (_along(s, leaf, torch.full_like(x, h)) for h in (step, -step))
    return (up - down) / (2 * step)


def _along(s: "Step", leaf: tuple[int, int], x: Tensor) -> Tensor:
    """Compute the island for another x."""
    found = {leaf: x}
    stack = [(s.index, 0)]
    while stack:
        i, k = stack[-1]
        edges = [edge for edge in s.tape.edges[i] if edge[0] >= 0]
        missing = [edge for edge in edges if edge not in found and s.tape.live[edge[0]]]
        if (i, k) in found or not missing:
            stack.pop()
            if (i, k) not in found:
                call = s.tape.calls[i]
                assert call is not None
                tracked = [found[edge] if edge in found else s.sweep.values.get(*edge) for edge in edges]
                found[i, k] = call.run(tracked)[0].to(x.dtype)
        else:
            stack.extend(missing)
    return found[s.index, 0]


def glu(s: "Step") -> None:
    """a sigmoid(b): half to a, half through the sigmoid's tangent; or the gradient of both."""
    c, x = s.coef(), s.value(0)
    dim = s.argument("dim", -1)
    a, b = x.chunk(2, dim)
    gate, share = b.sigmoid(), 1.0 if s.rules.gate == "gradient" else 0.5
    slope = gate * (1 - gate)
    s.send(0, coef=torch.cat([c * gate * share, c * a * slope * share], dim))
    s.absorb("remainder", (a * gate * (1 - share) - a * b * slope * share) * c)


def addcmul(s: "Step") -> None:
    """x + value a b: the sum first, then the product as a gate."""
    c, value = s.coef(), s.argument("value", 1)
    s.send(0, coef=c)
    a, b = s.operand(1), s.operand(2)
    if 0 not in s.tracked():
        s.absorb("constants", s.operand(0) * c)
    live = [i for i in (1, 2) if i in s.live()]
    if not live:
        s.absorb("parameters", a * b * value * c)
    share = 1.0 if s.rules.gate == "gradient" or len(live) == 1 else 0.5
    for i in live:
        s.send(i, coef=c * value * (b if i == 1 else a) * share)
    if share == 1 and len(live) == 2:
        s.absorb("remainder", -a * b * value * c)
