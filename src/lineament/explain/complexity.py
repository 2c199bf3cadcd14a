"""How much an alignment map may do before what it finds says nothing: a sweep over maps, beside controls."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lineament._base.errors import InputError
from lineament._base.seeds import seeded
from lineament.explain.align import AlignConfig, Alignment, align
from lineament.graph import Where, select
from lineament.report import curve
from lineament.tasks import Algorithm, Examples

ALIGNED = 0.5  # of the way from chance to all right: this library's convention, not the paper's
EMPTY = 0.5  # of the model's own gain


@dataclass(frozen=True, eq=False)
class Complexity:
    """Alignments by map and by what they were looked for in.

    Attributes:
        found: map's name -> {"model", "untrained", "control"} -> alignment.
    """

    found: Mapping[str, Mapping[str, Alignment]]

    def verdict(self, name: str) -> str:
        """Say what a map's accuracy is worth.

        "not aligned": it gets less than half the way from chance to all right. "empty": a control gets half as far.
        """
        gains = {where: one.gain for where, one in self.found[name].items()}
        own = gains.pop("model")
        if own < ALIGNED:
            return "not aligned"
        return "empty" if any(gain >= EMPTY * own for gain in gains.values()) else "aligned"

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per map and place, simplest map first, for tables."""
        order = sorted(self.found, key=lambda name: self.found[name]["model"].parameters)
        return [
            {"map": name, "in": where, **one.row(), "verdict": self.verdict(name) if where == "model" else ""}
            for name in order
            for where, one in self.found[name].items()
        ]

    def png(self, *, dark: bool = False) -> bytes:
        """Draw accuracy under interventions against the parameters of the map, chance beside it."""
        rows, series = self.rows(), {}
        for where in dict.fromkeys(row["in"] for row in rows):
            mine = [row for row in rows if row["in"] == where]
            series[where] = ([max(1, row["parameters"]) for row in mine], [row["IIA"] for row in mine])
        chance = max(row["chance"] for row in rows if row["in"] == "model")
        return curve(
            series, xlabel="parameters of the map", ylabel="interchange-intervention accuracy", log="x",
            levels={"chance": chance}, dark=dark,
        )  # fmt: skip


def complexity(
    model: nn.Module, layer: Where, algorithm: Algorithm, examples: Examples, unseen: Examples, *,
    maps: Mapping[str, str | Callable[[int], nn.Module]], untrained: nn.Module | None = None,
    control: Algorithm | None = None, config: AlignConfig | None = None, out: str | Path | None = None,
    on_done: Callable[[str, str, Alignment], None] | None = None,
) -> Complexity:  # fmt: skip
    """Align with maps of growing complexity, each beside an untrained copy of the model and a control algorithm.

    Args:
        model, layer, algorithm, examples, unseen: as for `align`.
        maps: name -> as `AlignConfig.map`.
        untrained: a copy that has learned nothing, as made by `untrained` with another seed; made here if None.
        control: another algorithm of the same task that the layer should not hold.
        config: everything but the map.
        out: folder to resume from; finished maps are not run again where it is given.
        on_done: called with the map's name, "model", "untrained" or "control", and the alignment.

    Raises:
        InputError: no map; or as for `align`.
    """
    if not maps:
        raise InputError("there is no map to align with; give at least one")
    bare = untrained_copy(model) if untrained is None else untrained
    places: dict[str, tuple[nn.Module, Algorithm]] = {"model": (model, algorithm), "untrained": (bare, algorithm)}
    if control is not None:
        places["control"] = (model, control)
    found: dict[str, dict[str, Alignment]] = {name: {} for name in maps}
    for name, made in maps.items():
        for where, (net, graph) in places.items():
            one = replace(config or AlignConfig(), map=made)
            folder = None if out is None else Path(out) / f"{name}, {where}"
            found[name][where] = align(net, layer, graph, examples, unseen, one, out=folder)
            if on_done:
                on_done(name, where, found[name][where])
    return Complexity(found)


def untrained_copy(model: nn.Module, where: Where | None = None, *, seed: int = 0) -> nn.Module:
    """Return a copy of a model whose weights are drawn anew, all of them or those of chosen modules.

    Args:
        model: with a transformers config, or of modules that have `reset_parameters`.
        where: `nn.Embedding` for random (un)embeddings only, say; everything if None.

    Raises:
        InputError: a module has parameters and no way to draw them.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> bool((untrained_copy(net).weight == net.weight).any())
        False
    """
    copy: Any = deepcopy(model)
    with seeded(seed):
        if hasattr(model, "config") and hasattr(model, "init_weights"):
            fresh: Any = type(model)(deepcopy(model.config))  # pyright: ignore[reportCallIssue]
            chosen = {"": copy} if where is None else select(copy, where)
            for name, module in chosen.items():
                module.load_state_dict(fresh.get_submodule(name).state_dict())
            return copy
        for top, chosen in ({"": copy} if where is None else select(copy, where)).items():
            for name, module in chosen.named_modules(prefix=top):
                _draw(name, module)
    return copy


def _draw(name: str, module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        with torch.no_grad():
            module.reset_parameters()  # pyright: ignore[reportCallIssue]
    elif next(module.parameters(recurse=False), None) is not None:
        raise InputError(
            f"{name!r} ({type(module).__name__}) has parameters and no reset_parameters; pass untrained= yourself"
        )
