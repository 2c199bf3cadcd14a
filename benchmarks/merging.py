"""Merging: equality with mergekit method by method, and speed and memory beside it and beside a plain copy loop.

Each run is a process of its own on the same files, input pages dropped from the cache before it, output fsynced, runs
interleaved. The peer is an interpreter that has mergekit (LGPL, never imported by the library):

    python benchmarks/merging.py --peer /path/to/venv/bin/python [--gigabytes 2] [--json results.json]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

CASES = [
    ("linear", {"weight": [0.2, 0.3, 0.5]}, False), ("linear", {"weight": [1, -0.3, 0.5], "normalize": False}, False),
    ("task_arithmetic", {"weight": [0.2, 0.5, -0.1], "lambda": 0.7}, True),
    ("ties", {"weight": [1.0, 0.5, 2.0], "density": 0.4}, True),
    ("dare_linear", {"weight": 0.5, "density": 0.4}, True), ("dare_ties", {"weight": 0.5, "density": 0.4}, True),
    ("breadcrumbs", {"weight": 0.5, "density": 0.4, "gamma": 0.05}, True),
    ("breadcrumbs_ties", {"weight": 0.5, "density": 0.4, "gamma": 0.05}, True),
    ("della", {"weight": 0.5, "density": 0.4, "epsilon": 0.2}, True),
    ("della_linear", {"weight": 0.5, "density": 0.4, "epsilon": 0.2}, True),
    ("slerp", {"t": 0.3}, True), ("nuslerp", {"weight": [0.3, 0.7]}, False), ("nuslerp", {"weight": [0.3, 0.7]}, True),
    ("nuslerp", {"weight": [0.3, 0.7], "nuslerp_flatten": False, "nuslerp_row_wise": True}, False),
    ("multislerp", {"weight": [0.2, 0.3, 0.5]}, True), ("multislerp", {"weight": [0.2, 0.3, 0.5]}, False),
    ("karcher", {}, False), ("model_stock", {}, True), ("model_stock", {"filter_wise": True}, True),
    ("sce", {"select_topk": 0.3}, True), ("ram", {"epsilon": 0.01}, True),
    ("ramplus_tl", {"epsilon": 0.01, "r": 0.3, "alpha": 0.5}, True), ("nearswap", {"t": 0.05}, True),
    ("arcee_fusion", {}, True), ("passthrough", {"scale": 0.5}, False),
]  # fmt: skip


def equality() -> list[dict]:
    """Compare every method at float32; runs in the peer's interpreter, which sees this library on PYTHONPATH."""
    import torch
    from mergekit.merge_methods.api import merge_tensors

    from lineament._base.seeds import generator
    from lineament.weights import METHODS, merge
    from lineament.weights.merge import draw_seed

    rows = []
    for method, options, based in CASES:
        for related in (True, False):
            g = torch.Generator().manual_seed(0)
            base = torch.randn(96, 64, generator=g)
            count = min(METHODS[method].models[1], 3)
            steps = [torch.randn(96, 64, generator=g) for _ in range(count)]
            models = [base + 0.1 * step if related else step for step in steps]
            ours = merge([{"w": x} for x in models], method, base={"w": base} if based else None, **options)["w"]
            draws = [torch.rand(96, 64, generator=generator(draw_seed(0, "w", i))) for i in range(count)]
            real, torch.bernoulli = torch.bernoulli, lambda p, d=draws: (d.pop(0) < p).to(p.dtype)
            try:
                tensors = [base, *models] if based else models
                theirs = merge_tensors(tensors, method, parameters=options, base_index=0 if based else None)
            finally:
                torch.bernoulli = real
            error = float((ours - theirs).abs().max() / theirs.abs().max())
            away = int(((ours - theirs).abs() > 1e-6 * theirs.abs().max()).sum())
            rows.append({"method": method, "options": str(options), "base": based, "related": related,
                         "largest relative error": error, "entries beyond 1e-6": away})  # fmt: skip
    return rows


def ratios(rows: list[dict]) -> dict[str, float]:
    """Return how often the loop's bytes a second linear reaches, and how much sooner than mergekit both merges end."""
    seconds = {}
    for row in rows:
        seconds.setdefault(row["what"], []).append(row["seconds"])
    middle = {what: median(values) for what, values in seconds.items()}
    pairs = {"linear, bytes a second over the loop's": ("copy-loop", "linear-ours"),
             "linear, over mergekit": ("linear-mergekit", "linear-ours"),
             "ties, over mergekit": ("ties-mergekit", "ties-ours")}  # fmt: skip
    return {said: middle[above] / middle[below] for said, (above, below) in pairs.items()}


def make(home: Path, gigabytes: float) -> None:
    """Write a base and two neighbours as Llama folders in bfloat16, four shards each."""
    import torch
    from transformers import LlamaConfig

    from lineament.io import save_sharded

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_attention_heads=16, vocab_size=32000, dtype="bfloat16"
    )
    layer = {f"self_attn.{n}_proj": (1024, 1024) for n in "qkvo"}
    layer |= {"mlp.gate_proj": (2816, 1024), "mlp.up_proj": (2816, 1024), "mlp.down_proj": (1024, 2816)}
    layer |= {"input_layernorm": (1024,), "post_attention_layernorm": (1024,)}
    config.num_hidden_layers = max(1, round((gigabytes * 5e8 - 65.5e6) / 12.85e6))
    config.architectures = ["LlamaForCausalLM"]
    shapes = {"model.embed_tokens": (32000, 1024), "lm_head": (32000, 1024), "model.norm": (1024,)}
    shapes |= {f"model.layers.{i}.{n}": s for i in range(config.num_hidden_layers) for n, s in layer.items()}
    for seed, name in enumerate(("base", "a", "b")):
        g = torch.Generator().manual_seed(seed)
        config.save_pretrained(home / name)

        tensors = {
            f"{n}.weight": torch.empty(s, dtype=torch.bfloat16).normal_(std=0.02, generator=g)
            for n, s in shapes.items()
        }
        save_sharded(tensors, home / name, max_shard_size=int(gigabytes * 2.6e8))


def copy_loop(home: Path, out: Path) -> None:
    """Read all inputs once and write the output's bytes: what no merge can beat."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    out.mkdir()
    for shard in sorted((home / "a").glob("*.safetensors")):
        with safe_open(shard, "pt") as a, safe_open(home / "b" / shard.name, "pt") as b:
            tensors = {}
            for name in a.keys():  # noqa: SIM118 - safe_open is no mapping
                tensors[name] = a.get_tensor(name).clone()
                b.get_tensor(name).view(-1)[::512].sum()
        save_file(tensors, out / shard.name)
        with (out / shard.name).open("rb") as file:
            os.fsync(file.fileno())


def task(what: str, home: Path, out: Path) -> None:
    """One run, in a process of its own."""
    plan = home / f"{what.split('-')[0]}.yml"
    if what == "copy-loop":
        return copy_loop(home, out)
    if what.endswith("-mergekit"):
        import yaml
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        options = MergeOptions(copy_tokenizer=False, quiet=True, out_shard_size=520_000_000)
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(plan.read_text())), str(out), options)
        for file in out.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        return None
    from lineament.weights.assemble import run_recipe
    from lineament.weights.recipe import read_recipe

    run_recipe(read_recipe(plan), out, max_shard_size="520MB")
    return None


def measured(python: str, what: str, home: Path) -> dict:
    """Run one task cold and return its seconds (imports left out) and peak memory."""
    for file in home.rglob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with tempfile.TemporaryDirectory(dir=home) as folder:
        command = [python, __file__, "--task", what, "--home", str(home), "--out", f"{folder}/out"]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"what": what, **json.loads(found.splitlines()[-1])}


def _run_task(arguments: argparse.Namespace) -> None:
    import resource
    import threading

    import torch  # noqa: F401 - not part of the time
    from transformers import LlamaForCausalLM  # noqa: F401

    if arguments.task.endswith("-mergekit"):
        import mergekit.merge
        import mergekit.options  # noqa: F401
    else:
        import lineament.weights.assemble
        import lineament.weights.recipe  # noqa: F401

    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            text = Path("/proc/self/status").read_text()
            most[0] = max(
                most[0], int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1])
            )

    threading.Thread(target=watch, daemon=True).start()
    began, cpu = time.perf_counter(), time.process_time()
    task(arguments.task, Path(arguments.home), Path(arguments.out))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    done.set()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak anonymous": most[0] * 1024, "peak resident": peak}))


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("peer", "json", "task", "home", "out"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--equality", action="store_true")
    arguments = parser.parse_args()
    if arguments.task:
        return _run_task(arguments) or 0
    if arguments.equality:
        print(json.dumps(equality()))
        return 0
    if not arguments.peer:
        print("merging: no --peer (an interpreter with mergekit) given; nothing to compare with")
        return 0
    from lineament.report import machine

    told = [
        subprocess.run([arguments.peer, *words], check=True, stdout=subprocess.PIPE, text=True).stdout
        for words in (
            (__file__, "--equality"),
            ("-c", "from importlib.metadata import version; print(version('mergekit'))"),
        )
    ]
    gigabytes = 0.2 if arguments.quick else arguments.gigabytes
    result = {
        "machine": machine() | {"mergekit": told[1].strip()},
        "gigabytes": gigabytes,
        "equality": json.loads(told[0].splitlines()[-1]),
        "speed": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make(home, gigabytes)
        both = ", ".join(f"{{model: {home}/{name}, parameters: {{weight: 1}}}}" for name in "ab")
        (home / "linear.yml").write_text(f"merge_method: linear\nmodels: [{both}]\ndtype: bfloat16\n")
        ties = f"merge_method: ties\nbase_model: {home}/base\nmodels: [{both}]\nparameters: {{density: 0.3}}\n"
        (home / "ties.yml").write_text(f"{ties}dtype: float32\nout_dtype: bfloat16\n")
        for _ in range(1 if arguments.quick else arguments.repeats):
            for what in ("copy-loop", "linear-ours", "linear-mergekit", "ties-ours", "ties-mergekit"):
                python = arguments.peer if what.endswith("mergekit") else sys.executable
                result["speed"].append(measured(python, what, home))
                print(result["speed"][-1], flush=True)
    result["medians"] = ratios(result["speed"])
    print(*(f"{said}: {value:.2f}" for said, value in result["medians"].items()), sep="\n")
    worst = max(row["largest relative error"] for row in result["equality"])
    print(f"equality: {len(result['equality'])} cases, largest relative error {worst:.2g}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
