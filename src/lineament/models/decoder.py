"""One decoder for every causal mixer, from scratch; an ordinary transformers model ("lineament-decoder").

A block is a mixing layer (`nn.Mixer`: a head mixer by name, and what stands around it) and an MLP. Softmax layers are
the same block with every head full. What fills the blocks is the config's `lineament` field, one entry per layer;
`families.decoder_config` writes it from a family's name and a ratio.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from lineament._base.errors import InputError, unknown
from lineament.models.attention import prepared
from lineament.models.student import FORMAT, StatefulModel, mixer_configs
from lineament.nn import Mixer, MixerConfig, Rows, Slots, share_lower_bounds_
from lineament.nn.mlp import MLP, MLPS

MODEL_TYPE = "lineament-decoder"
NORMS = {
    "rms": lambda width, eps: nn.RMSNorm(width, eps=eps),
    "simple-rms": lambda width, eps: nn.RMSNorm(width, eps=eps, elementwise_affine=False),
    "layer": lambda width, eps: nn.LayerNorm(width, eps=eps),
}


class DecoderConfig(PreTrainedConfig):
    """The shape of a decoder.

    Attributes:
        vocab_size, hidden_size, num_hidden_layers: as ever.
        intermediate_size: width of the MLP; 0 for blocks that are a mixer alone (Mamba-2).
        lineament: {"format", "layers": {"0": MixerConfig as JSON}, "slots": {"0": Slots as JSON}}.
        mlp: a key of `nn.mlp.MLPS`. norm: "rms", "simple-rms" (no weight) or "layer".
        post_norm: normalise what a branch adds (x + norm(f(x))) instead of what it reads (x + f(norm(x))).
        initializer_range: of all matrices; None for sqrt(2 / 5D).
        tie_word_embeddings: the output matrix is the embedding.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers reads it so)

    vocab_size: int = 256
    hidden_size: int = 64
    num_hidden_layers: int = 2
    intermediate_size: int = 256
    lineament: dict | None = None
    mlp: str = "swiglu"
    norm: str = "rms"
    norm_eps: float = 1e-6
    post_norm: bool = False
    initializer_range: float | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True


def slots_from_json(data: Mapping[str, Any]) -> Slots:
    """Build a layer's slots from JSON values; an unknown field is named with its near miss."""
    names = [f.name for f in fields(Slots)]
    for name in data:
        if name not in names:
            raise unknown("slot of a layer", name, names)
    return Slots(**data)


def fill(config: DecoderConfig, layers: Sequence[tuple[MixerConfig, Slots]]) -> DecoderConfig:
    """Write every layer's mixer and slots into a config, in place, and return it."""
    config.num_hidden_layers = len(layers)
    config.lineament = {
        "format": FORMAT,
        "layers": {str(i): mixer.to_json() for i, (mixer, _) in enumerate(layers)},
        "slots": {str(i): asdict(slots) for i, (_, slots) in enumerate(layers)},
    }
    return config


def filling(config: DecoderConfig) -> list[tuple[MixerConfig, Slots]]:
    """Return every layer's mixer and slots.

    Raises:
        InputError: a layer is missing or surplus, its width is not the model's, or a field is unknown.
    """
    if not config.lineament:
        raise InputError("this config says nothing of its layers; make one with lineament.models.decoder_config")
    mixers, slots = mixer_configs(config), config.lineament.get("slots", {})
    expected = list(range(config.num_hidden_layers))
    if sorted(mixers) != expected or sorted(int(i) for i in slots) != expected:
        raise InputError(
            f"the config has {config.num_hidden_layers} layers, but mixers for {sorted(mixers)} and slots for "
            f"{sorted(int(i) for i in slots)}; every layer needs both"
        )
    for i, mixer in mixers.items():
        if mixer.model_width != config.hidden_size:
            raise InputError(f"layer {i} is made for width {mixer.model_width}, the model has {config.hidden_size}")
    return [(mixers[i], slots_from_json(slots[str(i)])) for i in expected]


class DecoderBlock(GradientCheckpointingLayer):
    """`x + f(norm(x))` (or `x + norm(f(x))`) for the mixing layer and then for the MLP, if there is one."""

    def __init__(self, config: DecoderConfig, mixer: MixerConfig, slots: Slots) -> None:
        super().__init__()
        norm = NORMS[config.norm]
        self.post_norm = config.post_norm
        self.mixer_norm = norm(config.hidden_size, config.norm_eps)
        self.mixer = Mixer(mixer, slots)
        self.mlp_norm = norm(config.hidden_size, config.norm_eps) if config.intermediate_size else None
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.mlp) if config.intermediate_size else None

    def forward(self, x: Tensor, memory: Any = None, rows: Rows | None = None) -> Tensor:
        """Map [B, T, D] to [B, T, D]; `memory` is the layer's place in the cache."""
        y = x if self.post_norm else self.mixer_norm(x)
        y = self.mixer(y, rows=rows) if memory is None else memory.advance(self.mixer, y, rows=rows)
        x = x + (self.mixer_norm(y) if self.post_norm else y)
        if self.mlp is None or self.mlp_norm is None:
            return x
        return x + (self.mlp_norm(self.mlp(x)) if self.post_norm else self.mlp(self.mlp_norm(x)))


class DecoderPreTrainedModel(StatefulModel):
    """Loading, saving and initial weights."""

    config_class = DecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderBlock"]  # noqa: RUF012 (transformers reads it so)
    _can_record_outputs = None

    def __init__(self, config: DecoderConfig, *args: Any, **kwargs: Any) -> None:
        for kind, value, known in (("norm", config.norm, NORMS), ("mlp", config.mlp, MLPS)):
            if value not in known:
                raise unknown(kind, value, known)
        super().__init__(config, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            std = self.config.initializer_range or (2 / (5 * self.config.hidden_size)) ** 0.5
            _normal_(module.weight, std)
            if getattr(module, "bias", None) is not None:
                _normal_(module.bias, 0.0)  # type: ignore[arg-type]
        elif hasattr(module, "reset_parameters") or not type(module).__module__.startswith("lineament.nn"):
            super()._init_weights(module)


def _normal_(x: Tensor, std: float) -> None:
    if not getattr(x, "_is_hf_initialized", False):
        nn.init.normal_(x, std=std)


class DecoderModel(DecoderPreTrainedModel):
    """Embedding, blocks and the last norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderBlock(config, *layer) for layer in filling(config))
        if share_lower_bounds_(self):  # accelerate reads FSDP's units here: the table is gathered for every block
            self._no_split_modules = [*(self._no_split_modules or ()), "LowerBounds"]
        self.norm = NORMS[config.norm](config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Run the blocks.

        Args:
            input_ids: [B, T], or inputs_embeds: [B, T, D].
            attention_mask: [B, past + T], zero for padding (left or right).
            position_ids: [B, T]; where they restart, another document begins. Positions themselves are counted.
            past_key_values: a `StudentCache`, or an empty `DynamicCache`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give input_ids or inputs_embeds, one of them")
        call = prepared(self, {
            "input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask,
            "position_ids": position_ids, "past_key_values": past_key_values, "use_cache": use_cache,
        })  # fmt: skip
        cache, rows = call["past_key_values"], call["lineament_rows"]
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        seen = []
        for i, block in enumerate(self.layers):
            if wanted:
                seen.append(x)
            x = block(x, None if cache is None else cache.layers[i], rows)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,  # type: ignore[arg-type]
            past_key_values=cache,
            hidden_states=(*seen, x) if wanted else None,  # type: ignore[arg-type]
        )


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    """A decoder with a language-model head.

    Example:
        >>> import torch
        >>> from lineament.models import decoder_config
        >>> model = DecoderForCausalLM(decoder_config("lightning", ratio="1:1", vocab_size=32, width=16, layers=2))
        >>> model.generate(torch.zeros(1, 3, dtype=torch.long), max_new_tokens=2, do_sample=False).shape
        torch.Size([1, 5])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers reads it so)

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = DecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """See `DecoderModel.forward`; `labels` [B, T] (-100 for none) gives the mean loss in nats per token."""
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, return_dict=True,
            **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else kept
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **_counts(kwargs))
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )


def _counts(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}


def register_decoder() -> None:
    """Let transformers' Auto classes load decoders."""
    AutoConfig.register(MODEL_TYPE, DecoderConfig, exist_ok=True)
    AutoModel.register(DecoderConfig, DecoderModel, exist_ok=True)
    AutoModelForCausalLM.register(DecoderConfig, DecoderForCausalLM, exist_ok=True)
