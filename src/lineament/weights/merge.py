"""One door to all merges: points in, a point out, nothing computed before it is read or saved."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lineament._base.errors import InputError, near_miss, unknown
from lineament._base.seeds import generator
from lineament.weights.differences import check_alike, listed
from lineament.weights.geometry import pieces
from lineament.weights.methods import ALIASES, KINDS, METHODS, NEEDED, Method
from lineament.weights.point import Point, Spec
from lineament.weights.settings import check_setting, evaluate, layer_places, number
from lineament.weights.write import check_tensor

Where = tuple[Point, str]
"""A tensor: a point and a name in it."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """How one tensor of the result is made: from which tensors, with which options, already resolved."""

    inputs: tuple[Where, ...]
    base: Where | None
    options: Mapping[str, Any]
    statistics: tuple[Where | None, ...] = ()


class Inputs(Sequence[Tensor]):
    """Tensors that are read when they are looked at, one after the other, and checked to be finite."""

    def __init__(self, places: Sequence[Where]) -> None:
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        point, name = self.places[index]
        tensor = point.read(name)
        check_tensor(name, tensor, point.label)
        return tensor

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))


def merge(
    points: Sequence[Any],
    method: str = "linear",
    *,
    base: Any = None,
    statistics: Sequence[Any] = (),
    seed: int = 0,
    **options: Any,
) -> Point:
    """Merge models by one of `METHODS`; lazily, tensor by tensor.

    Args:
        points: the models, in order; anything `Point.open` opens. A base among them is not a task vector.
        method: a key of `METHODS`, or "average".
        base: what task vectors are taken from, where the method needs or takes one.
        statistics: of "fisher" and "regmean": one point per model, from `fisher` or `grams`, or a saved one.
        seed: of the methods that draw; each tensor and model has a stream of its own, so that order does not matter.
        options: the method's own, by mergekit's names (`lambda` as `scale` or `**{"lambda": ...}`). Each is a number, a
            list over the layers, or {part of the name: value}; those that belong to a model (weight, density, ...) may
            be a list with one of these per model of `points` (a base among them may be left out). With several models
            a list is always that; a list over the layers then stands in a list, once per model.

    Returns:
        A point; reading one of its tensors reads that tensor of the inputs.

    Raises:
        InputError: unknown method or option, one that is missing or no number, too few or too many models, models that
            do not fit together. On reading: weights that sum to zero, NaN (named).

    Example:
        >>> a, b = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
        >>> merge([a, b], "linear", weight=[1, 3])["w"].tolist()
        [0.75, 0.75]
    """
    if method in ALIASES:
        preset = ALIASES[method]()
        return merge(points, preset.pop("method"), base=None, seed=seed, **{**preset, **options})
    row, opened = find_method(method), [Point.open(point) for point in points]
    origin = None if base is None or row.base == "none" else Point.open(base)
    kept = [i for i, point in enumerate(opened)
            if origin is None or not (points[i] is base or same_point(point, origin))]  # fmt: skip
    opened = [opened[i] for i in kept]
    check_count(method, row, len(opened), origin is not None)
    settings, options = _sorted(row, options, kept, len(points))
    check_options(method, row, settings, options)
    like = origin or opened[0]
    for point in opened if origin else opened[1:]:
        check_alike(like, point)
    stats = _statistics(method, row, statistics, len(opened))
    places, specs = layer_places(like), like.specs
    tasks = {}
    for name in specs:
        own = [(point, name) for point in opened]
        told = [None if s is None or name not in s else (s, name) for s in stats]
        tasks[name] = Task(
            inputs=tuple(own), base=None if origin is None else (origin, name), statistics=tuple(told),
            options=resolve(row, [[one] for one in settings], [options], name, places[name]),
        )  # fmt: skip
    return merged(tasks, method, like, seed=seed)


def _sorted(
    row: Method, given: Mapping[str, Any], kept: Sequence[int], count: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Tell options of each model from options of the merge; `kept` are the places of the models among `count` given."""
    settings: list[dict[str, Any]] = [{} for _ in kept]
    shared = {"lambda" if name == "scale" and "lambda" in row.shared else name: one for name, one in given.items()}
    for name in [name for name in shared if name in row.each]:
        value = shared.pop(name)
        if isinstance(value, list | tuple) and len(value) == count:
            value = [value[i] for i in kept]
        per_model = isinstance(value, list | tuple) and len(value) == len(kept)
        if not per_model and len(kept) > 1 and _flat(value):
            raise InputError(
                f"{name} is a list of {len(value)} for {len(kept)} models; give one value per model, or for a gradient "
                f"over the layers the list once per model: [{list(value)}] * {len(kept)}"
            )
        for i, setting in enumerate(settings):
            setting[name] = value[i] if per_model else value
    return settings, shared


def _flat(value: Any) -> bool:
    """Whether it is a list that holds no filters, which tell what each of their values is for."""
    return isinstance(value, list | tuple) and not any(isinstance(each, Mapping) for each in value)


def _statistics(method: str, row: Method, given: Sequence[Any], count: int) -> list[Point | None]:
    if row.statistics and not given:
        raise InputError(f"{method} needs statistics: one point per model, from weights.fisher or weights.grams")
    if given and (not row.statistics or len(given) != count):
        raise InputError(
            f"{method} with {count} models was given {len(given)} statistics; expected one per model for fisher and "
            "regmean, none else"
        )
    return [None if one is None else Point.open(one) for one in given]


def merged(tasks: Mapping[str, Task], method: str, like: Point, *, seed: int = 0) -> Point:
    """Return the point of a table of tasks; ties, config and tokenizer are those of `like`."""
    row = METHODS[method]
    points = {id(p): p for task in tasks.values() for p, _ in _places(task)}
    specs = {name: _spec(task) for name, task in tasks.items()}

    def load(name: str, dtype: torch.dtype | None = None) -> Tensor:
        return _run(row, tasks[name], name, specs[name], seed, dtype)

    told = [method, seed, [[name, [[list(points).index(id(p)), n] for p, n in _places(task)], task.options]
                           for name, task in tasks.items()]]  # fmt: skip
    label = f"{method} of {listed([p.label for p in points.values()], 4)}"
    buffers = like.buffers & frozenset(tasks)
    return replace(like.computed(label, specs, list(points.values()), load, told=told, rounded=load), buffers=buffers)


def _places(task: Task) -> list[Where]:
    return [place for place in (*task.inputs, task.base, *task.statistics) if place is not None]


def _spec(task: Task) -> Spec:
    places = [*task.inputs, *([task.base] if task.base else [])]
    dtypes = [point.dtype(name) for point, name in places]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other) if other != dtype else dtype
    return Spec(dtype, places[0][0].shape(places[0][1]))


def _run(row: Method, task: Task, name: str, spec: Spec, seed: int, dtype: torch.dtype | None = None) -> Tensor:
    inputs, options = Inputs(task.inputs), dict(task.options)
    if not spec.floating:
        return _agreed(name, [*task.inputs, *([task.base] if task.base else [])])
    base = Inputs([task.base])[0] if task.base else None
    if not task.inputs:
        assert base is not None
        return base
    options.pop("int8_mask", None)  # a matter of mergekit's memory
    if "lambda" in options:
        options["scale"] = options.pop("lambda")
    if row.draws:
        options["generators"] = [generator(draw_seed(seed, name, i)) for i in range(len(inputs))]
    if row.statistics:
        options["statistics"] = [None if place is None else place[0].value(place[1]) for place in task.statistics]
    with torch.no_grad():
        if row.entries and spec.shape:
            return _in_pieces(row, list(inputs), base, options, dtype or torch.promote_types(spec.dtype, torch.float32))
        found = row.run(inputs, base, **options)
    return found.to(dtype) if dtype else found


def _in_pieces(row: Method, inputs: list[Tensor], base: Tensor | None, options: dict[str, Any], dtype: torch.dtype):
    """Merge piece by piece and round at once: what is fresh stays in cache."""
    out = torch.empty(inputs[0].shape, dtype=dtype)
    for into, *parts in pieces(out, *inputs, *([] if base is None else [base])):
        start = None if base is None else parts.pop()
        into.copy_(row.run(parts, start, **options))
    return out


def draw_seed(seed: int, name: str, model: int) -> int:
    """Return the seed of one model's draws for one tensor, whatever the order of work."""
    return int.from_bytes(hashlib.sha256(f"{seed} {model} {name}".encode()).digest()[:7], "little")


def _agreed(name: str, places: Sequence[Where]) -> Tensor:
    first = places[0][0].value(places[0][1])
    for point, other in places[1:]:
        if not torch.equal(first, point.value(other)):
            raise InputError(f"{name!r} is {first.dtype} and differs between {places[0][0].label} and {point.label}; "
                             "integer tensors must agree")  # fmt: skip
    return first


def find_method(method: str) -> Method:
    """Return a row of the table.

    Raises:
        InputError: no such method; the nearest is named.
    """
    if method not in METHODS:
        raise unknown("merge method", method, [*METHODS, *ALIASES])
    return METHODS[method]


def same_point(a: Point, b: Point) -> bool:
    """Say whether two points are the same content, as far as that can be told without reading."""
    return a is b or (a.fingerprint is not None and a.fingerprint == b.fingerprint)


def check_count(method: str, row: Method, count: int, has_base: bool) -> None:
    """Check the number of models beside the base.

    Raises:
        InputError: none at all, too few, too many, or no base where one is needed.
    """
    if count == 0 and not (has_base and row.base == "needed"):
        raise InputError("there is nothing to merge; give at least one model")
    if row.base == "needed" and not has_base:
        raise InputError(f"{method} works on differences to a base model; give base (--base, base_model)")
    least, most = row.models
    if not least <= count <= most:
        wanted = f"exactly {least}" if least == most else f"at least {least}" if count < least else f"at most {most}"
        raise InputError(f"{method} was given {count} models beside the base; expected {wanted}")


def check_options(method: str, row: Method, settings: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> None:
    """Check names and values of a method's options before any tensor is looked at.

    Raises:
        InputError: an unknown or missing option, or a value that is no number where one is needed.
    """
    known = {**row.each, **row.shared}
    for name in {**shared, **{name: None for setting in settings for name in setting}}:
        if name not in known:
            raise InputError(
                f"{method} has no option {name!r}.{near_miss(name, known)} Known: {listed(known) or 'none'}"
            )
    for i, setting in enumerate(settings):
        for name, value in setting.items():
            if value is not None:
                check_setting(value, f"{name} of model {i + 1}", KINDS.get(name, float))
    for name, value in shared.items():
        check_setting(value, name, KINDS.get(name, float))
    for name in [name for name, default in known.items() if default is NEEDED]:
        if name in row.each and any(setting.get(name) is None for setting in settings):
            raise InputError(f"{method} needs {name} for each model")
        if name in row.shared and name not in shared:
            raise InputError(f"{method} needs {name}")


def resolve(
    row: Method,
    settings: Sequence[Sequence[Mapping[str, Any]]],
    shared: Sequence[Mapping[str, Any]],
    name: str,
    t: float,
) -> dict[str, Any]:
    """Return a method's options for one tensor.

    Args:
        settings: per model, where to look for its options, the first place that has a value for this tensor counts.
        shared: the same for the options of the merge.

    Raises:
        InputError: an option has filters and none fits this tensor.
    """
    found: dict[str, Any] = {}
    for key, default in row.each.items():
        found[key] = [_value(key, scopes, default, name, t) for scopes in settings]
    for key, default in row.shared.items():
        found[key] = _value(key, shared, default, name, t)
    if row.check:
        row.check(found)
    return found


def _value(key: str, scopes: Sequence[Mapping[str, Any]], default: Any, name: str, t: float) -> Any:
    given = (evaluate(scope[key], name, t) for scope in scopes if scope.get(key) is not None)
    value = next((value for value in given if value is not None), default)
    if value is NEEDED:
        if all(scope.get(key) is None for scope in scopes):
            raise InputError(f"the method needs {key}, and none is given for each model")
        raise InputError(f"{key} has no value for {name!r}; add one without a filter")
    kind = KINDS.get(key, float)
    return value if value is None or kind in (bool, str) else kind(number(value))
