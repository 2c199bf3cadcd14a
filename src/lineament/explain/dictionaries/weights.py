"""What features mean by their weights alone: tokens that drive them, tokens they speak for, features they drive."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.explain.dictionaries.hooks import Placed, norm_affine
from lineament.models import adapter_for

CHUNK = 1024  # features of the later dictionary compared at once


@torch.no_grad()
def read_directions(model: nn.Module, at: Placed, features: Sequence[int] | None = None) -> Tensor:
    """Return the directions of the residual stream that features read [n, D], up to the norm's scale at a token.

    The norm's gain is folded in, and its centring where it has one; all features if None.

    Raises:
        InputError: a place that doesn't read the stream, or a feature outside the dictionary.
    """
    d, adapter = at.dictionary, adapter_for(model)
    W = d.W_enc if features is None else d.W_enc[d.check(features)]
    layer = f"{adapter.layers}.{at.layer}"
    if not adapter.reads:
        raise InputError(f"what reads the residual stream of {adapter.model_type} is not known")
    norm, mlp = f"{layer}.{adapter.reads[1]}", f"{layer}.{adapter.down.rpartition('.')[0]}:input"
    if at.reads in (layer, f"{layer}:input", f"{norm}:input", f"{norm}:stream"):
        return W.clone()
    if at.reads not in (norm, mlp):
        raise InputError(f"{at.reads!r} is not read from the residual stream, so its features have no direction there")
    return _through(model.get_submodule(norm), W)


def _through(norm: nn.Module, W: Tensor) -> Tensor:
    """Return directions behind a norm as directions before it, its scale aside."""
    found = W * norm_affine(norm, W.shape[1])[0].to(W)
    return found - found.mean(1, keepdim=True) if isinstance(norm, nn.LayerNorm) else found


@torch.no_grad()
def de_embedding(model: nn.Module, at: Placed, features: Sequence[int]) -> Tensor:
    """Return how much each token of the vocabulary drives features by its embedding alone, [n, V].

    In units of the norm's scale, so compare tokens, not features of different layers.
    """
    W: Any = model.get_submodule(adapter_for(model).embedding).weight
    return read_directions(model, at, features).to(W) @ W.T


@torch.no_grad()
def direct_tokens(model: nn.Module, at: Placed, features: Sequence[int]) -> Tensor:
    """Return what features add to each token's logit straight through the last norm, less the mean over tokens [n, V].

    In units of the norm's scale.
    """
    adapter = adapter_for(model)
    head: Any = model.get_submodule(adapter.head).weight
    written = at.dictionary.W_dec[at.dictionary.check(features)].to(head)
    found = _through(model.get_submodule(adapter.norm), written) @ head.T
    return found - found.mean(1, keepdim=True)


@torch.no_grad()
def connections(
    model: nn.Module,
    first: Placed,
    second: Placed,
    *,
    features: Sequence[int] | None = None,
    rates: Tensor | None = None,
    top: int = 20,
) -> list[dict[str, Any]]:
    """Return the strongest connections between features of two layers, by weights alone: <W_dec[i], W_enc[j]>.

    Only what a feature writes straight into the other's view is counted, attention between positions is not.

    Args:
        first, second: dictionaries; the first writes before the second reads.
        features: of the second; all if None.
        rates: mean activation of the first's features [F]; if given, connections are weighted by it.
        top: how many.

    Returns:
        Rows: from, to, weight; the largest absolute ones first.

    Raises:
        InputError: layers in the wrong order, or a feature outside the dictionary.
    """
    if first.layer >= second.layer:
        raise InputError(f"layer {first.layer} doesn't come before layer {second.layer}, so its features drive nothing")
    at = second.dictionary.check(range(second.dictionary.config.features) if features is None else features)
    W = first.dictionary.W_dec if rates is None else first.dictionary.W_dec * rates[:, None].to(first.dictionary.W_dec)
    found: list[tuple[float, int, int]] = []
    for i in range(0, len(at), CHUNK):
        C = W @ read_directions(model, second, at[i : i + CHUNK]).to(W).T
        best = C.abs().flatten().topk(min(top, C.numel())).indices.tolist()
        found += [(float(C.flatten()[b]), b // C.shape[1], at[i + b % C.shape[1]]) for b in best]
    found.sort(key=lambda each: -abs(each[0]))
    return [{"from": f"{first.name}.{i}", "to": f"{second.name}.{j}", "weight": w} for w, i, j in found[:top]]
