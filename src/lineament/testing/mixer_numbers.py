"""Laws of `check_mixer` about numbers: every way to compute the same, precision, extreme gates, traced graphs."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from lineament._base.seeds import generator
from lineament.testing.compare import leaves, same
from lineament.testing.trial import Trial

FLOAT32 = 1e-4


def chooses(module: nn.Module) -> bool:
    """Say whether a module's operator has backends to choose from."""
    return hasattr(module, "backend")


@contextmanager
def forced(mixer: nn.Module, backend: str) -> Iterator[bool]:
    """Run a block with a backend forced in every module that has one; says whether there was any."""
    found = [module for module in mixer.modules() if chooses(module)]
    before = [module.backend for module in found]
    try:
        for module in found:
            module.backend = backend  # pyright: ignore[reportArgumentType]
        yield bool(found)
    finally:
        for module, name in zip(found, before, strict=True):
            module.backend = name


def _loop(trial: Trial) -> None:
    for length in (1, 3, 21):
        case = replace(trial.case, length=length)
        mixer, block = trial.mixer(case), trial.block(case)
        whole, steps = trial.slopes(mixer, block), trial.slopes(mixer, block, range(1, length))
        same(steps, whole, 10 * trial.tolerance, f"loop, T={length}: result and gradients token by token")


def _backends(trial: Trial) -> bool:
    mixer, block = trial.mixer(), trial.block()
    with forced(mixer, "reference") as any_choice:
        if not any_choice:
            return False
        expected = trial.slopes(mixer, block)
    every = [set(getattr(m, "backends", ("chunked", "chunked-autograd"))) for m in mixer.modules() if chooses(m)]
    for backend in sorted(set.intersection(*every)):
        with forced(mixer, backend):
            same(trial.slopes(mixer, block), expected, trial.tolerance, f"backends: {backend} beside the reference")
    return True


def _float32(trial: Trial) -> None:
    mixer, block = trial.mixer().double(), trial.block().map(Tensor.double)
    narrow = copy.deepcopy(mixer).float()
    found = trial.slopes(narrow, block.map(Tensor.float))
    same(found, trial.slopes(mixer, block), FLOAT32, "float32: result and gradients beside float64")


def _extreme(trial: Trial) -> None:
    """Tokens of length 0, 1e-6, 1, 50 and 1e3 in turns drive every gate to both of its ends."""
    case = replace(trial.case, length=max(trial.case.length, 40))
    which = torch.randint(0, 5, (case.batch, case.length, 1), generator=generator(case.seed + 3))
    size = torch.tensor([0.0, 1e-6, 1.0, 50.0, 1e3], dtype=torch.float64)[which].to(case.device, case.dtype)
    mixer, block = trial.mixer(case), trial.block(case)
    block = block.changed(x=block.named["x"] * size)
    whole = trial.slopes(mixer, block)
    for name, x in leaves(whole, "extreme: result and gradients"):
        if not x.isfinite().all():
            raise AssertionError(f"{name} holds NaN or infinity")
    with torch.no_grad():
        steps, _ = trial.cut(mixer, block, range(1, case.length))
    same(steps, whole[0], 10 * trial.tolerance, "extreme: token by token beside the whole")
    with forced(mixer, "reference") as any_choice:
        if any_choice:
            same(trial.slopes(mixer, block), whole, 100 * trial.tolerance, "extreme: the reference beside the default")


def _compiled(trial: Trial) -> None:
    mixer, block = trial.mixer(), trial.block()
    expected = trial.slopes(mixer, block)
    torch.compiler.reset()
    compiled = torch.compile(_Whole(trial, mixer), backend="aot_eager")
    given = block.map(lambda x: x.clone().requires_grad_())
    o = compiled(*given.tensors().values())
    same(o, expected[0], trial.tolerance, "compiled: result")
    weight = torch.arange(o.numel(), device=o.device, dtype=torch.float64).view(o.shape).sin().to(o.dtype)
    wanted = list(given.tensors().values())
    slopes = torch.autograd.grad((o * weight).sum(), wanted, allow_unused=True)
    slopes = [torch.zeros_like(x) if g is None else g for g, x in zip(slopes, wanted, strict=True)]
    same(slopes, expected[1 : 1 + len(slopes)], 10 * trial.tolerance, "compiled: gradients")


def _exported(trial: Trial) -> None:
    mixer, block = trial.mixer(), trial.block()
    T = torch.export.Dim("T", min=2, max=4096)
    whole = _Whole(trial, mixer)
    with torch.no_grad():
        program = torch.export.export(
            whole, tuple(block.tensors().values()), dynamic_shapes={"named": tuple({1: T} for _ in block.named)}
        ).module()
        for length in (5, trial.case.length, trial.case.length + 64):
            given = tuple(trial.block(replace(trial.case, length=length)).tensors().values())
            same(program(*given), whole(*given), trial.tolerance, f"exported, T={length}")


class _Whole(nn.Module):
    """A mixer over whole sequences as a function of tensors alone."""

    def __init__(self, trial: Trial, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer, self.names = mixer, list(trial.block().named)

    def forward(self, *named: Tensor) -> Tensor:
        if len(named) == 1:
            return self.mixer(*named)
        return self.mixer(**dict(zip(self.names, named, strict=True)))[0]


def _long(trial: Trial, length: int = 100_000, block: int = 4000) -> None:
    case = replace(trial.case, batch=1, length=length)
    inputs = trial.block(case).map(Tensor.float)
    # the same numbers for both: a learned angle rounded alone is off by 6e-3 after so many tokens
    narrow = trial.mixer(replace(case, dtype=torch.float64)).float()
    wide = copy.deepcopy(narrow).double()
    with torch.no_grad():
        places = range(block, length, block)
        found, _ = trial.cut(narrow, inputs, places)
        expected, _ = trial.cut(wide, inputs.map(Tensor.double), places)
    same(found[:, -block:], expected[:, -block:], 1e-3, f"long: the last {block} of {length} tokens in float32")


NUMERIC_LAWS: dict[str, Callable[[Trial], bool | None]] = {
    "loop": _loop,
    "backends": _backends,
    "float32": _float32,
    "extreme": _extreme,
}
SLOW_LAWS: dict[str, Callable[[Trial], bool | None]] = {"compiled": _compiled, "exported": _exported, "long": _long}
"""Laws that take seconds to a minute, by name; checked where they are asked for."""
