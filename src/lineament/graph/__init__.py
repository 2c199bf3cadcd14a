"""Any model's inside, by one `Where`: select, swap, capture, patch, and run it layer by layer.

`trace(model, ...)` is its forward pass as one graph of ATen operators, `axes(model, ...)` the identity of every axis in
it, `diagram(model, ...)` what is done to them, drawn and runnable. `residual_stream` and the measures on it say what
each layer of a decoder writes, and what comes of it. In a block `InDouble()` a model computes in float64 throughout.
"""

from lineament.graph.axes import Axes, AxisClass, Cut, Leaf, Tree, axes
from lineament.graph.capture import Captured, Patch, capture, patch
from lineament.graph.diagrams import Diagram, Term, diagram
from lineament.graph.double import InDouble
from lineament.graph.residual import (
    LinearMaps,
    SkipEffects,
    Stream,
    contributions,
    depth_score,
    direct_effects,
    effective_depth,
    linear_maps,
    logit_lens,
    residual_stream,
    skip_effects,
    transition_layer,
)
from lineament.graph.stream import Batch, hidden_of, logits_in, output_from, run_from, stream
from lineament.graph.surgery import swap, swapped, tied
from lineament.graph.trace import Traced, trace
from lineament.graph.where import Where, outline, select

__all__ = [
    "Axes",
    "AxisClass",
    "Batch",
    "Captured",
    "Cut",
    "Diagram",
    "InDouble",
    "Leaf",
    "LinearMaps",
    "Patch",
    "SkipEffects",
    "Stream",
    "Term",
    "Traced",
    "Tree",
    "Where",
    "axes",
    "capture",
    "contributions",
    "depth_score",
    "diagram",
    "direct_effects",
    "effective_depth",
    "hidden_of",
    "linear_maps",
    "logit_lens",
    "logits_in",
    "outline",
    "output_from",
    "patch",
    "residual_stream",
    "run_from",
    "select",
    "skip_effects",
    "stream",
    "swap",
    "swapped",
    "tied",
    "trace",
    "transition_layer",
]
