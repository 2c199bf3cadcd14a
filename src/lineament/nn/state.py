"""What a mixer remembers: None, a tensor, `KeyValues`, or a (named) tuple of these; axis 0 of a tensor is the row."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

State = Any


def widened(x: Tensor) -> Tensor:
    """Return x in float32 or wider: the dtype of gates and states."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def tree_map(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Apply a function to every tensor of a state.

    Example:
        >>> import torch
        >>> tree_map(lambda x: x + 1, (torch.zeros(1), None))
        (tensor([1.]), None)
    """
    if state is None:
        return None
    if isinstance(state, Tensor):
        return function(state)
    if hasattr(state, "map"):  # a buffer of keys and values
        return state.map(function)
    parts = [tree_map(function, part) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)


def leaves(state: State, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a state with its path ("0.far").

    Example:
        >>> import torch
        >>> [name for name, _ in leaves((torch.zeros(1), None, (torch.zeros(1),)))]
        ['0', '2.0']
    """
    if state is None:
        return
    if isinstance(state, Tensor):
        yield prefix or "0", state
        return
    if hasattr(state, "tensors"):
        yield from ((f"{prefix}.{name}" if prefix else name, x) for name, x in state.tensors().items())
        return
    for name, part in zip(getattr(state, "_fields", None) or range(len(state)), state, strict=True):
        yield from leaves(part, f"{prefix}.{name}" if prefix else str(name))


def nbytes(state: State) -> int:
    """Return the bytes of all tensors of a state."""
    return sum(x.numel() * x.element_size() for _, x in leaves(state))


def detached(state: State) -> State:
    """Return the state cut off from the graph that made it."""
    return tree_map(Tensor.detach, state)


def cloned(state: State) -> State:
    """Return a copy that in-place steps on the original can't reach."""
    return tree_map(Tensor.clone, state)
