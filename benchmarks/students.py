"""Time students beside their teacher: decode and prefill, in turns in one run, with the ceiling that free mixers give.

    python benchmarks/students.py --quick      # short contexts
    python benchmarks/students.py --json FILE
    python benchmarks/students.py --plans default --decode --prefill 2048 8192   # a part: no decoding, two prompts

Speed does not depend on training, so the students are made on the spot: the plan's mixers in the embedded model,
softmax heads by its damage table. The teacher is timed with transformers' dynamic and static cache, and the faster one
counts.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lineament import convert
from lineament.convert.inherit import mixer_configs
from lineament.convert.parts import parts, teacher_digest
from lineament.models import build_student, load_teacher
from lineament.nn import LayerState
from lineament.report import machine
from lineament.tasks.cost import cache_bytes, decode_speed, prefill_speed

PLANS = ("default", "lightning", "gated-deltanet")
GOALS = {  # (measure, context): least ratio of the teacher's time to the student's
    ("decode", 128): 1 / 1.15, ("decode", 32768): 2.0, ("prefill", 2048): 0.95, ("prefill", 4096): 1.0,
}  # fmt: skip
LONG_PREFILL = {"default": 1.4, "lightning": 1.5, "gated-deltanet": 1.5}  # at 8192
CACHE = 0.30


class FreeMixer(nn.Module):
    """A mixer that costs nothing and says nothing: what is left is everything else in the model."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, state: Any = None, **rest: Any) -> tuple[Tensor, Any]:
        return q, state if state is not None else LayerState()


def make_students(teacher: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """Return {plan: student} on the teacher's own weights, and one whose mixers are free."""
    found = parts(teacher)
    made = {}
    for name in names:
        plan = convert.plan(name)
        window, sinks = convert.plan("default").window, convert.plan("default").sinks
        table = convert.shipped_table(teacher_digest(teacher), window=window, sinks=sinks)
        full = convert.kept_heads(plan, len(found.layers), found.shapes[0]["key_heads"], table)
        made[name] = build_student(teacher, mixer_configs(plan, found.shapes, full), share=True).eval()
    none = mixer_configs(replace(convert.plan("default"), keep="none"), found.shapes, {})
    made["free mixers"] = build_student(teacher, none, share=True).eval()
    for module in made["free mixers"].modules():
        if hasattr(module, "mixer"):
            module.mixer = FreeMixer()
    return made


def rows(models: dict[str, nn.Module], decode: list[int], prefill: list[int], tokens: int) -> list[dict[str, Any]]:
    """Measure everything; one row per measure, context and student."""
    measured = []
    prefill_models = dict(models)
    decode_models = {name: model for name, model in models.items() if name != "free mixers"}
    for what, contexts in (("decode", decode), ("prefill", prefill)):
        for context in contexts:
            if what == "decode":
                speeds = decode_speed(decode_models, context, tokens=tokens)
            else:
                speeds = prefill_speed(prefill_models, context)
            teacher = speeds["teacher"]
            for name, speed in speeds.items():
                if name != "teacher":
                    goal = (
                        LONG_PREFILL.get(name) if (what, context) == ("prefill", 8192) else GOALS.get((what, context))
                    )
                    measured.append({
                        "measure": what, "context": context, "student": name, "milliseconds": 1e3 * speed.median,
                        "teacher_milliseconds": 1e3 * teacher.median, "teacher_cache": teacher.cache,
                        "cache": speed.cache,
                        "faster": teacher.median / speed.median, "goal": None if name == "free mixers" else goal,
                    })  # fmt: skip
    theirs = cache_bytes(models["teacher"], 32768)
    for name, model in models.items():
        if name not in ("teacher", "free mixers"):
            share = cache_bytes(model, 32768) / theirs
            measured.append(
                {"measure": "cache bytes", "context": 32768, "student": name, "share": share, "goal": CACHE}
            )
    return measured


def table(measured: list[dict[str, Any]]) -> Table:
    """Return the rows as a table."""
    shown = Table("measure", "context", "student", "ms", "teacher's ms", "times faster", "goal", "met")
    for row in measured:
        if "share" in row:
            met = "yes" if row["share"] <= row["goal"] else "no"
            shown.add_row(
                row["measure"], str(row["context"]), row["student"], "", "", f"{row['share']:.3f}x", "0.30x", met
            )
            continue
        met = "" if row["goal"] is None else "yes" if row["faster"] >= row["goal"] else "no"
        goal = "" if row["goal"] is None else f"{row['goal']:.2f}"
        teacher = f"{row['teacher_milliseconds']:.1f} ({row['teacher_cache']})"
        shown.add_row(row["measure"], str(row["context"]), row["student"], f"{row['milliseconds']:.1f}", teacher,
                      f"{row['faster']:.2f}", goal, met)  # fmt: skip
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="folder, Hub name, GGUF file or smollm2")
    parser.add_argument("--quick", action="store_true", help="short contexts only")
    parser.add_argument("--plans", nargs="*", default=list(PLANS), help="what is timed")
    parser.add_argument("--decode", nargs="*", type=int, help="tokens before the decoded one; none to leave it out")
    parser.add_argument("--prefill", nargs="*", type=int, help="tokens of the prompts; none to leave them out")
    parser.add_argument("--json", type=Path, help="write the rows and the machine's description here")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    chosen = parser.parse_args()
    teacher, _ = load_teacher(chosen.model)
    teacher = teacher.eval().to(getattr(torch, chosen.dtype))
    models = {"teacher": teacher, **make_students(teacher, tuple(chosen.plans))}
    decode = [128, 2048] if chosen.quick else [128, 2048, 8192, 32768]
    prefill = [512, 2048] if chosen.quick else [2048, 4096, 8192]
    decode, prefill = (d if c is None else c for d, c in ((decode, chosen.decode), (prefill, chosen.prefill)))
    measured = rows(models, decode, prefill, 8 if chosen.quick else 16)
    console = Console(width=120)
    console.print(table(measured), json.dumps(machine()))
    if chosen.json:
        result = {"machine": machine(), "dtype": chosen.dtype, "rows": measured}
        chosen.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
