"""Convert the embedded model by our plan and by its controls, equally long, and put the students side by side.

    python benchmarks/recipes.py --quick           # two steps of each kind, to see that everything runs
    python benchmarks/recipes.py --small           # ten and eight steps at 1024 tokens: hours on two slow cores
    python benchmarks/recipes.py --budget 15min --json FILE

Each control changes one thing. The constant map is a gated running mean of the far values: what a learned map must
beat. The tuned teacher keeps every head softmax and learns the next token: what the text alone teaches. A finished
student is kept in benchmarks/students and not made again; teacher and baselines are measured once for all.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lineament import convert, io
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


TRAINED: dict[str, dict[str, Any]] = {
    "quick": {"transfer_steps": 2, "distil_steps": 2, "transfer_pool": 4},
    "small": {"transfer_steps": 10, "distil_steps": 8, "transfer_pool": 8},
}
SHORT = {"transfer_lengths": (1024,), "distil_lengths": (1024,)}  # of both
MEASURED: dict[str, dict[str, Any]] = {
    "quick": {"lengths": (512,), "tokens": 1024, "prompts": 4},
    "small": {"lengths": (512, 2048), "tokens": 8192, "prompts": 24},
    "budget": {"tokens": 32768, "prompts": 200},
}


def student(name: str, model: str, size: str, budget: str) -> Path:
    """Return the folder of a recipe's student, made now when it is not there."""
    plan, changes = RECIPES[name]
    label = f"{name}-{budget if size == 'budget' else size}"
    out = HERE / "students" / label.replace(" ", "-").replace("+", "and").replace(",", "")
    if not out.exists():
        steps = SHORT | TRAINED[size] if size in TRAINED else {}
        chosen = convert.plan(plan, {"evaluate_tokens": 0, **steps, **changes})
        convert.run(model, chosen, out, budget=budget if size == "budget" else None)
    return out


def measured(folder: Path, model: str, size: str) -> Evidence:
    """Return what a student was measured to be; students share their teacher's scores."""
    scores = HERE / "students" / f"scores-{size}"
    return convert.evaluate_folder(folder, model, speed=False, folder=scores, **MEASURED[size])


def show(found: Mapping[str, Evidence], trained: str) -> None:
    """Print every recipe's ratios and answers, in brackets with its linear state switched off."""
    kinds = {
        row["measure"]: None
        for one in found.values()
        for row in one.rows
        if row["measure"].startswith(("perplexity", "KL")) or row["measure"].partition(" ")[2].isdigit()
    }
    table = Table("recipe", *kinds, title=f"{trained}; ratio to the teacher or % of answers right (state off)")
    for name, evidence in found.items():
        rows = {row["measure"]: row for row in evidence.rows}
        table.add_row(name, *(_cell(rows.get(kind, {})) for kind in kinds))
    Console(width=200).print(table)


def _cell(row: Mapping[str, Any]) -> str:
    if row.get("student") is None:
        return ""
    by = row["teacher"] if row["measure"].startswith("perplexity") else 1.0
    values = [row[key] / by for key in ("student", "state_off") if row.get(key) is not None]
    return f"{values[0]:.4g}" + "".join(f" ({one:.4g})" for one in values[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="folder, Hub name, GGUF file or smollm2")
    parser.add_argument("--budget", default="15min", help="training time of each recipe")
    parser.add_argument("--only", nargs="*", choices=sorted(RECIPES), help="some of the recipes")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_const", dest="size", const="quick", help="two steps of each kind")
    sizes.add_argument("--small", action="store_const", dest="size", const="small", help="few steps, short texts")
    parser.add_argument("--json", type=Path, help="write the figures and the machine's description here")
    chosen = parser.parse_args()
    size = chosen.size or "budget"
    steps = TRAINED.get(size)
    trained = f"{steps['transfer_steps']} and {steps['distil_steps']} steps each" if steps else f"{chosen.budget} each"
    found: dict[str, Evidence] = {}
    for name in chosen.only or RECIPES:
        found[name] = measured(student(name, chosen.model, size, chosen.budget), chosen.model, size)
        show(found, trained)
        if chosen.json:
            recipes = {name: one.to_json() for name, one in found.items()}
            io.write_json(chosen.json, {"machine": machine(), "trained": trained, "recipes": recipes})


if __name__ == "__main__":
    main()
