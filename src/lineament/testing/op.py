"""`check_op`: one backend of a recurrent operator held to its reference, law by law."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lineament._base.errors import unknown
from lineament._base.seeds import generator
from lineament.testing.compare import TOLERANCE, copied, leaves, rms, same

Inputs = Callable[["OpCase"], Sequence[Tensor | None]]


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """What the inputs of one trial look like; an input maker may ignore what its operator has not."""

    batch: int = 2
    length: int = 7
    heads: int = 2
    key_heads: int = 2
    value_heads: int = 2
    key_width: int = 5
    value_width: int = 6
    gate: str = "head"
    """"none", "head" or "channel"."""
    extreme: bool = False
    """Gates of -inf, -1e4, 0 and -1e-8 among the ordinary ones."""
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    seed: int = 0

    def draw(self, *shape: int, salt: int = 0) -> Tensor:
        """Normal numbers, the same for the same case."""
        random = torch.randn(*shape, generator=generator(self.seed * 1000 + salt), dtype=torch.float64)
        return random.to(self.device, self.dtype)


def decayed_inputs(case: OpCase) -> tuple[Tensor | None, ...]:
    """Make (q, k, v, log_decay) for `decayed_attention`."""
    return (*_qkv(case), _log_decay(case))


def delta_inputs(case: OpCase) -> tuple[Tensor | None, ...]:
    """Make (q, k, v, beta, log_decay) for `delta_rule`, with keys of length 1 and beta in (0, 1)."""
    q, k, v = _qkv(case)
    k = torch.nn.functional.normalize(k.double(), dim=-1).to(k.dtype)
    beta = case.draw(case.batch, case.length, max(case.key_heads, case.value_heads), salt=5).sigmoid()
    return q, k, v, beta, _log_decay(case)


def scan_inputs(case: OpCase) -> tuple[Tensor | None, ...]:
    """Make (x, log_decay) for `elementwise_scan`: decays of 0, per key channel, or per head and broadcast."""
    gates = _log_decay(replace(case, value_heads=case.key_heads))
    x = case.draw(case.batch, case.length, case.key_heads, case.key_width, salt=1)
    if gates is None:
        return x, torch.zeros_like(x)
    return x, gates if gates.dim() == 4 else gates[..., None]


INPUTS: dict[str, Inputs] = {
    "decayed_attention": decayed_inputs,
    "delta_rule": delta_inputs,
    "elementwise_scan": scan_inputs,
}
"""By the name of the operator."""


def check_op(
    op: Callable[..., tuple[Tensor, Any]],
    backend: str,
    *,
    inputs: Inputs | None = None,
    reference: str = "reference",
    chunk: int = 64,
    laws: Iterable[str] | None = None,
    case: OpCase = OpCase(),
    tolerance: float | None = None,
) -> list[str]:
    """Hold one backend of an operator to the reference.

    Laws: `reference` (result, state and gradients on both sides of chunk edges), `gates` (none, per head, per channel),
    `extreme` (gates as extreme as -inf), `cut` (a sequence cut anywhere and continued, with gradients), `packed`
    (documents in one row equal documents alone, from given states), `grouped` (head counts that divide one another),
    `bf16`, `gradcheck` (finite differences), `pure` (inputs unchanged, the same bits each time).

    Args:
        op: called as `op(*inputs, state=, cu_seqlens=, backend=) -> (o, state)`, axes [B, T, ...].
        backend: the name under test.
        inputs: makes the tensors of a case; known for the operators in `INPUTS`.
        reference: the backend that is trusted.
        chunk: tokens per chunk of the backend.
        laws: some of `OP_LAWS`; all if None.
        case: changes the defaults, the dtype or device say. Float32 is compared with the float64 reference.
        tolerance: the largest error as a share of the largest value; by dtype if None, ten times that for gradients.

    Returns:
        The laws that were checked.

    Raises:
        AssertionError: a law is broken; the message says which, where and by how much.

    Example:
        >>> from lineament.ops.recurrence import decayed_attention
        >>> check_op(decayed_attention, "chunked", laws=["pure"])
        ['pure']
    """
    wanted = list(OP_LAWS if laws is None else laws)
    for law in wanted:
        if law not in OP_LAWS:
            raise unknown("law", law, OP_LAWS)
    maker = inputs or INPUTS.get(getattr(op, "__name__", ""))
    if maker is None:
        raise unknown("operator", getattr(op, "__name__", repr(op)), INPUTS)
    trial = _Trial(
        op, backend, maker, reference, chunk, case, TOLERANCE[case.dtype] if tolerance is None else tolerance
    )
    for law in wanted:
        OP_LAWS[law](trial)
    return wanted


@dataclass(frozen=True)
class _Trial:
    op: Callable[..., tuple[Tensor, Any]]
    backend: str
    maker: Inputs
    reference: str
    chunk: int
    case: OpCase
    tolerance: float

    def run(self, inputs: Sequence[Tensor | None], **keywords: Any) -> tuple[Tensor, Any]:
        return self.op(*inputs, backend=self.backend, **keywords)

    def trusted(self, inputs: Sequence[Tensor | None], **keywords: Any) -> tuple[Tensor, Any]:
        wide = [None if x is None else x.double() for x in inputs]
        return self.op(*wide, backend=self.reference, **keywords)

    def gradients(self, inputs: Sequence[Tensor | None], trusted: bool = False, cut: int | None = None) -> list[Tensor]:
        """Gradients of a fixed random sum of the result and the state, wrt every input."""
        given = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
        run = self.trusted if trusted else self.run
        if cut is None:
            o, state = run(given)
        else:
            o, state = self.cut(given, cut)
        total = sum(((x.double() * _weights(x)).sum() for _, x in leaves((o, state))), torch.zeros((), device=o.device))
        return list(torch.autograd.grad(total, [x for x in given if x is not None]))

    def cut(self, inputs: Sequence[Tensor | None], at: int) -> tuple[Tensor, Any]:
        first, state = self.run([None if x is None else x[:, :at] for x in inputs])
        rest, state = self.run([None if x is None else x[:, at:] for x in inputs], state=state)
        return torch.cat([first, rest], 1), state

    def against(self, case: OpCase, what: str) -> None:
        """Result, state and gradients beside the reference's."""
        inputs = self.maker(case)
        same(self.run(inputs), self.trusted(inputs), self.tolerance, f"{what}: result")
        same(self.gradients(inputs), self.gradients(inputs, trusted=True), 10 * self.tolerance, f"{what}: gradient")


def _reference(trial: _Trial) -> None:
    for length in (1, trial.chunk - 1, trial.chunk, trial.chunk + 1, 2 * trial.chunk + 2):
        if length >= 1:
            trial.against(replace(trial.case, length=length, batch=1), f"reference, T={length}")


def _gates(trial: _Trial) -> None:
    for gate in ("none", "head", "channel"):
        trial.against(replace(trial.case, length=trial.chunk + 3, batch=1, gate=gate), f"gates, {gate}")


def _extreme(trial: _Trial) -> None:
    for gate in ("head", "channel"):
        case = replace(trial.case, length=2 * trial.chunk + 3, batch=1, gate=gate, extreme=True)
        trial.against(case, f"extreme, {gate}")


def _cut(trial: _Trial) -> None:
    inputs = trial.maker(replace(trial.case, length=trial.chunk + 6))
    whole, slopes = trial.run(inputs), trial.gradients(inputs)
    for at in (1, 5, trial.chunk - 1, trial.chunk, trial.chunk + 5):
        same(trial.cut(inputs, at), whole, 10 * trial.tolerance, f"cut at {at}: result")
        same(trial.gradients(inputs, cut=at), slopes, 10 * trial.tolerance, f"cut at {at}: gradient")


def _packed(trial: _Trial) -> None:
    lengths = (1, trial.chunk + 1, 7, trial.chunk)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(trial.case.device)
    for gate in ("head", "none"):
        inputs = trial.maker(replace(trial.case, batch=1, length=sum(lengths), gate=gate))
        alone = [_rows(inputs, a, b) for a, b in pairwise(ends.tolist())]
        before = [trial.run(rows)[1] for rows in alone]
        after = [trial.run(rows, state=state) for rows, state in zip(alone, before, strict=True)]
        o, state = trial.run(inputs, cu_seqlens=ends)
        same(state, _stack(before), 10 * trial.tolerance, "packed: first states")
        o, state = trial.run(inputs, cu_seqlens=ends, state=state)
        same(o, torch.cat([o for o, _ in after], 1), 10 * trial.tolerance, "packed: result from given states")
        same(state, _stack([state for _, state in after]), 10 * trial.tolerance, "packed: last states")


def _grouped(trial: _Trial) -> None:
    for heads, key_heads, value_heads in ((4, 2, 2), (4, 1, 1), (2, 2, 4), (4, 2, 4), (2, 4, 2)):
        counts = {"heads": heads, "key_heads": key_heads, "value_heads": value_heads}
        for gate in ("head", "channel"):
            trial.against(replace(trial.case, batch=1, length=9, gate=gate, **counts), f"grouped, {counts}, {gate}")


def _bf16(trial: _Trial) -> None:
    inputs = trial.maker(replace(trial.case, batch=1, length=trial.chunk + 9, dtype=torch.bfloat16))
    (o, state), (expected, after) = trial.run(inputs), trial.trusted(inputs)
    if o.dtype != torch.bfloat16:
        raise AssertionError(f"bf16: the result is {o.dtype}; expected v's dtype")
    rms(o, expected, TOLERANCE[torch.bfloat16], "bf16: result")
    for (name, x), (_, y) in zip(leaves(state, "state"), leaves(after, "state"), strict=True):
        if x.is_floating_point() and x.itemsize < 4:
            raise AssertionError(f"bf16: {name} is {x.dtype}; expected float32 or wider")
        rms(x, y, TOLERANCE[torch.bfloat16], f"bf16: {name}")
    for i, (x, y) in enumerate(zip(trial.gradients(inputs), trial.gradients(inputs, trusted=True), strict=True)):
        rms(x, y, 2 * TOLERANCE[torch.bfloat16], f"bf16: gradient {i}")


def _gradcheck(trial: _Trial) -> None:
    if trial.case.dtype != torch.float64:
        return  # finite differences need it
    inputs = trial.maker(replace(trial.case, batch=1, length=4, gate="channel"))
    given = [x.requires_grad_() for x in inputs if x is not None]

    def function(*found: Tensor) -> tuple[Tensor, ...]:
        rest = iter(found)
        o, state = trial.run([None if x is None else next(rest) for x in inputs])
        return tuple(x for _, x in leaves((o, state)) if x.is_floating_point())

    if not torch.autograd.gradcheck(function, given, fast_mode=True, raise_exception=False):
        raise AssertionError("gradcheck: the gradients are not those of finite differences")


def _pure(trial: _Trial) -> None:
    inputs = trial.maker(trial.case)
    _, state = trial.run(inputs)
    before = copied([*inputs, state])
    first = trial.run(inputs, state=state)
    same(first, trial.run(inputs, state=state), 0.0, "pure: a second run")
    same(copied([*inputs, state]), before, 0.0, "pure: the inputs after the run")


OP_LAWS: dict[str, Callable[[_Trial], None]] = {
    "reference": _reference,
    "gates": _gates,
    "extreme": _extreme,
    "cut": _cut,
    "packed": _packed,
    "grouped": _grouped,
    "bf16": _bf16,
    "gradcheck": _gradcheck,
    "pure": _pure,
}
"""The laws of `check_op`, by name."""


def _qkv(case: OpCase) -> tuple[Tensor, Tensor, Tensor]:
    q = case.draw(case.batch, case.length, case.heads, case.key_width, salt=1)
    k = case.draw(case.batch, case.length, case.key_heads, case.key_width, salt=2)
    return q, k, case.draw(case.batch, case.length, case.value_heads, case.value_width, salt=3)


def _log_decay(case: OpCase) -> Tensor | None:
    if case.gate == "none":
        return None
    width = (case.key_width,) if case.gate == "channel" else ()
    heads = max(case.key_heads, case.value_heads)
    gates = -case.draw(case.batch, case.length, heads, *width, salt=4).abs() * 0.3
    if case.extreme:
        odd = torch.tensor([-torch.inf, -1e4, 0.0, -1e-8, -80.0], dtype=gates.dtype, device=gates.device)
        which = torch.randint(0, 15, gates.shape, generator=generator(case.seed)).to(gates.device)
        gates = torch.where(which < 5, odd[which.clamp_max(4)], gates)
    return gates


def _rows(inputs: Sequence[Tensor | None], begin: int, end: int) -> list[Tensor | None]:
    return [None if x is None else x[:, begin:end] for x in inputs]


def _stack(states: Sequence[Any]) -> Any:
    """Join the states of single documents along their rows, keeping the structure."""
    first = states[0]
    if isinstance(first, Tensor):
        return torch.cat(list(states))
    parts = [_stack([state[i] for state in states]) for i in range(len(first))]
    return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)


def _weights(x: Tensor) -> Tensor:
    """Fixed weights that tell the places of a tensor apart."""
    steps = torch.arange(x.numel(), device=x.device, dtype=torch.float64).view(x.shape)
    return (steps * 0.7391).sin() / max(x.numel(), 1) ** 0.5
