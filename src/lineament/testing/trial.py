"""What `check_mixer` tries: one mixer, how it is built, fed and compared."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.seeds import generator, seeded
from lineament.testing.compare import same

Make = Callable[..., nn.Module]


@dataclass(frozen=True, kw_only=True)
class MixerCase:
    """The shape of a trial."""

    batch: int = 2
    length: int = 70
    heads: int = 4
    key_heads: int = 2
    key_width: int = 8
    value_width: int = 8
    model_width: int = 16
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    seed: int = 0

    def shape(self) -> dict[str, int]:
        """What the mixer is built from."""
        names = ("heads", "key_heads", "key_width", "value_width", "model_width")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Block:
    """The inputs of a call by name: q (scaled), k, v and x of a head mixer; x alone of a layer."""

    named: dict[str, Tensor]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Block":
        return Block({name: function(each) for name, each in self.named.items()})

    def part(self, begin: int, end: int | None = None) -> "Block":
        return self.map(lambda each: each[:, begin:end])

    def tensors(self) -> dict[str, Tensor]:
        return self.named

    def changed(self, **named: Tensor) -> "Block":
        return Block({**self.named, **named})

    @property
    def length(self) -> int:
        return self.named["x"].shape[1]


@dataclass(frozen=True)
class Trial:
    """One mixer under test, and how it is built, fed and compared."""

    make: Make
    case: MixerCase
    begin: Callable[[], Any]
    shake: float
    constant_state: bool
    tolerance: float

    def mixer(self, case: MixerCase | None = None) -> nn.Module:
        case = case or self.case
        with seeded(case.seed):
            mixer = self.make(**case.shape())
        noise = generator(case.seed + 1)
        with torch.no_grad():
            for parameter in mixer.parameters():
                if parameter.is_floating_point():
                    parameter += self.shake * torch.randn(parameter.shape, generator=noise).to(parameter)
        return mixer.to(case.device, case.dtype).eval()

    @cached_property
    def layer(self) -> bool:
        """Whether it is a whole layer (x in, y out, a cache that is filled) and no head mixer."""
        return "q" not in inspect.signature(self.make(**self.case.shape()).forward).parameters

    def block(self, case: MixerCase | None = None, salt: int = 0) -> Block:
        case = case or self.case
        random = generator(case.seed * 100 + salt)

        def draw(*shape: int) -> Tensor:
            values = torch.randn(case.batch, case.length, *shape, generator=random, dtype=torch.float64)
            return values.to(case.device, case.dtype)

        if self.layer:
            return Block({"x": draw(case.model_width)})
        shapes = {"q": (case.heads, case.key_width), "k": (case.key_heads, case.key_width)}
        shapes |= {"v": (case.key_heads, case.value_width), "x": (case.model_width,)}
        named = {name: draw(*shape) for name, shape in shapes.items()}
        return Block({**named, "q": named["q"] * case.key_width**-0.5})

    def run(self, mixer: Callable[..., Any], block: Block, state: Any = None, **keywords: Any) -> tuple[Tensor, Any]:
        state = self.begin() if state is None else state
        if self.layer:
            return mixer(block.named["x"], cache=state, **keywords), state
        return mixer(**block.named, state=state, **keywords)

    def slopes(self, mixer: nn.Module, block: Block, places: Sequence[int] = ()) -> list[Tensor]:
        """Return the result, and the gradients of a fixed sum of it wrt the inputs and parameters."""
        given = block.map(lambda x: x.clone().requires_grad_())
        o, _ = self.cut(mixer, given, places)
        weight = torch.arange(o.numel(), device=o.device, dtype=torch.float64).view(o.shape).sin().to(o.dtype)
        wanted = [*given.tensors().values(), *(p for p in mixer.parameters() if p.requires_grad)]
        slopes = torch.autograd.grad((o * weight).sum(), wanted, allow_unused=True)
        return [o, *(torch.zeros_like(x) if g is None else g for g, x in zip(slopes, wanted, strict=True))]

    def same(self, found: Any, expected: Any, what: str) -> None:
        """Compare two (result, state), or results alone where states may hold spare room."""
        if not self.constant_state:
            found, expected = found[0], expected[0]
        same(found, expected, self.tolerance, what)

    def cut(self, mixer: nn.Module, block: Block, places: Sequence[int]) -> tuple[Tensor, Any]:
        outputs, state = [], None
        for begin, end in zip([0, *places], [*places, block.length], strict=True):
            o, state = self.run(mixer, block.part(begin, end), state)
            outputs.append(o)
        return torch.cat(outputs, 1), state
