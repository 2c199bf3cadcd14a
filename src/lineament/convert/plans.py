"""Published recipes and our own, as values of `Plan`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lineament._base.errors import InputError, unknown
from lineament.convert.plan import Plan

OURS: dict[str, Any] = {  # what both of our plans share
    "transfer_loss": "attention-kl",
    "transfer_lr": 3e-2,
    "transfer_lengths": (1024, 4096),  # what far codes get wrong adds up with the tokens they stand for
    "transfer_tokens": 2048,
    "transfer_far_sinks": 4,  # a second sink may stand behind the tokens that stay exact
    "reach": 8192,  # codes know no rotations but those that they have seen
    "distil_lengths": (2048, 4096),
    "distil_positions": 512,
    "distil_mixer_lr": 3e-3,
    "distil_gate_lr": 1e-2,
}

PLANS: dict[str, Plan] = {
    "default": Plan(
        about="Ours: hedgehog-window, the quarter of key-value heads with most damage stays softmax.",
        **OURS,
        options={"map": "product", "codes": 16, "query_scale": True},
        transfer_pool=12,
        distil_retrieval=0.3,
    ),
    "no-softmax": Plan(
        name="no-softmax",
        about="Ours without any softmax head: codes given to heads by damage, a cache of 2 % at 32k tokens.",
        **OURS,
        options={"map": "product", "query_scale": True},
        keep="none",
        state_share=0.02,
        transfer_steps=200,
        transfer_pool=24,
        budget_transfer=0.45,
        distil_retrieval=0.4,
    ),
    "hedgehog": Plan(
        name="hedgehog",
        about="As published: feature maps by attention distillation, no window, then LoRA on the projections.",
        mixer="hedgehog",
        window=0,
        sinks=0,
        keep="none",
        transfer_loss="attention-kl",
        distil_kl=0.0,
        distil_next=1.0,
        distil_retrieval=0.0,
        lora_rank=8,
        distil_lr=1e-4,
    ),
    "lolcats": Plan(
        name="lolcats",
        about="As published: softmax window of 64 beside Hedgehog features, output MSE, then LoRA (rank 8).",
        mixer="lolcats",
        window=64,
        sinks=0,
        keep="none",
        transfer_loss="output-mse",
        transfer_gate_lr=1e-2,
        distil_kl=0.0,
        distil_next=1.0,
        distil_retrieval=0.0,
        lora_rank=8,
        distil_lr=1e-4,
    ),
    "kimi-hybrid": Plan(
        name="kimi-hybrid",
        about="Kimi Delta Attention in three layers of four, every fourth layer softmax.",
        mixer="kda",
        window=0,
        sinks=0,
        keep="every:4",
        distil="full",
        distil_lr=1e-4,
    ),
    "sinks-window": Plan(
        name="sinks-window",
        about="The baseline to beat: window and sinks, no linear state, nothing trained.",
        mixer="softmax-window",
        transfer_steps=0,
        distil="none",
    ),
    "lightning": Plan(
        name="lightning",
        about="Lightning attention: a fixed scalar decay per head, half of the layers softmax by damage.",
        mixer="lightning",
        window=0,
        sinks=0,
        keep="auto-heads:0.25",
        distil="full",
        distil_lr=1e-4,
    ),
    "gated-deltanet": Plan(
        name="gated-deltanet",
        about="Gated delta rule in place of the heads with little damage.",
        mixer="gated-deltanet",
        window=0,
        sinks=0,
        keep="auto-heads:0.25",
        distil="full",
        distil_lr=1e-4,
    ),
}


def plan(name: "str | Plan" = "default", changes: Mapping[str, Any] | None = None) -> Plan:
    """Return a plan by name or from a JSON file, with some fields changed.

    Args:
        name: a key of `PLANS`, a path ending in .json, or a `Plan`.
        changes: field -> value; texts are read as the field's type.

    Raises:
        InputError: no such plan, an unknown field (with the near miss) or a wrong value.

    Example:
        >>> plan("lolcats", {"window": "128"}).window
        128
    """
    if isinstance(name, Plan):
        found = name
    elif name in PLANS:
        found = PLANS[name]
    elif name.endswith(".json"):
        found = _from_file(Path(name))
    else:
        raise unknown("plan", name, PLANS)
    return found.change(changes or {})


def _from_file(path: Path) -> Plan:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no plan file {path}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds {type(values).__name__}; expected an object of plan fields")
    return Plan.from_json(values)
