"""Time whole decoders made from scratch, pure and 3:1, beside softmax of the same size: prefill and one decoded token.

    python benchmarks/decoders.py --quick          # 1k and 2k
    python benchmarks/decoders.py --json benchmarks/results/decoders.json --plot benchmarks/results
    python benchmarks/decoders.py --layers 4 --width 96 --heads 3 --key-heads 3 --contexts 256 512   # to try it out

The shape is SmolLM2-135M's (30 layers, width 576, 9 and 3 heads), weights are random, arms have equal parameters.
Softmax is transformers' Llama and ours, whichever is faster (from 16k on only the one that was faster before). Medians
up to 16k, once at 32k (--once: from which length on); 64k is extrapolated (marked): t = bT + cT^2 for prefill, a + bT
for a decoded token, from the two longest measured. "free" is the ceiling: the same model with mixers that cost nothing.
All mixers take turns in one run, beside one softmax. With --json every measurement is kept in FILE.partial, and a run
that was cut off goes on behind it (same shape, mixers and machine). Prefill takes most of the time: hours on two cores.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lineament.io import read_json, write_json
from lineament.models import DecoderForCausalLM, decoder_config, match_parameters
from lineament.report import curve, machine
from lineament.tasks.cost import decode_speed, prefill_speed

MIXERS = ("gated-deltanet", "kda", "lightning", "gla")
CONTEXTS = (1024, 2048, 4096, 8192, 16384)
ONCE, EXTRAPOLATED = 32768, 65536
FASTER_ONLY = 16384  # from here on softmax is the one of two that was faster at the length before
SOFTMAX = ("softmax, transformers", "softmax, ours")


class FreeHeads(nn.Module):
    """Heads that hand on the values: what is left is everything else in the model."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, state: Any = None, **_: Any) -> tuple[Tensor, Any]:
        groups = max(q.shape[2] // v.shape[2], 1)
        return v[:, :, :, None].expand(-1, -1, -1, groups, -1).flatten(2, 3), state


def freed(model: nn.Module) -> nn.Module:
    """Return the model, on the same weights, with its linear heads free; softmax layers stay."""
    same = {id(t): t for t in chain(model.parameters(), model.buffers())}
    other: Any = copy.deepcopy(model, same)
    for block in other.model.layers:
        if len(block.mixer.config.full_heads) < block.mixer.config.key_heads:
            block.mixer.heads = FreeHeads()
    return other


def softmax_models(shape: dict[str, Any]) -> dict[str, Any]:
    """Return transformers' Llama and ours."""
    ours = decoder_config("llama", tie_word_embeddings=True, **shape)
    theirs = LlamaConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["width"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"], num_key_value_heads=shape["key_heads"], tie_word_embeddings=True,
        intermediate_size=ours.intermediate_size, max_position_embeddings=2 * EXTRAPOLATED,
    )  # fmt: skip
    return {"softmax, transformers": LlamaForCausalLM(theirs), "softmax, ours": DecoderForCausalLM(ours)}


def models_of(mixers: list[str], shape: dict[str, Any]) -> dict[str, nn.Module]:
    """Return softmax, and of every mixer "MIXER: ARM" for the arms pure and 3:1, and both with free mixers."""
    made = softmax_models(shape)
    for mixer, ratio in product(mixers, ("pure", "3:1")):
        config = decoder_config(mixer, ratio=ratio, tie_word_embeddings=True, **shape)
        model = DecoderForCausalLM(match_parameters(config, made["softmax, ours"].config))
        made |= {f"{mixer}: {ratio}": model, f"{mixer}: {ratio}, free": freed(model)}
    return {name: model.eval() for name, model in made.items()}


def measure(models: dict[str, nn.Module], what: str, context: int, once: bool) -> dict[str, float]:
    """Return median seconds by model."""
    if what == "prefill":
        speeds = prefill_speed(models, context, repeats=1 if once else 3)
    else:
        speeds = decode_speed(models, context, tokens=4 if once else 16, static=False)
    return {name: speed.median for name, speed in speeds.items()}


def extrapolated(what: str, times: dict[int, float], context: int) -> float:
    """Return seconds at a longer context from the two longest measured."""
    (x, s), (y, t) = sorted(times.items())[-2:]
    if what == "prefill":
        square = (t / y - s / x) / (y - x)
        return (s / x - square * x) * context + square * context**2
    slope = (t - s) / (y - x)
    return t + slope * (context - y)


def crossover(softmax: dict[int, float], arm: dict[int, float]) -> float | None:
    """Return the length from which on an arm is faster, between measurements by their logs; None if it never is.

    An arm that is faster everywhere gives the shortest context (read: there or below).
    """
    ratios = [(math.log(c), math.log(arm[c] / softmax[c])) for c in sorted(arm)]
    if ratios[-1][1] > 0:
        return None
    for (x, a), (y, b) in reversed(list(pairwise(ratios))):
        if a > 0 >= b:
            return math.exp(x + (y - x) * a / (a - b))
    return math.exp(ratios[0][0])


def measured(
    models: dict[str, nn.Module], contexts: list[int], once: int, kept: list[dict[str, Any]], keep: Callable[[], None]
) -> None:
    """Add what `kept` lacks: {"measure", "context", "kind", "seconds": {model: median}}."""
    for what, context in product(("decode", "prefill"), contexts):  # the quick one first
        before = {row["context"]: row["seconds"] for row in kept if row["measure"] == what}
        if context not in before:
            timed = models
            if context >= FASTER_ONLY and before:
                times = before[max(before)]
                slower = max(SOFTMAX, key=lambda name: times.get(name, math.inf))
                timed = {name: model for name, model in models.items() if name != slower}
            seconds = measure(timed, what, context, context >= once)
            kind = "once" if context >= once else "median"
            kept.append({"measure": what, "context": context, "kind": kind, "seconds": seconds})
            keep()


def rows_of(mixer: str, models: dict[str, nn.Module], kept: list[dict[str, Any]], extrapolate: bool) -> list[dict]:
    """Lay one mixer's measurements out: a row per measure and context, and one per crossover."""
    own = {name.removeprefix(f"{mixer}: "): name for name in models if name in SOFTMAX or name.startswith(f"{mixer}: ")}
    found, sizes = [], {name: sum(p.numel() for p in models[full].parameters()) for name, full in own.items()}
    for what in ("prefill", "decode"):
        mine = [row for row in kept if row["measure"] == what]
        kinds = {row["context"]: row["kind"] for row in mine}
        times = {
            name: {row["context"]: row["seconds"][full] for row in mine if full in row["seconds"]}
            for name, full in own.items()
        }
        times["softmax"] = {c: min(times[name].get(c, math.inf) for name in SOFTMAX) for c in kinds}
        if extrapolate and len(mine) > 1:
            longest, kinds[EXTRAPOLATED] = max(kinds), "extrapolated"
            for of in times.values():
                if max(of) == longest:
                    of[EXTRAPOLATED] = extrapolated(what, of, EXTRAPOLATED)
        softmax = times["softmax"]
        for context in sorted(softmax):
            found.append({
                "mixer": mixer, "measure": what, "context": context, "kind": kinds[context],
                **{f"{name}_ms": 1e3 * of[context] for name, of in times.items() if context in of},
            })  # fmt: skip
        found.append({
            "mixer": mixer, "measure": f"{what} crossover", "parameters": sizes,
            **{name: crossover(softmax, times[name]) for name in ("pure", "3:1", "pure, free", "3:1, free")},
        })  # fmt: skip
    return found


def kept_measurements(file: Path | None, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a run that was cut off measured, or nothing where the file is of another machine or shape."""
    if file is None or not file.exists():
        return []
    kept: Any = read_json(file)
    return kept["measured"] if {name: kept.get(name) for name in about} == about else []


def table(rows: list[dict[str, Any]]) -> Table:
    """Lay the rows out."""
    shown = Table("mixer", "measure", "tokens", "softmax ms", "pure ms", "3:1 ms", "pure, free", "3:1, free", "kind")
    for row in rows:
        if "crossover" in row["measure"]:
            cells = ["none" if row[n] is None else f"{row[n]:.0f}" for n in ("pure", "3:1", "pure, free", "3:1, free")]
            shown.add_row(row["mixer"], row["measure"], "", "", *cells, "tokens")
        else:
            cells = [f"{row[f'{n}_ms']:.1f}" for n in ("softmax", "pure", "3:1", "pure, free", "3:1, free")]
            shown.add_row(row["mixer"], row["measure"], str(row["context"]), *cells, row["kind"])
    return shown


def plot(rows: list[dict[str, Any]], folder: Path) -> None:
    """Draw how many times faster than softmax each mixer is, a PNG per measure and arm; without extrapolated points."""
    for what, (arm, file) in product(("prefill", "decode"), (("pure", "pure"), ("3:1", "hybrid"))):
        lines: dict[str, tuple[list[float], list[float]]] = {}
        for row in rows:
            if row["measure"] == what and row["kind"] != "extrapolated":
                line = lines.setdefault(f"{row['mixer']} {arm}", ([], []))
                line[0].append(row["context"])
                line[1].append(row["softmax_ms"] / row[f"{arm}_ms"])
        png = curve(lines, xlabel="context (tokens)", ylabel=f"{what}, times faster than softmax", log="x",
                    levels={"softmax": 1.0})  # fmt: skip
        (folder / f"decoders-{what}-{file}.png").write_bytes(png)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="*", default=list(MIXERS), help="families of lineament.models.FAMILIES")
    for name, default in (("layers", 30), ("width", 576), ("heads", 9), ("key-heads", 3), ("vocab", 49152)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--contexts", nargs="*", type=int, help="tokens, in place of 1k to 32k")
    parser.add_argument("--quick", action="store_true", help="1k and 2k only")
    parser.add_argument("--once", type=int, default=ONCE, metavar="TOKENS", help="from this length on, try once")
    parser.add_argument("--json", type=Path, help="write the rows and the machine's description here")
    parser.add_argument("--plot", type=Path, help="folder for four plots")
    chosen = parser.parse_args()
    shape = {
        "vocab_size": chosen.vocab, "width": chosen.width, "layers": chosen.layers, "heads": chosen.heads,
        "key_heads": chosen.key_heads,
    }  # fmt: skip
    contexts: list[int] = chosen.contexts or [*(CONTEXTS[:2] if chosen.quick else (*CONTEXTS, ONCE))]
    began, console = time.perf_counter(), Console(width=140)
    about = {"machine": machine(), "shape": shape}
    partial = chosen.json and chosen.json.with_name(chosen.json.name + ".partial")
    of_run = {**about, "mixers": chosen.mixers}
    kept = kept_measurements(partial, of_run)

    def keep() -> None:
        console.print(f"{time.perf_counter() - began:.0f} s: {kept[-1]['measure']}, {kept[-1]['context']} tokens")
        if partial:
            write_json(partial, {**of_run, "measured": kept})

    models = models_of(chosen.mixers, shape)
    measured(models, contexts, chosen.once, kept, keep)
    rows = [r for m in chosen.mixers for r in rows_of(m, models, kept, extrapolate=max(contexts) >= CONTEXTS[-1])]
    console.print(table(rows))
    console.print(json.dumps(machine()), f"{time.perf_counter() - began:.0f} s")
    if chosen.json and partial:
        write_json(chosen.json, {**about, "rows": rows}, indent=1)
        partial.unlink(missing_ok=True)
    if chosen.plot:
        plot(rows, chosen.plot)


if __name__ == "__main__":
    main()
