"""Relevance beside zennit, captum and LXT: equality, and the cost beside LXT. Each peer runs in its own process.

python -m venv peers && peers/bin/pip install torch==2.13.0 zennit captum lxt transformers
python -m benchmarks explain_peers --peers peers/bin/python
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from explain_models import COMPOSITES, image_model, language_model, seconds
from lineament import explain
from lineament.explain.relevance import propagate
from lineament.explain.rules import ATTNLRP
from lineament.report import machine, versions

HERE = Path(__file__).parent
SIZES = ((4, 64, 32), (4, 256, 512), (8, 256, 512))
"""Layers, width, tokens of the language model."""


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


def language(python: str, sizes: Sequence[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Compare with LXT's AttnLRP, and time both: coefficients, with the ledger, and a forward and backward pass."""
    rows: list[dict[str, Any]] = []
    for size in sizes:
        model, ids = language_model(*size)
        inputs = {"input_ids": ids, "logits_to_keep": 1}

        def step(model: Any = model, inputs: Any = inputs) -> None:
            model(**inputs, use_cache=False).logits[0, -1].max().backward()
            model.zero_grad()

        def lean(model: Any = model, inputs: Any = inputs) -> None:
            propagate(model, inputs, target=None, rules=ATTNLRP, counting=False)

        before, theirs = seconds(lean), peer(python, "lxt", *map(str, size))
        after = seconds(lean)
        ours = explain.relevance(model, inputs, rules="attnlrp").inputs["input_ids"]
        full = seconds(lambda model=model, inputs=inputs: explain.relevance(model, inputs, rules="attnlrp"))
        rows.append(
            {
                "layers": size[0], "width": size[1], "tokens": size[2],
                "difference to LXT": away(ours, theirs["relevance"]) if isinstance(theirs, dict) else theirs,
                "LXT, s": theirs["seconds"] if isinstance(theirs, dict) else None,
                "coefficients, s": min(before, after), "with ledger, s": full, "forward + backward, s": seconds(step),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="an interpreter with zennit, captum and LXT")
    parser.add_argument("--quick", action="store_true", help="the smallest language model only")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "explain-peers.json")
    given = parser.parse_args()
    if not given.peers:
        print("explain_peers: no --peers (an interpreter with zennit, captum and LXT) given; nothing to compare with")
        return
    torch.set_num_threads(1)
    found = {"equality": images(given.peers), "language": language(given.peers, SIZES[: 1 if given.quick else None]),
             "versions": versions(), "machine": machine()}  # fmt: skip
    given.json.write_text(json.dumps(found, indent=2, default=str) + "\n")
    for row in [*found["equality"], *found["language"]]:
        print(row)


if __name__ == "__main__":
    main()
