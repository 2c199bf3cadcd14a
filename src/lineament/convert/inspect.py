"""What a conversion would do to a model, from its config and headers alone: no weights are loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lineament.convert.plan import Plan, parse_keep
from lineament.models.adapters import sliding_layers
from lineament.tasks.predictions import CHUNK

STATE_BYTES = 4  # states are float32
SHARE_CONTEXT = 32768  # tokens at which a plan's `state_share` is counted


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The shape of a causal language model.

    Args:
        name: as the user gave it. kind: transformers' model_type.
        layers, heads, key_heads, head_width, width, vocabulary: the usual counts.
        parameters: in all; 0 when unknown. positions: longest context; 0 when unknown.
        kept_layers: layers that a conversion never touches (sliding windows). sliding_window: tokens they remember; 0:
            all. softcap: what attention logits are squashed to; 0: nothing.
        weight_bytes: per number in the weights' files, at most. dtype: of most of those numbers.
    """

    name: str
    kind: str
    layers: int
    heads: int
    key_heads: int
    head_width: int
    width: int
    vocabulary: int
    parameters: int = 0
    positions: int = 0
    kept_layers: tuple[int, ...] = ()
    sliding_window: int = 0
    softcap: float = 0.0
    weight_bytes: int = 4
    dtype: str = "float32"


def info_from_config(
    config: Any, *, name: str, parameters: int = 0, weight_bytes: int = 4, dtype: str = "float32"
) -> ModelInfo:
    """Read a `ModelInfo` off a transformers config (its text part when it has several)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = int(text.num_attention_heads)
    return ModelInfo(
        name=name,
        kind=config.model_type,
        layers=int(text.num_hidden_layers),
        heads=heads,
        key_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_width=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        width=int(text.hidden_size),
        vocabulary=int(text.vocab_size),
        parameters=parameters,
        positions=int(getattr(text, "max_position_embeddings", 0) or 0),
        kept_layers=sliding_layers(text),
        sliding_window=int(getattr(text, "sliding_window", None) or 0),
        softcap=float(getattr(text, "attn_logit_softcapping", None) or 0),
        weight_bytes=weight_bytes,
        dtype=dtype,
    )


def softmax_bytes(info: ModelInfo, context: int, *, number: int = 4) -> int:
    """Return the bytes of keys and values of one key-value head at a context."""
    return context * 2 * info.head_width * number


def state_bytes(info: ModelInfo, plan: Plan, *, number: int = 4) -> int:
    """Return the bytes of the constant-size state of one converted key-value head (at most, with a `state_share`)."""
    K = info.head_width
    if plan.state_share:
        total, kept = (info.layers - len(info.kept_layers)) * info.key_heads, kept_count(info, plan)
        room = (plan.state_share * total - kept) * softmax_bytes(info, SHARE_CONTEXT, number=number)
        return max(0, int(room / max(1, total - kept)))
    if plan.options.get("map") == "product":
        codes = int(plan.options.get("codes", 16))
        cells, exact = product_numbers(plan, {"key_width": K, "value_width": K}, codes)
        return cells * STATE_BYTES + exact * number
    features = {"hedgehog-window": 2 * K, "hedgehog": 2 * K, "lolcats": 2 * K, "softmax-window": 0, "performer": 2 * K,
                "cosformer": 2 * K, "taylor": 1 + K + K * K}.get(plan.mixer, K)  # fmt: skip
    if plan.options.get("features"):
        features = 2 * int(plan.options["features"])
    normalised = plan.mixer not in ("lightning", "gated-deltanet", "kda")
    state = features * (K + normalised) * STATE_BYTES
    if plan.mixer not in ("hedgehog-window", "lolcats", "softmax-window"):
        return state
    exact = (plan.window + plan.sinks) * (2 * K + features)
    return state + exact * number


def product_numbers(plan: Plan, shape: Mapping[str, int], codes: int) -> tuple[int, int]:
    """Return how many numbers one key-value head with product codes remembers: in its cells, and exactly."""
    exact = (plan.window + plan.sinks) * (shape["key_width"] + shape["value_width"] + 2 * codes)
    return codes * codes * (shape["value_width"] + 1), exact


def kept_count(info: ModelInfo, plan: Plan) -> int:
    """Return how many key-value heads a plan's rule keeps, of those that may be converted (no table needed)."""
    rule, numbers = parse_keep(plan.keep)
    free = [i for i in range(info.layers) if i not in info.kept_layers]
    total = len(free) * info.key_heads
    if rule == "all":
        return total
    if rule == "auto-heads":
        return head_count(numbers[0], total)
    if rule == "auto":
        return min(int(numbers[0]), len(free)) * info.key_heads
    if rule == "every":
        return sum(i % int(numbers[0]) == int(numbers[0]) - 1 for i in free) * info.key_heads
    return sum(i in numbers for i in free) * info.key_heads if rule == "layers" else 0


def head_count(share: float, total: int) -> int:
    """Return how many of `total` heads a share keeps: rounded down, but at least one of a share above 0.

    Example:
        >>> head_count(0.25, 90), head_count(0.25, 3), head_count(0.0, 90)
        (22, 1, 0)
    """
    return max(int(share * total + 1e-9), int(share > 0 and total > 0))


def memory_plan(info: ModelInfo, plan: Plan) -> dict[str, int]:
    """Estimate the bytes each stage needs at its peak.

    Transfer holds the teacher, one pool of hidden states and one layer's queries, keys, values and outputs;
    distillation the teacher, the student with gradients and optimiser states of what learns, and two sets of logits.
    """
    weights = info.parameters * 4
    longest = max(plan.transfer_lengths)
    per_token = info.width * 3 + info.head_width * (2 * info.heads + 2 * info.key_heads)
    pool = plan.transfer_pool * longest * per_token * 4
    step = plan.transfer_tokens * info.heads * (plan.window + 4 * info.head_width) * 4 * 4
    learning = info.parameters if plan.distil == "full" else info.parameters // 20
    rows = max(plan.distil_tokens, *plan.distil_lengths)
    activations = rows * info.layers * info.width * 40 * 2
    logits = 3 * min(rows, plan.distil_positions or rows) * info.vocabulary * 4
    return {
        "teacher": weights,
        "transfer": weights * 2 + pool + step,
        "distil": 2 * weights + 12 * learning + activations + logits if plan.distil != "none" else 0,
        "evaluate": 2 * weights + 2 * min(CHUNK, max(plan.evaluate_lengths)) * info.vocabulary * 4,
    }


def disk_bytes(info: ModelInfo, plan: Plan) -> int:
    """Estimate the bytes that a conversion writes: the student, checkpoints, and the cache of the teacher's logits."""
    weights = info.parameters * 4
    steps = plan.distil_steps + plan.extend_steps
    cached = plan.teacher_topk * 6 * plan.distil_tokens * steps if plan.teacher_topk else 0
    checkpoints = weights * 3 if plan.distil == "full" else weights
    return weights + checkpoints + cached


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect` found: the model, and what a plan would make of it."""

    info: ModelInfo
    plan: Plan
    full: dict[int, tuple[int, ...]] | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    caches: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    disk: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        from dataclasses import asdict

        heads = None if self.full is None else {str(k): list(v) for k, v in self.full.items()}
        return {
            "model": asdict(self.info), "plan": self.plan.to_json(), "full_heads": heads, "layers": self.rows,
            "cache": self.caches, "memory_bytes": self.memory, "disk_bytes": self.disk,
        }  # fmt: skip

    def tables(self) -> list[Any]:
        """Return rich tables: layers, cache bytes against context, memory."""
        from rich.table import Table

        from lineament.io import human_bytes

        info = self.info
        shown = Table(
            "layer",
            "now",
            f"with plan {self.plan.name}",
            title=f"{info.name}: {info.kind}, {info.parameters:,} parameters",
        )
        for row in self.rows:
            shown.add_row(str(row["layer"]), row["now"], row["then"])
        caches = Table("context", "teacher", "student", "ratio", title="cache of one sequence, float32")
        for row in self.caches:
            sizes = human_bytes(row["teacher"]), human_bytes(row["student"])
            caches.add_row(f"{row['context']:,}", *sizes, f"{row['ratio']:.3f}")
        memory = Table("stage", "memory at the peak", title=f"memory plan; disk {human_bytes(self.disk)}")
        for stage, size in self.memory.items():
            memory.add_row(stage, human_bytes(size))
        return [shown, caches, memory]


def inspection(
    info: ModelInfo, plan: Plan, full: dict[int, tuple[int, ...]] | None, contexts: Sequence[int]
) -> Inspection:
    """Work out layers, cache bytes and memory of a plan on a model.

    Args:
        full: {layer: key-value heads that stay softmax}; None when only a measurement can tell which.
    """
    free = (info.layers - len(info.kept_layers)) * info.key_heads
    kept, caches = kept_count(info, plan), []
    for context in contexts:
        whole, seen = softmax_bytes(info, context), min(context, info.sliding_window or context)
        sliding = len(info.kept_layers) * info.key_heads * softmax_bytes(info, seen)
        theirs = sliding + free * whole
        ours = sliding + kept * whole + (free - kept) * state_bytes(info, plan)
        caches.append({"context": context, "teacher": theirs, "student": ours, "ratio": ours / theirs})
    rows = [_layer_row(info, plan, full, layer) for layer in range(info.layers)]
    return Inspection(
        info=info, plan=plan, full=full, rows=rows, caches=caches, memory=memory_plan(info, plan),
        disk=disk_bytes(info, plan),
    )  # fmt: skip


def _layer_row(info: ModelInfo, plan: Plan, full: dict[int, tuple[int, ...]] | None, layer: int) -> dict[str, Any]:
    now = f"softmax, {info.heads} query and {info.key_heads} key-value heads of {info.head_width}"
    if layer in info.kept_layers:
        return {"layer": layer, "now": "sliding window", "then": "kept as it is"}
    if full is None:
        return {"layer": layer, "now": now, "then": f"{plan.mixer}; softmax heads chosen by measured damage"}
    kept = full.get(layer, ())
    if len(kept) == info.key_heads:
        return {"layer": layer, "now": now, "then": "softmax"}
    softmax = f"; key-value heads {', '.join(map(str, kept))} softmax" if kept else ""
    return {"layer": layer, "now": now, "then": f"{plan.mixer}{softmax}"}
