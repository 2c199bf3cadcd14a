"""Time masked blocks (a linear layer and ReLU) beside dense ones of equal shape: G2G masks at 75 % sparsity.

    python benchmarks/masked.py --quick
    python benchmarks/masked.py --json FILE

One thread, float32; medians over rounds in which all rows take turns, in seconds of the thread. "masked" multiplies the
dense weight by its mask and saves nothing; "packed units" are dense tiles; "packed edges" are tiles and a sparse rest,
for inference only. The goal is packed units >= 1.5x dense, forward, and forward with backward.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lineament import nn
from lineament._base.seeds import seeded
from lineament.report import machine

SHAPES = ((1000, 128, 5), (1000, 1024, 5), (2000, 256, 5), (4000, 256, 5), (2048, 256, 8))  # width, rows, groups
GOAL, DENSITY = 1.5, 0.25


def blocks(width: int, groups: int) -> dict[str, torch.nn.Module]:
    """Return the block of every kind, of one shape."""
    between = nn.between_for(DENSITY, groups)
    with seeded(0):
        layers: dict[str, torch.nn.Module] = {"dense": torch.nn.Linear(width, width)}
        for pattern in ("units", "edges"):
            layer = nn.MaskedLinear(nn.group_mask(width, width, groups, between=between, pattern=pattern))
            layers |= {"masked": layer, f"packed {pattern}": nn.PackedLinear(layer)}
    layers["packed edges"].eval()
    return {name: torch.nn.Sequential(layer, torch.nn.ReLU()) for name, layer in layers.items()}


def measured(width: int, rows: int, groups: int, rounds: int) -> list[dict[str, Any]]:
    """Return one row per kind of block, with its speed against the dense one."""
    x = torch.randn(rows, width)
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, block in blocks(width, groups).items():
        calls[name, "forward"] = lambda block=block: _forward(block, x)
        if name != "packed edges":
            calls[name, "both"] = lambda block=block: _both(block, x)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for turn in range(rounds + 1):
        for key, call in calls.items():
            began = time.thread_time()
            call()
            if turn:  # the first one warms up
                times[key].append(time.thread_time() - began)
    found = []
    for (name, what), seconds in times.items():
        ratio = statistics.median(times["dense", what]) / statistics.median(seconds)
        found.append({"width": width, "rows": rows, "groups": groups, "block": name, "what": what,
                      "ms": 1e3 * statistics.median(seconds), "times dense": ratio,
                      "goal": None if name != "packed units" else ratio >= GOAL})  # fmt: skip
    return found


@torch.no_grad()
def _forward(block: torch.nn.Module, x: torch.Tensor) -> None:
    block(x)


def _both(block: torch.nn.Module, x: torch.Tensor) -> None:
    block.zero_grad()
    block(x.clone().requires_grad_()).sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the two smallest shapes, few rounds")
    parser.add_argument("--json", type=Path, help="write the figures and the machine's description here")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    shapes = SHAPES[:2] if chosen.quick else SHAPES
    rows = [row for shape in shapes for row in measured(*shape, rounds=5 if chosen.quick else 15)]
    table = Table("width", "rows", "groups", "block", "what", "ms", "times dense", "goal")
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else "" if v is None else str(v) for v in row.values()))
    Console(width=120).print(table)
    if chosen.json:
        chosen.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
