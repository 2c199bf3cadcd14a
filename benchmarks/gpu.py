"""Check the Triton kernels on a GPU, and time them beside flash-linear-attention's and beside the card's roofline.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --quick --kernels                      # one shape, and where the time goes
    python benchmarks/gpu.py --no-fla --check-only

fla compiles and tries some 50 to 200 variants per op before its first result: minutes, of which the compiler's can be
had beforehand by `--warm`, in several processes. So ours are timed first, and rows are printed and kept as they come.

bfloat16 inputs, float32 gates, K = V = 128. Milliseconds are medians by CUDA events, with the cache of the card emptied
between calls. The roofline of a case is the longer of two times: every input read once and every output written once at
the rate of a large copy; and the products of the chunked form (64 tokens) at the rate of a large bfloat16 product, both
measured in the same run.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from lineament._base.extras import available
from lineament.io import write_json
from lineament.ops.recurrence import decayed_attention, delta_rule
from lineament.report import machine

if not available("triton"):
    raise SystemExit("triton is not installed; pip install 'lineament[gpu]'")

import triton

from lineament.ops.recurrence import triton_decayed

MEASURE = triton.testing.do_bench
FILLS = triton_decayed.FILLS
WIDTH, CHUNK = 128, 64
SHAPES = ((8, 4096, 16), (1, 16384, 16))  # B, T, H
OPS = ("no decay", "scalar decay", "channel decay", "delta rule", "gated delta rule", "KDA")
GOALS = {"of fla": 0.9, "of roofline": 0.6}

Call = Callable[[dict[str, Tensor]], Tensor]


def inputs(B: int, T: int, H: int, K: int = WIDTH, V: int = WIDTH, dtype: torch.dtype = torch.bfloat16, seed: int = 0):
    """Draw the inputs of every op; gates and strengths as a trained layer would have them."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    return {
        "q": normalize(draw(B, T, H, K), dim=-1).to(dtype),
        "k": normalize(draw(B, T, H, K), dim=-1).to(dtype),
        "v": draw(B, T, H, V).to(dtype),
        "beta": draw(B, T, H).sigmoid(),
        "head": -0.1 * draw(B, T, H).abs(),
        "channel": -0.1 * draw(B, T, H, K).abs(),
    }


def uses(op: str) -> list[str]:
    gate = {"scalar decay": ["head"], "gated delta rule": ["head"], "channel decay": ["channel"], "KDA": ["channel"]}
    return ["q", "k", "v", *(["beta"] if op in ("delta rule", "gated delta rule", "KDA") else []), *gate.get(op, [])]


def ours(op: str, backend: str = "triton") -> Call:
    """Return the op as a function of `inputs`."""
    names = uses(op)[3:]
    gate = next((name for name in names if name != "beta"), None)

    def call(x: dict[str, Tensor]) -> Tensor:
        log_decay = None if gate is None else x[gate]
        if "beta" in names:
            return delta_rule(x["q"], x["k"], x["v"], x["beta"], log_decay, backend=backend)[0]
        return decayed_attention(x["q"], x["k"], x["v"], log_decay, backend=backend)[0]

    return call


def fla(op: str) -> Call:
    """Return fla's function of the same op, called as its users call it."""
    import fla.ops as peer

    options = {"scale": 1.0, "output_final_state": True}
    return {
        "no decay": lambda x: peer.chunk_simple_gla(x["q"], x["k"], x["v"], **options)[0],
        "scalar decay": lambda x: peer.chunk_simple_gla(x["q"], x["k"], x["v"], g=x["head"], **options)[0],
        "channel decay": lambda x: peer.chunk_gla(x["q"], x["k"], x["v"], g=x["channel"], **options)[0],
        "delta rule": lambda x: peer.chunk_delta_rule(
            x["q"], x["k"], x["v"], beta=x["beta"].to(x["q"].dtype), **options
        )[0],
        "gated delta rule": lambda x: peer.chunk_gated_delta_rule(
            x["q"], x["k"], x["v"], g=x["head"], beta=x["beta"], **options
        )[0],
        "KDA": lambda x: peer.chunk_kda(x["q"], x["k"], x["v"], g=x["channel"], beta=x["beta"], **options)[0],
    }[op]


def gradients(call: Call, x: dict[str, Tensor], names: list[str], weight: Tensor) -> dict[str, Tensor]:
    """Return o and the gradients of `sum(weight o)`."""
    x = {name: t.detach().requires_grad_(name in names) for name, t in x.items()}
    o = call(x)
    found = torch.autograd.grad(o, [x[name] for name in names], weight.to(o.dtype))
    return {"o": o.detach()} | dict(zip(names, found, strict=True))


def check(console: Console, peer: bool, ops: list[str]) -> list[dict[str, Any]]:
    """Compare with the loop in float64: |found - wanted| / |wanted| of the output and of every gradient.

    Widths and lengths that no block divides, both dtypes, strong gates; ours with outputs from the walk and without.
    """
    wide, narrow = torch.float32, torch.bfloat16
    full = ((320, 16, WIDTH, narrow, 1.0), (80, 16, WIDTH, narrow, 300.0))  # T, heads, width, dtype, times the gates
    cases = (*full, (77, 2, 64, narrow, 30.0), (150, 2, 48, wide, 10.0))
    rows = []
    for op in ops:
        for T, heads, width, dtype, strength in cases:
            x = inputs(2, T, heads, width, width, dtype, seed=T)
            x |= {name: x[name] * strength for name in ("head", "channel")}
            weight = torch.randn(x["v"].shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
            wanted = gradients(ours(op, "reference"), {n: t.double() for n, t in x.items()}, uses(op), weight.double())
            row: dict[str, Any] = {"op": op, "T": T, "width": width, "dtype": str(dtype)[6:], "gates": strength}
            for name, fills in (("ours, one walk", 0.0), ("ours, two launches", math.inf), ("fla", None)):
                if fills is None and not (peer and width == WIDTH):
                    continue
                triton_decayed.FILLS = triton_decayed.FILLS if fills is None else fills
                found = gradients(fla(op) if fills is None else ours(op), x, uses(op), weight)
                errors = {n: ((found[n].double() - t).norm() / t.norm()).item() for n, t in wanted.items()}
                row[name] = {n: e if math.isfinite(e) else str(e) for n, e in errors.items()}
                worst = max(errors, key=lambda n: errors[n] if math.isfinite(errors[n]) else math.inf)
                about = f"{op:17} {row['dtype']:8} T={T} width {width} gates x {strength:g}"
                console.print(f"{about:55} {name:19} worst {errors[worst]:.1e} of {worst}", highlight=False)
            rows.append(row)
    triton_decayed.FILLS = FILLS
    return rows


def milliseconds(call: Callable[[], object]) -> float:
    for _ in range(3):  # do_bench plans its tries by the first few, which would include compiling and new memory
        call()
    return float(MEASURE(call, warmup=10, rep=60, return_mode="median"))  # type: ignore


def ceilings() -> dict[str, float]:
    """Return bytes a second of a large copy and operations a second of a large bfloat16 product."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = milliseconds(lambda: left @ left)
    return {"bytes_per_s": 2e3 * source.nbytes / copy, "flop_per_s": 2e3 * 8192**3 / product}


def roofline(op: str, x: dict[str, Tensor], rates: dict[str, float]) -> tuple[float, float]:
    """Return the fewest milliseconds of a forward, and of a forward and backward pass."""
    B, T, H, K = x["q"].shape
    read = sum(x[name].nbytes for name in uses(op))
    o = x["v"].nbytes
    V, triangle = x["v"].shape[3], CHUNK * (K + x["v"].shape[3])
    work = B * T * H * (4 * K * V + triangle + (2 * K * V + triangle if "beta" in uses(op) else 0))
    # With backward, again: inputs and o's gradient are read, the inputs' gradients are written.
    moved = {"f": read + o, "fb": 3 * read + 2 * o}
    flops = {"f": work, "fb": 3.5 * work}
    times = {n: 1e3 * max(moved[n] / rates["bytes_per_s"], flops[n] / rates["flop_per_s"]) for n in moved}
    return times["f"], times["fb"]


def timed(op: str, call: Call, x: dict[str, Tensor]) -> tuple[float, float]:
    """Return the milliseconds of a forward, and of a forward and backward pass."""
    grad = torch.randn_like(x["v"])

    def forward() -> Tensor:
        with torch.no_grad():
            return call(x)

    leaves = {name: t.detach().requires_grad_(name in uses(op)) for name, t in x.items()}
    wanted = [leaves[name] for name in uses(op)]
    return milliseconds(forward), milliseconds(lambda: torch.autograd.grad(call(leaves), wanted, grad))


def kernels(op: str, call: Call, x: dict[str, Tensor]) -> list[tuple[str, float]]:
    """Return the names and microseconds of what the card ran in one forward and backward pass, longest first."""
    from torch.profiler import ProfilerActivity, profile

    leaves = {name: t.detach().requires_grad_(name in uses(op)) for name, t in x.items()}
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        torch.autograd.grad(call(leaves).float().sum(), [leaves[name] for name in uses(op)])
        torch.cuda.synchronize()
    found = [(event.key, event.device_time_total) for event in seen.key_averages()]
    return sorted(found, key=lambda pair: -pair[1])


def time_ops(
    console: Console, ops: list[str], shapes: tuple[tuple[int, int, int], ...], peer: bool, rates: dict[str, float],
    keep: Callable[[list[dict[str, Any]]], None],
) -> None:  # fmt: skip
    """Find a row per op, shape and pass (f forward, fb forward and backward), ours first; `keep` gets all so far."""
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        x = inputs(*shape)
        for op in ops:
            for what, ms, best in zip(("f", "fb"), timed(op, ours(op), x), roofline(op, x, rates), strict=True):
                row = dict(zip("BTH", shape, strict=True)) | {"op": op, "what": what, "ms": ms, "fla_ms": None}
                rows.append(row | {"roofline_ms": best, "of roofline": best / ms, "of fla": None})
                console.print(f"{op:17} {shape} {what:2} {ms:.3f} ms, {best / ms:.2f} of roofline", highlight=False)
            keep(rows)
    for shape in shapes if peer else ():
        x = inputs(*shape)
        for op in ops:
            try:
                theirs = timed(op, fla(op), x)
            except Exception as error:  # fla refuses some versions of Triton: that is said, and the rest goes on
                console.print(f"fla, {op}: {error!r}"[:400])
                continue
            for row in rows:
                if (row["B"], row["T"], row["H"], row["op"]) == (*shape, op):
                    row["fla_ms"] = theirs[row["what"] == "fb"]
                    row["of fla"] = row["fla_ms"] / row["ms"]
                    about = (
                        f"{op:17} {shape} {row['what']:2} fla {row['fla_ms']:.3f} ms, ours {row['of fla']:.2f} times"
                    )
                    console.print(about, highlight=False)
            keep(rows)


def table(found: dict[str, Any]) -> Table:
    shown = Table("op", "B", "T", "H", "", "ours, ms", "fla, ms", "times fla", "roofline, ms", "of roofline")
    for row in found["rows"]:
        theirs = [f"{row[name]:.{digits}f}" if row[name] else "-" for name, digits in (("fla_ms", 3), ("of fla", 2))]
        ends = [f"{row['roofline_ms']:.3f}", f"{row['of roofline']:.2f}"]
        shown.add_row(row["op"], *(str(row[n]) for n in "BTH"), row["what"], f"{row['ms']:.3f}", *theirs, *ends)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--ops", nargs="*", default=list(OPS), choices=OPS)
    parser.add_argument("--no-check", action="store_true", help="time only")
    parser.add_argument("--check-only", action="store_true", help="don't time")
    parser.add_argument("--no-fla", action="store_true", help="without the peer")
    parser.add_argument("--warm", action="store_true", help="run everything once and stop: compiles all kernels")
    parser.add_argument("--kernels", action="store_true", help="also print where the time goes, kernel by kernel")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was checked or timed")
        return
    console, began = Console(width=150), time.perf_counter()
    peer = available("fla") and not options.no_fla
    triton.testing.do_bench = partial(MEASURE, warmup=1 if options.warm else 5, rep=1 if options.warm else 20)  # fla's
    about = {"machine": machine(), "triton": triton.__version__, "fla": None}
    if peer:
        import fla as package

        about["fla"] = package.__version__
    console.print(json.dumps(about))
    if options.warm:
        for op in options.ops:
            x = inputs(*SHAPES[0])
            for call in [ours(op), *([fla(op)] if peer else [])]:
                gradients(call, x, uses(op), torch.randn_like(x["v"]))
                with torch.no_grad():
                    call(x)
        return
    found: dict[str, Any] = {"about": about, "goals": GOALS}

    def keep(rows: list[dict[str, Any]]) -> None:
        found["rows"] = rows
        if options.json:
            write_json(options.json, found)

    if not options.check_only:
        found["ceilings"] = ceilings()
        shapes = SHAPES[: 1 if options.quick else None]
        time_ops(console, options.ops, shapes, peer, found["ceilings"], keep)
        console.print(table(found), {name: f"{rate:.3g}" for name, rate in found["ceilings"].items()})
    if options.kernels:
        for op in options.ops:
            for name, call in ({"ours": ours(op)} | ({"fla": fla(op)} if peer else {})).items():
                for key, spent in kernels(op, call, inputs(*SHAPES[0]))[:8]:
                    console.print(f"{op:18} {name:5} {spent:9.0f} us {key[:90]}", highlight=False)
    if not options.no_check:
        found["checks"] = check(console, peer, options.ops)
    if options.json:
        write_json(options.json, found)
    console.print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
