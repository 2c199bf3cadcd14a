"""Running a decoder layer by layer, and going on from the middle, with exactly the model's own arithmetic.

Embedding, masks, positions and the head are never imitated. The model's own forward runs each time, with the layers
that are not wanted passing their input on: that costs an embedding lookup and the masks, and works for any decoder
whose layers are called one after the other with the hidden states as first argument.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.graph.where import select

Batch = Mapping[str, Any] | Tensor
"""Keyword arguments of the model's forward, or the token numbers [B, T] alone."""

_Act = Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class _Reached(BaseException):
    """Ends a forward pass at the layer that was wanted."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call = args, kwargs


class _Through(Tensor):
    """Hidden states for a layer that is skipped: `x` where models take a tensor, and `x[0]` where they take a tuple."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Tensor:
        return self if isinstance(index, int) and index == 0 else super().__getitem__(index)


def stream(
    model: nn.Module, layers: Sequence[str], batch: Batch
) -> Iterator[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """Run a decoder layer by layer, giving out each layer with the inputs it gets in the model.

    A layer runs when the next one is asked for, so changes made to it meanwhile count. Several batches go through
    together, each layer's weights being needed once, by `zip(*(stream(model, layers, batch) for batch in batches))`.
    Nothing after the last layer is computed, and no autograd graph is kept.

    Args:
        model: a decoder, in eval mode if it has dropout.
        layers: names of the layers in the order the model calls them.
        batch: keyword arguments for the model, or token numbers [B, T].

    Yields:
        (name, layer, args, kwargs) for each layer: `layer(*args, **kwargs)` is what the model would compute. The hidden
        states are `hidden_of(args, kwargs)`; masks and positions are this layer's own.

    Raises:
        InputError: an unknown layer, or layers that the model calls in another order.
    """
    found = _layers(model, layers)
    previous: Any = None
    for wanted, (name, layer) in enumerate(found):
        with torch.no_grad():
            args, kwargs = _reach(model, found, wanted, previous, batch)
        yield name, layer, args, kwargs
        if wanted + 1 < len(found):
            with torch.no_grad():
                previous = layer(*args, **kwargs)


def run_from(model: nn.Module, layers: Sequence[str], start: int, hidden: Tensor, batch: Batch) -> Tensor:
    """Continue from the hidden states before layer `start` to the logits, with exactly the model's own result.

    With the hidden states of a prefix of layers kept, a change in a later layer is measured without running the prefix
    again. Gradients flow where the caller lets them.

    Args:
        model: a decoder.
        layers: names of its layers in the order of their calls.
        start: the first layer to run, 0 to len(layers); len(layers) runs the final norm and the head alone.
        hidden: [B, T, D], what that layer gets.
        batch: the batch the hidden states come from, as for the model.

    Returns:
        The logits [B, T, vocabulary], or the model's output if it has none.

    Raises:
        InputError: an unknown layer, or `start` outside them.
    """
    return logits_in(output_from(model, layers, start, hidden, batch))


def output_from(model: nn.Module, layers: Sequence[str], start: int, hidden: Tensor, batch: Batch) -> Any:
    """Do as `run_from`, and return what the model itself returns."""
    found = _layers(model, layers)
    if not 0 <= start <= len(found):
        raise InputError(f"start is {start}; expected 0 to {len(found)}, the number of layers")

    def act(index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index < start:
            return hidden.as_subclass(_Through)
        if index == start:
            args, kwargs = _with_hidden(args, kwargs, hidden)
        return forward(*args, **kwargs)

    with _taken_over(found, act):
        return _call(model, batch)


def run(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's logits [B, T, vocabulary], without a cache."""
    return logits_in(_call(model, batch))


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states among a layer's arguments: the first one, or `hidden_states`."""
    return args[0] if args else kwargs["hidden_states"]


def _with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})


def _layers(model: nn.Module, layers: Sequence[str]) -> list[tuple[str, nn.Module]]:
    if not layers:
        raise InputError("no layers were given; expected the names of the model's layers in the order of their calls")
    return [(name, select(model, name)[name]) for name in layers]


def _reach(
    model: nn.Module, layers: list[tuple[str, nn.Module]], wanted: int, previous: Any, batch: Batch
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of layer `wanted`, given what the layer before it passed on."""

    def act(index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index == wanted:
            raise _Reached(args, kwargs)
        return previous if index == wanted - 1 else hidden_of(args, kwargs).as_subclass(_Through)

    try:
        with _taken_over(layers, act):
            _call(model, batch)
    except _Reached as reached:
        return reached.call
    raise InputError(f"the model did not call {layers[wanted][0]!r}; are the layers in the order of their calls?")


@contextmanager
def _taken_over(layers: list[tuple[str, nn.Module]], act: _Act) -> Iterator[None]:
    """Let `act` stand in for the layers' forward, by the order of calls (a layer may stand in several places)."""
    calls = 0

    def stand_in(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            index, calls = calls, calls + 1
            if index >= len(layers) or layers[index][1] is not module:
                name = next(name for name, layer in layers if layer is module)
                raise InputError(
                    f"{name!r} was called out of turn; give the layers in the order the model calls them, once each"
                )
            return act(index, forward, args, kwargs)

        return called

    modules = {id(layer): layer for _, layer in layers}.values()
    before = [(module, module.__dict__.get("forward")) for module in modules]  # accelerate puts one there
    try:
        for module in modules:
            module.forward = stand_in(module, module.forward)
        yield
    finally:
        for module, forward in before:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def _call(model: nn.Module, batch: Batch) -> Any:
    if isinstance(batch, Tensor):
        return model(batch, **_no_cache(model, {}))
    return model(**_no_cache(model, batch), **batch)


def _no_cache(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Layers that are skipped must not leave holes in a cache."""
    asked = "use_cache" in batch or batch.get("past_key_values") is not None
    takes = inspect.signature(type(model).forward).parameters
    wrapped = "kwargs" in takes and hasattr(getattr(model, "config", None), "use_cache")
    return {"use_cache": False} if ("use_cache" in takes or wrapped) and not asked else {}


def logits_in(output: Any) -> Tensor:
    """Return the logits of what a model returned, its last hidden state if it has none."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = getattr(output, "last_hidden_state", None)
    if logits is None:
        logits = output[0]
    return logits
