"""Any model's inside, by one `Where`: select, swap, capture, patch, and run it layer by layer."""

from lineament.graph.capture import Captured, Patch, capture, patch
from lineament.graph.stream import Batch, hidden_of, run_from, stream
from lineament.graph.surgery import swap, swapped, tied
from lineament.graph.where import Where, outline, select

__all__ = [
    "Batch",
    "Captured",
    "Patch",
    "Where",
    "capture",
    "hidden_of",
    "outline",
    "patch",
    "run_from",
    "select",
    "stream",
    "swap",
    "swapped",
    "tied",
]
