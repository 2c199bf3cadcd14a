"""Images to images: denoising, super-resolution and classification by a prototype, scored in decibels."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, mse_loss

from lineament._base.errors import InputError
from lineament._base.seeds import generator


def restoration_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Mapping[str, float]]:
    """Return the mean squared error of a batch (inputs, targets), any shapes of as many numbers, for `train.fit`."""
    inputs, targets = batch
    return mse_loss(model(inputs).flatten(1), targets.flatten(1)), {}


def noisy(pixels: Tensor, sigma: float, *, seed: int = 0) -> Tensor:
    """Add Gaussian noise of standard deviation `sigma`; the result is not clipped."""
    return pixels + sigma * torch.randn(pixels.shape, generator=generator(seed), dtype=pixels.dtype)


def lowered(pixels: Tensor, factor: int = 2) -> Tensor:
    """Average images [N, C, Y, X] over squares of `factor` and blow them up again to the same size.

    Raises:
        InputError: the sides are no multiples of the factor.
    """
    if factor < 1 or pixels.shape[-1] % factor or pixels.shape[-2] % factor:
        raise InputError(f"images of {list(pixels.shape[-2:])} can't be averaged over squares of {factor}")
    return interpolate(avg_pool2d(pixels, factor), scale_factor=factor, mode="nearest")


def class_means(pixels: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return one prototype per class, the mean image [classes, C, Y, X]: targets of generative classification.

    Raises:
        InputError: a class without images.
    """
    counts = torch.bincount(labels, minlength=classes)
    if len(counts) > classes or not bool(counts.all()):
        raise InputError(f"the images of the {classes} classes number {counts.tolist()}; expected some of each")
    sums = pixels.new_zeros(classes, *pixels.shape[1:]).index_add_(0, labels, pixels)
    return sums / counts.view(-1, *[1] * (pixels.dim() - 1))


def nearest_prototype(outputs: Tensor, prototypes: Tensor) -> Tensor:
    """Return the number of the prototype next to each output [N, ...], in Euclidean distance."""
    return torch.cdist(outputs.flatten(1), prototypes.flatten(1)).argmin(1)


@torch.no_grad()
def psnr(model: nn.Module, inputs: Tensor, targets: Tensor, *, batch_size: int = 1000) -> float:
    """Return the peak signal-to-noise ratio `-10 log10 MSE` in dB, of targets in [0, 1].

    The squared error is averaged over all numbers of all images before the logarithm.

    Raises:
        InputError: nothing to score, or unequal numbers of both.

    Example:
        >>> round(psnr(nn.Identity(), torch.zeros(4, 3), torch.full((4, 3), 0.1)), 4)
        20.0
    """
    if not len(targets) or len(inputs) != len(targets):
        raise InputError(
            f"psnr was asked of {len(inputs)} inputs and {len(targets)} targets; expected as many, and some"
        )
    pairs = zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
    squared = [(model(x).flatten(1) - y.flatten(1)).double().square().sum() for x, y in pairs]
    return float(-10 * torch.log10(torch.stack(squared).sum() / targets.numel()))
