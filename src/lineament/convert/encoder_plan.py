"""How an encoder is converted, as one frozen value."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lineament._base.errors import InputError, unknown
from lineament.convert.plan import changed, typed_
from lineament.nn import FEATURE_MAPS

LOSSES = ("attention-kl", "output-mse", "both")
STARTS = ("orthogonal", "identity")


@dataclass(frozen=True, kw_only=True)
class EncoderPlan:
    """How an encoder is converted; plain JSON values all through.

    Args:
        map: key of `nn.FEATURE_MAPS`. options: the map's own arguments.
        start: of Hedgehog's W: "orthogonal" (random directions, the same for queries and keys) or "identity" (as
            published). On MiniLM's third layer, 160 steps, 64 features: KL .12 and .16, each at its best rate.
        keep: layers that stay softmax.
        transfer_loss: "attention-kl" (cross-entropy of the weights minus the teacher's entropy), "output-mse" (error
            of a layer's output relative to its size) or "both".
        transfer_steps, transfer_lr: of the maps alone, each layer on the teacher's activations.
        distil_steps, distil_lr, distil_map_lr: of all layers (and their maps) on the teacher's hidden states,
            embeddings and similarities. Word and position embeddings stay.
        transfer_rows, distil_rows: texts per step. length: their longest length in tokens.
        precision: "auto", "fp32" or "bf16". data: text by name.
        evaluate_texts, evaluate_length: held-out paragraphs and their longest length in tokens.
        checkpoint_every: steps.

    Raises:
        InputError: a field has the wrong type or value.
    """

    map: str = "hedgehog"
    options: Mapping[str, Any] = field(default_factory=lambda: {"features": 64})
    start: str = "orthogonal"
    keep: tuple[int, ...] = ()
    transfer_loss: str = "attention-kl"
    transfer_steps: int = 300
    transfer_lr: float = 0.1
    distil_steps: int = 50
    distil_lr: float = 3e-5
    distil_map_lr: float = 1e-3
    transfer_rows: int = 4
    distil_rows: int = 8
    length: int = 128
    precision: str = "auto"
    data: tuple[str, ...] = ("wiki-sample",)
    evaluate_texts: int = 256
    evaluate_length: int = 128
    seed: int = 0
    checkpoint_every: int = 25

    def __post_init__(self) -> None:
        typed_(self)
        if self.map not in FEATURE_MAPS or getattr(FEATURE_MAPS[self.map], "needs_positions", False):
            raise unknown("feature map of an encoder", self.map, [name for name in FEATURE_MAPS if name != "cosformer"])
        for name, known in (("transfer_loss", LOSSES), ("start", STARTS)):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        low = {
            "transfer_steps": 0,
            "distil_steps": 0,
            "transfer_rows": 1,
            "distil_rows": 2,
            "length": 2,
            "evaluate_texts": 3,
            "evaluate_length": 2,
        }
        for name, least in low.items():
            if getattr(self, name) < least:
                raise InputError(f"plan field {name} is {getattr(self, name)}; expected at least {least}")

    def change(self, changes: Mapping[str, Any]) -> "EncoderPlan":
        """Return a plan with some fields changed; texts are read as the field's type."""
        return changed(self, changes)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "keep": list(self.keep), "data": list(self.data), "options": dict(self.options)}
