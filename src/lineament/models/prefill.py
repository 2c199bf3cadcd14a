"""Read a text of any length in constant memory: piece by piece through the model's own cache."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from lineament._base.errors import InputError
from lineament.models.cache import StudentCache

PIECE = 1024  # tokens read at once: a layer's activations stay in a CPU's cache


class Prefilled(NamedTuple):
    """What a model knows after a text.

    Attributes:
        cache: to go on from. logits: [B, vocabulary], of the token that comes next. tokens: how many were read.
    """

    cache: Any
    logits: Tensor
    tokens: int


@torch.no_grad()
def prefill(
    model: Any,
    input_ids: Tensor | Iterable[Tensor],
    *,
    cache: Any = None,
    piece: int = PIECE,
    progress: Callable[[int], None] | None = None,
) -> Prefilled:
    """Read tokens in pieces, so that memory doesn't grow with the text where the cache doesn't.

    A pure student or decoder keeps constant-size states: then a million tokens take what one piece takes. Layers (or
    heads) that stay softmax keep keys and values, which grow; activations and logits don't in any model.

    Args:
        model: a student, a decoder, or any causal language model of transformers with a cache.
        input_ids: [B, T], or an iterable of [B, t] parts (read as they come, so the text itself need not fit either).
        cache: what an earlier call returned; made when None.
        piece: most tokens read at once.
        progress: called with the number of tokens read so far, after each piece.

    Returns:
        The cache, the next token's logits, and the number of tokens read.

    Raises:
        InputError: no tokens, a piece below 1, or parts of unequal batch size.

    Example:
        >>> from lineament.models import tiny
        >>> model, ids = tiny("llama", "kda"), torch.ones(1, 9, dtype=torch.long)
        >>> whole, streamed = model(ids).logits[:, -1], prefill(model, ids, piece=4)
        >>> streamed.tokens, torch.allclose(whole, streamed.logits, atol=1e-5)
        (9, True)
    """
    if piece < 1:
        raise InputError(f"piece is {piece}; expected at least one token")
    if cache is None:
        config = model.config
        cache = StudentCache(config) if getattr(config, "lineament", None) else DynamicCache(config=config)
    logits, tokens, rows = None, 0, None
    for part in [input_ids] if isinstance(input_ids, Tensor) else input_ids:
        if part.dim() != 2 or (rows is not None and len(part) != rows):
            raise InputError(f"a part has shape {list(part.shape)}; expected [{'B' if rows is None else rows}, t]")
        rows = len(part)
        for ids in part.split(piece, dim=1) if part.shape[1] else ():
            out = model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits, tokens = out.past_key_values, out.logits[:, -1], tokens + ids.shape[1]
            if progress is not None:
                progress(tokens)
    if logits is None:
        raise InputError("there are no tokens to read; give at least one")
    return Prefilled(cache, logits, tokens)
