"""Bringing the statistics of a merged net back: batch-norm reset, and REPAIR for nets without batch norm.

Averaging two networks shrinks the variance of their activations (Jordan et al. 2023, arXiv:2211.08403).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.weights.evaluate import between

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def call(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: a mapping by name, of a tuple the first entry (inputs, labels), a tensor as it is."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def reset_batch_norm(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Estimate the running statistics of all batch norms anew, in place: a plain mean over one pass in train mode.

    A model without batch norm is left alone.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1))
        >>> _ = reset_batch_norm(net, [torch.tensor([[1.0], [3.0]])])
        >>> net[0].running_mean.item()
        2.0
    """
    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    if not norms:
        return model
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        with torch.no_grad():
            for batch in batches:
                call(model, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    return model


def repair(
    model: nn.Module, a: Mapping[str, Tensor], b: Mapping[str, Tensor], batches: Iterable[Any], *, t: float = 0.5
) -> dict[str, Tensor]:
    """Merge two matched nets and give every layer's outputs the mean and deviation they have on average in the ends.

    For every linear and convolution layer but the last, `W <- W s*/s` and `bias <- (bias - m) s*/s + m*`, where m and s
    are the statistics in the merged net with the layers before it repaired, and m* and s* are interpolated between the
    ends. Nets with batch norm get their statistics reset instead.

    Args:
        model: the architecture; not changed.
        a, b: state dicts, b already brought onto a.
        batches: training data without dropout, used three times.
        t: where between a and b.

    Returns:
        The state dict of the merged net.

    Raises:
        InputError: a layer but the last of a net without batch norm has no bias.
    """
    return repairing(model, a, b, batches)(t)


def repairing(
    model: nn.Module, a: Mapping[str, Tensor], b: Mapping[str, Tensor], batches: Iterable[Any]
) -> Callable[[float], dict[str, Tensor]]:
    """Return t -> the merged and repaired net there, as `repair` makes it; the ends are measured once for all t."""
    batches = list(batches)
    if any(isinstance(module, NORMS) for module in model.modules()):
        return lambda t: reset_batch_norm(_at(model, between([a, b], [1 - t, t])), batches).state_dict()
    ends = [_statistics(_at(model, state), batches) for state in (a, b)]
    names = list(ends[0])[:-1]
    bare = [name for name in names if getattr(model.get_submodule(name), "bias", None) is None]
    if bare:
        raise InputError(f"REPAIR moves biases, and the layer {bare[0]} has none")

    def repaired(t: float) -> dict[str, Tensor]:
        merged = _at(model, between([a, b], [1 - t, t]))
        wanted = {
            name: ((1 - t) * ends[0][name][0] + t * ends[1][name][0], (1 - t) * ends[0][name][1] + t * ends[1][name][1])
            for name in names
        }
        found = _statistics(merged, batches, wanted)
        with torch.no_grad():
            for name, (mean, deviation) in wanted.items():
                layer: Any = merged.get_submodule(name)
                scale = deviation / found[name][1].clamp_min(1e-8)
                layer.weight.mul_(scale.view(-1, *([1] * (layer.weight.dim() - 1))))
                layer.bias.copy_((layer.bias - found[name][0]) * scale + mean)
        return merged.state_dict()

    return repaired


def _at(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a model, in eval mode, at other weights."""
    copied = copy.deepcopy(model).eval()
    copied.load_state_dict(dict(state))
    return copied


def _statistics(
    model: nn.Module, batches: Iterable[Any], wanted: Mapping[str, tuple[Tensor, Tensor]] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the mean and deviation per channel of every layer's outputs, in the order of the calls.

    With `wanted`, each layer's outputs are brought to these statistics batch by batch before they go on.
    """
    sums: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
            channel = out.dim() - 1 if isinstance(module, nn.Linear) else 1
            rest = [i for i in range(out.dim()) if i != channel]
            mean, variance = out.mean(rest), out.var(rest, unbiased=False)
            kept = sums.setdefault(name, [torch.zeros_like(mean), torch.zeros_like(mean), torch.zeros(())])
            for total, value in zip(kept, (mean, variance, torch.ones(())), strict=True):
                total.add_(value)
            if wanted is None or name not in wanted:
                return None
            shape = [-1 if i == channel else 1 for i in range(out.dim())]
            scale = wanted[name][1] / variance.sqrt().clamp_min(1e-8)
            return (out - mean.view(shape)) * scale.view(shape) + wanted[name][0].view(shape)

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, LAYERS):
                hooks.callback(module.register_forward_hook(watch(name)).remove)
        for batch in batches:
            call(model, batch)
    return {name: (mean / n, (variance / n).sqrt()) for name, (mean, variance, n) in sums.items()}
