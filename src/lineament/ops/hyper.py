"""The two HyperZ.Z.W products: weights made of activations and a generated kernel, applied to activations.

Zhang 2024 (arXiv:2401.17948). A hyper-kernel W is as large as the image; Z * W are the weights that depend on context.
"""

import torch
from torch import Tensor

from lineament._base.autocast import without_autocast
from lineament._base.errors import InputError
from lineament._base.shapes import bind


def hyper_product(z: Tensor, w: Tensor, other: Tensor) -> Tensor:
    """Apply the global weights z * w to another map.

    In two dimensions a matrix product over the spatial axes, for each sample and channel: `((z * w) other)_yx =
    sum_u z_yu w_yu other_ux`, which costs n^3 per channel. In one dimension, which the paper's code lacks, our choice:
    `z * w * other` convolved with w by FFT, offsets -n/2 ... n/2.

    Args:
        z, other: [N, C, n, n] or [N, C, n]. w: [C, n, n] or [C, n].

    Returns:
        The shape of z.

    Raises:
        InputError: axes disagree, or an image is not square.

    Example:
        >>> z = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
        >>> hyper_product(z, torch.ones(1, 2, 2), torch.eye(2)[None, None]).flatten().tolist()
        [1.0, 2.0, 3.0, 4.0]
    """
    if z.dim() == 3:
        bind("z: N C X, w: C X, other: N C X", z, w, other)
        return centred_convolution(z * w * other, w)
    n = bind("z: N C Y X, w: C Y X, other: N C Y X", z, w, other)
    if n["Y"] != n["X"]:
        raise InputError(f"z has {n['Y']} rows and {n['X']} columns; the product over space needs square images")
    return (z * w) @ other


def centred_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve x [N, C, n] with kernels [C, n] as long as x; kernel position n // 2 is the offset 0. Zeros outside.

    Example:
        >>> centred_convolution(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[1.0, 0.0, 0.0]])).round().tolist()
        [[[2.0, 3.0, 0.0]]]
    """
    n = bind("x: N C X, kernel: C X", x, kernel)["X"]
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device):
        spectrum = torch.fft.rfft(x.to(wide), 2 * n) * torch.fft.rfft(kernel.to(wide), 2 * n)
        out = torch.fft.irfft(spectrum, 2 * n)
    return out[..., n // 2 : n // 2 + n].to(x.dtype)


def local_product(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve every channel with its own small kernel, the size kept (odd kernels, zeros outside).

    Args:
        x: [N, C, Y, X] or [N, C, X]. kernel: [C, k, k] or [C, k] for all samples, or with N in front, one for each.

    Example:
        >>> local_product(torch.ones(2, 1, 3), torch.tensor([[1.0, 1.0, 1.0]])).tolist()
        [[[2.0, 3.0, 2.0]], [[2.0, 3.0, 2.0]]]
    """
    axes, each = x.dim() - 2, kernel.dim() == x.dim()
    if axes not in (1, 2) or kernel.dim() not in (axes + 1, axes + 2):
        raise InputError(f"x has {x.dim()} axes and the kernel {kernel.dim()}; expected [N, C, ...] and [C, k ...]")
    if kernel.shape[-1] % 2 == 0:
        raise InputError(f"the kernel is {kernel.shape[-1]} wide; expected an odd width")
    if kernel.shape[int(each)] != x.shape[1] or (each and len(kernel) != len(x)):
        raise InputError(f"x is {list(x.shape)} and the kernel {list(kernel.shape)}; samples and channels must agree")
    convolve = torch.nn.functional.conv1d if axes == 1 else torch.nn.functional.conv2d
    flat, weight = (x.flatten(0, 1)[None], kernel.flatten(0, 1)) if each else (x, kernel)
    out = convolve(flat, weight.unsqueeze(1), padding=kernel.shape[-1] // 2, groups=flat.shape[1])
    return out.view_as(x)
