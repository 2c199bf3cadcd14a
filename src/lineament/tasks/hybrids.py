"""The instrument of the hybrid study: one arm is a value; training it says what it recalls, predicts and keeps.

An arm is a mixer, a ratio of linear to softmax layers, a size and a task. All arms of a size have as many parameters as
its softmax decoder, within 2 %. `placement="heads"` asks the question that ratios leave open: the same cache, but full
heads where a trained softmax model's damage is largest, in place of full layers by position.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineament import io, train
from lineament._base.errors import InputError, unknown
from lineament._base.seeds import generator, seeded
from lineament.models import (
    FAMILIES,
    DecoderConfig,
    DecoderForCausalLM,
    Family,
    decoder_config,
    full_layers,
    match_parameters,
    parameters,
)
from lineament.models.decoder import filling
from lineament.nn import MixerConfig, Slots, build
from lineament.tasks.characters import character_ids
from lineament.tasks.cost import cache_bytes
from lineament.tasks.perplexity import perplexity
from lineament.tasks.predictions import next_token_loss
from lineament.tasks.recall import Recall, recall_loss, score_recall

WINDOW, SINKS = 8, 1  # what a softmax head is limited to when its damage is measured
HELD_OUT = 7_777  # seed of the examples that are scored
LONG = 4096  # tokens at which caches are compared
PLACEMENTS = ("layers", "inherited layers", "heads")
CONVERTED = Family(kind="gated-deltanet", slots=Slots(rope=1e4))  # takes over q, k and v of a softmax layer


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shape, task and training of a size.

    Attributes:
        width, layers, heads, vocab: of the decoder (vocab: of recall; text has an alphabet of its own).
        recall: fields of `Recall`. steps, rate, rows: of training. looks: steps after which recall is scored as well.
    """

    width: int
    layers: int
    heads: int
    vocab: int
    recall: Mapping[str, Any]
    steps: int
    rate: float = 2e-3
    rows: int = 64
    looks: tuple[int, ...] = ()
    text_length: int = 256


MQAR = {"task": "mqar", "length": 128, "pairs": 8, "queries": 16}
SIZES: dict[str, Size] = {
    "smoke": Size(
        width=16, layers=2, heads=2, vocab=16, steps=4, rows=4, looks=(2,), text_length=32,
        recall={**MQAR, "length": 32, "pairs": 4, "queries": 12},
    ),
    "small": Size(
        width=64, layers=2, heads=2, vocab=16, steps=400, looks=(100, 200),
        recall={**MQAR, "length": 32, "pairs": 4, "queries": 12},
    ),
    "study": Size(width=64, layers=4, heads=2, vocab=64, steps=2000, looks=(500, 1000), recall=MQAR),
    "deep": Size(width=64, layers=24, heads=2, vocab=64, steps=2000, rate=1e-3, looks=(500, 1000), recall=MQAR),
    "340m": Size(width=1024, layers=24, heads=8, vocab=32000, steps=20000, rate=3e-4,
                 recall={**MQAR, "length": 2048, "pairs": 256, "queries": 64}, text_length=2048),
    "1.3b": Size(width=2048, layers=24, heads=16, vocab=32000, steps=20000, rate=3e-4,
                 recall={**MQAR, "length": 2048, "pairs": 256, "queries": 64}, text_length=2048),
}  # fmt: skip
"""`340m` and `1.3b` have the paper's shapes; they learn this library's tasks, not its 20 and 100 billion tokens."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One run of the study.

    Attributes:
        variant: a key of `models.FAMILIES`, or "converted" (with placement "inherited layers" or "heads").
        ratio: as of `models.full_layers`; at placement "heads" what the cache must equal. size: a key of `SIZES`.
        task: "recall", or "text": the next character of the Python reference.
        placement: "layers" (by position, from scratch); or on the weights of a softmax model trained first:
            "inherited layers" (by position), or "heads" (as many, those with most damage).
        seed: of weights and examples.
    """

    variant: str
    ratio: str
    size: str
    task: str = "recall"
    placement: str = "layers"
    seed: int = 0

    def __post_init__(self) -> None:
        inherits = self.placement != "layers"
        for kind, value, known in (
            ("size", self.size, SIZES), ("task", self.task, ("recall", "text")),
            ("placement", self.placement, PLACEMENTS),
            ("variant", self.variant, ["converted"] if inherits else FAMILIES),
        ):  # fmt: skip
            if value not in known:
                raise unknown(kind, value, known)
        if inherits and self.task == "text":
            raise InputError("placement is measured on recall; an arm that inherits has task='recall'")

    @property
    def name(self) -> str:
        """The folder's name: "small-recall-retnet-1:1-layers-0" without colons and spaces."""
        parts = (self.size, self.task, self.variant, self.ratio, self.placement, str(self.seed))
        return "-".join(parts).replace(":", "to").replace(" ", "-")

    def value(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def arm_config(arm: Arm, full_heads: Mapping[int, tuple[int, ...]] | None = None) -> DecoderConfig:
    """Return an arm's decoder: of the softmax decoder's size within 2 %, but for inherited weights."""
    size = SIZES[arm.size]
    vocab = size.vocab if arm.task == "recall" else character_ids()[2]
    shape: dict[str, Any] = {"vocab_size": vocab, "width": size.width, "layers": size.layers, "heads": size.heads}
    softmax = decoder_config("llama", **shape)
    if arm.variant == "converted":
        ratio = "pure" if full_heads is not None else arm.ratio
        return decoder_config(CONVERTED, ratio=ratio, full_heads=full_heads, **shape)
    config = decoder_config(arm.variant, ratio=arm.ratio, tie_word_embeddings=False, **shape)
    return config if not config.intermediate_size else match_parameters(config, softmax)


def recall_of(arm: Arm, *, held_out: bool = False) -> Recall:
    """Return an arm's recall task."""
    size = SIZES[arm.size]
    return Recall(**{**size.recall, "vocab": size.vocab, "seed": HELD_OUT if held_out else arm.seed})


def run_arm(value: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """Train and score one arm, going on from what `folder` holds: the work of a `train.sweep`.

    Returns:
        parameters, the share of answer tokens recalled (at every look and at the end) or the loss on held-out text,
        cache bytes at 4096 tokens (measured, by arithmetic, and the softmax decoder's), full heads per layer.
    """
    arm, folder = Arm(**value), Path(folder)
    kept = None
    if arm.placement == "layers":
        model = _made(arm_config(arm), arm.seed)
    else:
        parent = replace(arm, variant="llama", ratio="full", placement="layers")
        teacher = _made(arm_config(parent), arm.seed)
        _learn(teacher, parent, folder / "parent")
        kept = kept_heads(arm, teacher) if arm.placement == "heads" else None
        model = _made(arm_config(arm, kept), arm.seed)
        model.load_state_dict(teacher.state_dict(), strict=False)
    looks = _learn(model, arm, folder)
    config = model.config
    softmax = arm_config(replace(arm, variant="llama", ratio="full", placement="layers"))
    return {
        **value, **_scored(model, arm), "looks": looks, "parameters": parameters(config),
        "softmax_parameters": parameters(softmax), "cache": cache_bytes(model.cpu(), LONG),
        "arithmetic": cache_arithmetic(config, LONG), "softmax_cache": cache_arithmetic(softmax, LONG),
        "full": [list(mixer.full_heads) for mixer, _ in filling(config)],
    }  # fmt: skip


def _made(config: DecoderConfig, seed: int) -> Any:
    with seeded(seed):
        return DecoderForCausalLM(config)


def _learn(model: nn.Module, arm: Arm, folder: Path) -> dict[str, float]:
    """Train on the arm's task; return recall at the looks."""
    size, file = SIZES[arm.size], folder / "looks.json"
    looks: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    batches, loss = (recall_of(arm).batches(size.rows), recall_loss)
    if arm.task == "text":
        batches, loss = _windows(size, arm.seed), next_token_loss

    def look(step: int, numbers: Mapping[str, float]) -> None:
        if step + 1 in size.looks and arm.task == "recall":
            looks[str(step + 1)] = score_recall(model, recall_of(arm, held_out=True)).token_accuracy
            io.write_json(file, looks)

    config = train.FitConfig(steps=size.steps, lr=size.rate, warmup=size.steps // 20, seed=arm.seed, log_every=20)
    train.fit(model.train(), batches, loss, config, out=folder, on_step=look, description=arm.name)
    model.eval()
    return looks


def _windows(size: Size, seed: int) -> Callable[[int], Tensor]:
    text, length = character_ids()[0], size.text_length + 1

    def batch(number: int) -> Tensor:
        random = generator(seed * 1_000_003 + number)
        starts = torch.randint(len(text) - length, (max(size.rows // 4, 1), 1), generator=random)
        return text[starts + torch.arange(length)]

    return batch


@torch.no_grad()
def _scored(model: nn.Module, arm: Arm) -> dict[str, float]:
    if arm.task == "recall":
        found = score_recall(model, recall_of(arm, held_out=True))
        return {"recall": found.token_accuracy, "answer_loss": found.loss}
    length = SIZES[arm.size].text_length
    return {"loss": perplexity(model, character_ids()[1].unfold(0, length, length)[:64], batch_size=16).nll}


@torch.no_grad()
def kept_heads(arm: Arm, teacher: Any) -> dict[int, tuple[int, ...]]:
    """Return {layer: key heads that stay full}: as many as the ratio's full layers have, those with most damage.

    A head's damage is the rise of the answers' loss when it alone sees its last 8 tokens and the first one only.
    """
    task, layers = recall_of(replace(arm, seed=HELD_OUT + 1)), len(teacher.model.layers)
    damage: list[tuple[float, int, int]] = []
    for i, block in enumerate(teacher.model.layers):
        heads, full = block.mixer.heads, block.mixer.heads.config
        for h in full.full_heads:
            rest = tuple(x for x in full.full_heads if x != h)
            limited = MixerConfig.from_json(
                {**full.to_json(), "full_heads": list(rest), "window": WINDOW, "sinks": SINKS}
            )
            block.mixer.heads = build(limited)  # softmax over a window has no weights of its own
            damage.append((score_recall(teacher, task, count=128).loss, i, h))
        block.mixer.heads = heads
    count = len(full_layers(arm.ratio, layers)) * len(filling(teacher.config)[0][0].full_heads)
    chosen = sorted(damage, reverse=True)[:count]
    return {i: tuple(sorted(h for _, layer, h in chosen if layer == i)) for i in range(layers)}


def cache_arithmetic(config: DecoderConfig, context: int, bytes_each: int = 4) -> int:
    """Return the bytes a decoder's cache must have after reading `context` tokens at once, by its shape alone.

    Full heads: keys and values of every token. Linear heads: a float32 state [K, V] each (HGRN: [V]). A short
    convolution: its last inputs. Every layer: a count.

    Raises:
        InputError: a mixer whose state is none of these.
    """
    total = 0
    for mixer, slots in filling(config):
        full, rest = len(mixer.full_heads), mixer.key_heads - len(mixer.full_heads)
        total += 8 + full * context * (mixer.key_width + mixer.value_width) * bytes_each
        if rest and mixer.kind not in STATES:
            raise InputError(f"the size of the state of {mixer.kind!r} is not written down; known: {', '.join(STATES)}")
        total += STATES[mixer.kind](mixer, rest, bytes_each) if rest else 0
        if slots.conv:
            channels = mixer.heads * mixer.key_width + mixer.key_heads * (mixer.key_width + mixer.value_width)
            total += (slots.conv - 1) * channels * bytes_each
    return total


def _matrix(mixer: MixerConfig, heads: int, bytes_each: int) -> int:
    return 4 * heads * mixer.key_width * mixer.value_width


def _vector(mixer: MixerConfig, heads: int, bytes_each: int) -> int:
    return 4 * heads * mixer.value_width


def _converted(mixer: MixerConfig, heads: int, bytes_each: int) -> int:
    channels = heads * (mixer.groups * mixer.key_width + mixer.key_width + mixer.value_width)
    return _matrix(mixer, heads, bytes_each) + (mixer.options.get("conv", 4) - 1) * channels * bytes_each


STATES: dict[str, Callable[[MixerConfig, int, int], int]] = {
    **dict.fromkeys(("retention", "gla", "hgrn2", "delta-rule", "lightning"), _matrix),
    **dict.fromkeys(("gated-deltanet", "kda"), _converted),
    "hgrn": _vector,
}
