"""A model's predictions at chosen places, without ever holding the logits of a whole long text.

49,000 words x 8,192 tokens x 4 bytes are 1.6 GB: hidden states are kept, logits are made in pieces.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError

CHUNK = 512  # predictions whose logits are held at once


def plain(model: Any) -> Any:
    """Take off the wrappers of data-parallel training and PEFT; adapters stay at work inside."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module) and not hasattr(model, "get_output_embeddings"):
            model = model.module
        else:
            return model


def hidden_states(model: nn.Module, input_ids: Tensor, *, cache: Any = None, **inputs: Tensor) -> Tensor:
    """Return what the model's head sees, [B, T, D]: the last hidden states after the last norm.

    With a `cache` of transformers the tokens follow those that it holds, and it holds them too afterwards.
    """
    past = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    return plain(model).base_model(input_ids=input_ids, **past, **inputs).last_hidden_state


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """Return the logits of some hidden states, [..., vocabulary], in float32 or wider."""
    inner = plain(model)
    head = inner.get_output_embeddings()
    if head is None:
        raise InputError(f"{type(inner).__name__} has no output embedding; expected a causal language model")
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    config = inner.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    logits = logits if scale == 1.0 else logits * scale  # a pass over 49,000 words a token
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def pieces(model: nn.Module, hidden: Tensor, *, chunk: int = CHUNK) -> Iterator[tuple[slice, Tensor]]:
    """Go through the tokens axis of hidden states [B, T, D]: yields (slice of T, logits [B, c, vocabulary])."""
    step = max(1, chunk // max(1, hidden.shape[0]))
    for at in range(0, hidden.shape[1], step):
        part = slice(at, min(at + step, hidden.shape[1]))
        yield part, logits_of(model, hidden[:, part])


@torch.no_grad()
def token_nll(model: nn.Module, input_ids: Tensor, *, last: int | None = None, chunk: int = CHUNK) -> Tensor:
    """Return the negative log likelihood of tokens given all before them, in nats.

    Args:
        model: a causal language model of transformers.
        input_ids: int64 [B, T], without padding.
        last: score the last so many tokens only; None for all that have something before them.
        chunk: predictions whose logits are held at once.

    Returns:
        float32 (or wider) [B, last] or [B, T - 1].
    """
    length = input_ids.shape[1]
    if length < 2:
        raise InputError(f"a window has {length} tokens; expected at least 2, the first one is never scored")
    if last is not None and not 1 <= last < length:
        raise InputError(f"the last {last} of {length} tokens were asked for; expected 1 to {length - 1}")
    first = 1 if last is None else length - last
    hidden = hidden_states(model, input_ids)[:, first - 1 : -1]
    truth = input_ids[:, first:]
    parts = [
        nn.functional.cross_entropy(logits.transpose(1, 2), truth[:, part], reduction="none")
        for part, logits in pieces(model, hidden, chunk=chunk)
    ]
    return torch.cat(parts, dim=1)


def next_token_loss(model: Any, batch: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Return the mean loss of every token predicting the next, in nats: for `train.fit` and `weights.path`.

    Args:
        model: a causal language model of transformers, bare or wrapped.
        batch: int64 [B, T], or what `lineament.data.batches` gives: {"input_ids": [B, T], "position_ids": ...}. Where
            positions restart another document begins, whose first token is no target.
    """
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    labels, positions = inputs["input_ids"], inputs.get("position_ids")
    if positions is not None:
        labels = labels.masked_fill(nn.functional.pad(positions.diff(dim=1) != 1, (1, 0)), -100)
    return model(**inputs, labels=labels, use_cache=False).loss, {}
