"""Encoding and decoding that touch the active features alone, forward and backward."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

ROWS = 256  # tokens whose decoder rows are laid out at once


class _Encode(torch.autograd.Function):
    """The k largest of x W^T + b, negative ones as 0; the gradient visits the chosen rows of W only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, index = torch.addmm(b, x, W.T).topk(k, dim=-1, sorted=False)
        values = values.relu()
        ctx.save_for_backward(x, W, values, index)
        ctx.mark_non_differentiable(index)
        return values, index

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, W, values, index = ctx.saved_tensors
        g = grads[0] * (values > 0)
        b = g.new_zeros(len(W)).index_add_(0, index.flatten(), g.flatten())
        into = embedding_bag(index, W, per_sample_weights=g, mode="sum") if ctx.needs_input_grad[0] else None
        return into, _by_feature(index, g, x, len(W)), b, None


class _Decode(torch.autograd.Function):
    """sum_k values_k W[index_k]."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(values, index, W)
        return embedding_bag(index, W, per_sample_weights=values, mode="sum")

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, Tensor]:
        values, index, W = ctx.saved_tensors
        g = grads[0].contiguous()
        pieces = zip(index.split(ROWS), g.split(ROWS), strict=True)
        products = torch.cat([torch.einsum("nkd,nd->nk", W[i], each) for i, each in pieces])
        return products, None, _by_feature(index, values, g, len(W))


def _by_feature(index: Tensor, weights: Tensor, x: Tensor, features: int) -> Tensor:
    """Return [F, D]: for each feature the weighted sum of the tokens that chose it."""
    order = index.flatten().argsort(stable=True)
    first = torch.searchsorted(index.flatten()[order], torch.arange(features, device=x.device))
    tokens = order // index.shape[1]
    return embedding_bag(tokens, x, first, per_sample_weights=weights.flatten()[order], mode="sum")


def top_encode(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest pre-activations of tokens [N, D] and their features, both [N, k]; negative ones are 0.

    Args:
        x: [N, D]. W: [F, D]. b: [F]. k: at most F.
    """
    values, index = _Encode.apply(x, W, b, k)  # pyright: ignore[reportGeneralTypeIssues]
    return values, index


def sparse_decode(values: Tensor, index: Tensor, W: Tensor) -> Tensor:
    """Return [N, D], the sum of rows of W [F, D] by features `index` with weights `values`, both [N, k]."""
    return _Decode.apply(values, index, W)  # pyright: ignore[reportReturnType]


class _Jump(torch.autograd.Function):
    """(z, step) with z = pre where it is above its threshold and step = 1 there; thresholds learn through a window
    around them (Rajamanoharan et al. 2024, arXiv:2407.14435)."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float) -> tuple[Tensor, Tensor]:
        on = (pre > threshold) & (pre > 0)
        ctx.save_for_backward(pre, threshold, on)
        ctx.width = width
        return pre * on, on.to(pre)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        pre, threshold, on = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.width / 2).to(pre) / ctx.width
        return grads[0] * on, -(near * (grads[0] * threshold + grads[1])).flatten(0, -2).sum(0), None


def jump(pre: Tensor, threshold: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """Return pre-activations [..., F] above their thresholds [F] (others 0), and which ones these are, as 0 and 1."""
    z, on = _Jump.apply(pre, threshold, width)  # pyright: ignore[reportGeneralTypeIssues]
    return z, on
