"""The layer: dense in eval mode, drawn anew in training, the same draw under activation checkpointing."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lineament._base.errors import InputError
from lineament.nn import SubsampledAttention, Subsampling


def layer(**options):
    torch.manual_seed(0)
    return SubsampledAttention(8, 2, Subsampling(reduction=4, **options), causal=True).double()


def test_it_is_dense_in_eval_mode_and_random_in_training():
    made, x = layer(), torch.randn(2, 16, 8, dtype=torch.float64)
    q, k, v = made.qkv_proj(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(made.eval()(x), made.o_proj(dense.transpose(1, 2).flatten(2)))
    made.train()
    assert not torch.equal(made(x), made(x))
    assert torch.equal(made(x, seed=3), made.eval()(x, seed=3))


def test_checkpointing_replays_the_draw():
    made, x = layer(), torch.randn(1, 16, 8, dtype=torch.float64, requires_grad=True)
    grads = []
    for run in (made, lambda y: checkpoint(made, y, use_reentrant=False)):
        torch.manual_seed(7)
        y = run(x)
        torch.rand(5)  # what comes after must not change the replay
        grads.append((y, *torch.autograd.grad(y.square().sum(), [x, *made.parameters()])))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_wrong_settings_are_named():
    with pytest.raises(InputError, match="must be a multiple"):
        SubsampledAttention(8, 3)
    with pytest.raises(InputError, match="unknown mode"):
        Subsampling(mode="global")
