"""Time the recurrence beside its peers, in one process on one thread, and compare with the goals.

    python benchmarks/ops.py --quick          # two lengths, a minute or two
    python benchmarks/ops.py --json FILE      # all lengths; half an hour, most of it spent in the peers

B=1, H=8, K=V=64, float32. Every figure is a median over rounds in which all rows take turns, because only ratios within
one run mean anything on a shared machine; seconds are those of the thread, so that waiting for other processes doesn't
count. A case is left out of later rounds once it has used its seconds.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from allocations import allocations
from lineament._base.extras import available
from lineament.ops import elementwise_scan
from lineament.ops.recurrence import decayed_attention, delta_rule
from lineament.report import machine
from ops_peers import PEERS

B, H, K, V = 1, 8, 64, 64
LENGTHS = (1024, 4096, 16384, 65536)
LONGEST = {"qwen3-next": 16384, "sdpa": 16384}  # the other peers stop at 4096: beyond, they take minutes
SECONDS_PER_CASE = 20.0

OURS: dict[str, Callable[..., Tensor]] = {
    "no decay": lambda x: decayed_attention(x["q"], x["k"], x["v"])[0],
    "scalar decay": lambda x: decayed_attention(x["q"], x["k"], x["v"], x["head"])[0],
    "channel decay": lambda x: decayed_attention(x["q"], x["k"], x["v"], x["channel"])[0],
    "delta rule": lambda x: delta_rule(x["q"], x["k"], x["v"], x["beta"])[0],
    "gated delta rule": lambda x: delta_rule(x["q"], x["k"], x["v"], x["beta"], x["head"])[0],
    "KDA": lambda x: delta_rule(x["q"], x["k"], x["v"], x["beta"], x["channel"])[0],
}
MORE: dict[str, Callable[..., Tensor]] = {
    "scan": lambda x: elementwise_scan(x["v"].flatten(2), x["channel"].flatten(2))[0],
}  # a vector state: no matmuls to compare with
USES = {
    "no decay": "q k v",
    "scalar decay": "q k v head",
    "channel decay": "q k v channel",
    "delta rule": "q k v beta",
    "gated delta rule": "q k v beta head",
    "KDA": "q k v beta channel",
}
FLOPS = {name: 4 * K * V + 128 * (K + V) * (2 if "beta" in USES[name] else 1) for name in OURS}  # a token and head


@dataclass(frozen=True)
class Goal:
    """How many times faster than a peer (or, for "matmul", which share of its FLOP/s) an op has to be."""

    ours: str
    peer: str
    length: int
    forward: float
    both: float


GOALS = (
    Goal("scalar decay", "sdpa", 4096, 8, 8),
    Goal("scalar decay", "sdpa", 16384, 25, 25),
    Goal("scalar decay", "minimax", 4096, 2, 3),
    Goal("scalar decay", "fla scalar", 4096, 1.5, 10),
    Goal("gated delta rule", "qwen3-next", 4096, 4, 7),
    Goal("gated delta rule", "qwen3-next", 16384, 4, 50),
    Goal("KDA", "kimi", 4096, 20, 60),
    Goal("scalar decay", "mamba2", 4096, 4, 4),
    Goal("no decay", "fla linear", 4096, 3, 5),
    Goal("channel decay", "fla gla", 4096, 3, 5),
    Goal("scan", "fla hgrn", 4096, 3, 5),
    Goal("delta rule", "fla delta", 4096, 3, 5),
    Goal("gated delta rule", "fla gated delta", 4096, 3, 5),
    Goal("scalar decay", "matmul", 16384, 0.7, 0.5),
    Goal("gated delta rule", "matmul", 16384, 0.5, 0.35),
    Goal("KDA", "matmul", 16384, 0.4, 0.3),
)
EXPONENT, MEMORY = 1.10, 1.0

Timings = dict[tuple[str, int, str], list[float]]


def inputs(T: int) -> dict[str, Tensor]:
    """Draw the inputs; gates and strengths as a trained layer would have them."""
    generator = torch.Generator().manual_seed(T)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731 (four uses, one line)
    return {
        "q": normalize(draw(B, T, H, K), dim=-1),
        "k": normalize(draw(B, T, H, K), dim=-1),
        "v": draw(B, T, H, V),
        "beta": draw(B, T, H).sigmoid(),
        "head": -0.1 * draw(B, T, H).abs(),
        "channel": -0.1 * draw(B, T, H, K).abs(),
    }


def forward(function: Callable[..., Tensor], data: dict[str, Tensor]) -> None:
    with torch.no_grad():
        function(data)


def both(function: Callable[..., Tensor], data: dict[str, Tensor]) -> None:
    leaves = {name: x.detach().requires_grad_() for name, x in data.items()}
    o = function(leaves)
    o.backward(data["v"].view(o.shape))


def matmul(T: int) -> Callable[[], object]:
    """Return a batched 64^3 matmul over as many matrices as the chunks of T tokens."""
    left = torch.randn(max(1, T // 64) * H, 64, 64)
    out = torch.empty_like(left)
    return lambda: torch.bmm(left, left, out=out)


def measure(lengths: tuple[int, ...], rounds: int, console: Console) -> Timings:
    """Time every case in turns; {(name, length, "f" or "fb"): seconds}."""
    found: Timings = {}
    rows = OURS | MORE | {name: function for name, function in PEERS.items() if function is not None}
    for function in OURS.values():
        both(function, inputs(lengths[0]))  # loops are compiled at their first call
    for T in lengths:
        data, plain = inputs(T), matmul(T)
        for turn in range(rounds + 1):  # the first one warms up and counts only for cases too slow to repeat
            console.print(f"T={T}, round {turn} of {rounds}", style="dim", highlight=False)
            _record(found, ("matmul", T, "f"), plain, turn)
            for name, function in rows.items():
                if LONGEST.get(name, 65536 if name in OURS else 4096) >= T:
                    _record(found, (name, T, "f"), lambda f=function, d=data: forward(f, d), turn)
                    _record(found, (name, T, "fb"), lambda f=function, d=data: both(f, d), turn)
    return found


def _record(found: Timings, key: tuple[str, int, str], call: Callable[[], object], turn: int) -> None:
    spent = found.setdefault(key, [])
    if sum(spent) > SECONDS_PER_CASE:
        return
    if turn == 1 and spent:
        spent.clear()
    start = time.thread_time()
    call()
    spent.append(time.thread_time() - start)


def extra_memory(name: str, T: int) -> float:
    """Return the peak of forward and backward beyond inputs, outputs and gradients, in units of the inputs."""
    data = {key: x for key, x in inputs(T).items() if key in USES[name].split()}
    both(OURS[name], data)
    peak = max(accumulate(allocations(lambda: both(OURS[name], data)), initial=0))
    size = sum(x.nbytes for x in data.values())
    return (peak - size - data["v"].nbytes) / size  # the gradients are as large as the inputs, o as v


def evaluate(found: Timings, lengths: tuple[int, ...]) -> list[dict]:
    """Return one record per goal: what was reached and whether it suffices."""
    middle = {key: statistics.median(seconds) for key, seconds in found.items()}
    records = []
    for goal in GOALS:
        for kind, wanted in (("f", goal.forward), ("fb", goal.both)):
            mine = middle.get((goal.ours, goal.length, kind))
            peer = middle.get((goal.peer, goal.length, "f" if goal.peer == "matmul" else kind))
            row = {"op": goal.ours, "against": goal.peer, "T": goal.length, "what": kind, "goal": wanted}
            row["reached"] = None
            if mine and peer:
                row["reached"] = peer / mine
                if goal.peer == "matmul":
                    work = FLOPS[goal.ours] * goal.length * (1.0 if kind == "f" else 3.5)
                    row["reached"] *= work / (goal.length * 2 * 64**2)
                row["holds"] = row["reached"] >= wanted
            records.append(row)
    long = [T for T in lengths if T >= 4096]
    for name in OURS if len(long) > 1 else ():
        for kind in ("f", "fb"):
            longer = middle[name, long[-1], kind] / middle[name, long[0], kind]
            exponent = math.log(longer) / math.log(long[-1] / long[0])
            row = {"op": name, "against": "growth exponent", "T": long[-1], "what": kind, "goal": EXPONENT}
            records.append(row | {"reached": exponent, "holds": exponent <= EXPONENT})
    for name in OURS:
        row = {"op": name, "against": "extra memory / inputs", "T": 4096, "what": "fb", "goal": MEMORY}
        units = extra_memory(name, 4096)
        records.append(row | {"reached": units, "holds": units <= MEMORY})
    return records


def show(found: Timings, goals: list[dict], lengths: tuple[int, ...], console: Console) -> None:
    times = Table(title="milliseconds, medians (f forward, fb forward and backward)")
    times.add_column("what")
    for T in lengths:
        times.add_column(f"f {T}", justify="right")
        times.add_column(f"fb {T}", justify="right")
    for name in ["matmul", *PEERS, *OURS, *MORE]:
        cells = [found.get((name, T, kind)) for T in lengths for kind in ("f", "fb")]
        missing = "not installed" if name in PEERS and PEERS[name] is None else "-"
        times.add_row(name, *(f"{statistics.median(c) * 1e3:.1f}" if c else missing for c in cells))
    console.print(times)
    table = Table(title="goals")
    for column in ("op", "against", "T", "what", "goal", "reached", "holds"):
        table.add_column(column)
    for row in goals:
        reached = "not measured" if row["reached"] is None else f"{row['reached']:.2f}"
        verdict = {True: "yes", False: "NO", None: "-"}[row.get("holds")]
        table.add_row(row["op"], row["against"], str(row["T"]), row["what"], str(row["goal"]), reached, verdict)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="lengths 1024 and 4096 only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    lengths = LENGTHS[:2] if options.quick else LENGTHS
    found = measure(lengths, options.rounds, console)
    goals = evaluate(found, lengths)
    show(found, goals, lengths, console)
    if options.json:
        seconds = [{"name": n, "T": T, "what": kind, "seconds": s} for (n, T, kind), s in found.items()]
        peers = {name: version(name) for name in ("transformers", "fla-core", "numba") if available(name.split("-")[0])}
        about = {"machine": machine(), "peers": peers, "threads": 1}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"about": about, "goals": goals, "seconds": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
