"""Subsampled attention inside any transformers model: the attention implementation "subsampled", and self-ensembles.

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="subsampled")   # dense in eval mode
    with subsampled(model, Subsampling(reduction=4)): ...                                    # or for a while

Weights and dense inference stay as they are; only the connections that take part are drawn.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lineament._base.errors import InputError, unknown
from lineament._base.seeds import seeded
from lineament.nn.subsampled import Subsampling, fresh_seed
from lineament.ops.subsampled import subsampled_attention

NAME = "subsampled"
FIELD = "subsampling"  # of a model's config: the fields of `Subsampling`, and "when"
WHEN = ("training", "always", "never")


def attend_subsampled(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, for transformers' attention interface: subsampled when asked for, else SDPA.

    Args:
        query: [B, Hq, T, K], positions applied. key, value: [B, Hk, S, K]. attention_mask: [B, 1, T, S] or None.

    Returns:
        [B, T, Hq, V] and None. Dropout of weights is left out while subsampling, which takes its place.
    """
    if not hasattr(module, "config"):
        raise InputError(f"{type(module).__name__} keeps no config, where the subsampling would be found")
    options = dict(getattr(module.config, FIELD, None) or {})
    when = options.pop("when", "training")
    if when == "never" or (when == "training" and not module.training):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
        )
    for name in ("softcap", "position_bias", "s_aux"):
        if kwargs.get(name) is not None:
            raise InputError(f"{type(module).__name__} uses {name}, which subsampled attention does not know")
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    visible = _visible(attention_mask)
    visible["causal"] = bool(causal and attention_mask is None and query.shape[2] > 1)
    q = query.transpose(1, 2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    return subsampled_attention(q, k, v, seed=fresh_seed(), **visible, **_options(options, key.shape[2])), None


def _options(options: dict[str, Any], sources: int) -> dict[str, Any]:
    grid = options.get("grid")
    if grid is not None and grid[0] * grid[1] != sources:
        raise InputError(f"grid {tuple(grid)} does not fit {sources} tokens; class tokens count too (use grid=None)")
    return options


def _visible(mask: Tensor | None) -> dict[str, Any]:
    """Read transformers' mask: bool (True is seen) or added to the products; plain padding becomes a key mask."""
    if mask is None:
        return {}
    if mask.dtype != torch.bool:
        seen = mask > 0.5 * torch.finfo(mask.dtype).min
        return {"mask": seen, "bias": mask.masked_fill(~seen, 0.0)}
    if bool((mask == mask[:, :1, :1]).all()):
        return {"key_mask": mask[:, 0, 0]}
    return {"mask": mask, "key_mask": mask.any(dim=2).any(dim=1)}


ALL_ATTENTION_FUNCTIONS.register(NAME, attend_subsampled)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


@contextmanager
def subsampled(
    model: PreTrainedModel, how: Subsampling | None = None, *, when: str = "training"
) -> Iterator[PreTrainedModel]:
    """Run a block with a transformers model's attention subsampled; it is as it was after it.

    Args:
        model: any whose attention goes through transformers' attention interface (Llama, BERT, ViT, GPT-2, ...).
        how: the subsampling. Draws come from torch's generator, one per layer and call, as for dropout.
        when: "training" (dense in eval mode) or "always".

    Raises:
        InputError: the model has an attention of its own that can't be replaced.

    Example:
        >>> from lineament.models import tiny_teacher
        >>> model, ids = tiny_teacher("llama"), torch.arange(12)[None]
        >>> with subsampled(model, Subsampling(reduction=4), when="always"):
        ...     one, other = model(ids).logits, model(ids).logits
        >>> bool((one == other).all())
        False
    """
    if when not in WHEN:
        raise unknown("when", when, WHEN)
    if not model._can_set_attn_implementation():
        raise InputError(
            f"{type(model).__name__} does not use transformers' attention interface; it can't be subsampled"
        )
    configs = _configs(model)
    held = [(config._attn_implementation, vars(config).get(FIELD)) for config in configs]
    try:
        model.set_attn_implementation(NAME)
        for config in configs:
            setattr(config, FIELD, {**asdict(how or Subsampling()), "when": when})
        yield model
    finally:
        for config, (before, value) in zip(configs, held, strict=True):
            config._attn_implementation = before
            if value is None:
                vars(config).pop(FIELD, None)
            else:
                setattr(config, FIELD, value)


def _configs(model: nn.Module) -> list[PretrainedConfig]:
    found = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PretrainedConfig)}
    return list(found.values())


@torch.no_grad()
def self_ensemble(
    model: PreTrainedModel,
    how: Subsampling | None = None,
    *,
    members: int = 16,
    seed: int = 0,
    score: Callable[[Any], Tensor] | None = None,
    **inputs: Any,
) -> Tensor:
    """Average the predictions of several random sub-models of one model.

    Args:
        model: in eval mode, else dropout is part of the members too.
        how: the subsampling of the members. members: S >= 1. seed: member i draws from seed + i.
        score: model output -> what is averaged, e.g. `lambda out: out.logits` for regression. None: probabilities,
            the softmax of `.logits` over the last axis (each token's own, for a language model).
        inputs: of the model.

    Returns:
        Log of the mean probabilities, [..., classes]; with `score` the mean.
    """
    if members < 1:
        raise InputError(f"members is {members}; an ensemble needs at least 1")
    found = []
    with subsampled(model, how, when="always"):
        for member in range(members):
            with seeded(seed + member):
                out = model(**inputs)
            found.append(score(out) if score is not None else out.logits.float().log_softmax(-1))
    together = torch.stack(found)
    return together.mean(0) if score is not None else together.logsumexp(0) - math.log(members)
