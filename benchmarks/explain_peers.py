"""Relevance beside zennit, captum and LXT: equality and cost. Each peer runs in its own process.

python -m venv peers && peers/bin/pip install torch==2.13.0 zennit captum lxt 'transformers<5'   # as LXT 2.1 needs
peers/bin/pip uninstall torchvision   # where it was built for another torch; no peer needs it
python -m benchmarks explain_peers --peers peers/bin/python
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from explain_models import COMPOSITES, image_model, language_model, saved_model, seconds
from lineament import explain
from lineament.explain.relevance import propagate
from lineament.explain.rules import ATTNLRP
from lineament.models import find_model
from lineament.report import machine, versions

HERE = Path(__file__).parent
SIZES = ((4, 64, 32), (4, 256, 512), (8, 256, 512), (16, 256, 512))
"""Layers, width, tokens of the random language models; the embedded one comes after them."""
KINDS = ("coefficients", "with ledger", "forward + backward")


def peer(python: str, *arguments: str) -> Any:
    """Run a peer and return what it found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.pt"
        command = [python, str(HERE / "explain_peer_side.py"), arguments[0], str(out), *arguments[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return done.stderr.strip().splitlines()[-1]
        return torch.load(out, weights_only=True)


def away(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def images(python: str) -> list[dict[str, Any]]:
    """Compare with zennit's composites, and captum's LRP, integrated gradients and conductance."""
    rows: list[dict[str, Any]] = []
    theirs = peer(python, "zennit")
    for name in ("vgg", "resnet"):
        model, x = image_model(name)
        for rules in COMPOSITES:
            ours = explain.relevance(model, x, rules=explain.RULES[rules](epsilon=1e-9)).inputs["input"]
            error = away(ours, theirs[f"{name}/{rules}"]) if isinstance(theirs, dict) else theirs
            rows.append({"peer": "zennit", "what": f"{name}, {rules}", "difference": error})
    theirs = peer(python, "captum")
    model, x = image_model("vgg")
    smooth = image_model("vgg-average")[0]
    path = explain.relevance(model, x, rules=explain.IntegratedGradients(20), at="7")
    ours = {"lrp": explain.relevance(model, x, rules="epsilon").inputs["input"],
            "deep-lift": explain.relevance(smooth, x, rules="deep-lift", baseline=0.1).inputs["input"],
            "integrated-gradients": path.inputs["input"], "conductance": path.at["7"]}  # fmt: skip
    for name, found in ours.items():
        error = away(found, theirs[name]) if isinstance(theirs, dict) else theirs
        rows.append({"peer": "captum", "what": f"vgg, {name}", "difference": error})
    return rows


def image_runs(name: str) -> dict[str, Callable[[], Any]]:
    """Return what is timed of ours beside zennit and captum on an image model, by peer and what it computes."""
    model, x = image_model(name)
    smooth = image_model(f"{name}-average")[0]
    rules: dict[str, Any] = {f"zennit/{one}": explain.RULES[one](epsilon=1e-9) for one in COMPOSITES}
    rules |= {"captum/lrp": "epsilon", "captum/integrated-gradients": explain.IntegratedGradients(20)}
    runs: dict[str, Callable[[], Any]] = {
        what: lambda how=how: explain.relevance(model, x, rules=how) for what, how in rules.items()
    }
    runs["captum/deep-lift"] = lambda: explain.relevance(smooth, x, rules="deep-lift", baseline=0.1)
    return runs


def image_costs(python: str, repeats: int) -> list[dict[str, Any]]:
    """Time zennit, captum and ours in turns, each in a process of its own on the same model and pictures."""
    name, taken = "vgg-large", dict[str, list[list[float]]]()
    for _ in range(repeats):
        theirs: dict[str, float] = {}
        for who in ("zennit", "captum"):
            found = peer(python, who, name)
            if isinstance(found, str):
                raise SystemExit(f"{who}: {found}")
            theirs |= {f"{who}/{what.rpartition('/')[2]}": s for what, s in found.items()}
        command = [sys.executable, __file__, "--side", "images", name]
        ours = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for what, s in ours.items():
            taken.setdefault(what, []).append([s, theirs[what]])
    best = {what: [min(column) for column in zip(*rows, strict=True)] for what, rows in taken.items()}
    return [{"what": what, "ours, s": a, "theirs, s": b, "ours / theirs": a / b} for what, (a, b) in best.items()]


def kinds_of_run(model: Any, inputs: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Return what is timed: coefficients alone, relevances with their ledger, a forward and backward pass."""

    def step() -> None:
        model(**inputs, use_cache=False).logits[0, -1].max().backward()
        model.zero_grad()

    return {
        "coefficients": lambda: propagate(model, inputs, target=None, rules=ATTNLRP, counting=False),
        "with ledger": lambda: explain.relevance(model, inputs, rules="attnlrp"),
        "forward + backward": step,
    }


def language(python: str, sizes: Sequence[tuple[Any, ...]], repeats: int) -> list[dict[str, Any]]:
    """Compare with LXT's AttnLRP, and time both in turns, each in processes of its own on the same tensors."""
    rows: list[dict[str, Any]] = []
    for size in sizes:
        made = saved_model(*size) if isinstance(size[0], str) else language_model(*size)
        model, inputs = made[0], {"input_ids": made[1], "logits_to_keep": 1}
        ours = explain.relevance(model, inputs, rules="attnlrp").inputs["input_ids"]
        about = {
            "layers": model.config.num_hidden_layers,
            "width": model.config.hidden_size,
            "tokens": made[1].shape[1],
        }
        del model
        seconds: dict[str, list[float]] = {}
        memory: dict[str, float] = {}
        for _ in range(repeats):
            theirs = peer(python, "lxt", *map(str, size))
            if isinstance(theirs, dict):
                seconds.setdefault("LXT", []).append(theirs["seconds"])
            for kind in KINDS:
                command = [sys.executable, __file__, "--side", kind, *map(str, size)]
                found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                seconds.setdefault(kind, []).append(found["seconds"])
                memory[kind] = found["memory_gb"]
        row = about | {"difference to LXT": away(ours, theirs["relevance"]) if isinstance(theirs, dict) else theirs}
        row |= {f"{kind}, s": min(several) for kind, several in seconds.items()}
        rows.append(row | {f"{kind}, GB": several for kind, several in memory.items()})
        print(rows[-1], flush=True)
    return rows


def side(kind: str, size: Sequence[Any]) -> None:
    """Print CPU seconds of one kind of run, and the peak memory of the process above that of the loaded model."""
    if kind == "images":
        print(json.dumps({what: seconds(run) for what, run in image_runs(size[0]).items()}))
        return
    made = saved_model(*size) if isinstance(size[0], str) else language_model(*size)
    before = peak_gb()
    work = kinds_of_run(made[0], {"input_ids": made[1], "logits_to_keep": 1})[kind]
    found = seconds(work, 1 if isinstance(size[0], str) else 3)
    print(json.dumps({"seconds": found, "memory_gb": peak_gb() - before}))


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="an interpreter with zennit, captum and LXT")
    parser.add_argument("--quick", action="store_true", help="the smallest language model only")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "explain-peers.json")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each peer and each of ours")
    parser.add_argument("--only", choices=["equality", "costs", "language"], help="leave the rest of --json as it is")
    parser.add_argument("--side", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.side:
        side(given.side[0], [int(x) if x.isdigit() else x for x in given.side[1:]])
        return
    if not given.peers:
        print("explain_peers: no --peers (an interpreter with zennit, captum and LXT) given; nothing to compare with")
        return
    sizes = [*SIZES, (str(find_model("smollm2")), 512)]
    found = json.loads(given.json.read_text()) if given.only else {}
    if given.only in (None, "equality"):
        found["equality"] = images(given.peers)
    if given.only in (None, "costs"):
        found["images"] = image_costs(given.peers, given.repeats)
    if given.only in (None, "language"):
        found["language"] = language(given.peers, sizes[: 1 if given.quick else None], given.repeats)
    found |= {"versions": versions(), "machine": machine()}
    given.json.write_text(json.dumps(found, indent=2, default=str) + "\n")
    for row in [*found["equality"], *found.get("images", [])]:
        print(row)


if __name__ == "__main__":
    main()
