"""The model card of a student: what it is, how it was made, what was measured, whose weights it holds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lineament.convert.plan import Plan

CARD = """---
{front}
---

# {title}

A linear-time student of `{teacher}`: {replaced} of its {heads} key-value heads use `{mixer}`
(exact on the last {window} and the first {sinks} tokens, a constant-size state for the rest), {kept} stay softmax.

```python
import lineament.models
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```

## Measured beside its teacher

{table}

{notes}

## Softmax heads

{full}

## Plan

```json
{plan}
```

## Licence

The weights come from `{teacher}` and stay under its licence: {licence}.
"""


def card_in(folder: Path) -> str:
    """Return the text of the model card in a folder; empty where there is none."""
    path = folder / "README.md"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def licence_of(config: Any, folder_card: str = "") -> str:
    """Return the teacher's licence as its own card or config names it, or say that it does not."""
    for line in folder_card.splitlines():
        if line.lower().startswith("license:"):
            return line.split(":", 1)[1].strip()
    return str(getattr(config, "license", None) or "see the teacher's card (its files name none)")


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table; columns in order of first appearance.

    Example:
        >>> print(markdown_table([{"a": 1, "b": 0.5}, {"a": None}]))
        | a | b |
        |---|---|
        | 1 | 0.5 |
        |  |  |
    """
    if not rows:
        return "Nothing was measured."
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append(f"| {' | '.join(_cell(row.get(name)) for name in columns)} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|")


def model_card(
    *,
    title: str,
    teacher: str,
    plan: Plan,
    rows: Sequence[Mapping[str, Any]],
    notes: str,
    full: Mapping[int, Sequence[int]],
    heads: int,
    licence: str,
) -> str:
    """Write the card.

    Args:
        rows: the measured table. full: {layer: key-value heads that stay softmax}. heads: key-value heads in all.
    """
    kept = sum(len(one) for one in full.values())
    front = ["library_name: transformers", "tags:", "- lineament", "- linear-attention"]
    if licence and " " not in licence:
        front.insert(0, f"license: {licence}")
    listed = ", ".join(f"{layer}.{head}" for layer, some in sorted(full.items()) for head in some)
    return CARD.format(
        front="\n".join(front),
        title=title,
        teacher=teacher,
        replaced=heads - kept,
        heads=heads,
        kept=kept,
        mixer=plan.mixer,
        window=plan.window,
        sinks=plan.sinks,
        table=markdown_table(rows),
        notes=notes,
        full=f"Layer.head: {listed}." if listed else "None.",
        plan=json.dumps(plan.to_json(), indent=2),
        licence=licence,
    )
