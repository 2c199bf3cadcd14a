"""Explain a model: where an output comes from, by relevance on the operators of its autograd graph.

- `relevance(model, inputs, *, target, rules, at, baseline) -> Relevance`: of inputs, of modules, with a ledger.
- `paths(model, inputs, *, target, rules, sites, by, top, beam) -> Paths`: the chains of heads, MLPs, positions or
  channels through which most of it flows; `PathsReading` draws them.
- `Rules`, `RULES`: rule sets as values and by name; `Epsilon`, `Gamma`, `AlphaBeta`, `ZPlus`, `ZBox`, `Flat`, `WSquare`
  are rules of linear maps. `METHODS`: integrated gradients, SmoothGrad, occlusion, rollout.
- `effects(model, clean, corrupt, metric, sites, *, method, by) -> Effects`: activation and path patching, ablations,
  estimates (attribution patching, RelP, integrated gradients), of components, positions, heads, neurons, edges, paths.
  `agreement` compares estimates with patching; `LogitDifference` is the usual metric.
- `circuit(model, clean, corrupt, metric, *, level, method) -> Circuit`: the edges or nodes that do a task, with curves
  of faithfulness and completeness; `evaluate_circuit` measures one on other prompts.
- `scope(model, x) -> Scope`: the affine map f(x) = A x + r the model is for one input, to be run, transposed, read.
- `depth(model, texts) -> Depth`: what each layer writes, changes and knows; `layer_maps`: maps between two models.
- `direct_logits` (what each node writes into the answer), `patterns` (who attends to whom), `steering_vector` and
  `steered` (a direction added while a model runs).
- `align(model, layer, algorithm, examples, unseen) -> Alignment`: does a layer hold an algorithm's variables?
  `complexity`: the same with growing maps beside an untrained copy; `interchange`: the intervention itself.
- `energy(w, pairs, labels)`, `ascend(group)`, `ridge_gradient`: what features climb when a net learns a group's table;
  `Stages(group)` watches `tasks.grok`, `stages_png` draws it.
- `blind_spots(classifier, sources, targets) -> BlindSpots`: other images of equal confidence; `path`, `triangle`.
- `Dictionary`: transcoders and sparse autoencoders. `.load(folder)`, `.save(folder)` in SAELens's layout;
  `cache_activations`, `train_dictionary`, `evaluate_dictionaries` (beside `best_affine`); `placed(model, dictionary)`
  finds where it belongs, `substituted` runs the model on it. `dashboard`, `de_embedding`, `direct_tokens` and
  `connections` read its features; `attribute` and `into_feature` trace an answer through them,
  `feature_circuit` finds those that do a task.
- `coverage(model, inputs)`: operator x count x rule.
- `infidelity`, `sensitivity`, `flipping` (`flip_curves` by row), `abpc`: how good an explanation is.
"""

from lineament.explain.align import AlignConfig, Alignment, align
from lineament.explain.blindspots import (
    BlindSpots,
    blind_spots,
    confidence_path,
    confidence_triangle,
    ssim,
    straight_line,
)
from lineament.explain.circuit import Circuit, circuit, evaluate_circuit
from lineament.explain.complexity import Complexity, complexity, untrained_copy
from lineament.explain.coverage import coverage
from lineament.explain.depth import Depth, depth, layer_maps
from lineament.explain.dictionaries import (
    Activations,
    AttributionGraph,
    Dashboard,
    Dictionary,
    DictionaryConfig,
    DictionaryScore,
    DictionaryTraining,
    Placed,
    attribute,
    best_affine,
    cache_activations,
    connections,
    dashboard,
    de_embedding,
    direct_tokens,
    evaluate_dictionaries,
    feature_circuit,
    feature_picture,
    into_feature,
    placed,
    substituted,
    train_dictionary,
)
from lineament.explain.direct import direct_logits
from lineament.explain.effects import Effects, agreement, effects
from lineament.explain.energy import ascend, energy, energy_gradient, feature_gradient, ridge_gradient, ridge_top
from lineament.explain.interchange import interchange
from lineament.explain.ledger import COLUMNS, Ledger
from lineament.explain.linear import AlphaBeta, Dynamic, Epsilon, Flat, Gamma, Linear, WSquare, ZBox, ZPlus
from lineament.explain.methods import METHODS, DeepLift, IntegratedGradients, Occlusion, Rollout, SmoothGrad
from lineament.explain.metrics import LogitDifference
from lineament.explain.operators import OPERATORS
from lineament.explain.paths import PathNode, Paths, RelevancePath, paths
from lineament.explain.paths_reading import PathsReading
from lineament.explain.patterns import Patterns, patterns
from lineament.explain.quality import abpc, flip_curves, flipping, infidelity, sensitivity
from lineament.explain.relevance import Relevance, relevance
from lineament.explain.rules import RULES, Rules
from lineament.explain.scope import Scope, anisotropy, scope
from lineament.explain.stages import Stages, readout, stages_png
from lineament.explain.steering import steered, steering_vector

__all__ = [
    "COLUMNS",
    "METHODS",
    "OPERATORS",
    "RULES",
    "Activations",
    "AlignConfig",
    "Alignment",
    "AlphaBeta",
    "AttributionGraph",
    "BlindSpots",
    "Circuit",
    "Complexity",
    "Dashboard",
    "DeepLift",
    "Depth",
    "Dictionary",
    "DictionaryConfig",
    "DictionaryScore",
    "DictionaryTraining",
    "Dynamic",
    "Effects",
    "Epsilon",
    "Flat",
    "Gamma",
    "IntegratedGradients",
    "Ledger",
    "Linear",
    "LogitDifference",
    "Occlusion",
    "PathNode",
    "Paths",
    "PathsReading",
    "Patterns",
    "Placed",
    "Relevance",
    "RelevancePath",
    "Rollout",
    "Rules",
    "Scope",
    "SmoothGrad",
    "Stages",
    "WSquare",
    "ZBox",
    "ZPlus",
    "abpc",
    "agreement",
    "align",
    "anisotropy",
    "ascend",
    "attribute",
    "best_affine",
    "blind_spots",
    "cache_activations",
    "circuit",
    "complexity",
    "confidence_path",
    "confidence_triangle",
    "connections",
    "coverage",
    "dashboard",
    "de_embedding",
    "depth",
    "direct_logits",
    "direct_tokens",
    "effects",
    "energy",
    "energy_gradient",
    "evaluate_circuit",
    "evaluate_dictionaries",
    "feature_circuit",
    "feature_gradient",
    "feature_picture",
    "flip_curves",
    "flipping",
    "infidelity",
    "interchange",
    "into_feature",
    "layer_maps",
    "paths",
    "patterns",
    "placed",
    "readout",
    "relevance",
    "ridge_gradient",
    "ridge_top",
    "scope",
    "sensitivity",
    "ssim",
    "stages_png",
    "steered",
    "steering_vector",
    "straight_line",
    "substituted",
    "train_dictionary",
    "untrained_copy",
]
