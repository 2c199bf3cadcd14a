"""What a part of a model does for a difference between two inputs: patched, or estimated from one backward sweep.

`corrupt` is the run that is changed, `clean` the one that activations come from. Activation patching is the truth, one
forward pass per place; attribution patching (a gradient), RelP (arXiv:2508.21258; coefficients of relevance) and
integrated gradients estimate it as <n(clean) - n(corrupt), slope of the metric at n>.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lineament._base.errors import InputError, unknown
from lineament.explain.recording import accepts, prepared, tapped
from lineament.explain.relevance import named, propagate
from lineament.explain.rules import GRADIENT, RELP, RELP_AH, Rules
from lineament.graph import Where, capture
from lineament.models import adapter_for

Metric = Callable[[Any], Tensor]
"""The model's output -> a number per row [B], or their sum."""

SLOPES: dict[str, Rules] = {"attribution": GRADIENT, "relp": RELP, "relp-ah": RELP_AH}
EXACT = ("patch", "zero", "mean", "resample")
METHODS = (*EXACT, *SLOPES, "integrated-gradients", "direct")
ALIASES = {
    r"blocks\.(\d+)\.hook_resid_pre": "{layers}.{0}:input",
    r"blocks\.(\d+)\.hook_resid_post": "{layers}.{0}",
    r"blocks\.(\d+)\.attn\.hook_z": "{layers}.{0}.{attention}.{out}:input",
    r"blocks\.(\d+)\.hook_attn_out": "{layers}.{0}.{attention}",
    r"blocks\.(\d+)\.hook_mlp_out": "{layers}.{0}.mlp",
}
"""TransformerLens's names of places -> ours."""


@dataclass(frozen=True)
class Effects:
    """Scores by place.

    Attributes:
        scores: site -> [B, T], or [B, T, H] by head: how the metric of `corrupt` changes with the part of `clean` (of
            `clean` with the ablation, for zero, mean and resample).
        method: how they were found.
        seconds: of wall clock.
    """

    scores: dict[str, Tensor]
    method: str
    seconds: float

    def pearson(self, other: "Effects") -> float:
        """Return the correlation with other scores over every place both have."""
        both = [name for name in self.scores if name in other.scores]
        x, y = (torch.cat([e.scores[name].flatten().double() for name in both]) for e in (self, other))
        return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def effects(
    model: nn.Module,
    clean: Mapping[str, Any] | Tensor,
    corrupt: Mapping[str, Any] | Tensor,
    metric: Metric,
    sites: Where | Sequence[Where],
    *,
    method: str = "relp",
    heads: int | None = None,
    steps: int = 10,
    rows: int = 512,
) -> Effects:
    """Score places by their part in the difference between two inputs.

    Args:
        model: any module in eval mode; it comes back as it was.
        clean, corrupt: inputs of the same shapes, row by row the same sentence but for what is asked about.
        metric: of the model's output, a number per row.
        sites: modules whose output [B, T, D] is meant; `"name:input"` means what it receives; TransformerLens's names
            ("blocks.5.attn.hook_z") are understood for decoders in `models.ADAPTERS`.
        method: "patch", ablations of `clean` ("zero", "mean" over rows, "resample" from `corrupt`), or an estimate:
            "attribution", "relp", "relp-ah" (attention patterns constant), "integrated-gradients" (of the place), or
            "direct" (through the last norm and the head alone).
        heads: split the last axis into so many heads, and score each.
        steps: of integrated gradients.
        rows: rows per forward pass of the exact methods.

    Raises:
        InputError: inputs of unequal shapes, an unknown method, or a site that passes no [B, T, D].

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> x, y = torch.ones(1, 3, 2), torch.zeros(1, 3, 2)
        >>> found = effects(model, x, y, lambda out: out[..., 0].sum(1), "0", method="patch")
        >>> found.scores["0"].shape
        torch.Size([1, 3])
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    to, source = named(model, corrupt), named(model, clean)
    _check_aligned(source, to)
    listed = [sites] if isinstance(sites, str | type) or callable(sites) else list(sites)
    places = [aliased(model, site) for site in listed]
    began = time.perf_counter()
    values = [_values(model, inputs, places) for inputs in (source, to)]
    for name, x in values[0].items():
        if x.dim() != 3:
            raise InputError(f"{name!r} passes {list(x.shape)}; effects are by position, of [B, T, D]")
    if method in EXACT:
        scores = _exact(model, source, to, metric, values, method, heads, rows)
    else:
        difference = {name: values[0][name] - values[1][name] for name in values[0]}
        slopes = _slopes(model, to, metric, places, values, method, steps)
        scores = {name: _by_head(d * slopes[name], heads).sum(-1) for name, d in difference.items()}
    return Effects(scores, method, time.perf_counter() - began)


def aliased(model: nn.Module, site: Where) -> Where:
    """Return a place under our name where TransformerLens's is given."""
    if not isinstance(site, str) or not site.startswith("blocks."):
        return site
    adapter = adapter_for(model)
    for pattern, ours in ALIASES.items():
        found = re.fullmatch(pattern, site)
        if found:
            names = {"layers": adapter.layers, "attention": adapter.attention, "out": adapter.projections[-1]}
            return ours.format(*found.groups(), **names)
    known = ", ".join(pattern.replace(r"(\d+)", "N").replace("\\", "") for pattern in ALIASES)
    raise InputError(f"{site!r} is no place we know by TransformerLens's names; known: {known}")


def _check_aligned(clean: Mapping[str, Any], corrupt: Mapping[str, Any]) -> None:
    for name, x in clean.items():
        other = corrupt.get(name)
        if isinstance(x, Tensor) and (not isinstance(other, Tensor) or x.shape != other.shape):
            shape = list(other.shape) if isinstance(other, Tensor) else "nothing"
            raise InputError(f"clean has {name} {list(x.shape)} and corrupt {shape}; pair prompts of equal length")


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    given = dict(inputs)
    positional = (given.pop(""),) if "" in given else ()
    if "use_cache" not in given and accepts(model, "use_cache"):
        given["use_cache"] = False
    return model(*positional, **given)


def _by_head(x: Tensor, heads: int | None) -> Tensor:
    return x if heads is None else x.unflatten(-1, (heads, -1))


def _first(tree: Any) -> Tensor:
    return next(leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _values(model: nn.Module, inputs: Mapping[str, Any], places: Sequence[Where]) -> dict[str, Tensor]:
    """Return what each place holds."""
    outs, ins = tapped(model, places)
    with torch.no_grad(), capture(model, lambda name, module: name in outs | ins, inputs=True, clone=True) as seen:
        _run(model, inputs)
    for name in seen:
        if len(seen[name]) != 1:
            raise InputError(f"{name!r} was called {len(seen[name])} times; effects are of modules called once")
    found = {name: seen.tensor(name) for name in seen if name in outs}
    return found | {f"{name}:input": _first(seen.inputs(name)[0]) for name in seen if name in ins}


@contextmanager
def replaced(model: nn.Module, site: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what a module passes on, or what it receives (a name that ends in ":input"), while the block runs."""

    def changed(tree: Any) -> Any:
        leaves, spec = pytree.tree_flatten(tree)
        at = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        leaves[at] = change(leaves[at])
        return pytree.tree_unflatten(leaves, spec)

    module = model.get_submodule(site.removesuffix(":input"))
    with ExitStack() as hooks:
        if site.endswith(":input"):
            hook = module.register_forward_pre_hook(lambda m, args, kwargs: changed((args, kwargs)), with_kwargs=True)
        else:
            hook = module.register_forward_hook(lambda m, args, output: changed(output))
        hooks.callback(hook.remove)
        yield


def _exact(
    model: nn.Module, clean: Mapping[str, Any], corrupt: Mapping[str, Any], metric: Metric,
    values: Sequence[dict[str, Tensor]], method: str, heads: int | None, rows: int,
) -> dict[str, Tensor]:  # fmt: skip
    """Run the model once for every place; positions (and heads) of a site share forward passes as rows of a batch."""
    base = corrupt if method == "patch" else clean
    with torch.no_grad():
        before = metric(_run(model, base))
        scores = {}
        for site, x in values[0].items():
            new = {"patch": x, "zero": torch.zeros_like(x), "mean": x.mean(0, keepdim=True).expand_as(x)}.get(
                method, values[1][site]
            )
            B, T, H = len(x), x.shape[1], heads or 1
            cells = [(t, h) for t in range(T) for h in range(H)]
            size = max(1, rows // B)
            found = [
                _patched(model, base, metric, site, _by_head(new, H), cells[i : i + size])
                for i in range(0, len(cells), size)
            ]
            after = torch.cat(found).unflatten(0, (T, H)) if heads else torch.cat(found)
            scores[site] = (after - before).movedim(-1, 0)
    return scores


def _patched(
    model: nn.Module, base: Mapping[str, Any], metric: Metric, site: str, new: Tensor, cells: Sequence[tuple[int, int]]
) -> Tensor:
    """Return the metric [cells, B] with one (position, head) replaced in each copy of the batch."""
    B, n = len(new), len(cells)

    def change(x: Tensor) -> Tensor:
        y = x.unflatten(0, (n, B)).unflatten(-1, (new.shape[-2], -1)).clone()
        for copy, (t, h) in enumerate(cells):
            y[copy, :, t, h] = new[:, t, h].to(y)
        return y.flatten(-2).flatten(0, 1)

    repeated = {k: x.repeat(n, *[1] * (x.dim() - 1)) if isinstance(x, Tensor) and x.dim() and len(x) == B else x
                for k, x in base.items()}  # fmt: skip
    with replaced(model, site, change):
        found = metric(_run(model, repeated))
    if found.dim() != 1:
        raise InputError("the exact methods need a metric with a number per row, [B]")
    return found.unflatten(0, (n, B))


def _slopes(
    model: nn.Module, inputs: Mapping[str, Any], metric: Metric, places: Sequence[Where],
    values: Sequence[dict[str, Tensor]], method: str, steps: int,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the slope of the metric at every place, by the method's own backward sweep."""
    if method == "integrated-gradients":
        return {site: _mean_slope(model, inputs, metric, site, values, steps) for site in values[0]}
    last = None
    if method == "direct":
        adapter = adapter_for(model)
        last = f"{adapter.layers}.{len(model.get_submodule(adapter.layers)) - 1}"  # type: ignore[arg-type]
        places = [last]
    rules = SLOPES.get(method, RELP)
    run = propagate(
        model, inputs, target=metric, rules=rules, at=places, counting=False, coefficients_only=True
    )  # fmt: skip
    found = {name: parts[0] for name, parts in run.sweep.at.items()}
    if last is not None:
        return {site: _written(model, site, found[last]) for site in values[0]}
    return {site: found.get(site, torch.zeros_like(x)) for site, x in values[0].items()}


def _written(model: nn.Module, site: str, slope: Tensor) -> Tensor:
    """Return the slope at a site of what is written to the residual stream from there.

    Raises:
        InputError: what the site holds is not written there, or by a map that is not known.
    """
    name, within, _ = site.rpartition(":input")
    adapter = adapter_for(model)
    if not within or name.removeprefix(f"{adapter.layers}.").isdigit():
        return slope
    module = model.get_submodule(name)
    if name.rpartition(".")[2] != adapter.projections[-1]:
        raise InputError(f"{site!r} is not written to the residual stream, so it has no direct effect; name what is")
    weight: Any = module.weight
    return slope @ (weight if isinstance(module, nn.Linear) else weight.mT)  # (transformers' Conv1D is transposed)


def _mean_slope(
    model: nn.Module, inputs: Mapping[str, Any], metric: Metric, site: str, values: Sequence[dict[str, Tensor]],
    steps: int,
) -> Tensor:  # fmt: skip
    """Average the gradient at a place over the line from its corrupt to its clean value."""
    clean, corrupt = values[0][site], values[1][site]
    total = torch.zeros_like(clean)
    with prepared(model):
        for step in range(steps):
            x = (corrupt + (step + 0.5) / steps * (clean - corrupt)).requires_grad_()
            with replaced(model, site, lambda y, x=x: x):
                total += torch.autograd.grad(metric(_run(model, inputs)).sum(), x)[0] / steps
    return total
