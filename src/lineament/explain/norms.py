"""Norm layers: the scale is frozen and the centring kept, so relevance is only moved by what is subtracted."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lineament.explain.linear import wide

if TYPE_CHECKING:
    from lineament.explain.sweep import Step


def layer_norm(s: "Step") -> None:
    """gamma (x - mean) / sigma + beta, sigma a constant: h = rho gamma / sigma, rho_x = h - mean h."""
    shape = s.argument("normalized_shape")
    dims = list(range(-len(shape), 0))
    _frozen(
        s, lambda h: h - h.mean(dims, keepdim=True), wide(s.saved("result2")), affine(s, "weight"), affine(s, "bias")
    )


def rms_norm(s: "Step") -> None:
    """gamma x / rms, rms a constant: R passes whole."""
    x, eps = s.value(0), s.argument("eps")
    dims = list(range(-len(s.argument("normalized_shape")), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    rstd = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    _frozen(s, lambda h: h, rstd, affine(s, "weight"), None)


def group_norm(s: "Step") -> None:
    """As `layer_norm`, over each group of channels."""
    x_shape = s.shape(0)
    groups = s.argument("group")
    rstd = wide(s.saved("result2"))
    along = (1, -1, *[1] * (len(x_shape) - 2))
    scaling = [None if a is None else a.view(along) for a in (affine(s, "weight"), affine(s, "bias"))]
    spread = rstd.view(x_shape[0], groups, 1).expand(-1, -1, x_shape[1] // groups)
    rstd = spread.reshape(x_shape[0], x_shape[1], *[1] * (len(x_shape) - 2))

    def centred(h: Tensor) -> Tensor:
        inside = h.reshape(x_shape[0], groups, -1)
        return (inside - inside.mean(-1, keepdim=True)).reshape(h.shape)

    _frozen(s, centred, rstd, scaling[0], scaling[1])


def batch_norm(s: "Step") -> None:
    """With running statistics a diagonal linear map, its own or the layer's before it; else an instance norm."""
    if s.argument("training"):
        _instance_norm(s)
        return
    merged = s.sweep.plan.merged.get(s.index)
    if merged is not None:
        s.sweep.folded[merged] = batch_affine(s)
    if merged is not None or s.rules.batchnorm == "identity":
        s.send(0, rel=s.rel())
        return
    c = s.coef()
    scale, shift = batch_affine(s)
    along = (1, -1, *[1] * (c.dim() - 2))
    s.send(0, coef=c * scale.view(along))
    s.absorb("biases", c * shift.view(along))


def batch_affine(s: "Step") -> tuple[Tensor, Tensor]:
    """Return scale and shift of a batch norm with running statistics, per channel."""
    mean, var = (s.argument(name).to(torch.promote_types(torch.float32, s.argument(name).dtype))
                 for name in ("running_mean", "running_var"))  # fmt: skip
    scale = (var + _epsilon(s)).rsqrt()
    weight, bias = affine(s, "weight"), affine(s, "bias")
    scale = scale if weight is None else scale * weight
    return scale, (0.0 if bias is None else bias) - mean * scale


def _epsilon(s: "Step") -> float:
    """Return what a batch norm adds to the variance; cuDNN's operator spells it out."""
    return s.argument("eps", s.argument("epsilon"))


def _instance_norm(s: "Step") -> None:
    shape = s.shape(0)
    along, dims = (1, -1, *[1] * (len(shape) - 2)), [0, *range(2, len(shape))]
    scaling = [None if a is None else a.view(along) for a in (affine(s, "weight"), affine(s, "bias"))]
    x = s.value(0)
    rstd = (x.var(dims, unbiased=False, keepdim=True) + _epsilon(s)).rsqrt()
    _frozen(s, lambda h: h - h.mean(dims, keepdim=True), rstd, scaling[0], scaling[1])


def _frozen(s: "Step", centred, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    kind = s.rules.norm
    if kind == "identity":
        s.send(0, rel=s.rel())
        return
    c = s.coef()
    if bias is not None:
        s.absorb("biases", bias * c)
    if kind == "freeze":
        s.send(0, coef=centred((c if weight is None else c * weight) * rstd))
        return
    found = s.vjp(*[c if k == 0 else None for k in range(len(s.tape.shapes[s.index]))])[0]
    assert found is not None
    s.send(0, coef=found)
    if s.counting:
        y = s.result() if bias is None else s.result() - bias
        s.absorb("remainder", y * c)
        s.absorb("remainder", -s.value(0) * found)


def affine(s: "Step", name: str) -> Tensor | None:
    """Return a norm's weight or bias, if it has one."""
    found = s.argument(name)
    return None if found is None else wide(found)
