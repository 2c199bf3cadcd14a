"""The papers behind the library: one record each, and its experiment once the system works.

Reading records costs milliseconds and never loads torch. Each paper is one file with `RECORD` and, when the status is
"works", `experiment(scale) -> Evidence`; that file imports what it runs inside the function.
"""

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from types import ModuleType
from typing import Any
from unicodedata import combining, normalize

from .._base.errors import InputError
from .record import Figure, Paper

__all__ = ["MODULES", "Figure", "Paper", "experiment", "record", "records", "runs", "search"]

MODULES = {
    "alignment-maps": "lineament.papers.alignment_maps",
    "atlas": "lineament.papers.atlas",
    "brain-encoder": "lineament.papers.brain_encoder",
    "brainmae": "lineament.papers.brainmae",
    "care-transformer": "lineament.papers.care_transformer",
    "clear": "lineament.papers.clear",
    "configurable-bricks": "lineament.papers.configurable_bricks",
    "conn-net": "lineament.papers.conn_net",
    "deltanet": "lineament.papers.deltanet",
    "depth-efficiency": "lineament.papers.depth_efficiency",
    "diff-decompose": "lineament.papers.diff_decompose",
    "dynamic-lrp": "lineament.papers.dynamic_lrp",
    "fireq": "lineament.papers.fireq",
    "fmri-generative-ssl": "lineament.papers.fmri_generative_ssl",
    "g2gnet": "lineament.papers.g2gnet",
    "grokking-li2": "lineament.papers.grokking_li2",
    "hedgehog": "lineament.papers.hedgehog",
    "hourglass-mlp": "lineament.papers.hourglass_mlp",
    "hybrid-linear-attention": "lineament.papers.hybrid_linear_attention",
    "hyperzzw": "lineament.papers.hyperzzw",
    "i-lora": "lineament.papers.i_lora",
    "inline-attention": "lineament.papers.inline_attention",
    "kimi-linear": "lineament.papers.kimi_linear",
    "level-set-traversal": "lineament.papers.level_set_traversal",
    "lightnet": "lineament.papers.lightnet",
    "lightning-attention-2": "lineament.papers.lightning_attention_2",
    "linear-scope": "lineament.papers.linear_scope",
    "linfusion": "lineament.papers.linfusion",
    "linvideo": "lineament.papers.linvideo",
    "lit": "lineament.papers.lit",
    "lmc-landscape": "lineament.papers.lmc_landscape",
    "ltsf-linear": "lineament.papers.ltsf_linear",
    "neural-circuit-diagrams": "lineament.papers.neural_circuit_diagrams",
    "projection-head": "lineament.papers.projection_head",
    "rala": "lineament.papers.rala",
    "relp": "lineament.papers.relp",
    "rws": "lineament.papers.rws",
    "sensor-layout": "lineament.papers.sensor_layout",
    "shallow-parallel": "lineament.papers.shallow_parallel",
    "ssa": "lineament.papers.ssa",
    "tensor-attention": "lineament.papers.tensor_attention",
    "transcoders": "lineament.papers.transcoders",
    "transnormer": "lineament.papers.transnormer",
    "weight-matching": "lineament.papers.weight_matching",
}


def record(slug: str) -> Paper:
    """Return the record of one paper.

    Args:
        slug: a key of `MODULES`.

    Raises:
        ValueError: no paper has this slug; the message suggests the nearest ones.

    Example:
        >>> record("hedgehog").arxiv
        '2402.04347'
    """
    return _module(slug).RECORD


def records() -> list[Paper]:
    """Return every record, in the order of `MODULES` (by slug)."""
    return [record(slug) for slug in MODULES]


def search(text: str) -> list[Paper]:
    """Return the papers that mention every word of a text, best first.

    Letter case and accents do not matter, and a word may be part of a longer one. A word counts by the best field it
    is found in: slug, title, keywords, authors, summary. Ties keep the order of the catalogue, and a text without
    words returns all papers.

    Example:
        >>> tuple(paper.slug for paper in search("delta rule"))
        ('deltanet', 'kimi-linear', 'hybrid-linear-attention')
    """
    words = _plain(text).split()
    found = [(paper, [_weight(word, paper) for word in words]) for paper in records()]
    found = [(paper, weights) for paper, weights in found if all(weights)]
    return [paper for paper, weights in sorted(found, key=lambda hit: -sum(hit[1]))]


def experiment(slug: str, **options: Any) -> Callable[..., Any]:
    """Return the function `experiment(scale) -> Evidence` of one paper.

    Args:
        slug: a key of `MODULES`.
        options: what it will be called with beside the scale; studies take `out`, `only`, `workers` and `ray`.

    Raises:
        ValueError: no paper has this slug, or its experiment doesn't take an option.
        NotImplementedError: the system is planned and has no experiment yet.
    """
    run = getattr(_module(slug), "experiment", None)
    if run is None:
        raise NotImplementedError(
            f"the system of {slug!r} is planned: its record is here, its experiment is not yet. "
            "`lineament papers` lists the ones that run."
        )
    taken = signature(run).parameters
    for name in options:
        if name not in taken:
            raise InputError(f"the experiment of {slug!r} takes no {name}; it is one run, not a study")
    return run


def runs(slug: str, scale: str, **options: Any) -> dict[str, bool]:
    """Return the names of a study's runs and whether each is finished.

    Args:
        slug: a key of `MODULES`. scale: of its experiment. options: `out` and `only`, as the experiment takes them.

    Raises:
        ValueError: no paper has this slug, or its experiment is one run.
    """
    found = getattr(_module(slug), "runs", None)
    if found is None:
        raise InputError(f"the experiment of {slug!r} is one run, not a study; there are no runs to list")
    return found(scale, **options)


def _module(slug: str) -> ModuleType:
    if slug not in MODULES:
        near = ", ".join(map(repr, get_close_matches(str(slug), MODULES)))
        hint = f"Did you mean {near}?" if near else f"`lineament papers` lists all {len(MODULES)}."
        raise InputError(f"no paper is called {slug!r}. {hint}")
    return import_module(MODULES[slug])


def _weight(word: str, paper: Paper) -> int:
    """Return how much a plain word counts for a paper; 0 if no field has it."""
    fields = (paper.slug, paper.title, " ".join(paper.keywords), paper.authors, paper.summary)
    return max((len(fields) - i for i, field in enumerate(fields) if word in _plain(field)), default=0)


def _plain(text: str) -> str:
    """Fold letter case and drop accents, so that "re" finds "Ré"."""
    return "".join(c for c in normalize("NFKD", text.casefold()) if not combining(c))
