"""Pretrained softmax transformers to linear time: plan, inherit, transfer, distil, measure, save.

- `run(model, plan, out)` is the door; `PLANS`, `plan(name, changes)` the recipes; `inspect` shows what would happen.
- `evaluate`, `evaluate_folder`, `write_report`: a student beside its teacher and the baselines; `shown`: as a table.
- `DamageTable`, `kept_heads`: what stays softmax and why.
"""

from lineament.convert.check import check
from lineament.convert.evaluate import evaluate, shown, state_off
from lineament.convert.folders import evaluate_folder, inspect, write_report
from lineament.convert.inspect import ModelInfo
from lineament.convert.plan import Plan
from lineament.convert.plans import PLANS, plan
from lineament.convert.run import run
from lineament.convert.select import DamageTable, kept_heads, shipped_table
from lineament.convert.thresholds import DEMO, HOUR, NO_SOFTMAX, Bar, bar_of

__all__ = [
    "DEMO",
    "HOUR",
    "NO_SOFTMAX",
    "PLANS",
    "Bar",
    "DamageTable",
    "ModelInfo",
    "Plan",
    "bar_of",
    "check",
    "evaluate",
    "evaluate_folder",
    "inspect",
    "kept_heads",
    "plan",
    "run",
    "shipped_table",
    "shown",
    "state_off",
    "write_report",
]
