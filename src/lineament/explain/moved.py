"""The effect of moving what places hold from one value to another: exactly, or by the slope of the metric there.

With `old` and `new` the two values of a place n and m the metric of the base run, in which n = old:
exactly m(n := new) - m, cell by cell; estimated <new - old, slope of m at n>.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.explain.places import Grid, apart, run
from lineament.explain.recording import prepared
from lineament.explain.relevance import propagate
from lineament.explain.restart import Restart
from lineament.explain.rules import GRADIENT, RELP, RELP_AH, Rules
from lineament.graph import Where
from lineament.models import adapter_for

Metric = Callable[[Any], Tensor]
"""The model's output -> a number per row [B], or their sum."""

ABLATIONS = ("zero", "mean", "resample")
SLOPES: dict[str, Rules] = {"attribution": GRADIENT, "relp": RELP, "relp-ah": RELP_AH}


@dataclass(frozen=True)
class How:
    """By what method, and within which bounds.

    Attributes:
        method: "patch", a key of `SLOPES`, "integrated-gradients" or "direct".
        grid: how places are cut. rows: rows of a forward pass. steps: of integrated gradients.
        tick: called with (done, all) places.
    """

    method: str
    grid: Grid
    rows: int = 512
    steps: int = 10
    tick: Callable[[int, int], None] | None = None

    def counted(self, done: int, total: int) -> None:
        """Say how far it is."""
        if self.tick:
            self.tick(done, total)


def ablated(of: Mapping[str, Tensor], other: Mapping[str, Tensor], ablation: str) -> dict[str, Tensor]:
    """Return what places hold when they are ablated: nothing, the mean over rows, or what they hold in another run."""
    if ablation == "resample":
        return dict(other)
    return {
        name: torch.zeros_like(x) if ablation == "zero" else x.mean(0, keepdim=True).expand_as(x)
        for name, x in of.items()
    }


def moved(
    model: nn.Module, base: Mapping[str, Any], old: Mapping[str, Tensor], new: Mapping[str, Tensor], metric: Metric,
    how: How,
) -> dict[str, Tensor]:  # fmt: skip
    """Return site -> scores of moving it from `old`, what it holds in the base run, to `new`."""
    if how.method == "patch":
        return _exact(model, base, old, new, metric, how)
    slopes = _slopes(model, base, old, new, metric, how)
    return {site: how.grid.sums((new[site] - x) * slopes[site]) for site, x in old.items()}


def _exact(
    model: nn.Module, base: Mapping[str, Any], old: Mapping[str, Tensor], new: Mapping[str, Tensor], metric: Metric,
    how: How,
) -> dict[str, Tensor]:  # fmt: skip
    """Run the model for every cell whose value changes; cells of a place share forward passes as rows of a batch."""
    scores = {}
    with torch.no_grad():
        before, restart = metric(run(model, base)), Restart(model, base, new)
        for done, (site, x) in enumerate(new.items()):
            cells, size = how.grid.cells(x), max(1, how.rows // len(x))
            parts = how.grid.parts(x != old[site]).any(-1).any(0)  # before the first word that differs, nothing does
            first = _first(x, old[site])
            wanted = [i for i, (at, part) in enumerate(cells) if bool(parts[at, part].any())]
            found = before.new_zeros(len(cells), len(x))
            for i in range(0, len(wanted), size):
                some = [cells[k] for k in wanted[i : i + size]]
                since = min(restart.latest, *(max(first, min(at)) for at, _ in some))
                change = _put(how.grid, x, some, since)
                found[wanted[i : i + size]] = patched(restart, site, metric, change, len(some), since) - before
            scores[site] = how.grid.shaped(found, x)
            how.counted(done + 1, len(new))
    return scores


def patched(
    restart: Restart, site: str, metric: Metric, change: Callable[[Tensor], Tensor], copies: int, since: int = 0
) -> Tensor:
    """Return the metric [copies, B] of as many copies of the batch, one below the other, with a place changed."""
    found = metric(restart.run(site, change, copies, since))
    if found.dim() != 1 or len(found) % copies:
        raise InputError("the exact methods need a metric with a number per row, [B]")
    return found.unflatten(0, (copies, -1))


def _first(new: Tensor, old: Tensor) -> int:
    """Return the first position where a place [B, T, D] changes, 0 if it doesn't."""
    return int((new != old).any(-1).any(0).int().argmax())


def _put(grid: Grid, new: Tensor, cells: Sequence[tuple[list[int], int]], since: int = 0) -> Callable[[Tensor], Tensor]:
    """Return the change that gives each copy of the batch, from a position on, the new value of one cell."""
    wanted = grid.parts(new)[:, since:]
    cells = [([t - since for t in at if t >= since], part) for at, part in cells]

    def change(x: Tensor) -> Tensor:
        y = grid.parts(x.unflatten(0, (len(cells), -1))[0])  # refuses widths that don't fit
        y = x.unflatten(0, (len(cells), -1)).unflatten(-1, y.shape[-2:]).clone()
        for copy, (at, part) in enumerate(cells):
            y[copy][:, at, part] = wanted[:, at, part].to(y)
        return y.flatten(-2).flatten(0, 1)

    return change


def _slopes(
    model: nn.Module, base: Mapping[str, Any], old: Mapping[str, Tensor], new: Mapping[str, Tensor], metric: Metric,
    how: How,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the slope of the metric at every place, by the method's own backward sweep."""
    if how.method == "integrated-gradients":
        return _mean_slopes(model, base, old, new, metric, how)
    if how.method == "direct":
        adapter = adapter_for(model)
        last = f"{adapter.layers}.{len(model.get_submodule(adapter.layers)) - 1}"  # type: ignore[arg-type]
        slope = swept(model, base, metric, [last], RELP)[last]
        return {site: _written(model, site, slope) for site in old}
    found = swept(model, base, metric, list(old), SLOPES[how.method])
    return {site: found.get(site, torch.zeros_like(x)) for site, x in old.items()}


def swept(
    model: nn.Module, base: Mapping[str, Any], metric: Metric, places: Sequence[Where], rules: Rules
) -> dict[str, Tensor]:
    """Return the coefficients of a rule set at places; at what a module receives, those through it alone."""
    with apart(model, places):
        found = propagate(
            model, base, target=metric, rules=rules, at=places, counting=False, coefficients_only=True
        )  # fmt: skip
    return {name: parts[0] for name, parts in found.sweep.at.items()}


def _written(model: nn.Module, site: str, slope: Tensor) -> Tensor:
    """Return the slope at a site of what is written to the residual stream from there.

    Raises:
        InputError: what the site holds is not written there, or by a map that is not known.
    """
    name, within, _ = site.rpartition(":input")
    adapter = adapter_for(model)
    if not within or name.removeprefix(f"{adapter.layers}.").isdigit():
        return slope
    module: Any = model.get_submodule(name)
    if name.rpartition(".")[2] != adapter.projections[-1]:
        raise InputError(f"{site!r} is not written to the residual stream, so it has no direct effect; name what is")
    weight = module.weight.detach()
    turned = weight if isinstance(module, nn.Linear) else weight.mT  # (transformers' Conv1D is transposed)
    return slope @ turned.to(slope)


def _mean_slopes(
    model: nn.Module, base: Mapping[str, Any], old: Mapping[str, Tensor], new: Mapping[str, Tensor], metric: Metric,
    how: How,
) -> dict[str, Tensor]:  # fmt: skip
    """Average the gradient at each place over the line from its old to its new value, the rest of the run as it is."""
    found = {}
    with prepared(model):
        restart = Restart(model, base, old)
        for done, (site, x) in enumerate(old.items()):
            since, total = min(restart.latest, _first(new[site], x)), torch.zeros_like(x)  # before, nothing moves
            for step in range(how.steps):
                at = (x + (step + 0.5) / how.steps * (new[site] - x))[:, since:].detach().requires_grad_()
                value = metric(restart.run(site, lambda y, at=at: at, since=since)).sum()
                total[:, since:] += torch.autograd.grad(value, at)[0] / how.steps
            found[site] = total
            how.counted(done + 1, len(old))
    return found
