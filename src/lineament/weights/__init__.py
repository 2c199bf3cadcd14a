"""Models as points in weight space: arithmetic, symmetry and matching, merging.

- `Point.open(model)`: a folder, Hub name, "smollm2", GGUF or safetensors file, module, state dict or LoRA adapter.
  `a + 0.5 * (b - a)`, `a.scale({"*.mlp.*": 0.3, "*": 1})`, `dot`, `norm`, `angle`, `interpolate`, `slerp`; nothing is
  read before a tensor is asked for. `point.save(folder)` writes a model that transformers opens.
- `merge(points, method, base=..., **options) -> Point`: every row of `METHODS`; `fisher` and `grams` measure what the
  merges of those names need.
- `symmetry(model, *args, **kwargs) -> Symmetry`: the permutations that leave a model's function alone, derived from its
  graph and checked; `match(points, symmetry) -> list[Element]` brings models onto each other; `continuous` finds
  scalings, signs and rotations. `repair` and `reset_batch_norm` mend a merged net's statistics; `alignment` compares
  singular vectors.
- `path(model, a, b, batches) -> Path` (`.barrier`); `bent` trains a curve; `layerwise`, `second_order`, `plane`,
  `fork` and `geometry` look at the landscape around it. `trained` and `compared`: classifiers trained
  apart, and their line in four arms.
- `FastSlow(model, LoraConfig(...))`: a fast and a slow adapter; `continual(learner, lessons, config, score) -> Stream`
  teaches tasks one after another, with replay from a `Reservoir`; `line` looks between two adapters.
- `side_by_side(model, layers, groups)`: modules that let layers of a stack run next to each other, for `graph.swap`;
  `orders(layers, x)` and `decoder_orders` say what that drops, `parallel_bound` and `parallel_error` how much it is.
- `neurons` (module): how much each neuron of a feed-forward layer says, sparsity curves, functionality scores.
  `experts`: such layers cut into experts with a router, or reading only the neurons that speak. `Bricks`, `Brick`:
  parts of models under one record, with the verbs route, merge, update, grow.
"""

from lineament.weights.alignment import Alignment, alignment
from lineament.weights.bricks import Brick, Bricks, bricks_of, rank_one_edit, with_expert
from lineament.weights.continual import (
    CONTINUAL,
    Lesson,
    Stream,
    average,
    backward_transfer,
    continual,
    forgetting,
)
from lineament.weights.continuous import Family, continuous
from lineament.weights.elements import Element
from lineament.weights.evaluate import prediction_loss, score
from lineament.weights.fast_slow import ADAPTERS, FastSlow, Reservoir, line, replay_loss
from lineament.weights.landscape import (
    Fork,
    Geometry,
    Plane,
    SecondOrder,
    fork,
    geometry,
    layerwise,
    module_of,
    plane,
    second_order,
)
from lineament.weights.match import match
from lineament.weights.merge import merge
from lineament.weights.methods import METHODS, Method
from lineament.weights.pairs import ARMS, Compared, classifiers, compared, images_in_batches, trained
from lineament.weights.path import Path, bent, path
from lineament.weights.point import Point, Source, Spec
from lineament.weights.repair import repair, reset_batch_norm
from lineament.weights.shallow import (
    Orders,
    decoder_orders,
    groups_of,
    orders,
    over_determination,
    parallel_bound,
    parallel_error,
    side_by_side,
)
from lineament.weights.statistics import fisher, grams
from lineament.weights.straight_through import straight_through
from lineament.weights.symmetry import Symmetry, SymmetryError, symmetry

__all__ = [
    "ADAPTERS",
    "ARMS",
    "CONTINUAL",
    "METHODS",
    "Alignment",
    "Brick",
    "Bricks",
    "Compared",
    "Element",
    "Family",
    "FastSlow",
    "Fork",
    "Geometry",
    "Lesson",
    "Method",
    "Orders",
    "Path",
    "Plane",
    "Point",
    "Reservoir",
    "SecondOrder",
    "Source",
    "Spec",
    "Stream",
    "Symmetry",
    "SymmetryError",
    "alignment",
    "average",
    "backward_transfer",
    "bent",
    "bricks_of",
    "classifiers",
    "compared",
    "continual",
    "continuous",
    "decoder_orders",
    "fisher",
    "forgetting",
    "fork",
    "geometry",
    "grams",
    "groups_of",
    "images_in_batches",
    "layerwise",
    "line",
    "match",
    "merge",
    "module_of",
    "orders",
    "over_determination",
    "parallel_bound",
    "parallel_error",
    "path",
    "plane",
    "prediction_loss",
    "rank_one_edit",
    "repair",
    "replay_loss",
    "reset_batch_norm",
    "score",
    "second_order",
    "side_by_side",
    "straight_through",
    "symmetry",
    "trained",
    "with_expert",
]
