"""Linear attention in both directions equals its quadratic definition, and padding is nothing at all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lineament.ops.bidirectional import bidirectional_attention, bidirectional_weights


def problem(T=7, S=9, heads=(4, 2), F=5, V=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    phi_q = torch.rand(2, T, heads[0], F, generator=g, dtype=dtype)
    phi_k = torch.rand(2, S, heads[1], F, generator=g, dtype=dtype)
    v = torch.randn(2, S, heads[1], V, generator=g, dtype=dtype)
    mask = torch.rand(2, S, generator=g) < 0.7
    mask[:, 0] = True
    return phi_q, phi_k, v, mask


def reference(phi_q, phi_k, v, mask, eps=1e-6):
    groups = phi_q.shape[2] // phi_k.shape[2]
    out = phi_q.new_zeros(*phi_q.shape[:3], v.shape[-1])
    for b in range(len(phi_q)):
        for h in range(phi_q.shape[2]):
            for i in range(phi_q.shape[1]):
                weights = [phi_q[b, i, h] @ phi_k[b, j, h // groups] for j in range(phi_k.shape[1]) if mask[b, j]]
                values = [v[b, j, h // groups] for j in range(phi_k.shape[1]) if mask[b, j]]
                out[b, i, h] = sum(w * x for w, x in zip(weights, values, strict=True)) / (sum(weights) + eps)
    return out


def grads(out, inputs):
    return torch.autograd.grad(out.sin().sum(), inputs)


@settings(max_examples=15, deadline=None)
@given(
    T=st.integers(1, 6), S=st.integers(1, 9), heads=st.sampled_from([(1, 1), (3, 3), (4, 2), (6, 1)]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_the_reference_with_gradients(T, S, heads, seed):
    phi_q, phi_k, v, mask = problem(T, S, heads, seed=seed)
    inputs = [x.requires_grad_() for x in (phi_q, phi_k, v)]
    ours, theirs = bidirectional_attention(*inputs, mask=mask), reference(*inputs, mask)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(grads(ours, inputs), grads(theirs, inputs))


def test_weights_give_the_same_output():
    phi_q, phi_k, v, mask = problem()
    weights = bidirectional_weights(phi_q, phi_k, mask=mask)
    values = v.repeat_interleave(2, dim=2)
    ours = torch.einsum("bhts,bshv->bthv", weights, values)
    torch.testing.assert_close(ours, bidirectional_attention(phi_q, phi_k, v, mask=mask))
    assert (weights.masked_select(~mask[:, None, None].expand_as(weights)) == 0).all()


def test_padded_keys_contribute_exactly_nothing():
    phi_q, phi_k, v, mask = problem()
    before = bidirectional_attention(phi_q, phi_k, v, mask=mask)
    phi_k[~mask], v[~mask] = torch.inf, torch.nan
    assert torch.equal(bidirectional_attention(phi_q, phi_k, v, mask=mask), before)


def test_order_of_keys_does_not_matter():
    phi_q, phi_k, v, mask = problem()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    ours = bidirectional_attention(phi_q, phi_k[:, order], v[:, order], mask=mask[:, order])
    torch.testing.assert_close(ours, bidirectional_attention(phi_q, phi_k, v, mask=mask))


def test_a_row_without_a_real_key_is_zero():
    phi_q, phi_k, v, mask = problem()
    mask[1] = False
    out = bidirectional_attention(phi_q, phi_k, v, mask=mask)
    assert (out[1] == 0).all()
    assert out[0].abs().sum() > 0


@pytest.mark.parametrize("autocast", [False, True])
def test_sums_are_taken_in_float32(autocast):
    S = 4096
    phi = torch.ones(1, S, 1, 1, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = bidirectional_attention(phi[:, :1], phi, torch.arange(S).view(1, S, 1, 1).float())
    torch.testing.assert_close(out.item(), (S - 1) / 2, rtol=1e-6, atol=1e-3)


def test_errors_name_both_tensors():
    phi_q, phi_k, v, mask = problem()
    with pytest.raises(ValueError, match="v has S=8, but phi_k has S=9; these must agree"):
        bidirectional_attention(phi_q, phi_k, v[:, 1:])
    with pytest.raises(ValueError, match="head counts must divide one another"):
        bidirectional_attention(phi_q[:, :, :3], phi_k, v)
    with pytest.raises(ValueError, match="at least as many heads"):
        bidirectional_attention(phi_q[:, :, :1], phi_k, v, mask=mask)
