"""The symmetry group of a model, derived from its traced graph and checked before use."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lineament import graph
from lineament._base.errors import LineamentError
from lineament._base.seeds import generator
from lineament.graph import Axes, AxisClass
from lineament.weights.elements import Element, Permutation

ALLOWED = 1e-10  # change of an output, of its largest entry


@dataclass(frozen=True)
class Symmetry:
    """A group of permutations of a model's hidden positions that leave its function alone.

    Attributes:
        classes: free and frozen classes of positions; a class is permuted apart for each position of its outer ones.
        axes: how the classes lie in the parameters, and the graph they were read from.
        aliases: names of tied parameters -> the name under which they are kept.
        error: the largest change of the output in the self-check, relative to its largest entry.
    """

    classes: tuple[AxisClass, ...]
    axes: Axes = field(repr=False)
    aliases: Mapping[str, str] = field(repr=False)
    error: float = math.nan

    @property
    def free(self) -> tuple[int, ...]:
        """The classes that may be permuted."""
        return tuple(i for i, cls in enumerate(self.classes) if not cls.frozen)

    @property
    def log10_order(self) -> float:
        """log10 of the number of elements.

        Example:
            >>> mlp = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
            >>> round(10 ** symmetry(mlp, torch.ones(1, 2)).log10_order)
            6
        """
        return math.fsum(self.copies(i) * math.lgamma(self.classes[i].size + 1) / math.log(10) for i in self.free)

    def copies(self, cls: int) -> int:
        """Return for how many outer positions a class is permuted apart."""
        return math.prod(self.classes[o].size for o in self.classes[cls].outer)

    def reasons(self) -> dict[str, str]:
        """Say for each dimension of a parameter that keeps its order what keeps it."""
        return {f"{name}[{dim}]": cls.why for cls in self.classes if cls.why for name, dim in cls.members}

    def element(self, perms: Mapping[int, Tensor]) -> Element:
        """Return the element with these permutations, class -> int64 [outer sizes ..., n]."""
        return Element((Permutation(self.classes, self.axes.tensors, dict(perms)),), self.aliases)

    def identity(self) -> Element:
        """Return the element that moves nothing."""
        return self.element({cls: self.still(cls) for cls in self.free})

    def still(self, cls: int) -> Tensor:
        """Return the permutation of a class that moves nothing."""
        sizes = [self.classes[o].size for o in self.classes[cls].outer]
        return torch.arange(self.classes[cls].size).expand(*sizes, -1).contiguous()

    def random(self, seed: int | torch.Generator, classes: Iterable[int] | None = None) -> Element:
        """Draw an element; every class (of those given) is moved, at each of its outer positions."""
        draw = seed if isinstance(seed, torch.Generator) else generator(seed)
        perms = {}
        for cls in self.free if classes is None else classes:
            still = self.still(cls)
            perm = torch.rand(still.shape, generator=draw).argsort(-1)
            same = (perm == still).all(-1, keepdim=True)
            perms[cls] = torch.where(same, still.roll(1, -1), perm)
        return self.element(perms)

    def __str__(self) -> str:
        frozen = len(self.classes) - len(self.free)
        return f"{len(self.free)} free classes, {frozen} frozen, 10^{self.log10_order:.1f} elements"


def symmetry(model: nn.Module, *args: Any, check: int = 1, **kwargs: Any) -> Symmetry:
    """Derive the permutation symmetries of a model from its graph.

    Axes are tied, cut and frozen operator by operator (`graph.axes`); residual streams, heads, groups of heads, units
    and experts come out as classes. Before the group is returned, random elements are tried on a copy whose every
    parameter and float buffer is jittered, in float64; a class that changes the function there is frozen, with that as
    the reason.

    Args:
        model: any module whose forward pass can be traced; taken in eval mode, not changed. Of an output with `logits`
            only these count; otherwise all tensors of the output keep their order.
        args, kwargs: an example call. Float inputs that are one number throughout are replaced by noise in the check.
        check: how many random elements to try; 0 trusts the derivation.

    Raises:
        InputError: the model can't be traced. SymmetryError: the model gives NaN in the check.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
        >>> print(symmetry(net, torch.zeros(1, 3, 4, 4)))
        1 free classes, 6 frozen, 10^4.6 elements
    """
    axes = graph.axes(model, *args, **kwargs)
    aliases = {alias: owner for owner, *others in graph.tied(model) for alias in others}
    found = Symmetry(axes.classes, axes, aliases)
    return checked(found, model, args, kwargs, tries=check) if check else found


class SymmetryError(LineamentError):
    """The self-check could not be carried out."""


def checked(
    found: Symmetry, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, tries: int = 1, seed: int = 0
) -> Symmetry:
    """Try random elements on a jittered copy; freeze the classes that change the function.

    Returns:
        The group, smaller where classes failed, with the largest relative error of what is left.
    """
    trial = Trial(model, args, kwargs, seed)
    draw = generator(seed + 1)
    free, worst = list(found.free), 0.0
    for _ in range(tries):
        error = trial.error(found.random(draw, free))
        while error > ALLOWED:
            bad = _failing(found, trial, free, draw)
            free = [cls for cls in free if cls not in bad]
            why = "the self-check failed: permuting it changes the function"
            changed = tuple(replace(c, why=why) if i in bad else c for i, c in enumerate(found.classes))
            found = replace(found, classes=changed)
            error = trial.error(found.random(draw, free))
        worst = max(worst, error)
    return replace(found, error=worst)


def _failing(found: Symmetry, trial: Trial, classes: Sequence[int], draw: torch.Generator) -> set[int]:
    """Find the classes that change the function, by halves."""
    if not classes or trial.error(found.random(draw, classes)) <= ALLOWED:
        return set()
    if len(classes) == 1:
        return set(classes)
    half = len(classes) // 2
    bad = _failing(found, trial, classes[:half], draw) | _failing(found, trial, classes[half:], draw)
    return bad or set(classes)  # together only: none of them can be trusted


class Trial:
    """A model's function at a generic point: a jittered copy in float64, and how far an element changes it."""

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], seed: int = 0) -> None:
        self.model = copy.deepcopy(model).double().eval().requires_grad_(False)
        draw = generator(seed)
        with torch.no_grad():
            for tensor in self.model.parameters():
                _jitter_(tensor, draw)
            for name, tensor in self.model.named_buffers():
                if name.endswith("running_var"):
                    tensor.mul_((0.3 * torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype)).exp())
                else:
                    _jitter_(tensor, draw)
        self.args, self.kwargs = pytree.tree_map(lambda x: _generic(x, draw), (tuple(args), dict(kwargs)))
        self.state = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        self.at: Element | None = None  # where the copy was moved to; it is moved in place, since it may be large
        self.before = self.outputs()
        if not all(bool(torch.isfinite(x).all()) for x in self.before):
            raise SymmetryError(f"{type(model).__name__} gives NaN or infinity at a jittered point; check with check=0")

    def outputs(self) -> list[Tensor]:
        with torch.no_grad(), graph.InDouble():  # norms, rotary positions and softmax cast to float32
            found = self.model(*self.args, **self.kwargs)
        found = found.logits if isinstance(getattr(found, "logits", None), Tensor) else found
        return [x for x in pytree.tree_leaves(found) if isinstance(x, Tensor) and x.is_floating_point()]

    def error(self, element: Element) -> float:
        """Return the largest change of an output, relative to the largest entry."""
        after = self.outputs_at(element)
        top = max((float(x.abs().max()) for x in self.before if x.numel()), default=1.0) or 1.0
        gaps = [float((x - y).abs().max()) for x, y in zip(self.before, after, strict=True) if x.numel()]
        return max(gaps, default=0.0) / top if all(map(math.isfinite, gaps)) else math.inf

    def outputs_at(self, element: Element) -> list[Tensor]:
        """Return the outputs after an element has moved the copy."""
        for step in ([] if self.at is None else [self.at.inverse()]) + [element]:
            for name, x in self.state.items():
                moved = step.act(name, x)
                if moved is not x:
                    x.copy_(moved)
        self.at = element
        return self.outputs()


def _jitter_(x: Tensor, draw: torch.Generator) -> None:
    """Make w into w (1 + 0.1 n) + 0.1 n, n of variance 1; a matrix's second noise is of its own size, or sums swell."""
    if not x.is_floating_point() or not x.numel():
        return
    size = 1.0 if x.dim() < 2 else float(x.square().mean().sqrt()) or x[0].numel() ** -0.5
    for factor in (None, size):
        noise = (
            torch.rand(x.shape, generator=draw).sub_(0.5).mul_(0.1 * math.sqrt(12))
        )  # (five times faster than randn)
        if factor is None:
            x.mul_(noise.add_(1))
        else:
            x.add_(noise, alpha=factor)


def _generic(x: Any, draw: torch.Generator) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    noise = torch.randn(x.shape, generator=draw, dtype=torch.float64)
    return noise if x.numel() and bool((x == x.flatten()[0]).all()) else x.double()
