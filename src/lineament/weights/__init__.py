"""Models as points in weight space.

- `Point.open(model)`: a folder, Hub name, "smollm2", GGUF or safetensors file, module, state dict or LoRA adapter.
  `a + 0.5 * (b - a)`, `a.scale({"*.mlp.*": 0.3, "*": 1})`, `dot`, `norm`, `angle`, `interpolate`, `slerp`; nothing is
  read before a tensor is asked for. `point.save(folder)` writes a model that transformers opens.
"""

from lineament.weights.point import Point, Source, Spec

__all__ = ["Point", "Source", "Spec"]
