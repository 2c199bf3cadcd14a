"""What `speed_up_` gains on other people's models: of the operator, of its layer and of the model, apart.

    python benchmarks/other_weights.py --quick     # tiny and short
    python benchmarks/other_weights.py --json FILE

Random weights of real head shapes, built by transformers; one thread, theirs and ours take turns, medians of the
thread's own seconds. "operator" is the very call of the recurrence that the model's forward makes, on the inputs it
makes it with, alone and with its backward.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lineament.models import speed_up_
from lineament.models.speed_up import OPERATORS
from lineament.report import machine
from lineament.tasks import in_turn

DELTA = {
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
COMMON = {
    "vocab_size": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_hidden_layers": 1,
    "layer_types": ["linear_attention"],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 256}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_next": {**COMMON, **DELTA, **EXPERTS, "hidden_size": 1024, "shared_expert_intermediate_size": 256},
    "kimi_linear": {**COMMON, **EXPERTS, "hidden_size": 1024, "linear_num_heads": 8, "linear_head_dim": 128},
    "mamba2": {
        "vocab_size": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "num_hidden_layers": 1, "hidden_size": 768, "num_heads": 24, "head_dim": 64,
        "state_size": 128, "n_groups": 1,
    },
}  # fmt: skip
GOALS = {"qwen3_next": 5.0}  # of the operator inside its forward and backward at 4096 tokens


def recorded(layer: Any, x: Tensor) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """Return (name, arguments) of the recurrence that a layer's forward calls."""
    scope = vars(__import__("sys").modules[type(layer).__module__])
    calls: list[Any] = []
    held = {name: scope[name] for name in OPERATORS if name in scope}

    def spy(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, args, kwargs))
            return held[name](*args, **kwargs)

        return call

    try:
        scope.update({name: spy(name) for name in held})
        layer(x)
    finally:
        scope.update(held)
    return calls[0]


def both_ways(run: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    """Forward and backward of a function of leaves."""

    def call() -> None:
        for x in inputs:
            x.grad = None
        run().float().square().mean().backward()

    return call


def compare(model_type: str, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Return one row per part: seconds of theirs and of ours, forward and with backward."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **MODELS[model_type]))
    ids = torch.randint(0, 1024, (1, tokens))
    with speed_up_(model) as sped:
        name = next(iter(sped.layers))
    layer = model.get_submodule(name)
    x = torch.randn(1, tokens, model.config.hidden_size, requires_grad=True)
    operator, args, kwargs = recorded(layer, x.detach())
    theirs = vars(__import__("sys").modules[type(layer).__module__])[operator]
    args, kwargs = detached(args), dict(zip(kwargs, detached(tuple(kwargs.values())), strict=True))
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]
    weights = [*model.parameters()]
    parts: dict[str, tuple[Callable[[Any], Callable[[], Tensor]], list[Tensor]]] = {
        "operator": (lambda f: lambda: first(f(*args, **kwargs)), leaves),
        "layer": (lambda _: lambda: first(layer(x)), [x, *weights]),
        "model": (lambda _: lambda: model(ids, use_cache=False).logits, weights),
    }
    rows = []
    for part, (make, inputs) in parts.items():
        runs = {"theirs": make(theirs), "ours": make(OPERATORS[operator])}
        if part != "operator":
            runs["ours"] = sped_up(model, runs["ours"])
        steps = {f"{who}, forward": torch.no_grad()(run) for who, run in runs.items()}
        steps |= {f"{who}, both": both_ways(run, inputs) for who, run in runs.items()}
        times = {name: median(s) for name, s in in_turn(steps, repeats, clock=time.thread_time).items()}
        seconds = {who: [times[f"{who}, forward"], times[f"{who}, both"]] for who in runs}
        rows.append({"model": model_type, "tokens": tokens, "part": part, **seconds})
    return rows


def sped_up(model: torch.nn.Module, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Run with our operators in the model's layers, and give it back as it was."""

    def call() -> Tensor:
        with speed_up_(model):
            return run()

    return call


def detached(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Turn tensors into leaves of their own."""
    return tuple(
        v.detach().clone().requires_grad_(v.is_floating_point()) if isinstance(v, Tensor) else v for v in values
    )


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="256 tokens, one repeat")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokens, repeats = (256, 1) if given.quick else (given.tokens, given.rounds)
    rows = [row for name in given.models for row in compare(name, tokens, repeats)]
    table = Table(*["model", "part", "theirs ms", "ours ms", "x", "theirs ms, + backward", "ours ms", "x"])
    for row in rows:
        (a, b), (c, d) = row["theirs"], row["ours"]
        table.add_row(
            row["model"], row["part"], *(f"{v:.1f}" for v in (a * 1e3, c * 1e3, a / c, b * 1e3, d * 1e3, b / d))
        )
    Console().print(table)
    for row in rows:
        if row["part"] == "operator" and row["model"] in GOALS and tokens >= 4096:
            reached = row["theirs"][1] / row["ours"][1]
            print(f"{row['model']}: wanted {GOALS[row['model']]}x with backward, got {reached:.1f}x")
    if given.json:
        about = {"machine": machine(), "transformers": transformers.__version__, "quick": given.quick}
        given.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
