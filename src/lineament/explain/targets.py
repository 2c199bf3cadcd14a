"""Which numbers of a model's output are explained."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lineament._base.errors import InputError

Target = None | int | Tensor | tuple[int, int] | Callable[[Any], Tensor]


def scores_of(output: Any) -> Tensor:
    """Return the scores of a model's output: its logits, or its first tensor."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point():
            return part
    raise InputError(f"the model returns a {type(output).__name__} without a tensor; give a function of it as target")


def selected(output: Any, target: Target, inputs: Mapping[str, Any]) -> tuple[Tensor, tuple[Any, ...], str]:
    """Return scores, the index of the explained ones among them, and words for these.

    Raises:
        InputError: the target is out of range, or doesn't fit the scores.
    """
    if callable(target) and not isinstance(target, Tensor):
        found = target(output)
        if not isinstance(found, Tensor) or found.dim() > 1:
            raise InputError("the target function must return a scalar or [B]")
        return found, (slice(None),) if found.dim() else (), getattr(target, "__name__", "own function")
    scores = scores_of(output)
    if scores.dim() == 1:
        return scores, (slice(None),), "the output"
    if scores.dim() not in (2, 3):
        raise InputError(f"the output has shape {list(scores.shape)}; give a function of it as target")
    rows = torch.arange(scores.shape[0], device=scores.device)
    position: Any = None
    if isinstance(target, tuple):
        position, target = target
        if scores.dim() != 3:
            raise InputError(f"the output has shape {list(scores.shape)}, so the target has no position")
        if not -scores.shape[1] <= position < scores.shape[1]:
            raise InputError(f"position {position} is outside the output's {scores.shape[1]} positions")
    at = (rows,) if scores.dim() == 2 else (rows, _last(scores, inputs) if position is None else position)
    ids = _ids(scores.detach()[at], target)
    words = "class" if scores.dim() == 2 else "token"
    return scores, (*at, ids), f"{words} {', '.join(map(str, ids.tolist()))}"


def _ids(scores: Tensor, target: Any) -> Tensor:
    """Return the class or token of each row."""
    rows, classes = scores.shape
    if target is None:
        return scores.argmax(-1)
    ids = torch.as_tensor(target, device=scores.device)
    if ids.dim() > 1 or ids.is_floating_point() or (ids.dim() == 1 and ids.shape[0] != rows):
        raise InputError(f"target has shape {list(ids.shape)}; expected a number or {rows} of them, one per row")
    if bool((ids >= classes).any()) or bool((ids < 0).any()):
        raise InputError(f"target {ids.max().item()} is out of range; the output has classes 0 to {classes - 1}")
    return ids.expand(rows)


def _last(scores: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Return the last real position of each row."""
    mask = inputs.get("attention_mask")
    T = scores.shape[1]
    if isinstance(mask, Tensor) and mask.shape == scores.shape[:2]:
        return (mask.ne(0) * torch.arange(T, device=scores.device)).argmax(-1)
    return torch.full((scores.shape[0],), T - 1, device=scores.device)
