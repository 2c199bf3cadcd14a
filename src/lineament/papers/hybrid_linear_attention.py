"""hybrid-linear-attention: which linear mixer, and how many softmax layers beside it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .record import Figure, Paper

RECORD = Paper(
    slug="hybrid-linear-attention",
    title="A Systematic Analysis of Hybrid Linear Attention",
    authors="Wang, Zhu, Abreu, Shan, Kergan, Pan, Chou, Li, G. Zhang, Huang, Eshraghian",
    year=2025,
    venue=None,
    arxiv="2507.06457",
    room=("tasks", "models", "nn", "ops"),
    status="works",
    summary=(
        "A controlled comparison of six linear mixers, from vector states to gated delta rules, at several "
        "ratios of linear to full-attention layers. The library offers the instrument: interchangeable mixers "
        "in one block, a builder that takes a ratio or an explicit list, recall and language-modelling probes, "
        "and cache accounting."
    ),
    claim=(
        "Language-modelling quality hardly depends on the ratio, while recall rises clearly with the share of "
        "softmax layers."
    ),
    figures=(
        Figure("language modelling against the ratio", "nearly flat", "abstract"),
        Figure("recall against the share of full attention", "rises clearly, most below 3:1", "abstract"),
        Figure("recommended", "HGRN-2 or Gated DeltaNet between 3:1 and 6:1", "abstract"),
        Figure("models trained", "72, at 340M and 1.3B parameters", "abstract"),
        Figure("KV cache at 3:1 / 6:1 against full attention", "4 times / 7 times smaller", "derived"),
    ),
    experiment=(
        "Small scale checks the mechanics on associative recall: softmax and every 1:1 hybrid must end at 95 %, "
        "the RetNet hybrid must lead pure RetNet by 10 points at step 100, and cache bytes must equal the "
        "arithmetic. The study scale gives the verdict: 3:1 gains at least 10 points wherever pure recall is "
        "below 90 %, Gated DeltaNet beats RetNet pure, and the hybrid's cache stays within 1.1 of a quarter of "
        "softmax's plus the state."
    ),
    code="fla-org/flash-linear-attention (MIT)",
    keywords=("hybrid", "linear attention", "recall", "kv cache", "hgrn", "retnet", "gla", "mamba"),
    related=("deltanet", "kimi-linear", "hedgehog", "lightnet"),
)

Rows = Sequence[Mapping[str, Any]]


def runs(scale: str, **asked: Any) -> dict[str, bool]:
    """Return the names of a scale's runs, and whether each is finished; `out` and `only` as of `experiment`."""
    from lineament.tasks.hybrid_study import listed

    return listed(scale, **asked)


def experiment(
    scale: str = "small", *, out: str | None = None, only: Any = None, workers: int = 2, ray: str | None = None
) -> Any:
    """Train the arms of a scale and hold them to thresholds written before the first run, as `report.Evidence`.

    Args:
        scale: "small" (the mechanics), "study" (the verdict, and all ratios at 24 layers), "full" (the paper's sizes).
        out: folder that the arms' results and the plots are kept in; the same folder goes on where it was. A temporary
            one if None.
        only: a glob over the arms' names, or several. workers: local processes. ray: a Ray cluster's address.
    """
    import time
    from tempfile import TemporaryDirectory

    from lineament.convert.progress import Progress
    from lineament.report import Evidence
    from lineament.tasks.hybrid_study import arms, judged, run_study

    began = time.perf_counter()
    with TemporaryDirectory() as folder, Progress() as progress:
        progress.stage("arms", str(len(arms(scale, only))))
        rows = run_study(scale, out or folder, only=only, workers=workers, ray=ray, said=progress.note)
    rules = _mechanics(rows) if scale in ("small", "smoke") else _verdict(rows)
    complete = judged(scale, rows) and all("held" in rule for rule in rules)
    return Evidence(
        name=RECORD.slug, claim=RECORD.claim, rows=[_shown(row) for row in rows] + rules + _left_open(rows),
        threshold="; ".join(str(rule["arm"]) for rule in rules),
        passed=all(rule["held"] for rule in rules) if complete else None,
        seeds=sorted({row["seed"] for row in rows}), seconds=time.perf_counter() - began,
        notes="The small scale checks the mechanics: its task is too easy to rank mixers." if scale == "small" else "",
    )  # fmt: skip


def _of(rows: Rows, measure: str, **fields: Any) -> float:
    """Return a measure's mean over the seeds of an arm, or NaN where it was not run."""
    wanted = {"placement": "layers", **fields}
    found = [row[measure] for row in rows if measure in row and all(row[k] == v for k, v in wanted.items())]
    return sum(found) / len(found) if found else math.nan


def _rule(text: str, held: bool, **found: float) -> dict[str, Any]:
    """Lay out a rule; it says nothing of whether it held where a number that it needs was not measured."""
    known = bool(found) and not any(math.isnan(x) for x in found.values())
    numbers = ", ".join(f"{name} {x:.4g}" for name, x in found.items())
    return {"arm": text, "found": numbers, **({"held": held} if known else {})}


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: row[name] for name in ("recall", "loss", "parameters", "cache") if name in row}
    early = ", ".join(f"{x:.3f} at {step}" for step, x in row["looks"].items())
    place = "" if row["placement"] == "layers" else f", {row['placement']}"
    name = f"{row['variant']} {row['ratio']}{place} ({row['size']}, seed {row['seed']})"
    return {"arm": name, **kept, "found": early}


def _left_open(rows: Rows) -> list[dict[str, Any]]:
    """Answer what the paper leaves open, where it was run: full heads by measurement or layers by position."""
    placed = {p: _of(rows, "recall", placement=p) for p in ("heads", "inherited layers")}
    known = not any(math.isnan(x) for x in placed.values())
    return [{"arm": f"at equal cache: {p}", "recall": x} for p, x in placed.items() if known]


def _mechanics(rows: Rows) -> list[dict[str, Any]]:
    learnt = {f"{row['variant']} {row['ratio']}": row["recall"] for row in rows if row["ratio"] != "pure"}
    early = {row["ratio"]: row["looks"].get("100", math.nan) for row in rows if row["variant"] == "retnet"}
    lead = early.get("1:1", math.nan) - early.get("pure", math.nan)
    off = max(abs(row["cache"] - row["arithmetic"]) for row in rows)
    return [
        _rule("softmax and every 1:1 arm recall at least .95", min(learnt.values(), default=0.0) >= 0.95, **learnt),
        _rule("RetNet 1:1 leads RetNet by at least .10 at step 100", lead >= 0.10, lead=lead),
        _rule("cache bytes equal the arithmetic", off == 0, off=off),
    ]


def _verdict(rows: Rows) -> list[dict[str, Any]]:
    study: Rows = [row for row in rows if row["size"] == "study"]
    pure, hybrid = ({v: _of(study, "recall", variant=v, ratio=ratio) for v in ("retnet", "hgrn2", "gated-deltanet")}
                    for ratio in ("pure", "3:1"))  # fmt: skip
    gains = {v: hybrid[v] - pure[v] for v in pure if not pure[v] >= 0.90}
    order = {v: pure[v] for v in ("gated-deltanet", "retnet")}
    states = {row["variant"]: row["arithmetic"] for row in study if row["ratio"] == "pure"}
    caches = {row["variant"]: row["cache"] / (row["softmax_cache"] / 4 + states[row["variant"]])
              for row in study if row["ratio"] == "3:1" and row["variant"] in states}  # fmt: skip
    losses = [_of(study, "loss", task="text", ratio=ratio) for ratio in ("pure", "3:1")]
    apart = abs(losses[1] / losses[0] - 1)
    return [
        _rule("3:1 gains at least .10 wherever pure recall is below .90", all(g >= 0.1 for g in gains.values()),
              **(gains or {"arms below .90": 0.0})),
        _rule("pure recall: Gated DeltaNet above RetNet", order["gated-deltanet"] > order["retnet"], **order),
        _rule("cache of 3:1 at most 1.1 x (softmax / 4 + state)", max(caches.values(), default=0.0) <= 1.1, **caches),
        _rule("loss on text differs by less than 3 % between pure and 3:1", apart < 0.03, apart=apart),
    ]  # fmt: skip
