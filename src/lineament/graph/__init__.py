"""Any model's inside, by one `Where`: select, swap, capture, patch, and run it layer by layer.

`trace(model, ...)` is its forward pass as one graph of ATen operators, `axes(model, ...)` the identity of every axis in
it.
"""

from lineament.graph.axes import Axes, AxisClass, Cut, Leaf, Tree, axes
from lineament.graph.capture import Captured, Patch, capture, patch
from lineament.graph.stream import Batch, hidden_of, output_from, run_from, stream
from lineament.graph.surgery import swap, swapped, tied
from lineament.graph.trace import Traced, trace
from lineament.graph.where import Where, outline, select

__all__ = [
    "Axes",
    "AxisClass",
    "Batch",
    "Captured",
    "Cut",
    "Leaf",
    "Patch",
    "Traced",
    "Tree",
    "Where",
    "axes",
    "capture",
    "hidden_of",
    "outline",
    "output_from",
    "patch",
    "run_from",
    "select",
    "stream",
    "swap",
    "swapped",
    "tied",
    "trace",
]
