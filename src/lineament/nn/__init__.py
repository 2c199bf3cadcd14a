"""Layers, one file per idea.

- `MixerConfig`, `build(config) -> ConvertedHeads`, `BUILDERS`: head mixers (`HeadMixer`): they take a layer's q, k, v
  and mix over the tokens; `ConvertedHeads` adds heads that stay softmax, padding and packing.
- `Mixer(config, Slots(...))`: a whole layer from scratch around a head mixer; `MixerCache` is what it keeps.
- `published(name, ...) -> (config, slots)`, `LAYERS`: publications as such values, on the kinds of `PUBLISHED` and
  `BUILDERS`. `share_lower_bounds_` ties the gates of a model's HGRN layers. `global_field`, `cosines`: LightNet on
  grids, `Field` its layer there; `Scanned`: a causal layer over a grid in several scans; `ToeplitzEncoding`: positions
  by exponentials along every axis.
- `FEATURE_MAPS`: phi of linear attention.
- `Rows`: padding and packing of a block. `KeyValues`, `causal_softmax`: ordinary attention over a growing buffer.
- `SubsampledAttention(width, heads, Subsampling(...))`: self-attention over a random part of the sources in training.
- `TensorAttention(width, heads)`: self-attention over pairs of keys, exact, windowed or near-linear.
- `HyperBlock(channels, factor, HyperConfig(size=...))`: maps mixed by generated kernels (`HyperKernel`,
  `LocalKernel`) as large as the image. `GroupedStandardization`, `ByBatch`, `by_sample`: nothing learned in them.
- `ResidualMLP(config)`, `matched(shape, ..., budget)`: residual MLPs with a narrow or a wide skip, of equal parameters.
- `Residual`, `SideBySide`, `Through`, `fuse`: residual layers next to each other, and those as one wide layer.
- `Rotation`, `InvertibleLinear`, `Reversible`, `Reordered`, `BIJECTIONS`: maps that can be undone.
- `Experts(ExpertsConfig(...))`, `Router`: a feed-forward layer's own units in groups, of which some work on a token.
  `SelectiveMLP(SelectiveConfig(...))`: a gated one that reads only the neurons its gate lets speak.
- `MaskedLinear(group_mask(...))`, `MaskedConv2d`: sparse layers of groups; `PackedLinear` runs them as tiles; `with
  rewired(model, Rewiring(...))` moves their edges in training.
- `projection_head(kind, width)`, `HEADS`, `ReweightingHead`: what stands between an encoder and a contrastive loss.
- `quiet_log_scale`: where a far part starts unheard.
"""

from lineament.nn.additive import CountedState, Lightning, LinearHeads
from lineament.nn.bijections import BIJECTIONS, InvertibleLinear, Reordered, Reversible, Rotation
from lineament.nn.build import BUILDERS, PUBLISHED, build
from lineament.nn.config import MixerConfig
from lineament.nn.decays import share_lower_bounds_
from lineament.nn.delta import DeltaHeads, DeltaState
from lineament.nn.experts import Experts, ExpertsConfig, Router
from lineament.nn.feature_maps import FEATURE_MAPS
from lineament.nn.grids import Field, Scanned, coordinates
from lineament.nn.heads import ConvertedHeads, HeadMixer, LayerState, check_heads_input
from lineament.nn.hyper_kernel import HyperKernel, LocalKernel
from lineament.nn.hyperzzw import HyperBlock, HyperConfig
from lineament.nn.layers import LAYERS, published
from lineament.nn.lightnet import cosines, global_field
from lineament.nn.masked import GroupMask, MaskedConv2d, MaskedLinear, PackedLinear, between_for, group_mask
from lineament.nn.mixer import Mixer, MixerCache, Slots
from lineament.nn.projection import HEADS, ReweightingHead, projection_head
from lineament.nn.residual import Fused, Residual, SideBySide, Through, fuse
from lineament.nn.residual_mlp import ResidualMLP, ResidualMLPConfig, hadamard, matched
from lineament.nn.rewiring import GROWTHS, Rewiring, rewired
from lineament.nn.rows import Rows
from lineament.nn.selective import SelectiveConfig, SelectiveMLP
from lineament.nn.short_conv import ShortConv
from lineament.nn.softmax import KeyValues, causal_softmax
from lineament.nn.standardization import ByBatch, GroupedStandardization, by_sample
from lineament.nn.subsampled import SubsampledAttention, Subsampling
from lineament.nn.tensor_attention import TensorAttention
from lineament.nn.toeplitz import ToeplitzEncoding
from lineament.nn.two_layer import ACTIVATIONS, TwoLayer
from lineament.nn.windowed import HedgehogWindow, Lolcats, SoftmaxWindow, quiet_log_scale

__all__ = [
    "ACTIVATIONS",
    "BIJECTIONS",
    "BUILDERS",
    "FEATURE_MAPS",
    "GROWTHS",
    "HEADS",
    "LAYERS",
    "PUBLISHED",
    "ByBatch",
    "ConvertedHeads",
    "CountedState",
    "DeltaHeads",
    "DeltaState",
    "Experts",
    "ExpertsConfig",
    "Field",
    "Fused",
    "GroupMask",
    "GroupedStandardization",
    "HeadMixer",
    "HedgehogWindow",
    "HyperBlock",
    "HyperConfig",
    "HyperKernel",
    "InvertibleLinear",
    "KeyValues",
    "LayerState",
    "Lightning",
    "LinearHeads",
    "LocalKernel",
    "Lolcats",
    "MaskedConv2d",
    "MaskedLinear",
    "Mixer",
    "MixerCache",
    "MixerConfig",
    "PackedLinear",
    "Reordered",
    "Residual",
    "ResidualMLP",
    "ResidualMLPConfig",
    "Reversible",
    "ReweightingHead",
    "Rewiring",
    "Rotation",
    "Router",
    "Rows",
    "Scanned",
    "SelectiveConfig",
    "SelectiveMLP",
    "ShortConv",
    "SideBySide",
    "Slots",
    "SoftmaxWindow",
    "SubsampledAttention",
    "Subsampling",
    "TensorAttention",
    "Through",
    "ToeplitzEncoding",
    "TwoLayer",
    "between_for",
    "build",
    "by_sample",
    "causal_softmax",
    "check_heads_input",
    "coordinates",
    "cosines",
    "fuse",
    "global_field",
    "group_mask",
    "hadamard",
    "matched",
    "projection_head",
    "published",
    "quiet_log_scale",
    "rewired",
    "share_lower_bounds_",
]
