"""Residual MLPs of two shapes, matched in size: a narrow skip and wide blocks, or an hourglass (arXiv:2510.01796)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, pad, relu, silu

from lineament._base.errors import InputError, unknown
from lineament._base.seeds import generator

SHAPES = ("conventional", "hourglass")
LIFTS = ("identity", "trained", "fixed", "hadamard")
ACTS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "relu": relu, "silu": silu}
NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "none": nn.Identity}


@dataclass(frozen=True, kw_only=True)
class ResidualMLPConfig:
    """The shape of a `ResidualMLP`, and what it costs.

    Args:
        inputs, outputs: d_x and d_y. skip: d_z, the width of the residual stream. hidden: d_h inside a block.
        blocks: L.
        lift: from d_x to d_z: "identity" (needs skip = inputs), "trained", "fixed" (random, entries N(0, 1/d_x), never
            trained, stored as its seed), or "hadamard" (fixed too: random signs, then chosen rows of a Hadamard matrix
            over sqrt(d_x), in O(d log d)).
        norm: before each block: "layer", "rms" or "none". act: "gelu", "relu" or "silu". bias: in the blocks.
        seed: of a fixed lift.

    Raises:
        InputError: an unknown name, a width below 1, or an identity between unequal widths.
    """

    inputs: int
    outputs: int
    skip: int
    hidden: int
    blocks: int
    lift: str = "identity"
    norm: str = "layer"
    act: str = "gelu"
    bias: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for kind, value, known in (("lift", self.lift, LIFTS), ("norm", self.norm, NORMS), ("act", self.act, ACTS)):
            if value not in known:
                raise unknown(kind, value, known)
        for name in ("inputs", "outputs", "skip", "hidden", "blocks"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.lift == "identity" and self.skip != self.inputs:
            raise InputError(f"no lift goes from {self.inputs} to a skip of {self.skip}; choose one of {LIFTS[1:]}")

    @property
    def shape(self) -> str:
        """Which of `SHAPES` it is: by which is wider, the skip or the inside of a block."""
        return "hourglass" if self.hidden < self.skip else "conventional"

    @property
    def trainable(self) -> int:
        """Parameters that learn."""
        norms = {"layer": 2, "rms": 1, "none": 0}[self.norm] * self.skip
        block = 2 * self.skip * self.hidden + norms + (self.skip + self.hidden if self.bias else 0)
        return self.blocks * block + self.outputs * self.skip + (self._lift if self.lift == "trained" else 0)

    @property
    def total(self) -> int:
        """Numbers that take part: those that learn and those of a fixed lift (the signs of a Hadamard one)."""
        return self.trainable + {"fixed": self._lift, "hadamard": self.inputs}.get(self.lift, 0)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one input in all linear maps; a fixed lift is not free (a Hadamard one: additions)."""
        size = _power(max(self.skip, self.inputs))
        lift = {"identity": 0, "hadamard": size * (size.bit_length() - 1)}.get(self.lift, self._lift)
        return lift + self.blocks * 2 * self.skip * self.hidden + self.outputs * self.skip

    @property
    def _lift(self) -> int:
        return self.inputs * self.skip


def matched(
    shape: str, inputs: int, outputs: int, budget: int, *, blocks: int, skip: int | None = None, count: str = "total",
    **fields: object,
) -> ResidualMLPConfig:  # fmt: skip
    """Return the largest net of a shape within a budget of parameters: the width inside its blocks is solved for.

    Args:
        shape: "conventional" (skip = inputs, no lift) or "hourglass" (skip wider than the inputs, lift "trained" unless
            `fields` say otherwise).
        budget: parameters. count: "total", or "trainable" where a fixed lift shall not count.
        skip: d_z; twice the inputs for an hourglass if None.
        fields: others of `ResidualMLPConfig`.

    Raises:
        InputError: unknown names, a budget too small for any block, or a result that has not the shape asked for.

    Example:
        >>> one, other = (matched(shape, 144, 144, 190_000, blocks=2) for shape in SHAPES)
        >>> one.hidden, other.hidden, one.total, other.total
        (292, 91, 189504, 188928)
    """
    if shape not in SHAPES:
        raise unknown("shape", shape, SHAPES)
    if count not in ("total", "trainable"):
        raise unknown("count", count, ("total", "trainable"))
    wide = shape == "hourglass"
    width = inputs if not wide else (skip or 2 * inputs)
    if not wide and skip not in (None, inputs):
        raise InputError(f"a conventional net's skip is its input, {inputs} wide; {skip} was given")
    given = {"lift": "trained" if wide else "identity", **fields}
    one = ResidualMLPConfig(inputs=inputs, outputs=outputs, skip=width, hidden=1, blocks=blocks, **given)  # type: ignore[arg-type]
    each = replace(one, hidden=2).trainable - one.trainable
    hidden = 1 + (budget - getattr(one, count)) // each
    if hidden < 1:
        raise InputError(
            f"{blocks} blocks on a skip of {width} have {getattr(one, count):,} parameters at the least; the budget is "
            f"{budget:,}: take fewer blocks or a narrower skip"
        )
    found = replace(one, hidden=hidden)
    if found.shape != shape:
        wanted = "below the skip" if wide else "above the skip"
        raise InputError(f"a budget of {budget:,} makes blocks {hidden} wide on a skip of {width}; {shape} is {wanted}")
    return found


class ResidualMLP(nn.Module):
    """`z_0 = lift x`, `z_{i+1} = z_i + W2_i s(W1_i norm(z_i))`, `y = W_out z_L`.

    W1, W2 and W_out start at N(0, 1/fan_in), W2 divided by sqrt(L), so that depth does not raise the residual stream's
    variance. A fixed lift is no part of the state dict: it is drawn again from its seed, on the CPU, wherever the net
    is built.

    Args:
        config: the shape. zero: start W2 at zero, so that the net starts as the linear map `W_out lift`.

    Example:
        >>> config = matched("hourglass", 16, 4, 3000, blocks=2, lift="fixed")
        >>> net = ResidualMLP(config)
        >>> net(torch.ones(3, 16)).shape, sum(p.numel() for p in net.parameters()) == config.trainable
        (torch.Size([3, 4]), True)
    """

    folded: Tensor | None

    def __init__(self, config: ResidualMLPConfig, *, zero: bool = False) -> None:
        super().__init__()
        self.config = config
        self.lift = _lift(config)
        self.blocks = nn.ModuleList(_Block(config, zero) for _ in range(config.blocks))
        self.out = nn.Linear(config.skip, config.outputs, bias=False)
        nn.init.normal_(self.out.weight, std=config.skip**-0.5)
        self.register_buffer("folded", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., d_x] to [..., d_y]."""
        if x.shape[-1] != self.config.inputs:
            raise InputError(f"x is {x.shape[-1]} wide; this net takes {self.config.inputs}")
        z = self.lift(x)
        for i, one in enumerate(self.blocks):
            block: Any = one
            inside = linear(x, self.folded, block.up.bias) if i == 0 and self.folded is not None else None
            z = z + block(z, inside)
        return self.out(z)

    @torch.no_grad()
    def fold_(self) -> None:
        """Multiply the first block's W1 into a dense lift for inference: that block then reads x, d_x wide, not z.

        Training on would leave the product behind; call `unfold_` first.

        Raises:
            InputError: a norm stands between, or the lift is no matrix.
        """
        if self.config.norm != "none" or self.config.lift not in ("trained", "fixed"):
            raise InputError(
                f"norm is {self.config.norm!r}, lift {self.config.lift!r}; folding needs norm 'none' and a dense lift"
            )
        first: Any = self.blocks[0]
        lift: Any = self.lift
        self.folded = first.up.weight @ lift.weight

    def unfold_(self) -> None:
        """Undo `fold_`."""
        self.folded = None


class _Block(nn.Module):
    def __init__(self, config: ResidualMLPConfig, zero: bool) -> None:
        super().__init__()
        self.act, self.norm = ACTS[config.act], NORMS[config.norm](config.skip)
        self.up = nn.Linear(config.skip, config.hidden, bias=config.bias)
        self.down = nn.Linear(config.hidden, config.skip, bias=config.bias)
        nn.init.normal_(self.up.weight, std=config.skip**-0.5)
        nn.init.normal_(self.down.weight, std=0.0 if zero else (config.hidden * config.blocks) ** -0.5)
        for bias in (self.up.bias, self.down.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, z: Tensor, inside: Tensor | None = None) -> Tensor:
        return self.down(self.act(self.up(self.norm(z)) if inside is None else inside))


class FixedLift(nn.Module):
    """x -> W x with W [d_z, d_x] of N(0, 1/d_x) drawn from a seed: E |Wx|^2 = (d_z / d_x) |x|^2."""

    weight: Tensor

    def __init__(self, inputs: int, skip: int, seed: int) -> None:
        super().__init__()
        drawn = torch.randn(skip, inputs, generator=generator(seed), dtype=torch.float32)
        self.register_buffer("weight", drawn * inputs**-0.5, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype))


class HadamardLift(nn.Module):
    """x -> P H D x / sqrt(d_x): random signs D, a Hadamard matrix H of a power of two, d_z rows P drawn from a seed.

    Over the signs every coordinate has mean square |x|^2 / d_x, as of the Gaussian lift.
    """

    signs: Tensor
    rows: Tensor

    def __init__(self, inputs: int, skip: int, seed: int) -> None:
        super().__init__()
        draw, self.size = generator(seed), _power(max(skip, inputs))
        signs = torch.randint(2, (inputs,), generator=draw).float() * 2 - 1
        self.register_buffer("signs", signs * inputs**-0.5, persistent=False)
        self.register_buffer("rows", torch.randperm(self.size, generator=draw)[:skip].sort().values, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad(x * self.signs.to(x.dtype), (0, self.size - x.shape[-1]))
        return hadamard(x).index_select(-1, self.rows)


def hadamard(x: Tensor) -> Tensor:
    """Multiply the last axis, a power of two, by the Hadamard matrix of +-1 (Sylvester's), in O(n log n).

    Example:
        >>> hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
        [10.0, -2.0, -4.0, 0.0]
    """
    size, step = x.shape[-1], 1
    if size != _power(size):
        raise InputError(f"the last axis is {size} wide; a Hadamard matrix here has a power of two")
    while step < size:
        a, b = x.unflatten(-1, (size // (2 * step), 2, step)).unbind(-2)
        x, step = torch.stack([a + b, a - b], dim=-2).flatten(-3), 2 * step
    return x


def _lift(config: ResidualMLPConfig) -> nn.Module:
    if config.lift == "identity":
        return nn.Identity()
    if config.lift == "trained":
        made = nn.Linear(config.inputs, config.skip, bias=False)
        nn.init.normal_(made.weight, std=config.inputs**-0.5)
        return made
    return {"fixed": FixedLift, "hadamard": HadamardLift}[config.lift](config.inputs, config.skip, config.seed)


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()
