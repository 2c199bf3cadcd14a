"""The HyperZ.Z.W products against plain sums."""

import pytest
import torch

from lineament._base.errors import InputError
from lineament.ops import centred_convolution, hyper_product, local_product

DRAW = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64).requires_grad_()


def test_the_product_over_space_is_the_sum_over_a_row_and_a_column():
    z, w, other = draw(2, 3, 5, 5), draw(3, 5, 5), draw(2, 3, 5, 5)
    wanted = torch.einsum("nchw,chw,ncwv->nchv", z, w, other)
    torch.testing.assert_close(hyper_product(z, w, other), wanted)
    assert torch.autograd.gradcheck(hyper_product, (z, w, other))
    assert (hyper_product(z * 0, w, other) == 0).all()


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_in_one_dimension_it_is_a_long_convolution(n):
    z, w, other = draw(2, 3, n), draw(3, n), draw(2, 3, n)
    x, wanted = z * w * other, torch.zeros(2, 3, n, dtype=torch.float64)
    for t in range(n):
        for s in range(n):
            if 0 <= t - s + n // 2 < n:
                wanted[..., t] += x[..., s] * w[:, t - s + n // 2]
    torch.testing.assert_close(hyper_product(z, w, other), wanted)
    torch.testing.assert_close(centred_convolution(x, w), wanted)
    assert torch.autograd.gradcheck(hyper_product, (z, w, other))


@pytest.mark.parametrize("axes", [1, 2])
def test_every_channel_has_its_small_kernel_and_every_sample_may(axes):
    x = draw(2, 3, *[5] * axes)
    each = draw(2, 3, *[3] * axes)
    pad = torch.nn.functional.pad(x, (1, 1) * axes)
    wanted = torch.zeros_like(x)
    for offset in torch.cartesian_prod(*[torch.arange(3)] * axes).view(-1, axes).tolist():
        part = pad
        for axis, o in enumerate(offset):
            part = part.narrow(2 + axis, o, 5)
        wanted = wanted + part * each[(slice(None), slice(None), *offset)].view(2, 3, *[1] * axes)
    torch.testing.assert_close(local_product(x, each), wanted)
    torch.testing.assert_close(local_product(x[:1], each[0]), wanted[:1])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: hyper_product(draw(1, 1, 2, 3), draw(1, 2, 3), draw(1, 1, 2, 3)), "needs square images"),
        (lambda: hyper_product(draw(1, 2, 3), draw(1, 3), draw(1, 2, 3)), "w has C=1, but z has C=2"),
        (lambda: local_product(draw(1, 1, 4), draw(1, 2)), "expected an odd width"),
        (lambda: local_product(draw(1, 2, 4), draw(1, 3)), "must agree"),
        (lambda: local_product(draw(1, 2, 4), draw(3)), "axes"),
    ],
)
def test_wrong_shapes_are_named(run, message):
    with pytest.raises(InputError, match=message):
        run()
