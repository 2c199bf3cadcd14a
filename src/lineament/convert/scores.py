"""Numbers measured so far, one file for each model and measure: what was cut off goes on where it was.

What is known of a teacher is known beside its next student too.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lineament import io
from lineament.convert.parts import teacher_digest

Numbers = Mapping[str, Tensor]


class Scores:
    """Measurements by name, each taken once.

    Args:
        folder: where they are kept; None forgets them with the object.
        about: JSON values, all that the numbers depend on beside their names and models. Another `about` finds nothing.

    Example:
        >>> import torch
        >>> scores = Scores(None, {})
        >>> [int(scores.once("a", lambda: {"x": torch.tensor(n)})["x"]) for n in (1, 2)]
        [1, 1]
    """

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        asked = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self.folder = None if folder is None else Path(folder) / asked[:16]
        self._held: dict[str, Numbers] = {}

    def once(self, name: str, take: Callable[[], Numbers], of: Sequence[str | None] = ()) -> Numbers:
        """Return the numbers of that name: from memory, from the folder, or taken now and kept.

        Args:
            of: digests of the models that the numbers are about.
        """
        key = " ".join([name, *map(str, of)])
        if key not in self._held:
            self._held[key] = take() if self.folder is None else _from_file(self.folder / _file(key), take)
        return self._held[key]


def _from_file(path: Path, take: Callable[[], Numbers]) -> Numbers:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        io.save_tensors({name: one.cpu().contiguous() for name, one in take().items()}, path)
    weights = io.open_weights(path)
    return {name: weights.load(name) for name in weights.names}


def _file(name: str) -> str:
    """Return a readable file name that is unique even where texts are named by long paths."""
    short = re.sub(r"[^\w.-]+", "-", name)[:40]
    return f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:12]}.safetensors"


def model_digest(model: nn.Module | None) -> str | None:
    """Return what names a model for a measurement: its weights, their dtype and the choices of its mixers."""
    if model is None:
        return None
    config: Any = model.config
    mixers = getattr(config.get_text_config(), "lineament", None)
    about = [teacher_digest(model), str(next(model.parameters()).dtype), mixers]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
