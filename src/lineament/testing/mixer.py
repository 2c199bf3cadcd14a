"""`check_mixer`: what every head mixer, and every layer around one, must do, law by law."""

import copy
import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lineament._base.errors import InputError, unknown
from lineament.testing.compare import TOLERANCE, copied, leaves, rms, same
from lineament.testing.mixer_numbers import NUMERIC_LAWS, SLOW_LAWS
from lineament.testing.trial import Block, Make, MixerCase, Trial

CASE = MixerCase()


def check_mixer(
    make: Make,
    *,
    case: MixerCase = CASE,
    begin: Callable[[], Any] = lambda: None,
    laws: Iterable[str] | None = None,
    shake: float = 0.3,
    constant_state: bool = True,
    tolerance: float | None = None,
) -> list[str]:
    """Hold a head mixer to the protocol of `lineament.nn.HeadMixer`, or a layer to that of `lineament.nn.Mixer`.

    Laws: `shape` (axes, dtype, finite), `causal` (the future changes nothing), `chunked` (a sequence cut anywhere, with
    its state), `stepwise` (token by token without gradients), `batched` (rows do not know each other), `packed`
    (documents in one row, also continued from their states unless that is refused by an InputError), `padded` (left and
    right), `grouped` (key heads 1, 2, all; a key head reaches its own query heads only), `reordered` (rows of the state
    taken, repeated), `gradients` (cut or whole), `gradcheck` (finite differences, parameters too), `bf16`, `large`
    (inputs thirty times as large stay finite), `deterministic`, `pure` (inputs and the state given to a block of tokens
    unchanged), `constant` (the state's bytes do not grow), `loop` (token by token with gradients), `backends` (all that
    run here, with gradients), `float32` (beside float64, with gradients, to 1e-4), `extreme` (inputs from 0 to 1e3 in
    one sequence, so that gates are shut, open and between). Slower, and only checked by name: `compiled`
    (torch.compile with "aot_eager"), `exported` (torch.export with any T), `long` (1e5 tokens in float32 beside
    float64).

    A state is None, a tensor, a tuple of states, or an object with `tensors()` (name -> tensor) and `select(index)`.

    Args:
        make: called as `make(heads=, key_heads=, key_width=, value_width=, model_width=)`, returns the module.
        case: the shape; the dtype float64 is what makes tight tolerances possible.
        begin: the state before the first token, None by the protocol; of a layer a fresh cache.
        laws: some of `MIXER_LAWS` or `SLOW_LAWS`; all of the first if None.
        shake: parameters are moved by that much, so that none sits at a harmless start.
        constant_state: False for mixers that keep ordinary keys and values in some heads. Their buffers may have spare
            room, so only results are compared, not states.
        tolerance: the largest error as a share of the largest value; by dtype if None.

    Returns:
        The laws that were checked: without "backends" where the mixer has none to choose from.

    Raises:
        AssertionError: a law is broken; the message says which, where and by how much.

    Example:
        >>> from lineament.nn import MixerConfig, build
        >>> make = lambda **shape: build(MixerConfig(kind="lightning", **shape))
        >>> check_mixer(make, case=MixerCase(length=9), laws=["causal", "chunked"])
        ['causal', 'chunked']
    """
    wanted = list(MIXER_LAWS if laws is None else laws)
    for law in wanted:
        if law not in KNOWN:
            raise unknown("law", law, KNOWN)
    allowed = 10 * TOLERANCE[case.dtype] if tolerance is None else tolerance
    trial = Trial(make, case, begin, shake, constant_state, allowed)
    return [law for law in wanted if KNOWN[law](trial) is not False]


def _shape(trial: Trial) -> None:
    case = replace(trial.case, length=5)
    o, _ = trial.run(trial.mixer(case), trial.block(case))
    expected = (case.batch, case.length, *((case.model_width,) if trial.layer else (case.heads, case.value_width)))
    if tuple(o.shape) != expected or o.dtype != case.dtype:
        raise AssertionError(f"shape: the result is {tuple(o.shape)}, {o.dtype}; expected {expected}, {case.dtype}")
    if not o.isfinite().all():
        raise AssertionError("shape: the result holds NaN or infinity")


def _causal(trial: Trial) -> None:
    mixer, block, other = trial.mixer(), trial.block(), trial.block(salt=7)
    o, _ = trial.run(mixer, block)
    for at in {1, trial.case.length // 2, trial.case.length - 1}:
        mixed = {n: torch.cat([a[:, :at], 3 * other.named[n][:, at:]], 1) for n, a in block.named.items()}
        changed, _ = trial.run(mixer, Block(mixed))
        same(changed[:, :at], o[:, :at], trial.tolerance, f"causal: outputs before token {at}, which changed")
        if torch.equal(changed[:, at:], o[:, at:]):
            raise AssertionError(f"causal: nothing changed from token {at} on although the inputs did")


def _chunked(trial: Trial) -> None:
    mixer, block, T = trial.mixer(), trial.block(), trial.case.length
    whole = trial.run(mixer, block)
    for places in ([1], [T // 2], [T - 1], [3, 4, T // 2 + 1], [T // 3, 2 * T // 3]):
        trial.same(trial.cut(mixer, block, places), whole, f"chunked, cut at {places}")


def _stepwise(trial: Trial) -> None:
    mixer, block, T = trial.mixer(), trial.block(), trial.case.length
    with torch.no_grad():
        whole = trial.run(mixer, block)
        trial.same(trial.cut(mixer, block, range(1, T)), whole, "stepwise from nothing")
        trial.same(trial.cut(mixer, block, range(T // 2, T)), whole, "stepwise after a prefill")


def _batched(trial: Trial) -> None:
    mixer, block = trial.mixer(), trial.block()
    o, _ = trial.run(mixer, block)
    for row in range(trial.case.batch):
        one, _ = trial.run(mixer, block.map(lambda each, row=row: each[row : row + 1]))
        same(one, o[row : row + 1], trial.tolerance, f"batched: row {row} alone")


def _packed(trial: Trial) -> None:
    T = trial.case.length
    lengths = (1, T // 2, 3, T - T // 2 - 4)
    case = replace(trial.case, batch=1)
    mixer, block, more = trial.mixer(case), trial.block(case), trial.block(case, salt=9)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(case.device)
    bounds = list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))
    o, state = trial.run(mixer, block, cu_seqlens=ends)
    alone = [trial.run(mixer, block.part(begin, end)) for begin, end in bounds]
    same(o, torch.cat([one for one, _ in alone], 1), trial.tolerance, "packed: documents in one row")
    try:
        again, state = trial.run(mixer, more, state, cu_seqlens=ends)
    except InputError:
        return
    for row, ((begin, end), (_, own)) in enumerate(zip(bounds, alone, strict=True)):
        one, own = trial.run(mixer, more.part(begin, end), own)
        same(again[:, begin:end], one, trial.tolerance, f"packed: document {row}, continued")
        if not hasattr(own, "tensors"):
            rows = {name: x[row : row + 1] for name, x in leaves(state)}
            same(rows, dict(leaves(own)), trial.tolerance, f"packed: state of document {row}")


def _padded(trial: Trial) -> None:
    from lineament.nn import Rows

    mixer, T = trial.mixer(), trial.case.length
    short = T // 3
    for side in ("left", "right"):
        valid = torch.ones(2, T, dtype=torch.bool, device=trial.case.device)
        real = slice(short, T) if side == "left" else slice(0, T - short)
        valid[0] = False
        valid[0, real] = True
        case = replace(trial.case, batch=2)
        block = trial.block(case).map(lambda x, valid=valid: x.masked_fill(~valid.view(2, T, *[1] * (x.ndim - 2)), 1e4))
        rows = Rows.make(valid)
        if "rows" in inspect.signature(mixer.forward).parameters:
            o, _ = trial.run(mixer, block, rows=rows)
        else:
            o, _ = trial.run(mixer, block.map(rows.pack), cu_seqlens=rows.cu_seqlens)
            o = rows.unpack(o)
        for row, where in ((0, real), (1, slice(0, T))):
            one, _ = trial.run(mixer, block.map(lambda x, row=row, where=where: x[row : row + 1, where]))
            same(o[row : row + 1, where], one, trial.tolerance, f"padded on the {side}: row {row}")


def _grouped(trial: Trial) -> None:
    for key_heads in sorted({1, trial.case.heads // 2, trial.case.heads}):
        case = replace(trial.case, key_heads=key_heads, length=9)
        mixer, block = trial.mixer(case), trial.block(case)
        groups = case.heads // key_heads
        whole = trial.run(mixer, block)
        trial.same(trial.cut(mixer, block, [4]), whole, f"grouped, {key_heads} key heads, cut")
        for name in () if trial.layer else ("k", "v"):
            changed = block.named[name].clone()
            changed[:, :, -1] *= -1.5
            o, _ = trial.run(mixer, block.changed(**{name: changed}))
            own = case.heads - groups
            same(o[:, :, :own], whole[0][:, :, :own], trial.tolerance, f"grouped: {name} of the last head, other heads")
            if torch.allclose(o[:, :, own:], whole[0][:, :, own:]):
                raise AssertionError(f"grouped: {name} of the last head changed nothing in its own query heads")


def _reordered(trial: Trial) -> None:
    from lineament.nn.state import tree_map

    mixer, block, more = trial.mixer(), trial.block(), trial.block(salt=5)
    index = torch.tensor([trial.case.batch - 1, 0, 0], device=trial.case.device)
    with torch.no_grad():
        _, state = trial.run(mixer, block)
        if hasattr(state, "tensors"):
            state.select(index)
        else:
            state = tree_map(lambda x: x.index_select(0, index), state)
        o, _ = trial.run(mixer, more.map(lambda x: x[index]), state)
        _, whole = trial.run(mixer, block)
        expected, _ = trial.run(mixer, more, whole)
    same(o, expected[index], trial.tolerance, "reordered: rows of the state taken and repeated")


def _gradients(trial: Trial) -> None:
    case = replace(trial.case, length=min(trial.case.length, 40))
    mixer, block = trial.mixer(case), trial.block(case)
    whole, cut = trial.slopes(mixer, block), trial.slopes(mixer, block, [1, case.length // 2])
    same(cut, whole, 10 * trial.tolerance, "gradients of a sequence in pieces")


def _gradcheck(trial: Trial) -> None:
    if trial.case.dtype != torch.float64:
        return  # finite differences need it
    case = replace(trial.case, batch=1, length=6, heads=2, key_heads=1)
    mixer, block = trial.mixer(case), trial.block(case)
    weights = {name: p.detach().clone() for name, p in mixer.named_parameters() if p.requires_grad}
    given = [x.requires_grad_() for x in (*block.tensors().values(), *weights.values())]

    def function(*found: Tensor) -> Tensor:
        inputs = dict(zip([*block.named, *weights], found, strict=True))
        named = {name: inputs.pop(name) for name in weights}

        def call(*args: Any, **keywords: Any) -> Any:
            return torch.func.functional_call(mixer, named, args, keywords)

        return trial.run(call, Block(inputs))[0]

    if not torch.autograd.gradcheck(function, given, fast_mode=True, raise_exception=False, atol=1e-4):
        raise AssertionError("gradcheck: the gradients are not those of finite differences")


def _bf16(trial: Trial) -> None:
    case = replace(trial.case, dtype=torch.bfloat16)
    mixer, block = trial.mixer(case), trial.block(case)
    wide = copy.deepcopy(mixer).double()
    o, state = trial.run(mixer, block)
    expected, _ = trial.run(wide, block.map(Tensor.double))
    if o.dtype != torch.bfloat16:
        raise AssertionError(f"bf16: the result is {o.dtype}; expected the inputs' dtype")
    rms(o, expected, 2 * TOLERANCE[torch.bfloat16], "bf16: result")
    with torch.no_grad():
        step, _ = trial.run(mixer, block.part(0, 1), state)
    rms(step, trial.run(wide, block.map(Tensor.double).part(0, 1), trial.run(wide, block.map(Tensor.double))[1])[0],
        2 * TOLERANCE[torch.bfloat16], "bf16: a step")  # fmt: skip


def _large(trial: Trial) -> None:
    mixer, block = trial.mixer(), trial.block()
    given = block.map(lambda x: (30 * x).requires_grad_())
    o, _ = trial.run(mixer, given)
    slopes = torch.autograd.grad(o.sum(), list(given.tensors().values()), allow_unused=True)
    for name, x in leaves([o, *(g for g in slopes if g is not None)], "large inputs: result and gradients"):
        if not x.isfinite().all():
            raise AssertionError(f"{name} holds NaN or infinity")


def _deterministic(trial: Trial) -> None:
    block = trial.block()
    first = copied(trial.run(trial.mixer(), block))
    same(copied(trial.run(trial.mixer(), block)), first, 0.0, "deterministic: the same mixer built and run again")


def _pure(trial: Trial) -> None:
    mixer, block = trial.mixer(), trial.block()
    before = copied(block)
    _, state = trial.run(mixer, block)
    same(copied(block), before, 0.0, "pure: the inputs after the run")
    if hasattr(state, "tensors"):
        return  # an object that is filled as it goes
    kept = copied(state)
    trial.run(mixer, block.part(0, 5), state)
    same(copied(state), kept, 0.0, "pure: the state given to a block of tokens")


def _constant(trial: Trial) -> None:
    if not trial.constant_state:
        return
    mixer, sizes = trial.mixer(), []
    for factor in (1, 3):
        case = replace(trial.case, length=factor * trial.case.length)
        with torch.no_grad():
            _, state = trial.run(mixer, trial.block(case))
        sizes.append(sum(x.numel() * x.itemsize for _, x in leaves(state)))
    if sizes[0] != sizes[1]:
        raise AssertionError(f"constant: the state grew from {sizes[0]} to {sizes[1]} bytes with the sequence")


MIXER_LAWS: dict[str, Callable[[Trial], bool | None]] = {
    "shape": _shape,
    "causal": _causal,
    "chunked": _chunked,
    "stepwise": _stepwise,
    "batched": _batched,
    "packed": _packed,
    "padded": _padded,
    "grouped": _grouped,
    "reordered": _reordered,
    "gradients": _gradients,
    "gradcheck": _gradcheck,
    "bf16": _bf16,
    "large": _large,
    "deterministic": _deterministic,
    "pure": _pure,
    "constant": _constant,
    **NUMERIC_LAWS,
}
"""The laws of `check_mixer`, by name; one answers False where it has nothing to check."""

KNOWN = {**MIXER_LAWS, **SLOW_LAWS}
