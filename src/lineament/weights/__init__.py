"""Models as points in weight space: arithmetic, merging.

- `Point.open(model)`: a folder, Hub name, "smollm2", GGUF or safetensors file, module, state dict or LoRA adapter.
  `a + 0.5 * (b - a)`, `a.scale({"*.mlp.*": 0.3, "*": 1})`, `dot`, `norm`, `angle`, `interpolate`, `slerp`; nothing is
  read before a tensor is asked for. `point.save(folder)` writes a model that transformers opens.
- `merge(points, method, base=..., **options) -> Point`: every row of `METHODS`; `fisher` and `grams` measure what the
  merges of those names need.
"""

from lineament.weights.merge import merge
from lineament.weights.methods import METHODS, Method
from lineament.weights.point import Point, Source, Spec
from lineament.weights.statistics import fisher, grams

__all__ = ["METHODS", "Method", "Point", "Source", "Spec", "fisher", "grams", "merge"]
