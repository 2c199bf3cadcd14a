"""The hybrid study as lists of arms, run resumably, and its two plots."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean
from typing import Any

from lineament import io, train
from lineament._base.errors import InputError, unknown
from lineament.report import curve
from lineament.tasks.hybrids import SIZES, Arm

VARIANTS = ("hgrn", "retnet", "gla", "hgrn2", "deltanet", "gated-deltanet")
RATIOS = ("pure", "24:1", "12:1", "6:1", "3:1")
PILOTED = ("retnet", "hgrn2", "gated-deltanet")
SEEDS = (0, 1, 2)
WORK = "lineament.tasks.hybrids:run_arm"


def _softmax(size: str, **fields: Any) -> Arm:
    return Arm(variant="llama", ratio="full", size=size, **fields)


def _crossed(variants: Sequence[str], ratios: Sequence[str], size: str, **fields: Any) -> list[Arm]:
    return [Arm(variant=variant, ratio=ratio, size=size, **fields) for variant in variants for ratio in ratios]


def _mechanics(size: str) -> list[Arm]:
    return [_softmax(size), *_crossed(PILOTED, ("pure", "1:1"), size)]


def _verdict() -> list[Arm]:
    """Return the arms that the verdict is spoken on: recall of three mixers, the loss of one, full heads or layers."""
    found: list[Arm] = []
    for seed in SEEDS:
        found += [_softmax("study", seed=seed), *_crossed(PILOTED, ("pure", "3:1"), "study", seed=seed)]
        found += _crossed(("gated-deltanet",), ("pure", "3:1"), "study", task="text", seed=seed)
        found += [
            Arm(variant="converted", ratio="3:1", size="study", placement=placement, seed=seed)
            for placement in ("inherited layers", "heads")
        ]
    return found


def _sweep(size: str) -> list[Arm]:
    tasks = ("recall", "text")
    return [arm for task in tasks for arm in (_softmax(size, task=task), *_crossed(VARIANTS, RATIOS, size, task=task))]


LISTS = {
    "smoke": lambda: _mechanics("smoke"),
    "small": lambda: _mechanics("small"),
    "study": lambda: [*_verdict(), *_sweep("deep")],
    "full": lambda: [*_sweep("340m"), *_sweep("1.3b")],
}
"""By scale. `full` are the paper's sizes: six mixers, five ratios and softmax, 31 arms a size of the 36 that its
abstract counts (the rest can't be told), each on both tasks."""


def arms(scale: str, only: str | Sequence[str] | None = None) -> list[Arm]:
    """Return the arms of a scale, or those whose names match one of some globs.

    Raises:
        InputError: an unknown scale, or a glob that nothing matches (some names are shown).

    Example:
        >>> [arm.name for arm in arms("small", "*-retnet-*")]
        ['small-recall-retnet-pure-layers-0', 'small-recall-retnet-1to1-layers-0']
    """
    if scale not in LISTS:
        raise unknown("scale", scale, LISTS)
    found = LISTS[scale]()
    globs = [only] if isinstance(only, str) else only or ["*"]
    for glob in globs:
        if not any(fnmatchcase(arm.name, glob) for arm in found):
            raise InputError(f"no arm matches {glob!r}; names are like {found[0].name} and {found[-1].name}")
    return [arm for arm in found if any(fnmatchcase(arm.name, glob) for glob in globs)]


def listed(scale: str, *, only: str | Sequence[str] | None = None, out: str | Path | None = None) -> dict[str, bool]:
    """Return the names of a scale's arms (see `arms`) and whether each is finished in `out`."""
    values = _values(arms(scale, only))
    done = {} if out is None else train.finished(values, out)
    return {name: name in done for name in values}


def judged(scale: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether a scale has a verdict and all the arms that it rests on, those of the scale's own size, are there."""
    there = sum(row["size"] == scale for row in rows)
    return scale in ("small", "study") and there == sum(arm.size == scale for arm in arms(scale))


def run_study(
    scale: str,
    out: str | Path,
    *,
    only: str | Sequence[str] | None = None,
    workers: int = 1,
    ray: str | None = None,
    said: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """Run the arms of a scale (see `arms`) as a `train.sweep`; draw what all finished ones in `out` show into it.

    Args:
        workers, ray: of `train.sweep`. said: called with the name of every arm that is done.

    Returns:
        What `run_arm` returned, in the arms' order.
    """
    values = _values(arms(scale, only))
    rows = train.sweep(WORK, values, out, workers=workers, ray=ray, on_done=lambda name, _: said(name))
    there = train.finished(_values(arms(scale)), out)  # those of earlier parts too
    for name, png in figures(list(there.values())).items():
        io.write_bytes(Path(out) / name, png)
    return list(rows.values())


def _values(chosen: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    return {arm.name: arm.value() for arm in chosen}


def share(row: Mapping[str, Any]) -> float:
    """Return the share of an arm's heads that are softmax, in percent."""
    heads = SIZES[row["size"]].heads
    return 100 * sum(map(len, row["full"])) / (heads * len(row["full"]))


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """Draw recall against the share of full heads, and loss against it: name -> PNG, one of each per size."""
    drawn = {}
    for measure, label in (("recall", "answers recalled (%)"), ("loss", "held-out loss (nats per character)")):
        for size in dict.fromkeys(row["size"] for row in rows):
            of = [row for row in rows if row["size"] == size and measure in row]
            lines: dict[str, tuple[list[float], list[float]]] = {}
            softmax = [row[measure] for row in of if row["variant"] == "llama"]
            factor = 100.0 if measure == "recall" else 1.0
            for row in of:
                name = row["variant"] if row["placement"] == "layers" else row["placement"]
                if row["variant"] != "llama":
                    lines.setdefault(name, ([], []))
            for name, line in lines.items():
                own = [r for r in of if (r["variant"] if r["placement"] == "layers" else r["placement"]) == name]
                for x in sorted({share(row) for row in own}):
                    line[0].append(x)
                    line[1].append(factor * mean(row[measure] for row in own if share(row) == x))
            if lines:
                drawn[f"{measure}-{size}.png"] = curve(
                    lines, xlabel="softmax heads (% of all)", ylabel=label,
                    levels={"softmax": factor * mean(softmax)} if softmax else None,
                )  # fmt: skip
    return drawn
