"""Running a model again from the layer where something changes, on copies of a batch, with its prefix kept."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.explain.places import first_tensor, replaced, run
from lineament.graph import capture, output_from
from lineament.models import adapter_for


class Restart:
    """One run of a model, its hidden states kept at the layers that later runs start from.

    A decoder whose layers are known restarts at the layer of the changed place, which saves all layers before it; any
    other model runs whole.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], sites: Iterable[str]) -> None:
        self.model, self.inputs = model, inputs
        self.layers, self.norm = decoder_layers(model)
        self.starts = {site: self._start(site) for site in sites}
        self.hidden = self._hidden({start for start, _ in self.starts.values() if start})

    def run(self, site: str, change: Callable[[Tensor], Tensor], copies: int = 1) -> Any:
        """Return the model's output for copies of the batch, below one another, with a place changed."""
        start, whole = self.starts[site]
        inputs = _repeated(self.inputs, copies)
        if not start:
            with replaced(self.model, site, change):
                return run(self.model, inputs)
        hidden = self.hidden[start].repeat(copies, 1, 1)
        if whole:
            return output_from(self.model, self.layers, start, change(hidden), inputs)
        with replaced(self.model, site, change):
            return output_from(self.model, self.layers, start, hidden, inputs)

    def _start(self, site: str) -> tuple[int, bool]:
        """Return the layer to start at, and whether the place is the hidden state it starts from."""
        name, _, received = site.partition(":")
        if not self.layers:
            return 0, False
        if name == self.norm:
            return len(self.layers), False
        for index, layer in enumerate(self.layers):
            if name == layer:
                start = index + (not received)
                return start, start > 0
            if name.startswith(f"{layer}."):
                return index, False
        return 0, False

    def _hidden(self, starts: set[int]) -> dict[int, Tensor]:
        if not starts:
            return {}
        wanted = {self.layers[min(start, len(self.layers) - 1)] for start in starts}
        with torch.no_grad(), capture(self.model, lambda name, _: name in wanted, inputs=True, clone=True) as seen:
            run(self.model, self.inputs)
        return {
            start: first_tensor(seen.inputs(self.layers[start])[0])
            if start < len(self.layers)
            else seen.tensor(self.layers[-1])
            for start in starts
        }


def decoder_layers(model: nn.Module) -> tuple[list[str], str]:
    """Return the names of a decoder's layers in order, and of its last norm; none of a model we know no family for."""
    try:
        adapter = adapter_for(model)
        count = len(model.get_submodule(adapter.layers))  # type: ignore[arg-type]
    except (InputError, AttributeError):
        return [], ""
    return [f"{adapter.layers}.{index}" for index in range(count)], adapter.norm


def _repeated(inputs: Mapping[str, Any], copies: int) -> dict[str, Any]:
    rows = len(first_tensor(inputs))
    return {
        name: x.repeat(copies, *[1] * (x.dim() - 1))
        if isinstance(x, Tensor) and x.dim() and len(x) == rows and name != "logits_to_keep"  # positions, of all rows
        else x
        for name, x in inputs.items()
    }
