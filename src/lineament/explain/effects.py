"""What a part of a model does for a difference between two inputs: patched, or estimated from one backward sweep.

`corrupt` is the run that is changed, `clean` the one that activations come from. Activation patching is the truth, one
forward pass per place; attribution patching (a gradient), RelP (arXiv:2508.21258; coefficients of relevance) and
integrated gradients estimate it as <n(clean) - n(corrupt), slope of the metric at n>.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError, unknown
from lineament.explain.edges import moved_edges
from lineament.explain.moved import ABLATIONS, SLOPES, How, Metric, ablated, moved
from lineament.explain.places import aliased, check_aligned, grid_of, values_at
from lineament.explain.recording import check_mode
from lineament.explain.relevance import named
from lineament.graph import Where
from lineament.io import Parts
from lineament.models import adapter_for

METHODS = ("patch", *ABLATIONS, *SLOPES, "integrated-gradients", "direct")
KINDS = {
    "residual": ("blocks.{}.hook_resid_pre", "position"),
    "attention": ("blocks.{}.hook_attn_out", "position"),
    "mlp": ("blocks.{}.hook_mlp_out", "position"),
    "head": ("blocks.{}.attn.hook_z", "position", "head"),
    "neuron": ("blocks.{}.mlp.hook_post", "neuron"),
    "edge": ("*->*", "component"),
}
"""Kinds of places of a decoder: the site, and how it is cut."""


@dataclass(frozen=True)
class Effects:
    """Scores by place.

    Attributes:
        scores: site -> [B, T] by position, [B, T, H] by position and head, ..., [B] by component: how the metric of
            `corrupt` changes with the part of `clean` (of `clean` with the ablation, for zero, mean and resample).
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

    def mean(self) -> dict[str, Tensor]:
        """Return the mean over the rows of the batch, by site."""
        return {site: x.mean(0) for site, x in self.scores.items()}


def effects(
    model: nn.Module,
    clean: Mapping[str, Any] | Tensor,
    corrupt: Mapping[str, Any] | Tensor,
    metric: Metric,
    sites: Where | Sequence[Where],
    *,
    method: str = "relp",
    by: str | Sequence[str] | None = None,
    heads: int | None = None,
    positions: Sequence[int] | None = None,
    steps: int = 10,
    rows: int = 512,
    tick: Callable[[int, int], None] | None = None,
) -> Effects:
    """Score places by their part in the difference between two inputs.

    Args:
        model: any module in eval mode; it comes back as it was.
        clean, corrupt: inputs of the same shapes, row by row the same sentence but for what is asked about.
        metric: of the model's output, a number per row. One that can be cut (`LogitDifference`) lets batches of more
            than `rows` rows pass in parts.
        sites: modules whose output [B, T, D] is meant; `"name:input"` means what it receives; TransformerLens's names
            ("blocks.5.attn.hook_z") are understood for decoders in `models.ADAPTERS`. Edges and paths of a decoder are
            "a3.h7->m5", "a3.h7->a5.h2->logits", "*->logits" (see `wiring`).
        method: "patch", ablations of `clean` ("zero", "mean" over rows, "resample" from `corrupt`), or an estimate:
            "attribution", "relp", "relp-ah" (attention patterns constant), "integrated-gradients" (of the place; of
            edges along the embeddings), or "direct" (through the last norm and the head alone).
        by: "component" (the whole place), "position", "head", "neuron", or several; by position if None.
        heads: split the last axis into so many heads, and score each; if `by` asks for heads, those of the model's own
            width (so keys and values that heads share are as many as there are of them).
        positions: look at these alone, all if None; -1 is the last.
        steps: of integrated gradients.
        rows: rows per forward pass.
        tick: called with (done, all) places by methods that take a pass per place.

    Raises:
        InputError: inputs of unequal shapes, an unknown method, a site that passes no [B, T, D], or a model that would
            drop out or normalise by the batch.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> x, y = torch.ones(1, 3, 2), torch.zeros(1, 3, 2)
        >>> found = effects(model, x, y, lambda out: out[..., 0].sum(1), "0", method="patch")
        >>> found.scores["0"].shape
        torch.Size([1, 3])
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    check_mode(model)
    to, source = named(model, corrupt), named(model, clean)
    check_aligned(source, to)
    listed = [sites] if isinstance(sites, str | type) or callable(sites) else list(sites)
    places = [aliased(model, site) for site in listed]
    how = How("patch" if method in ABLATIONS else method, grid_of(model, by, heads, positions), rows, steps, tick)
    began = time.perf_counter()
    parts = [_scores(model, *part, places, method, how) for part in _in_parts(source, to, metric, rows, method)]
    scores = {site: torch.cat([found[site] for found in parts]) for site in parts[0]}
    return Effects(scores, method, time.perf_counter() - began)


def _scores(
    model: nn.Module, clean: Mapping[str, Any], corrupt: Mapping[str, Any], metric: Metric, places: Sequence[Where],
    method: str, how: How,
) -> dict[str, Tensor]:  # fmt: skip
    edges = [site for site in places if isinstance(site, str) and "->" in site]
    modules = [site for site in places if site not in edges]
    found = moved_edges(model, clean, corrupt, metric, edges, method, how) if edges else {}
    return found | (_of_modules(model, clean, corrupt, metric, modules, method, how) if modules else {})


def _of_modules(
    model: nn.Module, clean: Mapping[str, Any], corrupt: Mapping[str, Any], metric: Metric, places: list[Where],
    method: str, how: How,
) -> dict[str, Tensor]:  # fmt: skip
    values = [values_at(model, inputs, places) for inputs in (clean, corrupt)]
    for name, x in values[0].items():
        if x.dim() != 3:
            raise InputError(f"{name!r} passes {list(x.shape)}; effects are by position, of [B, T, D]")
    if method not in ABLATIONS:
        return moved(model, corrupt, values[1], values[0], metric, how)
    return moved(model, clean, values[0], ablated(values[0], values[1], method), metric, how)


def _in_parts(
    clean: Mapping[str, Any], corrupt: Mapping[str, Any], metric: Metric, rows: int, method: str
) -> Iterable[tuple[Mapping[str, Any], Mapping[str, Any], Metric]]:
    """Cut a batch into parts of at most `rows` rows, if its metric can be cut; a mean is over all of them."""
    count = next((len(x) for x in clean.values() if isinstance(x, Tensor) and x.dim()), 0)
    cut: Any = getattr(metric, "rows", None)
    if count <= rows or cut is None or method == "mean":
        return [(clean, corrupt, metric)]
    return [
        (rows_of(clean, i, i + rows), rows_of(corrupt, i, i + rows), cut(i, i + rows)) for i in range(0, count, rows)
    ]


def rows_of(inputs: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Return some rows of inputs."""
    count = next((len(x) for x in inputs.values() if isinstance(x, Tensor) and x.dim()), 0)
    return {
        name: x[start:stop] if isinstance(x, Tensor) and x.dim() and len(x) == count and name != "logits_to_keep" else x
        for name, x in inputs.items()
    }


def agreement(
    model: nn.Module,
    clean: Mapping[str, Any] | Tensor,
    corrupt: Mapping[str, Any] | Tensor,
    metric: Metric,
    *,
    kinds: Sequence[str] = ("residual", "attention", "mlp", "head"),
    methods: Sequence[str] = ("attribution", "relp", "integrated-gradients"),
    truth: str = "patch",
    said: Callable[[str], None] | None = None,
    parts: Parts | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Compare estimates with activation patching on every layer of a decoder, beside what each costs.

    Args:
        model, clean, corrupt, metric: as for `effects`.
        kinds: of `KINDS`: "residual", "attention", "mlp" by position, "head" by position and head, "neuron", "edge".
        methods: estimates. truth: what they are compared with.
        said: called with each line of progress.
        parts: where scores by kind and method are kept.
        options: of `effects` (`positions`, `steps`, `rows`).

    Returns:
        A row per kind: how many places, Pearson correlation over prompts and places by method, seconds by method.
    """
    table, parts = [], parts or Parts()
    for kind in kinds:
        sites, by = sites_of(model, kind)
        found: dict[str, Effects] = {}
        for method in (truth, *methods):
            found[method] = kept_effects(
                parts, f"{kind} {method}", model, clean, corrupt, metric, sites, method=method, by=by, **options
            )
            if said:
                said(f"{kind}: {method} in {found[method].seconds:.1f} s")
        cells = sum(x[0].numel() for x in found[truth].scores.values())
        table.append(
            {"places": kind, "count": cells}
            | {method: found[method].pearson(found[truth]) for method in methods}
            | {f"{method}, s": each.seconds for method, each in found.items()}
        )
    return table


def sites_of(model: nn.Module, kind: str) -> tuple[list[str], list[str]]:
    """Return the places of a kind in a decoder, and how they are cut."""
    if kind not in KINDS:
        raise unknown("kind of place", kind, KINDS)
    name, *by = KINDS[kind]
    layers = range(len(model.get_submodule(adapter_for(model).layers)))  # type: ignore[arg-type]
    return list(dict.fromkeys(name.format(layer) for layer in layers)), by


def kept_effects(parts: Parts, name: str, *given: Any, method: str, **options: Any) -> Effects:
    """Do as `effects`, unless the scores are kept already."""

    def make() -> dict[str, Tensor]:
        found = effects(*given, method=method, **options)
        return found.scores | {"seconds": torch.tensor(found.seconds, dtype=torch.float64)}

    scores = parts.tensors(name, make)
    return Effects(scores, method, float(scores.pop("seconds")))
