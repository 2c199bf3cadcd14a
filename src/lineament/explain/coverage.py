"""Which operators a model is made of, and which rule each gets."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lineament.explain.recording import prepared, record, scored
from lineament.explain.relevance import named
from lineament.explain.rules import rules_of
from lineament.explain.sweep import plan
from lineament.explain.tape import LEAF, build
from lineament.explain.targets import Target, selected


def coverage(
    model: nn.Module, inputs: Mapping[str, Any] | Tensor, *, target: Target = None, rules: Any = "auto"
) -> list[dict[str, Any]]:
    """List the operators that relevance would pass, each with its count and rule.

    Args:
        model, inputs, target, rules: as in `relevance`.

    Returns:
        Rows with "operator", "count", "rule" (its function, or "none"), "covered" and "modules" (three, numbers as *),
        the most frequent first. An operator let through by its gradient does not count as covered.

    Example:
        >>> import torch
        >>> [row["operator"] for row in coverage(nn.Linear(2, 1), torch.ones(1, 2))]
        ['Addmm']
    """
    given = named(model, inputs)
    with prepared(model):
        recording = record(model, given, target=target)
        scores = selected(recording.output, scored(recording, target), given)[0]
        tape = build(get_gradient_edge(scores).node, recording)
        chosen = plan(tape, replace(rules_of(rules, model), unknown="vjp"), model)
    found: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(tape.names):
        if tape.live[index] and index not in tape.leaves and name != LEAF:
            found[name].append(index)
    rows = []
    for name, at in sorted(found.items(), key=lambda item: -len(item[1])):
        rule = chosen.operators[at[0]]
        modules = sorted({re.sub(r"\.\d+", ".*", tape.modules[i]) or "the model" for i in at})
        more = f", and {len(modules) - 3} more" if len(modules) > 3 else ""
        rows.append(
            {
                "operator": name, "count": len(at), "rule": getattr(rule, "__name__", "own") if rule else "none",
                "covered": rule is not None, "modules": ", ".join(modules[:3]) + more,
            }
        )  # fmt: skip
    return rows
