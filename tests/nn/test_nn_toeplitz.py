"""Toeplitz encodings: the matrix they stand for, along every axis, both ways and causally."""

import pytest
import torch

from lineament._base.errors import InputError
from lineament.nn.toeplitz import ToeplitzEncoding


def encoding(**options):
    torch.manual_seed(0)
    return ToeplitzEncoding(6, 2, **options).double()


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_the_toeplitz_matrix_it_says(causal):
    encode, x = encoding(causal=causal), torch.randn(2, 70, 6, dtype=torch.float64)
    steps = torch.arange(70)
    gap = (steps[:, None] - steps)[None]
    matrix = encode.rate.sigmoid()[0, :, None, None] ** gap.abs() * ((gap >= 0) | (not causal))
    matrix = matrix * (encode.query * encode.key).sum(-1)[0, :, None, None]
    expected = torch.einsum("hts,bshd->bthd", matrix, x.unflatten(-1, (2, 3))).flatten(2)
    torch.testing.assert_close(encode.sums(x), expected)


@torch.no_grad()
def test_axes_are_summed_each_with_its_own_parameters():
    encode, x = encoding(axes=2), torch.randn(2, 4, 5, 6, dtype=torch.float64)
    total = 0
    for axis in range(2):
        one = encoding()
        for name in ("query", "key", "rate"):
            getattr(one, name).copy_(getattr(encode, name)[axis : axis + 1])
        lines = x.movedim(1 + axis, 2)  # the axis last but channels
        total = total + one.sums(lines.flatten(0, 1)).view(lines.shape).movedim(2, 1 + axis)
    torch.testing.assert_close(encode.sums(x), total)


@torch.no_grad()
def test_a_head_that_forgets_at_once_multiplies():
    encode, x = encoding(), torch.randn(1, 9, 6, dtype=torch.float64)
    encode.rate.fill_(-1e4)
    scale = (encode.query * encode.key).sum(-1)[0].repeat_interleave(3)
    torch.testing.assert_close(encode.sums(x), scale * x)


def test_gradients():
    encode = encoding(axes=2)
    x = torch.randn(1, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(encode, x, fast_mode=True)


def test_wrong_shapes_are_named():
    with pytest.raises(InputError, match="heads must divide"):
        ToeplitzEncoding(7, 2)
    with pytest.raises(InputError, match="2 grid axes"):
        encoding(axes=2)(torch.zeros(1, 3, 6, dtype=torch.float64))
