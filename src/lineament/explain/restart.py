"""Running a model again from the layer and the token where something changes, on copies of a batch, the rest kept."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lineament._base.errors import InputError
from lineament.explain.places import first_tensor, replaced, run
from lineament.graph import capture, output_from
from lineament.models import adapter_for


class Restart:
    """One run of a model, with what later runs start from: hidden states by layer, keys and values by position.

    A decoder whose layers are known restarts at the layer of the changed place, which saves all layers before it, and
    at the first position that changes, which saves all tokens before it; any other model runs whole.

    Attributes:
        latest: the last position a run can start at: where the first logits are asked for; 0 where keys and values
            before a position are not all that later ones need (linear mixers, windows), or inputs are more than tokens.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], sites: Iterable[str]) -> None:
        self.model, self.inputs = model, inputs
        self.layers, self.norm = decoder_layers(model)
        self.starts = {site: self._start(site) for site in sites}
        self.hidden = self._hidden({start for start, _ in self.starts.values() if start})
        self.past = _past(model, inputs) if self.layers else []
        self.latest = int(inputs["logits_to_keep"].min()) if self.past else 0

    def run(self, site: str, change: Callable[[Tensor], Tensor], copies: int = 1, since: int = 0) -> Any:
        """Return the model's output for copies of the batch, below one another, with a place changed.

        Args:
            change: of what the place holds at positions from `since` on.
            since: up to `latest`; positions before it are as they were, and not run.
        """
        start, whole = self.starts[site]
        inputs = _repeated(self.inputs, copies)
        if since:
            past = [tuple(x[:, :, :since].repeat(copies, 1, 1, 1) for x in pair) for pair in self.past]
            inputs = {"input_ids": inputs["input_ids"][:, since:], "logits_to_keep": inputs["logits_to_keep"] - since,
                      "past_key_values": DynamicCache(past), "use_cache": True}  # fmt: skip
        if not start:
            with replaced(self.model, site, change):
                return run(self.model, inputs)
        hidden = self.hidden[start][:, since:].repeat(copies, 1, 1)
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


def _past(model: nn.Module, inputs: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Return each layer's keys and values; none if they aren't all that later positions need of earlier ones."""
    if set(inputs) != {"input_ids", "logits_to_keep"} or not isinstance(inputs["logits_to_keep"], Tensor):
        return []
    with torch.no_grad():
        cache = getattr(model(**inputs, use_cache=True), "past_key_values", None)
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return []
    pairs: list[Any] = [(layer.keys, layer.values) for layer in cache.layers]
    return [] if any(x is None for pair in pairs for x in pair) else pairs


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
