"""Decode one token with every layer of the literature: microseconds, allocations, share of the memory bandwidth.

    python benchmarks/steps.py --quick
    python benchmarks/steps.py --json benchmarks/results/steps.json
    python benchmarks/steps.py --layers kda gla --width 64 --heads 2 --key-heads 2 --context 64   # to try it out

A layer is timed whole (`layer`) and without its projections, norm and gate (`heads`), one row of float32 on one thread,
layers taking turns; the figure is the median over rounds of the mean of a round's steps, in seconds of the thread.
Bandwidth is what a large addition reaches on the same thread in the same run. A step must at least read the layer's
weights once, and read and write its state (keys and values of every token are only read): those bytes a second are the
share. It is small where a step costs calls and not bytes.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from allocations import allocations
from lineament.nn import LAYERS, Mixer, MixerCache, published
from lineament.report import machine
from lineament.tasks import in_turn

STEPS = 16  # of a round
GROWS = ("softmax", "mla")  # they keep something of every token
OWN_HEADS = ("mamba2",)  # counts groups, not key heads
Calls = dict[str, Callable[[], object]]


def calls_of(name: str, given: argparse.Namespace) -> tuple[Calls, dict[str, dict[str, float]]]:
    """Return a step of a layer and one of its heads, after a text, and the bytes that each has to move."""
    key_heads = None if name in OWN_HEADS else given.key_heads
    torch.manual_seed(0)
    layer = Mixer(*published(name, model_width=given.width, heads=given.heads, key_heads=key_heads)).eval()
    cache, x = MixerCache(), torch.randn(1, 1, given.width)
    layer(torch.randn(1, given.context, given.width), cache=cache)
    caches = {"layer": cache, "heads": cache.copy()}
    q, k, v = layer.projected(x)

    def whole() -> Tensor:
        return layer(x, cache=caches["layer"])

    def inner() -> Any:
        return layer.heads(q, k, v, x=x, state=caches["heads"], keep=True)

    bytes_of: dict[str, dict[str, float]] = {}
    for part, module in (("layer", layer), ("heads", layer.heads)):
        state = sum(x.nbytes for at, x in caches[part].tensors().items() if part == "layer" or "." in at)
        weights = sum(p.nbytes for p in chain(module.parameters(), module.buffers()))
        bytes_of[part] = {"state": state, "weights": weights, "moved": weights + state * (1 if name in GROWS else 2)}
    return {"layer": whole, "heads": inner}, bytes_of


def bandwidth(megabytes: int = 96) -> float:
    """Return bytes a second of adding two large arrays into a third, on this thread."""
    a = torch.ones(megabytes * 2**18)
    b, out = a.clone(), a.clone()
    seconds = in_turn({"add": lambda: torch.add(a, b, out=out)}, 7, clock=time.thread_time)["add"]
    return 3 * a.nbytes / median(seconds)


@torch.no_grad()
def rows_of(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all layers; a row per layer and part."""
    made = {name: calls_of(name, given) for name in given.layers}
    calls = {(name, part): call for name, (parts, _) in made.items() for part, call in parts.items()}
    repeated = {
        f"{name}\n{part}": lambda call=call: [call() for _ in range(STEPS)] for (name, part), call in calls.items()
    }
    times = in_turn(repeated, given.rounds, clock=time.thread_time)
    reach, found = bandwidth(8 if given.quick else 96), []
    for (name, part), call in calls.items():
        seconds, of = median(times[f"{name}\n{part}"]) / STEPS, made[name][1][part]
        sizes = [n for n in allocations(call) if n > 0]
        found.append({
            "layer": name, "part": part, "microseconds": 1e6 * seconds, "allocations": len(sizes),
            "allocated bytes": sum(sizes), "state bytes": of["state"], "weight bytes": of["weights"],
            "bytes a second": of["moved"] / seconds, "share of bandwidth": of["moved"] / seconds / reach,
        })  # fmt: skip
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    """Lay the rows out."""
    shown = Table("layer", "part", "us", "allocations", "allocated KB", "state KB", "weights KB", "share of bandwidth")
    for row in rows:
        sizes = (f"{row[f'{what} bytes'] / 1e3:.1f}" for what in ("allocated", "state", "weight"))
        shown.add_row(row["layer"], row["part"], f"{row['microseconds']:.0f}", str(row["allocations"]), *sizes,
                      f"{100 * row['share of bandwidth']:.1f} %")  # fmt: skip
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="*", default=list(LAYERS), choices=list(LAYERS), help="all by default")
    for name, default in (("width", 576), ("heads", 9), ("key-heads", 3), ("context", 1024), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--quick", action="store_true", help="3 rounds after 64 tokens")
    parser.add_argument("--json", type=Path, help="write the rows and the machine's description here")
    given = parser.parse_args()
    if given.quick:
        given.context, given.rounds = min(given.context, 64), min(given.rounds, 3)
    torch.set_num_threads(1)
    rows = rows_of(given)
    Console(width=140).print(table(rows))
    if given.json:
        shape = {name: getattr(given, name) for name in ("width", "heads", "key_heads", "context", "rounds")}
        given.json.write_text(json.dumps({"machine": machine(), "shape": shape, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
