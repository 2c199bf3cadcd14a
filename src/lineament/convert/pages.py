"""An evaluation as one HTML page: its table and what it looks like."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lineament.convert.evaluate import SHOWN, in_megabytes
from lineament.convert.thresholds import undecided
from lineament.report import Evidence, bars, curve, page
from lineament.report.page import Picture, Rows, Samples, Section, Text, Tiles

MODELS = {"teacher": "teacher", "student": "student", "state_off": "linear state off", "untrained": "window + sinks"}


def report_page(evidence: Evidence, path: Path, *, extra: Sequence[Any] = ()) -> Path:
    """Write an evaluation as one HTML file.

    Args:
        evidence: from `evaluate`. extra: further sections of `report.page`.
    """
    rows = list(evidence.rows)
    sections: list[Any] = [Section("At a glance", [Tiles(_tiles(rows)), Text(evidence.notes or "Nothing to add.")])]
    for text in dict.fromkeys(one[1] for one in _perplexities(rows)):
        said = f"perplexity of teacher, student and baselines on {text} against context"
        sections.append(Section(f"Perplexity on {text}", [Picture(perplexity_picture(rows, text), said)]))
    if picture := retrieval_picture(rows):
        said = "share of answer tokens right for facts found far back, by length and model"
        sections.append(Section("Retrieval", [Picture(picture, said)]))
    if pictures := cost_pictures(rows):
        sections.append(Section("Speed and memory", pictures))
    names = [name for name in SHOWN if any(name in row for row in rows)]
    lines = [{**dict.fromkeys(names), **row} for row in in_megabytes(rows)]  # what matters most comes first
    table = Section("Everything measured", [Rows(lines, evidence.threshold)])
    return page(f"{evidence.name}: {_reached(evidence)}", [*sections, *extra, table], path, lead=evidence.claim)


def _reached(evidence: Evidence) -> str:
    """Count the goals reached: one that is missed by a hair among ten is no failure of all."""
    goals = [row["verdict"] == "pass" for row in evidence.rows if row.get("verdict")]
    return f"{sum(goals)} of {len(goals)} goals reached" if goals else evidence.verdict


COSTS = {  # measure: (what one sees, axis of the values, factor)
    "cache bytes": ("memory of the cache against context", "megabytes", 1e-6),
    "decode tokens/s": ("tokens written per second after a context", "tokens per second", 1.0),
    "prefill tokens/s": ("tokens read per second, by length of the prompt", "tokens per second", 1.0),
}
PROMPTS = ("The capital of France is", "The linear structure of a neural network", "Once upon a time, a small robot")


def cost_pictures(rows: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Draw cache bytes, decode and prefill speed of student and teacher against context."""
    pictures = []
    for measure, (said, unit, factor) in COSTS.items():
        mine = [row for row in rows if re.fullmatch(rf"{measure} \d+", row["measure"])]
        points = sorted((int(row["measure"].rpartition(" ")[2]), row) for row in mine)
        if len(points) > 1:
            series = {
                name: ([context for context, _ in points], [factor * row[name] for _, row in points])
                for name in ("teacher", "student")
            }
            picture = curve(series, xlabel="context (tokens)", ylabel=unit, title=said, log="x")
            pictures.append(Picture(picture, f"{said}, student and teacher"))
    return pictures


def written(models: Mapping[str, Any], tokenizer: Any, *, max_new_tokens: int = 48) -> Section:
    """Let every model go on from the same prompts, and show the texts side by side."""
    from lineament.models import write_text

    samples = []
    for prompt in PROMPTS:
        texts = {
            name: write_text((model, tokenizer), prompt, max_new_tokens=max_new_tokens)["text"]
            for name, model in models.items()
        }
        samples.append(Samples(prompt, texts))
    return Section("Text by both, the likeliest token each time", samples)


def _tiles(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the few numbers to see first: every ratio with a goal, and its verdict."""
    found = {}
    for row in rows:
        value = row.get("ratio", row.get("lost"))
        if row.get("verdict") and value is not None:
            value += 0.0  # -0.0 is nothing lost too
            shown, unit = (f"{value:.3f}x", "") if "ratio" in row else (f"{value:.2g}", "points lost: ")
            found[row["measure"]] = (shown, unit + row["verdict"] + ", goal inside the interval" * undecided(row))
    return found


def _perplexities(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str, int]]:
    found = []
    for row in rows:
        match = re.fullmatch(r"perplexity (.+) (\d+)", row["measure"])
        if match and row.get("student") is not None:
            found.append((row, match[1], int(match[2])))
    return found


def perplexity_picture(rows: Sequence[Mapping[str, Any]], text: str) -> bytes:
    """Draw perplexity against context for every model (PNG)."""
    mine = [(row, length) for row, name, length in _perplexities(rows) if name == text]
    series = {}
    for key, label in MODELS.items():
        points = [(length, row[key]) for row, length in mine if row.get(key) is not None]
        if points:
            series[label] = tuple(zip(*points, strict=True))
    return curve(series, xlabel="context (tokens)", ylabel="perplexity", title=text, log="x")


def retrieval_picture(rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Draw retrieval against length for every model (PNG); None when it was not measured."""
    groups = {}
    for row in rows:
        match = re.fullmatch(r"retrieval (\d+)", row["measure"])
        if match:
            groups[f"{match[1]} tokens"] = {
                label: row[key] for key, label in MODELS.items() if row.get(key) is not None
            }
    return bars(groups, ylabel="answer tokens right (%)", title="facts found far back") if groups else None
