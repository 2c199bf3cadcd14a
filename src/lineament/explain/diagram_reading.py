"""A diagram of a model by name: loaded, called on an example, checked if asked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.text import Text

from lineament._base.seeds import generator
from lineament.explain.reading import classifier_of
from lineament.graph.diagrams import Diagram, diagram
from lineament.io import read_json
from lineament.models.load import find_model, load_model


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A diagram and what was measured of it.

    Attributes:
        model: as it was named. diagram: what was found. fold: whether blocks are drawn once.
        error: largest difference between term and model as a share of the largest output; None if not asked.
    """

    model: str
    diagram: Diagram
    fold: bool = True
    error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the term and the numbers, for `json.dumps`."""
        return {"model": self.model, "error": self.error, **self.diagram.to_json()}

    def tables(self) -> list[Any]:
        """Return the text form, and how far term and model are apart."""
        checked = [] if self.error is None else [f"executed term beside the model, float64: {self.error:.1e}"]
        return [Text(self.diagram.text(fold=self.fold)), *checked]


def read_diagram(model: str, *, tokens: int = 13, size: int = 64, fold: bool = True, check: bool = False) -> Drawn:
    """Draw a language model, or an image classifier, by name.

    Args:
        model: a folder, a Hub name, a GGUF file or smollm2. tokens: of the example text. size: of the example picture,
            in pixels, where the model's config names none. fold: draw repeated blocks once.
        check: run the term and the model on random input in float64.

    Raises:
        InputError: no such model, or one that can't be traced.
    """
    net, call = _loaded(model, tokens, size)
    found = diagram(net, **call)
    return Drawn(model=model, diagram=found, fold=fold, error=found.error(**call) if check else None)


def _loaded(name: str, tokens: int, size: int) -> tuple[Any, Mapping[str, Any]]:
    folder = find_model(name)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if any("ImageClassification" in each for each in config.get("architectures") or ()):
        picture = classifier_of(folder)
        side, channels = config.get("image_size", size), config.get("num_channels", 3)
        return picture, {"pixel_values": torch.randn(1, channels, side, side, generator=generator(0))}
    net: Any = load_model(name)
    ids = torch.randint(0, int(net.config.vocab_size), (1, tokens), generator=generator(0))
    return net, {"input_ids": ids, "use_cache": False}
