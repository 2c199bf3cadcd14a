"""The table of merges: what each needs, its options, and the function that does it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from lineament.weights import choices, spectra, spheres, statistics, task_vectors
from lineament.weights.task_vectors import by_rank, largest, middle, random, row

NEEDED = object()
"""Default of an option that must be given."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One merge.

    Args:
        about: one line.
        run: (tensors, base, **options) -> tensor; tensors as stored, in the order of the models without the base.
        base: "needed", "optional" (task vectors if given), or "none" (a base among the models is one of them).
        models: least and most number of models beside the base.
        each: options with one value per model, and their defaults. shared: options with one value.
        check: what is refused of the options, before a tensor is read.
        entries: every entry of the result depends on that entry of the inputs alone, so that pieces may be merged.
        draws: hand `run` one random generator per model. statistics: hand it one statistic per model.
    """

    about: str
    run: Callable[..., Tensor]
    base: str = "none"
    models: tuple[int, int] = (1, 10_000)
    each: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] | None = None
    entries: bool = False
    draws: bool = False
    statistics: bool = False


def _family(
    about: str, trim: Any = None, *, elect: bool = False, normalize: bool = False, rescale: Any = False, **each
):
    return Method(
        about=about, run=row(trim, elect), base="needed", draws=True, each={"weight": NEEDED, "density": 1.0, **each},
        shared={"normalize": normalize, "rescale": rescale, "lambda": 1.0, "int8_mask": False},
        entries=trim is None and not elect, check=task_vectors.check_trim,
    )  # fmt: skip


def _spectral(run: Callable[..., Tensor], about: str) -> Method:
    return Method(about=about, run=run, base="needed", each={"weight": 1.0}, shared={"lambda": 1.0})


def _sums(options: Mapping[str, Any]) -> None:
    if options.get("normalize", options.get("normalize_weights")):
        task_vectors.total_weight(options["weight"])


_WEIGHT = {"weight": 1.0}
METHODS: dict[str, Method] = {
    "linear": Method(
        about="weighted average", run=task_vectors.linear, each={"weight": NEEDED}, shared={"normalize": True},
        check=_sums, entries=True,
    ),
    "task_arithmetic": _family("base plus weighted task vectors"),
    "ties": _family("task vectors trimmed by magnitude, signs elected", largest, elect=True, normalize=True),
    "dare_linear": _family("task vectors thinned at random", random, rescale="l1"),
    "dare_ties": _family("thinned at random, signs elected", random, elect=True, rescale="l1"),
    "breadcrumbs": _family("task vectors without outliers and small entries", middle, gamma=0.01),
    "breadcrumbs_ties": _family("the same, signs elected", middle, elect=True, gamma=0.01),
    "della": _family("thinned by rank of magnitude, signs elected", by_rank, elect=True, normalize=True, rescale="l1",
                     epsilon=0.15),
    "della_linear": _family("thinned by rank of magnitude", by_rank, rescale="l1", epsilon=0.15),
    "slerp": Method(about="arc from base to the other model", run=spheres.slerp, base="needed", models=(1, 1),
                    shared={"t": NEEDED}),
    "nuslerp": Method(about="arc between two models or their task vectors", run=spheres.nuslerp, base="optional",
                      models=(2, 2), each={"weight": NEEDED},
                      shared={"nuslerp_flatten": True, "nuslerp_row_wise": False}),
    "multislerp": Method(about="mean direction, mean length", run=spheres.multislerp, base="optional",
                         each={"weight": NEEDED}, shared={"normalize_weights": True, "eps": 1e-8}, check=_sums),
    "karcher": Method(about="mean along arcs", run=spheres.karcher, shared={"max_iter": 10, "tol": 1e-5}),
    "model_stock": Method(about="between base and mean, by the angles of task vectors", run=choices.model_stock,
                          base="needed", models=(2, 10_000), shared={"filter_wise": False}),
    "sce": Method(about="entries of high variance, weighted by energy", run=choices.sce, base="needed",
                  shared={"select_topk": 1.0, "int8_mask": False}),
    "ram": Method(about="own changes whole, shared ones averaged", run=choices.ram, base="needed",
                  shared={"epsilon": 1e-5}),
    "ramplus_tl": Method(about="the same, own changes amplified", run=choices.ram, base="needed",
                         shared={"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}),
    "nearswap": Method(about="towards the other model by at most t", run=choices.nearswap, base="needed",
                       models=(1, 1), shared={"t": NEEDED}),
    "arcee_fusion": Method(about="entries that matter most to the output", run=choices.arcee_fusion, base="needed",
                           models=(1, 1), draws=True),
    "passthrough": Method(about="one model's tensors, for slices", run=choices.passthrough, models=(1, 1),
                          each={"scale": None}),
    "fisher": Method(about="entries weighted by Fisher information", run=statistics.fisher_merge, each=_WEIGHT,
                     shared={"floor": 1e-10}, statistics=True),
    "regmean": Method(about="least squares fit to all models' outputs", run=statistics.regmean_merge, each=_WEIGHT,
                      shared={"shrink": 0.9}, statistics=True),
    "tsv": _spectral(spectra.tsv, "decorrelated leading singular vectors of the task vectors"),
    "iso_c": _spectral(spectra.iso_c, "singular values of the summed task vectors made equal"),
}  # fmt: skip
ALIASES = {"average": partial(dict, method="linear", weight=1.0)}
KINDS: dict[str, type] = {
    "normalize": bool, "int8_mask": bool, "nuslerp_flatten": bool, "nuslerp_row_wise": bool, "normalize_weights": bool,
    "filter_wise": bool, "max_iter": int, "rescale": str,
}  # fmt: skip
"""Types of options that are not numbers; `rescale` is l1, 1/density, none, or mergekit's true and false."""
