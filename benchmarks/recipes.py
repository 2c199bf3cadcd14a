"""Convert the embedded model by our plan and by its controls, with the same budget, and put the students side by side.

    python benchmarks/recipes.py --quick           # two minutes of training each
    python benchmarks/recipes.py --budget 15min --json FILE

Each control changes one thing. The constant map is a gated running mean of the far values: what a learned map must
beat. The tuned teacher keeps every head softmax and learns the next token: what the text alone teaches. A finished
student is kept in benchmarks/students and not made again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lineament import convert
from lineament.report import Evidence, machine

HERE = Path(__file__).resolve().parent
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("default", {}),
    "Hedgehog map": ("default", {"options": {"query_scale": True}}),
    "constant map": ("default", {"options": {"map": "constant"}}),
    "1+ELU": ("default", {"options": {"map": "elu"}}),
    "T2R": ("default", {"options": {"map": "t2r"}}),
    "window + sinks only": ("default", {"mixer": "softmax-window", "options": {}, "transfer_steps": 0}),
    "placement by position": ("default", {"keep": "every:4"}),
    "no softmax head": ("no-softmax", {}),
    "teacher tuned on the same tokens": (
        "default",
        {"keep": "all", "distil_kl": 0.0, "distil_next": 1.0, "transfer_steps": 0},
    ),
    "Hedgehog, no window": ("hedgehog", {}),
    "LoLCATs as published": ("lolcats", {}),
}


def student(name: str, model: str, budget: str, tokens: int, prompts: int) -> Evidence:
    """Return what a recipe's student was measured to be, making it when it is not there."""
    plan, changes = RECIPES[name]
    out = HERE / "students" / f"{name.replace(' ', '-').replace('+', 'and').replace(',', '')}-{budget}"
    if (out / "evidence.json").exists():
        return Evidence.from_json(json.loads((out / "evidence.json").read_text(encoding="utf-8")))
    chosen = convert.plan(plan, {**changes, "evaluate_tokens": tokens, "evaluate_prompts": prompts})
    return convert.run(model, chosen, out, budget=budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="folder, Hub name, GGUF file or smollm2")
    parser.add_argument("--budget", default="15min", help="training time of each recipe")
    parser.add_argument("--only", nargs="*", choices=sorted(RECIPES), help="some of the recipes")
    parser.add_argument("--quick", action="store_true", help="two minutes each, a small measurement")
    parser.add_argument("--json", type=Path, help="write the figures and the machine's description here")
    chosen = parser.parse_args()
    budget, tokens, prompts = ("2min", 4096, 8) if chosen.quick else (chosen.budget, 32768, 200)
    found = {n: student(n, chosen.model, budget, tokens, prompts) for n in chosen.only or RECIPES}
    measures = [row["measure"] for row in next(iter(found.values())).rows]
    table = Table("measure", *found, title=f"{budget} each; ratio to the teacher, or answer tokens right")
    for measure in measures:
        cells = []
        for evidence in found.values():
            row = next((one for one in evidence.rows if one["measure"] == measure), {})
            value = row.get("ratio", row.get("student"))
            cells.append("" if value is None else f"{value:.4g}")
        table.add_row(measure, *cells)
    Console(width=200).print(table)
    if chosen.json:
        result = {"machine": machine(), "budget": budget, "recipes": {n: e.to_json() for n, e in found.items()}}
        chosen.json.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
