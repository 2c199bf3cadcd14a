"""Linear attention with its normaliser equals the quadratic formula."""

import pytest
import torch
from recurrence_problems import problem

from lineament.ops.linear import linear_attention


def quadratic(q, k, v, log_decay, eps):
    since = log_decay.cumsum(1)
    gap = (since[:, :, None] - since[:, None]).movedim(3, 1)
    causal = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    weight = torch.einsum("bthk,bshk->bhts", q, k) * gap.masked_fill(~causal, -torch.inf).exp()
    return torch.einsum("bhts,bshv->bthv", weight, v) / (weight.sum(-1).transpose(1, 2)[..., None] + eps)


def inputs(T=70):
    p = problem(T, delta=False, strength=0.1)
    return [x.requires_grad_() for x in (p.q.exp(), p.k.exp(), p.v, p.log_decay)]


def test_equals_the_quadratic_formula_with_gradients():
    q, k, v, gate = inputs()
    found, _ = linear_attention(q, k, v, log_decay=gate)
    wanted = quadratic(q, k, v, gate, 1e-6)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(*(torch.autograd.grad(x.sin().sum(), [q, k, v, gate]) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("normalise", [True, False])
def test_cut_and_packed(normalise):
    q, k, v, _ = inputs()
    whole, last = linear_attention(q, k, v, normalise=normalise)
    first, state = linear_attention(q[:, :20], k[:, :20], v[:, :20], normalise=normalise)
    rest, state = linear_attention(q[:, 20:], k[:, 20:], v[:, 20:], normalise=normalise, state=state)
    torch.testing.assert_close((torch.cat([first, rest], 1), state), (whole, last))
    borders = torch.tensor([0, 20, 70])
    packed, states = linear_attention(q[:1], k[:1], v[:1], normalise=normalise, cu_seqlens=borders)
    again, state = linear_attention(q[:1, :20], k[:1, :20], v[:1, :20], normalise=normalise)
    torch.testing.assert_close((packed[:, :20], states[:1]), (again, state))
    assert last.shape[-1] == v.shape[-1] + normalise


def test_weights_sum_to_one():
    q, k, _, _ = inputs()
    o, _ = linear_attention(q, k, torch.ones(2, 70, 2, 3, dtype=torch.float64), eps=0.0)
    torch.testing.assert_close(o, torch.ones_like(o))


def test_half_precision_divides_in_float32():
    q, k, v, _ = (x.detach().bfloat16() for x in inputs())
    o, state = linear_attention(q, k, v)
    wanted, _ = linear_attention(q.double(), k.double(), v.double())
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(o.double(), wanted, rtol=2**-8, atol=1e-5)
