"""Attention over pairs of keys: the exact form against plain sums, the polynomial form against the exact one."""

import math
from itertools import product

import pytest
import torch

from lineament._base.errors import InputError
from lineament.ops import (
    kernel_error,
    polynomial_error,
    polynomial_tensor_attention,
    polynomial_tensor_scan,
    tensor_attention,
    tensor_cost,
    tensor_polynomial,
)


def problem(T=5, keys=2, B=2, Hq=2, H=1, K=3, V=2, S=None, size=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, T, Hq, K)] + [(B, S or T, H, K)] * keys + [(B, S or T, H, V)] * keys
    q, *rest = (((torch.rand(s, generator=g, dtype=torch.float64) * 2 - 1) * size).requires_grad_() for s in shapes)
    return q, rest[:keys], rest[keys:]


def plain(q, keys, values, seen=lambda b, i, places: True, kernel=torch.exp):
    """The definition, one combination of positions after another."""
    B, T, Hq, _ = q.shape
    out = []
    for b, i, h in product(range(B), range(T), range(Hq)):
        g, total, above = h * keys[0].shape[2] // Hq, 0.0, torch.zeros_like(values[0][0, 0, 0])
        for places in product(range(keys[0].shape[1]), repeat=len(keys)):
            if seen(b, i, places):
                score, value = q[b, i, h], 1.0
                for k, v, j in zip(keys, values, places, strict=True):
                    score, value = score * k[b, j, g], value * v[b, j, g]
                weight = kernel(score.sum())
                total, above = total + weight, above + weight * value
        out.append(above / total if isinstance(total, torch.Tensor) else above)
    return torch.stack(out).view(B, T, Hq, -1)


def same_with_gradients(found, wanted, q, keys, values, **tolerance):
    torch.testing.assert_close(found, wanted, **tolerance)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    grads = [torch.autograd.grad((x * weights).sum(), [q, *keys, *values]) for x in (found, wanted)]
    torch.testing.assert_close(*grads, **tolerance)


@pytest.mark.parametrize("block", [10, 1 << 22])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "keys"), [(1, 2), (4, 2), (5, 1), (3, 3)])
def test_the_exact_form_is_the_definition(T, keys, causal, block, monkeypatch):
    monkeypatch.setitem(tensor_attention.__globals__, "SCORES", block)  # the module's name is the function's
    inputs = problem(T, keys)
    found = tensor_attention(*inputs, causal=causal)
    same_with_gradients(found, plain(*inputs, lambda b, i, places: not causal or max(places) <= i), *inputs)


@pytest.mark.parametrize("windows", [(1, 1), (2, 3), (9, 9)])
def test_windows_take_the_last_positions(windows):
    inputs = problem(5, B=1)
    wanted = plain(*inputs, lambda b, i, at: all(0 <= i - j < w for j, w in zip(at, windows, strict=True)))
    same_with_gradients(tensor_attention(*inputs, windows=windows), wanted, *inputs)
    if windows == (9, 9):
        torch.testing.assert_close(wanted, tensor_attention(*inputs, causal=True))


@pytest.mark.parametrize("form", [tensor_attention, polynomial_tensor_attention])
def test_padding_is_never_combined(form):
    q, keys, values = problem(5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1]]).bool()
    wanted = form(q, keys, values, key_mask=mask)
    poisoned = [[x.masked_fill(~mask[..., None, None], math.nan) for x in of] for of in (keys, values)]
    torch.testing.assert_close(form(q, *poisoned, key_mask=mask), wanted)
    if form is tensor_attention:
        torch.testing.assert_close(wanted, plain(q, keys, values, lambda b, i, at: all(mask[b, j] for j in at)))
    else:
        one = form(q[:1], *([x[:1, :3] for x in of] for of in (keys, values)))
        torch.testing.assert_close(wanted[:1], one)
    assert (form(q, keys, values, key_mask=mask & False) == 0).all()


def test_ones_as_second_key_and_value_give_ordinary_attention():
    q, (k, _), (v, _) = problem(7)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), scale=1.0, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(tensor_attention(q, [k, torch.ones_like(k)], [v, torch.ones_like(v)]), dense)
    torch.testing.assert_close(tensor_attention(q, [k], [v]), dense)


def test_the_two_keys_may_be_swapped_and_tokens_permuted():
    q, (k1, k2), (v1, v2) = problem(6)
    out, order = tensor_attention(q, [k1, k2], [v1, v2]), torch.randperm(6)
    torch.testing.assert_close(tensor_attention(q, [k2, k1], [v2, v1]), out)
    moved = [x[:, order] for x in (q, k1, k2, v1, v2)]
    torch.testing.assert_close(tensor_attention(moved[0], moved[1:3], moved[3:]), out[:, order])


def test_weights_sum_to_one():
    q, keys, values = problem(6, size=3.0)
    ones = [torch.ones_like(v) for v in values]
    torch.testing.assert_close(tensor_attention(q, keys, ones), torch.ones(2, 6, 2, 2, dtype=torch.float64))


@pytest.mark.parametrize("method", ["chebyshev", "taylor"])
@pytest.mark.parametrize("keys", [1, 2, 3])
def test_the_polynomial_form_converges_to_the_exact_one_forward_and_backward(keys, method):
    inputs = problem(5, keys)
    near = polynomial_tensor_attention(*inputs, degree=16, method=method)
    same_with_gradients(near, tensor_attention(*inputs), *inputs, rtol=1e-8, atol=1e-9)


def test_the_polynomial_form_is_attention_with_the_polynomial_as_kernel():
    inputs = problem(4, size=0.8)
    taylor = lambda x: sum(x**p / math.factorial(p) for p in range(4))  # noqa: E731
    found = polynomial_tensor_attention(*inputs, degree=3, method="taylor")
    same_with_gradients(found, plain(*inputs, kernel=taylor), *inputs)


def test_chebyshev_meets_exp_at_its_nodes():
    c = tensor_polynomial._coefficients(torch.tensor([0.5, 2.0]), 5, "chebyshev")
    nodes = (math.pi * (torch.arange(6) + 0.5) / 6).cos().double()
    for radius, row in zip((0.5, 2.0), c, strict=True):
        x = radius * nodes
        torch.testing.assert_close(sum(row[p] * x**p for p in range(6)), x.exp(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["chebyshev", "taylor"])
@pytest.mark.parametrize(("size", "degree"), [(0.5, 2), (0.5, 4), (0.8, 6), (0.8, 8)])
def test_the_error_stays_below_its_bound(size, degree, method):
    inputs = problem(12, size=size, seed=degree)
    near = polynomial_tensor_attention(*inputs, degree=degree, method=method)
    error = (near - tensor_attention(*inputs)).abs().amax(-1)
    bound = polynomial_error(*inputs, degree=degree, method=method)
    assert (error <= bound).all()
    assert bound.max() < 1
    x = torch.linspace(-size, size, 999, dtype=torch.float64)
    c = tensor_polynomial._coefficients(torch.tensor(size), degree, method)
    relative = (sum(c[p] * x**p for p in range(degree + 1)) / x.exp() - 1).abs().max()
    assert relative <= kernel_error(size, degree, method) <= 60 * relative


@pytest.mark.parametrize("cuts", [(), (1,), (3, 4)])
@pytest.mark.parametrize("chunk", [2, 16])
def test_the_causal_recurrence_is_the_masked_sum_and_may_be_cut(chunk, cuts):
    q, keys, values = problem(5, size=0.8, B=1)
    kernel = lambda x: sum(x**p / math.factorial(p) for p in range(4))  # noqa: E731
    wanted, state, out = plain(q, keys, values, lambda b, i, at: max(at) <= i, kernel), None, []
    for a, b in zip((0, *cuts), (*cuts, 5), strict=True):
        part = ([x[:, a:b] for x in of] for of in (keys, values))
        o, state = polynomial_tensor_scan(
            q[:, a:b], *part, radius=1.0, degree=3, method="taylor", state=state, chunk=chunk
        )
        out.append(o)
    same_with_gradients(torch.cat(out, 1), wanted, q, keys, values)
    assert [x.shape for x in state.sums] == [(1, 1, math.comb(6, 3), 3)] * 2


def test_gradcheck():
    q, (k1, k2), (v1, v2) = problem(3, B=1, Hq=1)
    for form in (
        lambda q, a, b, c, d: tensor_attention(q, [a, b], [c, d], causal=True),
        lambda q, a, b, c, d: tensor_attention(q, [a, b], [c, d], windows=(2, 2)),
        lambda q, a, b, c, d: polynomial_tensor_attention(q, [a, b], [c, d], radius=3.0),
        lambda q, a, b, c, d: polynomial_tensor_scan(q, [a, b], [c, d], radius=3.0)[0],
    ):
        assert torch.autograd.gradcheck(form, (q, k1, k2, v1, v2))


def test_half_precision_takes_its_softmax_in_float32():
    q, keys, values = problem(24, K=8, size=0.7)
    half = [[x.detach().bfloat16() for x in of] for of in ([q], keys, values)]
    wide = [[x.double() for x in of] for of in half]
    for form in (tensor_attention, polynomial_tensor_attention):
        found, wanted = form(half[0][0], *half[1:]), form(wide[0][0], *wide[1:])
        assert found.dtype == torch.bfloat16
        assert (found - wanted).abs().max() < 0.005 * wanted.abs().max()
    plain = [[x.float() for x in of] for of in half]
    with torch.autocast("cpu", dtype=torch.bfloat16):  # must not reach into the state either
        found, wanted = (polynomial_tensor_scan(y[0][0], *y[1:], radius=3.0)[0] for y in (plain, wide))
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_what_the_two_forms_cost():
    assert tensor_cost(64, 4, degree=2).exact == 64**3 * 8
    assert [tensor_cost(1, d, degree=g).rank for d, g in ((4, 2), (4, 4), (8, 4), (16, 4))] == [15, 70, 495, 4845]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.zeros(2, 5, 1, 3)}, "expected two lists"),
        ({"keys": []}, "got 0 keys and 2 values"),
        ({"windows": (2,)}, "expected 2 widths"),
        ({"windows": (2, 0)}, "expected 2 widths"),
        ({"q": torch.zeros(2, 5, 2, 4)}, "K=3"),
        ({"q": torch.zeros(2, 3, 2, 3), "causal": True}, "needs as many"),
    ],
)
def test_wrong_input_to_the_exact_form_is_named(change, message):
    q, keys, values = problem(5)
    given = {"q": q, "keys": keys, "values": values, **change}
    with pytest.raises(InputError, match=message):
        tensor_attention(**given)


def test_too_many_combinations_are_refused_with_a_way_out():
    q, keys, values = (torch.zeros(1, 3000, 1, 1),) * 3
    with pytest.raises(InputError, match="give windows, or fewer than 2048"):
        tensor_attention(q, [keys] * 3, [values] * 3)


def test_wrong_input_to_the_polynomial_form_is_named():
    q, keys, values = problem(5)
    with pytest.raises(InputError, match="Did you mean 'taylor'"):
        polynomial_tensor_attention(q, keys, values, method="tailor")
    with pytest.raises(InputError, match="rank of at most 20000"):
        polynomial_tensor_attention(q, keys, values, degree=60)
    with pytest.raises(InputError, match="radius is -1"):
        polynomial_tensor_attention(q, keys, values, radius=-1)
    with pytest.raises(InputError, match="not positive here: scores are too large"):
        polynomial_tensor_attention(q * 0 - 10, [k * 0 + 1 for k in keys], values, degree=3, method="taylor")
    with pytest.raises(InputError, match="needs as many"):
        polynomial_tensor_scan(q[:, :2], keys, values, radius=1.0)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"windows": [2, 3]}])
def test_an_empty_batch_is_answered(options):
    x = torch.zeros(0, 6, 2, 4)
    assert tensor_attention(x, [x, x], [x, x], **options).shape == (0, 6, 2, 4)
