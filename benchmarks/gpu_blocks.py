"""Try blocks, warps and stages of every Triton kernel on this GPU, beside those that `triton_launch.TUNED` has.

    python benchmarks/gpu_blocks.py --json blocks.json
    python benchmarks/gpu_blocks.py --ops KDA --quick      # one op, one shape

One forward and backward pass per op and shape of `gpu.py`; each kernel that it launches is tried in all ways, one after
the other (milliseconds are medians of a launch). Every way is compiled first: a second or so each, some 200 an op.
"""

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gpu import OPS, SHAPES, gradients, inputs, milliseconds, ours, uses
from lineament.io import write_json
from lineament.ops.recurrence import triton_decayed, triton_delta, triton_launch
from lineament.report import machine

SIZES, WARPS, STAGES = (32, 64, 128), (2, 4, 8), (1, 2, 3)


def choices(now: dict[str, int], widths: dict[str, int]) -> list[dict[str, int]]:
    """Return every way to launch a kernel that is cut as `now` is, that one first."""
    sizes = {n: [size for size in SIZES if size <= widths[n]] for n in ("BK", "BV") if n in now}
    tried = sizes | {"num_warps": WARPS, "num_stages": STAGES}
    ways = [dict(zip(tried, way, strict=True)) for way in product(*tried.values())]
    return [now, *(way for way in ways if way != now)]


class Trial:
    """Stands in for `launch`: times every new kernel in all ways, then launches it as usual."""

    def __init__(self, console: Console) -> None:
        self.console, self.launch, self.blocks = console, triton_launch.launch, triton_launch.blocks
        self.rows: list[dict[str, Any]] = []
        self.op = ""

    def __call__(self, kernel: Any, rows: int, c: dict[str, Any], *tensors: Any, **more: Any) -> None:
        name, now = self.usual(kernel, rows, c, tensors, more)
        row = {
            "kernel": name,
            "gate": c["GATE"],
            "programs": rows,
            "saved": more.get("SAVE"),
            "strict": c.get("STRICT"),
        }
        if row not in [{n: seen[n] for n in row} for seen in self.rows]:
            found = []
            for way in choices(now, {"BK": c["KP"], "BV": c["VP"]}):
                triton_launch.FITTING.clear()
                triton_launch.blocks = lambda name, c, way=way: way
                ms = milliseconds(lambda: self.launch(kernel, rows, c, *tensors, **more))
                if not triton_launch.FITTING:  # else it was halved to fit
                    found.append({"ms": ms} | way)
            triton_launch.FITTING.clear()
            self.rows.append(row | {"op": self.op, "now": found[0], "found": sorted(found, key=lambda x: x["ms"])[:8]})
            best = self.rows[-1]["found"][0]
            about = f"{self.op:17} {name:40} {rows:5} programs"
            self.console.print(f"{about} {found[0]['ms']:.3f} ms, best {best}", highlight=False)
        triton_launch.blocks = self.blocks
        self.launch(kernel, rows, c, *tensors, **more)

    def usual(self, kernel: Any, rows: int, c: dict[str, Any], tensors: tuple, more: dict[str, Any]) -> tuple:
        """Launch as usual; return the name in TUNED and the choice that was made."""
        made: list[tuple[str, dict[str, int]]] = []

        def blocks(name: str, c: dict[str, Any]) -> dict[str, int]:
            made.append((name, self.blocks(name, c)))
            return made[-1][1]

        triton_launch.FITTING.clear()
        triton_launch.blocks = blocks
        self.launch(kernel, rows, c, *tensors, **more)
        name, choice = made[0]
        return name, next(iter(triton_launch.FITTING.values()), choice)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="*", default=list(OPS), choices=OPS)
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--json", type=Path, help="also write the results here, after every op")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was tried")
        return
    trial = Trial(Console(width=180))
    for module in (triton_launch, triton_decayed, triton_delta):
        module.launch = trial
    for shape in SHAPES[: 1 if options.quick else None]:
        x = inputs(*shape)
        for op in options.ops:
            trial.op = op
            gradients(ours(op), x, uses(op), torch.ones_like(x["v"]))
            with torch.no_grad():
                ours(op)(x)
            if options.json:
                write_json(options.json, {"machine": machine(), "rows": trial.rows})


if __name__ == "__main__":
    main()
