"""Models as points: names -> tensors, with arithmetic that is written down first and carried out tensor by tensor.

A point is a linear combination of sources (folders, state dicts, adapters, merges). Adding and subtracting only adds
and subtracts coefficients, so that `base + (tuned - base)` is `tuned` to the last bit, and nothing is read before a
tensor is asked for.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError, near_miss
from lineament.weights.geometry import combined, dot_product, slerp, wide

Coefficient = float | Mapping[str, float] | Callable[[str], float]
"""One number; {glob over names: number}, where the first glob that fits counts; or a function of the name."""


@dataclass(frozen=True)
class Spec:
    """Dtype and shape of a tensor that was not read yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def floating(self) -> bool:
        """Whether arithmetic applies; integers and booleans are carried along and must agree."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Source:
    """Where numbers come from: a label for messages, the specs, and how one tensor is read (never written to).

    `sparse`: names it lacks are zeros (an adapter's product). `fingerprint`: tells one content from another without
    reading it; None where that can't be told. `files`: what is read. `rounded`: evaluates and rounds in one pass, where
    that is faster than `load`.
    """

    label: str
    specs: Mapping[str, Spec]
    load: Callable[[str], Tensor]
    sparse: bool = False
    fingerprint: str | None = None
    files: tuple[Path, ...] = ()
    rounded: Callable[[str, torch.dtype], Tensor] | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Point(Mapping[str, Tensor]):
    """A model as a point in weight space; see `Point.open`.

    `point[name]` is the tensor rounded to `point.dtype(name)`; `point.value(name)` the same before rounding, in float32
    or wider. Names of tied weights resolve to their owner and are counted once; integer tensors of all models in an
    expression must agree and are carried along. Treat what you get as read-only: it may be the file itself.

    Example:
        >>> a, b = Point.open({"w": torch.ones(2)}), Point.open({"w": torch.zeros(2)})
        >>> (a + 0.5 * (b - a))["w"].tolist(), (a - b).norm() ** 2
        ([0.5, 0.5], 2.0000000000000004)
    """

    terms: tuple[tuple[Source, Coefficient], ...]
    ties: Mapping[str, str] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    cast: torch.dtype | None = None

    @classmethod
    def open(cls, model: "str | Path | nn.Module | Mapping[str, Tensor] | Point", **options: Any) -> "Point":
        """Open a model; nothing but headers is read.

        Args:
            model: a folder, a Hub name, "smollm2", a GGUF file (dequantised to float32 when it is unpacked), a
                safetensors file, a module or state dict (copied), or the folder of a LoRA adapter.
            options: `base`, `lora`, `any_base` (adapters); `dequantise` (packed weights); `rename` ({old prefix: new
                prefix}); `copy` (False: a state dict is used as it is). See `weights.sources.open_point`.

        Raises:
            InputError: nothing there, pickles, missing shards, truncated files, packed weights, a foreign adapter.
        """
        from lineament.weights.sources import open_point

        return open_point(model, **options)

    # -- what is there -------------------------------------------------------------------------------------------

    @property
    def specs(self) -> dict[str, Spec]:
        """Name -> dtype and shape, tied names left out, in the order of the first source."""
        whole = [source for source, _ in self.terms if not source.sparse] or [source for source, _ in self.terms]
        names = dict.fromkeys(name for source in whole for name in source.specs if name not in self.ties)
        return {name: self._spec(name) for name in names}

    def _spec(self, name: str) -> Spec:
        found = [source.specs[name] for source, _ in self.terms if name in source.specs]
        dtype = found[0].dtype
        for spec in found[1:]:
            dtype = torch.promote_types(dtype, spec.dtype) if spec.dtype != dtype else dtype
        return Spec(self.cast if self.cast and found[0].floating else dtype, found[0].shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype a tensor is rounded to."""
        return self._known(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._known(name).shape

    def nbytes(self, name: str | None = None) -> int:
        """The bytes of one tensor once written, or of all."""
        specs = self.specs
        return sum(spec.nbytes for spec in specs.values()) if name is None else self._known(name).nbytes

    def _known(self, name: str) -> Spec:
        owner = self.ties.get(name, name)
        if not any(owner in source.specs for source, _ in self.terms):
            raise InputError(f"{self.label} has no tensor {name!r}.{near_miss(name, self.specs)}")
        return self._spec(owner)

    @property
    def label(self) -> str:
        """A short name for messages: the sources and their numbers."""
        if len(self.terms) == 1 and self.terms[0][1] == 1:
            return self.terms[0][0].label
        parts = [f"{c:g} x {s.label}" if isinstance(c, int | float) else f"blocks of {s.label}" for s, c in self.terms]
        return " + ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read when the point is written."""
        return tuple(dict.fromkeys(file for source, _ in self.terms for file in source.files))

    @property
    def fingerprint(self) -> str | None:
        """Tells whether two expressions are the same work; None when a source lives in memory only."""
        told = []
        for source, c in self.terms:
            blocks = None if isinstance(c, int | float) else [(n, self._scale(c, n)) for n in sorted(source.specs)]
            told.append((source.fingerprint, blocks or c))
        if any(mark is None for mark, _ in told):
            return None
        return hashlib.sha256(json.dumps([told, str(self.cast)]).encode()).hexdigest()

    # -- numbers -------------------------------------------------------------------------------------------------

    def value(self, name: str) -> Tensor:
        """Evaluate one tensor in float32 or wider, not rounded.

        Raises:
            InputError: no such name, or an integer tensor on which the models differ.
        """
        return wide(self.read(name))

    def read(self, name: str) -> Tensor:
        """Return a tensor as stored where the point is one source, and else its value in float32 or wider."""
        spec, owner = self._known(name), self.ties.get(name, name)
        if not spec.floating:
            return self._agreed(owner)
        found = self._coefficients(owner)
        if len(found) == 1 and found[0][1] == 1.0:
            return found[0][0].load(owner)
        return _summed(found, owner, spec, torch.promote_types(spec.dtype, torch.float32))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        spec, owner = self._known(name), self.ties.get(name, name)
        found = self._coefficients(owner) if spec.floating else []
        if len(found) == 1 and found[0][1] == 1.0:
            source = found[0][0]
            return source.rounded(owner, spec.dtype) if source.rounded else source.load(owner).to(spec.dtype)
        return _summed(found, owner, spec, spec.dtype) if spec.floating else self._agreed(owner)

    def __contains__(self, name: object) -> bool:
        owner = self.ties.get(name, name) if isinstance(name, str) else name
        return any(owner in source.specs for source, _ in self.terms)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __repr__(self) -> str:
        return f"Point({self.label}: {len(self)} tensors, {self.nbytes()} bytes)"

    def _coefficients(self, name: str) -> list[tuple[Source, float]]:
        """Add up each source's coefficients, exactly rounded, so that what cancels is gone."""
        sums: dict[Any, tuple[Source, list[float]]] = {}
        for source, c in self.terms:
            if name in source.specs:  # the same file opened twice is one source
                sums.setdefault(source.fingerprint or source, (source, []))[1].append(self._scale(c, name))
        totals = [(source, math.fsum(parts)) for source, parts in sums.values()]
        return [(source, c) for source, c in totals if c != 0.0]

    @staticmethod
    def _scale(c: Coefficient, name: str) -> float:
        if isinstance(c, int | float):
            return float(c)
        if isinstance(c, Mapping):
            fits = next((number for glob, number in c.items() if fnmatchcase(name, glob)), None)
            if fits is None:
                raise InputError(f"no coefficient for {name!r}; the globs are {', '.join(c)}; add '*' for the rest")
            return float(fits)
        return float(c(name))

    def _agreed(self, name: str) -> Tensor:
        sources = list(dict.fromkeys(source for source, _ in self.terms if name in source.specs))
        first = sources[0].load(name)
        for other in sources[1:]:
            if not torch.equal(first, other.load(name)):
                raise InputError(
                    f"{name!r} is {first.dtype} and differs between {sources[0].label} and {other.label}; integer "
                    f"tensors must agree (take one side's with point.replace)"
                )
        return first

    # -- arithmetic ----------------------------------------------------------------------------------------------

    def __add__(self, other: "Point") -> "Point":
        return self._joined(other, 1.0)

    def __sub__(self, other: "Point") -> "Point":
        return self._joined(other, -1.0)

    def __mul__(self, by: Coefficient) -> "Point":
        return self.scale(by)

    __rmul__ = __mul__

    def __truediv__(self, by: float) -> "Point":
        return self.scale(1.0 / by)

    def __neg__(self) -> "Point":
        return self.scale(-1.0)

    def scale(self, by: Coefficient) -> "Point":
        """Multiply by a number, or block by block by {glob: number} or a function of the name.

        Raises:
            InputError: a coefficient is not a finite number. A name without a coefficient is noticed when it is read.
        """
        numbers = by.values() if isinstance(by, Mapping) else [] if callable(by) else [by]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise InputError(f"coefficient {number!r} is not a finite number")
        return replace(self, terms=tuple((source, _times(c, by)) for source, c in self.terms))

    def interpolate(self, other: "Point", t: float) -> "Point":
        """`(1 - t) self + t other`; t outside [0, 1] extrapolates."""
        return self.scale(1.0 - t) + other.scale(t)

    def slerp(self, other: "Point", t: float) -> "Point":
        """Go along the arc between two points, each tensor on its own; nearly parallel ones in a straight line."""
        together = self + other
        specs = together.specs

        def arc(name: str) -> Tensor:
            floating = specs[name].floating
            return slerp(self.value(name), other.value(name), t) if floating else together.value(name)

        return together.computed(f"slerp({self.label}, {other.label}, {t})", specs, [self, other], arc, told=t)

    def dot(self, other: "Point") -> float:
        """Inner product over all parameters (tied ones once, buffers not), summed in float64."""
        together = self + other  # names and shapes are checked here
        return math.fsum(dot_product(self._or_zero(n, s), other._or_zero(n, s)) for n, s in together._parameters())

    def norm(self) -> float:
        """Euclidean norm over all parameters."""
        squares = (dot_product(x, x) for x in (self.value(name) for name, _ in self._parameters()))
        return math.sqrt(math.fsum(squares))

    def angle(self, other: "Point") -> float:
        """Angle between two points as vectors, in radians; NaN where one is zero or holds NaN."""
        product = self.norm() * other.norm()
        return math.acos(min(max(self.dot(other) / product, -1.0), 1.0)) if product else math.nan

    def _parameters(self) -> list[tuple[str, Spec]]:
        return [(name, spec) for name, spec in self.specs.items() if spec.floating and name not in self.buffers]

    def _or_zero(self, name: str, spec: Spec) -> Tensor:
        return self.value(name) if name in self else torch.zeros(spec.shape)

    def _joined(self, other: "Point", sign: float) -> "Point":
        if not isinstance(other, Point):
            return NotImplemented
        from lineament.weights.differences import check_alike

        check_alike(self, other)
        sparse = all(source.sparse for source, _ in self.terms)
        like = other if sparse else self
        return replace(
            like, terms=self.terms + tuple((source, _times(c, sign)) for source, c in other.terms),
            buffers=self.buffers | other.buffers, folder=self.folder or other.folder,
            config=like.config if like.folder else {**other.config, **like.config},
            cast=self.cast if self.cast == other.cast else None,
        )  # fmt: skip

    # -- other forms ---------------------------------------------------------------------------------------------

    def computed(
        self, label: str, specs: Mapping[str, Spec], inputs: "Sequence[Point]", load: Callable[[str], Tensor], *,
        told: Any = None, rounded: Callable[[str, torch.dtype], Tensor] | None = None,
    ) -> "Point":  # fmt: skip
        """Return a point like this one whose tensors come from a function of the name; `told` names its settings."""
        marks = [point.fingerprint for point in inputs]
        text = json.dumps([label, told, marks], default=str)
        mark = None if None in marks else hashlib.sha256(text.encode()).hexdigest()
        files = tuple(dict.fromkeys(file for point in inputs for file in point.files))
        source = Source(label, dict(specs), load, fingerprint=mark, files=files, rounded=rounded)
        return replace(self, terms=((source, 1.0),), cast=None)

    def to(self, dtype: torch.dtype) -> "Point":
        """Round floating tensors to another dtype when they are read or written; integers stay."""
        return replace(self, cast=dtype)

    def replace(self, tensors: Mapping[str, Tensor]) -> "Point":
        """Return a point with some tensors exchanged for given ones.

        Raises:
            InputError: a name is unknown, a shape differs, or tied names are given different tensors.
        """
        new: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if self.shape(name) != tuple(tensor.shape):
                raise InputError(f"{name!r} has shape {self.shape(name)}; the tensor given {tuple(tensor.shape)}")
            owner = self.ties.get(name, name)
            if new.setdefault(owner, tensor) is not tensor and not torch.equal(new[owner], tensor):
                raise InputError(f"the names tied to {owner!r} are given different tensors; untie them (point.untie())")
        specs = {n: Spec(new[n].dtype, s.shape) if n in new else s for n, s in self.specs.items()}
        source = Source(self.label, specs, lambda name: new[name] if name in new else self.read(name), files=self.files)
        return replace(self, terms=((source, 1.0),), cast=None)

    def untie(self) -> "Point":
        """Give tied names tensors of their own; the saved config says so."""
        specs = {**self.specs, **{name: self._known(name) for name in self.ties}}
        loose = self.computed(self.label, specs, [self], self.value, told="untied")
        return replace(loose, ties={}, config={**self.config, "tie_word_embeddings": False})

    def state_dict(self) -> dict[str, Tensor]:
        """Read everything, tied names as the same tensor: what `load_state_dict` takes."""
        found = {name: self[name].clone() for name in self}
        return found | {alias: found[owner] for alias, owner in self.ties.items()}

    def load_into(self, model: nn.Module) -> nn.Module:
        """Copy the numbers into a module's parameters and buffers, one tensor in memory at a time. Returns the module.

        Raises:
            InputError: the module has a tensor the point lacks, or a shape differs.
        """
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if self.shape(name) != tuple(tensor.shape):
                    raise InputError(f"{name!r} has shape {self.shape(name)}; the module's {tuple(tensor.shape)}")
                tensor.copy_(self.value(name))
        return model

    def save(self, folder: str | Path, **options: Any) -> Path:
        """Write the point as a model folder that transformers reads; it appears complete or not at all.

        Args:
            folder: must not exist. Work happens in FOLDER.partial and goes on there after a kill.
            options: `dtype`, `max_shard_size`, `config`, `card`, `progress`, `resume`; see `weights.write.write_point`.

        Raises:
            InputError: the folder exists, a tensor holds NaN or infinity (named), no space.
        """
        from lineament.weights.write import write_point

        return write_point(self, folder, **options)


def _summed(found: list[tuple[Source, float]], name: str, spec: Spec, dtype: torch.dtype) -> Tensor:
    if not found:
        return torch.zeros(spec.shape, dtype=dtype)
    return combined([source.load(name) for source, _ in found], [c for _, c in found], dtype)


def _times(c: Coefficient, by: Coefficient) -> Coefficient:
    if isinstance(c, int | float) and isinstance(by, int | float):
        return c * by
    if by == 1.0:
        return c
    if c == 1.0:
        return by
    return lambda name: Point._scale(c, name) * Point._scale(by, name)
