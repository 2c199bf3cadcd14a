"""Students made of transformers models. Importing this room registers them with transformers' Auto classes.

    import lineament.models                                            # registers "lineament-llama", ...
    model = AutoModelForCausalLM.from_pretrained("student")            # an ordinary folder; generate() as ever

- `build_student(teacher, {layer: MixerConfig}, *, share=False) -> student`: the teacher's weights with mixers in some
  layers; layers not named stay softmax, and so do `MixerConfig.full_heads` inside a converted layer. Each converted
  attention module gets a child `mixer` (`nn.ConvertedHeads`, its trainable part is `mixer.filling`).
- `head_shape(config)`: heads, key_heads, key_width, value_width, model_width for `MixerConfig(kind=..., **shape)`.
- `attentions(model) -> {layer: (name, module)}`, `mixers_of(student) -> {layer: ConvertedHeads}`,
  `mixer_configs(config) -> {layer: MixerConfig}`, `sliding_layers(config)`, `learned_positions(config)`,
  `adapter_for(model)`, `ADAPTERS`.
- `StudentCache(config)`: what students keep between calls; made by itself when needed. `.nbytes()`, `.save(path)`,
  `StudentCache.load(path, config)`, `crop(-n)` after `activate_past_recording()`, beam reorder, row select and repeat.
- `load_teacher(name) -> (model, tokenizer)`: a folder, a Hub name, a .gguf file, or "smollm2"; `find_model(name)` gives
  the folder alone (GGUF files are unpacked into the user's cache once).
- `write_text(model, prompt, ...)`: generate and say how fast and with how large a cache; `cache_nbytes(any cache)`.
- `find_device("auto")`, `find_dtype("bf16")`: where a model shall compute and in which dtype, by name.
- `build_encoder(teacher, {layer: MixerConfig})`, `encoder_mixers(student)`: BERT-type encoders, both directions linear.
- `decoder_config("gated-deltanet", ratio="3:1", ...)`, `DecoderForCausalLM(config)`: decoders from scratch around any
  mixer, hybrid by ratio or list. `FAMILIES`, `Family`: block choices by paper. `full_layers(ratio, layers)`,
  `match_parameters(config, other)`: arms of equal size; `parameters(config)`.
- `attn_implementation="subsampled"`, `with subsampled(model, Subsampling(...))`, `self_ensemble(model, ...)`: random
  parts of attention while training, dense afterwards, and averages over random sub-models.
- `prefill(model, ids) -> Prefilled(cache, logits, tokens)`: a text of any length, piece by piece.
- `speed_up_(model) -> SpedUp`: a transformers model's linear layers on our operators, in place, `.restore()`.
- `load_model(name)`: a model in its own format, every key accounted for. `FLA`: fla's families, read without fla.
- `sequence_parallel_loss(model, input_ids)`: sequences spread over ranks; `average_gradients_(model)` without DDP.
- `Terminator(TerminatorConfig(...))`, `TERMINATOR_CIFAR`: classifiers of images and sequences by hyper-kernels.
- `widen(model, groups)`: neighbouring layers as one wide layer; `with_mlps(model, {layer: Experts})`, `experts_of`,
  `set_active_`: other feed-forward layers. Ordinary folders both.
- `deep_linear(sizes)`, `dense_classifier(sizes)`, `masked_classifier(sizes, groups)`, `residual_classifier(...)`,
  `ResidualClassifier()`, `GridClassifier(mixers, width)` (patches as tokens): small nets to study.
- `tiny_teacher(model_type)`, `tiny(model_type, kind)`: random models of every family, for tests.
"""

from lineament.models.adapters import (
    ADAPTERS,
    Adapter,
    adapter_for,
    attentions,
    head_shape,
    learned_positions,
    sliding_layers,
)
from lineament.models.cache import StudentCache
from lineament.models.classifiers import (
    GridClassifier,
    ResidualClassifier,
    deep_linear,
    dense_classifier,
    masked_classifier,
    residual_classifier,
)
from lineament.models.decoder import DecoderConfig, DecoderForCausalLM, DecoderModel, register_decoder
from lineament.models.encoder import build_encoder, encoder_mixers, register_encoders
from lineament.models.families import FAMILIES, Family, decoder_config, full_layers, match_parameters, parameters
from lineament.models.fla import FLA, register_fla
from lineament.models.generate import cache_nbytes, write_text
from lineament.models.load import find_model, load_model, load_teacher
from lineament.models.parallel import average_gradients_, sequence_parallel_loss
from lineament.models.place import find_device, find_dtype
from lineament.models.prefill import Prefilled, prefill
from lineament.models.rebuilt import experts_of, register_rebuilt, set_active_, widen, with_mlps
from lineament.models.speed_up import SpedUp, speed_up_
from lineament.models.student import (
    build_student,
    config_for,
    mixer_configs,
    mixers_of,
    register,
    register_all,
    student_class,
)
from lineament.models.subsampled import self_ensemble, subsampled
from lineament.models.terminator import TERMINATOR_CIFAR, Terminator, TerminatorConfig
from lineament.models.tiny import tiny, tiny_teacher

register_all()
register_encoders()
register_decoder()
register_fla()
register_rebuilt()

__all__ = [
    "ADAPTERS",
    "FAMILIES",
    "FLA",
    "TERMINATOR_CIFAR",
    "Adapter",
    "DecoderConfig",
    "DecoderForCausalLM",
    "DecoderModel",
    "Family",
    "GridClassifier",
    "Prefilled",
    "ResidualClassifier",
    "SpedUp",
    "StudentCache",
    "Terminator",
    "TerminatorConfig",
    "adapter_for",
    "attentions",
    "average_gradients_",
    "build_encoder",
    "build_student",
    "cache_nbytes",
    "config_for",
    "decoder_config",
    "deep_linear",
    "dense_classifier",
    "encoder_mixers",
    "experts_of",
    "find_device",
    "find_dtype",
    "find_model",
    "full_layers",
    "head_shape",
    "learned_positions",
    "load_model",
    "load_teacher",
    "masked_classifier",
    "match_parameters",
    "mixer_configs",
    "mixers_of",
    "parameters",
    "prefill",
    "register",
    "register_all",
    "register_decoder",
    "register_encoders",
    "register_fla",
    "register_rebuilt",
    "residual_classifier",
    "self_ensemble",
    "sequence_parallel_loss",
    "set_active_",
    "sliding_layers",
    "speed_up_",
    "student_class",
    "subsampled",
    "tiny",
    "tiny_teacher",
    "widen",
    "with_mlps",
    "write_text",
]
