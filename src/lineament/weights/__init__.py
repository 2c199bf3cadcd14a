"""Models as points in weight space: arithmetic, symmetry and matching, merging.

- `Point.open(model)`: a folder, Hub name, "smollm2", GGUF or safetensors file, module, state dict or LoRA adapter.
  `a + 0.5 * (b - a)`, `a.scale({"*.mlp.*": 0.3, "*": 1})`, `dot`, `norm`, `angle`, `interpolate`, `slerp`; nothing is
  read before a tensor is asked for. `point.save(folder)` writes a model that transformers opens.
- `merge(points, method, base=..., **options) -> Point`: every row of `METHODS`; `fisher` and `grams` measure what the
  merges of those names need.
- `symmetry(model, *args, **kwargs) -> Symmetry`: the permutations that leave a model's function alone, derived from its
  graph and checked; `match(points, symmetry) -> list[Element]` brings models onto each other.
"""

from lineament.weights.elements import Element
from lineament.weights.match import match
from lineament.weights.merge import merge
from lineament.weights.methods import METHODS, Method
from lineament.weights.point import Point, Source, Spec
from lineament.weights.statistics import fisher, grams
from lineament.weights.symmetry import Symmetry, SymmetryError, symmetry

__all__ = [
    "METHODS",
    "Element",
    "Method",
    "Point",
    "Source",
    "Spec",
    "Symmetry",
    "SymmetryError",
    "fisher",
    "grams",
    "match",
    "merge",
    "symmetry",
]
