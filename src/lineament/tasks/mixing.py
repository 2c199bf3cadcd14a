"""How a layer mixes: the weight of every earlier token in every token's output, whatever kind of mixer it is."""

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.graph import capture


@torch.no_grad()
def mixing_weights(model: nn.Module, input_ids: Tensor, *, layer: int = 0) -> Tensor:
    """Return the matrix A of a decoder's layer, `o_t = sum_s A_ts v_s`, before its norm and gate.

    All the heads here are linear in their values, so A is what they make of values that say where they stand. Softmax
    gives rows that sum to 1; others may give any numbers. Quadratic in T.

    Args:
        model: a `DecoderForCausalLM` in eval mode, which comes back as it was. input_ids: [B, T], nothing padded.
        layer: counted from 0.

    Returns:
        [B, Hq, T, T], 0 above the diagonal.

    Raises:
        InputError: the model has no such layer.

    Example:
        >>> from lineament.models import DecoderForCausalLM, decoder_config
        >>> model = DecoderForCausalLM(decoder_config("llama", vocab_size=16, width=16, layers=1, heads=2)).eval()
        >>> A = mixing_weights(model, torch.zeros(1, 3, dtype=torch.long))
        >>> A.shape, bool(A.sum(-1).allclose(torch.ones(1, 2, 3)))
        (torch.Size([1, 2, 3, 3]), True)
    """
    names = [name for name, _ in model.named_modules() if name.endswith(f"layers.{layer}.mixer.heads")]
    if len(names) != 1:
        raise InputError(f"the model has no layer {layer} with a mixer of its own; expected a decoder from scratch")
    heads = model.get_submodule(names[0])
    with capture(model, names[0], inputs=True, outputs=False) as seen:
        model(input_ids=input_ids, use_cache=False)
    (q, k, v), named = seen.inputs(names[0])[0]
    where = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)[None, :, None].expand(*v.shape[:3], -1)
    return heads(q, k, where, x=named["x"], keep=False)[0].transpose(1, 2)


def near_share(weights: Tensor, within: int) -> float:
    """Return the share of |A| that falls on the last `within` tokens (itself included), averaged over tokens.

    Args:
        weights: [B, H, T, T], as from `mixing_weights`. A row of zeros counts as near.

    Example:
        >>> round(near_share(torch.ones(1, 1, 4, 4).tril(), 2), 4)  # the mean of 1, 1, 2/3 and 1/2
        0.7917
    """
    sizes = weights.abs()
    far = sizes.tril(-within).sum(-1) / sizes.sum(-1).clamp_min(torch.finfo(sizes.dtype).tiny)
    return float((1 - far).mean())
