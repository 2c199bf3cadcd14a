"""Weight matching beside the public PyTorch port of git re-basin: the same tensors, classes and visiting order.

Each side is a process of its own on one thread; runs are interleaved and the ratio is that of the medians. The port is
a clone of github.com/themrzmaster/git-re-basin-pytorch (read from its folder, never imported by the library):

    python benchmarks/matching.py --peer path/to/clone [--json benchmarks/results/matching.json]
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOALS = {"resnet20": 5.0, "vgg16": 2.0}  # how many times faster
SHARE = 0.6  # of our time in matrix products and the assignment solver
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
SWEEPS = 100


def resnet20(width: int = 1) -> tuple[nn.Module, Tensor]:
    from lineament.models.classifiers import ResidualClassifier

    return ResidualClassifier(channels=3, width=16 * width), torch.zeros(2, 3, 32, 32)


def vgg16() -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = []
    inward = 3
    for size in VGG16:
        if isinstance(size, str):
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(inward, size, 3, padding=1), nn.BatchNorm2d(size), nn.ReLU()]
        inward = size
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10)), torch.zeros(2, 3, 32, 32)


NETS = {"resnet20": resnet20, "resnet20, 4 times as wide": lambda: resnet20(4), "vgg16": vgg16}


@cache
def problem(net: str) -> tuple[Any, dict[str, Tensor], dict[str, Tensor], list[list[int]]]:
    """Return the group, two models drawn apart, and the order of every sweep as positions in the group's free list."""
    from lineament import weights

    torch.manual_seed(0)
    model, example = NETS[net]()
    group = weights.symmetry(model, example, check=0)
    sides = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        other = NETS[net]()[0]
        sides.append({name: x.detach() for name, x in other.named_parameters() if name in group.axes.tensors})
    draw = torch.Generator().manual_seed(3)
    orders = [torch.randperm(len(group.free), generator=draw).tolist() for _ in range(SWEEPS)]
    return group, sides[0], sides[1], orders


def ours(net: str, profiled: bool) -> dict[str, Any]:
    """Ascend in the given orders until a sweep gains nothing."""
    from lineament.weights.ascent import Ascent

    group, a, b, orders = problem(net)
    free = group.free

    def run() -> Ascent:
        ascent = Ascent(group.classes, group.axes.tensors, a, b)
        for order in orders:
            if not ascent.sweep([free[i] for i in order]):
                break
        return ascent

    if profiled:
        return share(run)
    ascent, took = timed(run)
    moved = {name: ascent.total.act(name, x) for name, x in b.items()}
    return {**took, "objective": objective(a, moved)}


def timed(run: Any) -> tuple[Any, dict[str, float]]:
    began, cpu = time.perf_counter(), time.process_time()
    out = run()
    return out, {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}


def share(run: Any) -> dict[str, float]:
    """Return which share of the processor time is spent inside the matrix products and the assignment solver."""
    from lineament.weights import ascent

    spent = [0.0]

    def watched(inner: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            out, took = timed(lambda: inner(*args, **kwargs))
            spent[0] += took["cpu"]
            return out

        return call

    solver, product = ascent.linear_sum_assignment, Tensor.__matmul__
    ascent.linear_sum_assignment, Tensor.__matmul__ = watched(solver), watched(product)  # type: ignore[assignment]
    try:
        took = timed(run)[1]
    finally:
        ascent.linear_sum_assignment, Tensor.__matmul__ = solver, product  # type: ignore[assignment]
    return {**took, "share": spent[0] / took["cpu"]}


def theirs(net: str, peer: Path) -> dict[str, Any]:
    """Run the port on the same classes; what it prints goes nowhere."""
    group, a, b, orders = problem(net)
    sys.path.insert(0, str(peer))
    from utils import weight_matching as port  # type: ignore[import-not-found]

    names: dict[str, list[str | None]] = {name: [None] * x.dim() for name, x in a.items()}
    for cls in group.free:
        for name, dim in group.classes[cls].members:
            if name in names:
                names[name][dim] = f"P{cls}"
    spec = port.permutation_spec_from_axes_to_perm({name: tuple(axes) for name, axes in names.items()})
    listed = list(spec.perm_to_axes)  # the port numbers its permutations as it meets them
    queue = [torch.tensor([listed.index(f"P{group.free[i]}") for i in order]) for order in orders]
    drawn, torch.randperm = torch.randperm, lambda count: queue.pop(0)  # type: ignore[assignment]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            perm, took = timed(lambda: port.weight_matching(spec, a, b, max_iter=SWEEPS))
    finally:
        torch.randperm = drawn
    return {**took, "objective": objective(a, port.apply_permutation(spec, perm, b))}


def objective(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum(float((x.double() * b[name].double()).sum()) for name, x in a.items())


class Worker:
    """One side in a process of its own, which does one run for every line it is sent."""

    def __init__(self, side: str, peer: Path) -> None:
        command = [sys.executable, __file__, "--peer", str(peer), "--side", side]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, net: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(net, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def serve(side: str, peer: Path) -> None:
    """Answer the lines of `Worker.run`; a net's tensors and group are made once."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        net = line.strip()
        print(json.dumps(theirs(net, peer) if side == "theirs" else ours(net, side == "profile")), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="folder of the port")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--net", choices=NETS)
    parser.add_argument("--side", choices=("ours", "theirs", "profile"))
    asked = parser.parse_args()
    if asked.peer is None:
        print("matching: no --peer (a clone of git-re-basin-pytorch) given; nothing to compare with")
        return 0
    if asked.side:
        serve(asked.side, asked.peer)
        return 0
    from lineament.report import machine

    workers = {side: Worker(side, asked.peer) for side in ("ours", "theirs", "profile")}
    rows = []
    for net in [asked.net] if asked.net else NETS:
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in workers}
        for _ in range(1 if asked.quick else asked.repeats):
            for side, of in runs.items():
                of.append(workers[side].run(net))
        rows.append(row_of(net, runs))
        print(json.dumps(rows[-1]), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return 0


def row_of(net: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Sum up one net's runs: medians, their ratio, the objectives."""
    took = {side: statistics.median(run["seconds"] for run in of) for side, of in runs.items()}
    used = {side: statistics.median(run["cpu"] for run in of) for side, of in runs.items()}
    return {
        "net": net, "ours": took["ours"], "port": took["theirs"], "port / ours": took["theirs"] / took["ours"],
        "port / ours, processor time": used["theirs"] / used["ours"], "goal": GOALS.get(net),
        "objective": runs["ours"][0]["objective"], "port's objective": runs["theirs"][0]["objective"],
        "in products and assignment": statistics.median(run["share"] for run in runs["profile"]),
        "share wanted": SHARE, "all seconds": {side: [run["seconds"] for run in of] for side, of in runs.items()},
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
