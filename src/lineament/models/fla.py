"""flash-linear-attention's checkpoints as ordinary transformers models, without fla: "gla", "retnet", "hgrn2", ...

Importing `lineament.models` registers the families with transformers' Auto classes where nobody else has, so that
`load_model(folder)` reads a checkpoint in fla's own format and `save_pretrained` writes one.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lineament._base.errors import InputError
from lineament.models.decoder import DecoderForCausalLM, DecoderModel
from lineament.models.fla_layers import DeltaNet, GatedDelta, Gla, Hgrn2, Kda, Retention, Softmax
from lineament.models.student import FORMAT, StatefulModel
from lineament.nn import Rows
from lineament.nn.mlp import MLP

SHARED: dict[str, Any] = {
    "hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 4, "num_kv_heads": None, "hidden_ratio": 4,
    "intermediate_size": None, "hidden_act": "swish", "use_short_conv": True, "conv_size": 4, "norm_eps": 1e-6,
    "fuse_norm": True, "attn": None, "attnres_block_size": None, "initializer_range": 0.02, "vocab_size": 32000,
    "use_cache": True, "tie_word_embeddings": False, "elementwise_affine": True, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ADDITIVE = {"feature_map": None, "use_short_conv": False, "use_output_gate": True}
GATED = {"head_dim": 256, "num_heads": 6, "num_v_heads": None, "allow_neg_eigval": False}
FLA: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "gla": (Gla, {**ADDITIVE, "expand_k": 0.5, "expand_v": 1.0, "clamp_min": None}),
    "retnet": (Retention, {**ADDITIVE, "expand_k": 1.0, "expand_v": 2.0, "num_heads": 8, "hidden_ratio": 2}),
    "hgrn2": (Hgrn2, {"num_heads": None, "expand_ratio": 128, "use_short_conv": False, "use_lower_bound": True}),
    "delta_net": (DeltaNet, {
        "expand_k": 1.0, "expand_v": 1.0, "use_gate": False, "allow_neg_eigval": False, "use_beta": True,
        "num_heads": 16, "qk_norm": "l2", "qk_activation": "silu",
    }),
    "gated_deltanet": (GatedDelta, {**GATED, "expand_v": 2.0, "use_gate": True, "num_hidden_layers": 21}),
    "kda": (Kda, {**GATED, "expand_v": 1.0, "head_dim": 128, "num_heads": 16, "lower_bound": None}),
}  # fmt: skip
"""model_type -> the layer and the defaults of fla's configuration class beside `SHARED`."""

NAMES = {
    "gla": "GLA", "retnet": "RetNet", "hgrn2": "HGRN2", "delta_net": "DeltaNet", "gated_deltanet": "GatedDeltaNet",
    "kda": "KDA",
}  # fmt: skip
"""How the architectures are called in a checkpoint's config.json."""


class FlaConfig(PreTrainedConfig):
    """A configuration of fla; fields by the family's own names, unknown ones are kept and written back."""

    family = ""

    def __post_init__(self, **fields: Any) -> None:
        super().__post_init__(**fields)
        if self.attnres_block_size is not None or self.hidden_act != "swish" or not self.elementwise_affine:
            raise InputError(
                f"this {self.family} checkpoint has attnres_block_size={self.attnres_block_size}, hidden_act="
                f"{self.hidden_act!r}, elementwise_affine={self.elementwise_affine}; only None, 'swish', True are read"
            )

    @property
    def lineament(self) -> dict[str, Any]:
        """All layers keep their own state; not part of the saved config."""
        every = {str(i): {} for i in range(self.num_hidden_layers)}
        return {"format": FORMAT, "layers": every, "slots": every}

    def softmax(self, layer: int) -> dict[str, Any] | None:
        """Return the attention that a hybrid's layer has, or None."""
        given = [self.attn] if isinstance(self.attn, dict) else self.attn or []
        return next((spec for spec in given if layer in spec["layers"]), None)


class FlaBlock(GradientCheckpointingLayer):
    """`x + attn(norm(x))`, then `x + mlp(norm(x))`, under fla's names."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        D, softmax = config.hidden_size, config.softmax(layer)
        inner = config.intermediate_size or 256 * (-(-int(D * (config.hidden_ratio or 4) * 2 / 3) // 256))
        self.attn_norm, self.mlp_norm = nn.RMSNorm(D, config.norm_eps), nn.RMSNorm(D, config.norm_eps)
        self.attn = FLA[config.family][0](config, layer) if softmax is None else Softmax(config, softmax)
        self.mlp = MLP(D, inner, "swiglu")

    def forward(self, x: Tensor, memory: Any = None, rows: Rows | None = None) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        y = self.attn_norm(x)
        x = x + (self.attn(y, rows=rows) if memory is None else memory.advance(self.attn, y, rows=rows))
        return x + self.mlp(self.mlp_norm(x))


class FlaModel(DecoderModel):
    """Embedding, blocks and the last norm under fla's names."""

    _no_split_modules = ["FlaBlock"]  # noqa: RUF012 (transformers reads it so)
    _input_embed_layer = "embeddings"

    def __init__(self, config: Any) -> None:
        StatefulModel.__init__(self, config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(FlaBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        if getattr(config, "use_lower_bound", False):
            self.lower_bounds = nn.Parameter(torch.zeros(config.num_hidden_layers, config.hidden_size))
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def embed_tokens(self) -> nn.Module:
        return self.embeddings

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See `DecoderModel.forward`."""
        if hasattr(self, "lower_bounds"):
            share = self.lower_bounds.float().softmax(0)
            for bound, block in zip(share.cumsum(0) - share[0], self.layers, strict=True):
                block.attn.lower_bound = bound
        return super().forward(*args, **kwargs)


class FlaForCausalLM(DecoderForCausalLM):
    """A decoder of fla's with its language-model head."""

    _no_split_modules = ["FlaBlock"]  # noqa: RUF012 (transformers reads it so)
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012 (transformers reads it so)
    _input_embed_layer = "embeddings"

    def __init__(self, config: Any) -> None:
        StatefulModel.__init__(self, config)
        self.model = FlaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


@cache
def fla_classes(model_type: str) -> tuple[type, type, type]:
    """Return the config, decoder and language-model classes of a family."""
    name = NAMES[model_type]
    here = {"__module__": __name__}
    fields = {**SHARED, **FLA[model_type][1]}
    body = {**here, **fields, "__annotations__": dict.fromkeys(fields, Any)}  # transformers makes a dataclass of it
    config = type(f"{name}Config", (FlaConfig,), {**body, "model_type": model_type, "family": model_type})
    base = type(f"{name}Model", (FlaModel,), {**here, "config_class": config})
    head = type(f"{name}ForCausalLM", (FlaForCausalLM,), {**here, "config_class": config})
    globals().update({cls.__name__: cls for cls in (config, base, head)})
    return config, base, head


def register_fla() -> None:
    """Register the families that transformers (or an imported fla) does not know."""
    for model_type in FLA:
        if model_type not in CONFIG_MAPPING:
            config, base, head = fla_classes(model_type)
            AutoConfig.register(model_type, config)
            AutoModel.register(config, base)
            AutoModelForCausalLM.register(config, head)
