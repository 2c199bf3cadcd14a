"""Steering: a direction between two kinds of prompts, added where a model passes it on (Turner et al. 2023)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.explain.places import one_place, replaced, values_at
from lineament.explain.relevance import named


def steering_vector(
    model: nn.Module, positive: Mapping[str, Any] | Tensor, negative: Mapping[str, Any] | Tensor, site: str, *,
    position: int = -1,
) -> Tensor:  # fmt: skip
    """Return the mean difference [D] of what a place holds for two sets of prompts.

    Args:
        model: any module in eval mode. positive, negative: its inputs, of any number and length.
        site: a place as for `effects`. position: where it is read.

    Raises:
        InputError: the place holds no [B, T, D], or the position is outside a prompt.
    """
    name = one_place(model, site)
    means = []
    for inputs in (positive, negative):
        x = values_at(model, named(model, inputs), [name])[name]
        if x.dim() != 3 or not -x.shape[1] <= position < x.shape[1]:
            raise InputError(f"{name!r} holds {list(x.shape)}; position {position} of [B, T, D] was asked for")
        means.append(x[:, position].mean(0))
    return means[0] - means[1]


@contextmanager
def steered(model: nn.Module, site: str, vector: Tensor, *, strength: float = 1.0) -> Iterator[nn.Module]:
    """Add a vector at a place, at every position, while the block runs; `generate` in it is steered too.

    Raises:
        InputError: the vector is not as wide as the place.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Identity(), nn.Identity())
        >>> with steered(model, "0", torch.ones(2), strength=3.0):
        ...     model(torch.zeros(1, 1, 2))
        tensor([[[3., 3.]]])
    """

    def change(x: Tensor) -> Tensor:
        if vector.dim() != 1 or x.shape[-1] != len(vector):
            raise InputError(f"the vector is {list(vector.shape)} and {site!r} holds {list(x.shape)}")
        return x + strength * vector.to(x)

    with replaced(model, one_place(model, site), change):
        yield model
