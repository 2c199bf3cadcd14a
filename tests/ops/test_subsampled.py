"""Subsampled attention: dense at reduction 1, each draw a masked dense attention, causal, repeatable, never NaN."""

import math
from itertools import permutations

import pytest
import torch

from lineament._base.errors import InputError
from lineament.ops.subsampled import subsampled_attention, subsampled_connections

LENGTHS = [1, 2, 7, 16, 33]


def problem(T=9, B=2, Hq=4, H=2, K=3, V=5, S=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, T, Hq, K), (B, S or T, H, K), (B, S or T, H, V)
    return [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]


def dense(q, k, v, keep, bias=None):
    """Softmax over the connections `keep` [.., T, S], one target after another; zeros where there is none."""
    B, T, Hq, _ = q.shape
    k, v = (x.repeat_interleave(Hq // x.shape[2], 2) for x in (k, v))
    keep = keep.expand(B, Hq, T, k.shape[1])
    out = []
    for b in range(B):
        for h in range(Hq):
            for i in range(T):
                j = keep[b, h, i].nonzero().flatten()
                s = k[b, j, h] @ q[b, i, h]
                s = s if bias is None else s + bias.expand(B, Hq, T, -1)[b, h, i, j]
                out.append(s.softmax(0) @ v[b, j, h] if len(j) else torch.zeros_like(v[b, 0, h]))
    return torch.stack(out).view(B, Hq, T, -1).transpose(1, 2)


def same_with_gradients(found, wanted, inputs):
    torch.testing.assert_close(found, wanted)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    grads = [torch.autograd.grad((x * weights).sum(), inputs) for x in (found, wanted)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mode", ["unbiased", "local"])
def test_without_reduction_it_is_dense_attention_whatever_the_draw(mode, causal, T):
    inputs = problem(T)
    keep = torch.ones(T, T, dtype=torch.bool)
    found = subsampled_attention(*inputs, mode=mode, reduction=1, sigma=5.0, causal=causal, seed=T)
    same_with_gradients(found, dense(*inputs, keep.tril() if causal else keep), inputs)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mode", ["unbiased", "local"])
def test_a_draw_is_dense_attention_over_its_connections(mode, causal, T):
    inputs, options = problem(T), {"mode": mode, "reduction": 3, "causal": causal, "seed": 5}
    keep = subsampled_connections(T, **options)
    bias = torch.randn(1, 4, T, T, dtype=torch.float64)
    same_with_gradients(subsampled_attention(*inputs, **options), dense(*inputs, keep), inputs)
    same_with_gradients(subsampled_attention(*inputs, bias=bias, **options), dense(*inputs, keep, bias), inputs)


@pytest.mark.parametrize(("T", "reduction"), [(16, 4), (17, 4), (5, 2.5), (3, 8)])
def test_local_uses_every_source_in_exactly_one_block(T, reduction):
    keep = subsampled_connections(T, reduction=reduction, sigma=3.0, seed=1)
    w = math.ceil(T / reduction)
    for j in range(T):
        users = keep[:, j].nonzero().flatten().tolist()
        assert users == [i for i in range(T) if i // w == users[0] // w]
    assert keep.sum() == sum(w * min(w, T - a) if a + w <= T else (T - a) ** 2 for a in range(0, T, w))


def test_sigma_goes_from_windows_to_anywhere():
    windows = subsampled_connections(12, reduction=3, sigma=0.0)
    assert torch.equal(windows, torch.block_diag(*[torch.ones(4, 4)] * 3).bool())

    def reach(sigma):
        return torch.stack([subsampled_connections(12, reduction=3, sigma=sigma, seed=s) for s in range(200)])

    near, far = reach(1.0).double().mean(0), reach(math.inf).double().mean(0)
    assert near[0, 0] > 0.9
    assert near[0, 11] == 0
    assert (far - 1 / 3).abs().max() < 0.15


def test_unbiased_gives_all_targets_the_same_sources():
    keep = subsampled_connections(10, mode="unbiased", reduction=4, seed=2)
    assert keep.any(0).sum() == 3
    assert (keep == keep[:1]).all()


def test_the_mean_numerator_over_all_draws_is_the_dense_one_times_the_share():
    T, k = 5, 2
    q, keys, v = problem(T, B=1, Hq=1, H=1)
    kernel = (q[0, :, 0] @ keys[0, :, 0].T).exp()
    kept = [kernel[:, list(order[:k])] @ v[0, list(order[:k]), 0] for order in permutations(range(T))]
    torch.testing.assert_close(torch.stack(kept).mean(0), k / T * kernel @ v[0, :, 0])
    # and the draws come from all subsets, evenly
    counts = torch.stack([subsampled_connections(T, mode="unbiased", reduction=2.5, seed=s)[0] for s in range(2000)])
    subsets, each = counts.unique(dim=0, return_counts=True)
    assert len(subsets) == math.comb(T, k)
    assert each.min() > 140


@pytest.mark.parametrize("mode", ["unbiased", "local"])
@pytest.mark.parametrize("sigma", [0.0, 3.0, math.inf])
def test_causal_never_looks_ahead_and_is_never_nan(mode, sigma):
    T = 13
    for seed in range(20):
        keep = subsampled_connections(T, mode=mode, reduction=4, sigma=sigma, causal=True, seed=seed)
        assert not keep.triu(1).any()
        assert keep.diagonal().all()  # itself, so that no target is left without a source
    inputs = problem(T)
    changed = [torch.cat([x[:, :8], x[:, 8:] + 1], 1) for x in inputs]
    a, b = (subsampled_attention(*x, mode=mode, sigma=sigma, causal=True, seed=3) for x in (inputs, changed))
    assert torch.equal(a[:, :8], b[:, :8])
    assert a.isfinite().all()


def test_rows_of_weights_sum_to_one():
    q, k, v = problem(11)
    for mode in ("unbiased", "local"):
        out = subsampled_attention(q, k, torch.ones_like(v), mode=mode, reduction=3, seed=1)
        torch.testing.assert_close(out, torch.ones_like(out))


def test_the_same_seed_is_the_same_draw_and_another_is_another():
    inputs = problem(32)
    a, b, c = (subsampled_attention(*inputs, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("mode", ["unbiased", "local"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_seen_and_short_samples_keep_their_share(mode, side):
    q, k, v = problem(12, B=3)
    real = torch.tensor([12, 5, 1])
    mask = torch.arange(12) < real[:, None]
    mask = mask if side == "right" else mask.flip(1)
    poison = [x.detach().masked_fill(~mask[..., None, None], 1e4) for x in (k, v)]
    out = subsampled_attention(q, *poison, mode=mode, reduction=3, key_mask=mask, seed=4)
    one = torch.eye(12, dtype=torch.float64)[None, :, None].expand(3, -1, 2, -1)
    keep = subsampled_attention(q * 0, k, one, mode=mode, reduction=3, key_mask=mask, seed=4)[:, :, 0] > 0
    assert not (keep & ~mask[:, None]).any()
    for b in range(3):
        assert keep[b][mask[b]].any(1).all()
    torch.testing.assert_close(out[mask], dense(q, *poison, keep[:, None])[mask])
    empty = subsampled_attention(q, k, v, mode=mode, key_mask=torch.zeros(3, 12))
    assert (empty == 0).all()


def test_a_mask_of_documents_keeps_them_apart_and_shows_each_token_itself():
    inputs, document = problem(10), torch.tensor([0] * 4 + [1] * 6)
    mask = (document[:, None] == document)[None, None].tril()
    one = torch.eye(10, dtype=torch.float64)[None, :, None].expand(2, -1, 2, -1)
    options = {"reduction": 3, "sigma": 4.0, "mask": mask, "seed": 2}
    keep = subsampled_attention(inputs[0] * 0, inputs[1], one, **options)[:, :, 0] > 0
    assert not (keep & ~mask[0]).any()
    assert keep[0].diagonal().all()
    same_with_gradients(subsampled_attention(*inputs, **options), dense(*inputs, keep[:, None]), inputs)
    dense_too = subsampled_attention(*inputs, **{**options, "reduction": 1})
    torch.testing.assert_close(dense_too, dense(*inputs, mask))


def test_more_keys_than_queries_as_in_decoding():
    q, k, v = problem(3, S=8)
    found = subsampled_attention(q, k, v, mode="unbiased", reduction=1, causal=True)
    torch.testing.assert_close(found, dense(q, k, v, torch.ones(3, 8, dtype=torch.bool).tril(5)))


@pytest.mark.parametrize(("grid", "reduction"), [((8, 8), 4), ((4, 8), 4), ((6, 5), 3), ((1, 7), 2)])
def test_windows_of_an_image(grid, reduction):
    N = grid[0] * grid[1]
    keep = subsampled_connections(N, grid=grid, reduction=reduction, sigma=0.0)
    assert keep.diagonal().all()
    assert torch.equal(keep, keep.T)
    w = math.ceil(N / reduction)
    assert sorted(keep.sum(1).unique().tolist()) == sorted({w, N - w * (math.ceil(N / w) - 1)})
    noisy = subsampled_connections(N, grid=grid, reduction=reduction, sigma=2.0, seed=1)
    assert noisy.any(0).all()
    if grid == (8, 8):  # four quarters
        y, x = torch.arange(64) // 8 // 4, torch.arange(64) % 8 // 4
        assert torch.equal(keep, (y[:, None] == y) & (x[:, None] == x))
    inputs = problem(N)
    out = subsampled_attention(*inputs, grid=grid, reduction=reduction, sigma=2.0, seed=1)
    torch.testing.assert_close(out, dense(*inputs, noisy))


def test_gradcheck():
    inputs = problem(5, B=1, Hq=2, H=1)
    assert torch.autograd.gradcheck(lambda *x: subsampled_attention(*x, reduction=2, causal=True), inputs)
    assert torch.autograd.gradcheck(lambda *x: subsampled_attention(*x, mode="unbiased", reduction=2), inputs)


def test_half_precision_keeps_its_statistics_in_float32():
    wide = problem(64, K=16)
    half = [x.detach().bfloat16() for x in wide]
    found = subsampled_attention(*half, causal=True)
    wanted = subsampled_attention(*[x.double() for x in half], causal=True)
    assert found.dtype == torch.bfloat16
    assert (found - wanted).abs().max() < 0.01 * wanted.abs().max()  # the rounding of the result alone is 0.004


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "locl"}, "Did you mean 'local'"),
        ({"reduction": 0.5}, "reduction is 0.5; expected 1"),
        ({"reduction": math.nan}, "reduction is nan"),
        ({"sigma": -1.0}, "sigma is -1.0"),
        ({"grid": (2, 3)}, "grid .2, 3. with 9 tokens"),
        ({"grid": (3, 3), "mode": "unbiased"}, "expected rows x columns"),
        ({"grid": (3, 3), "key_mask": torch.ones(2, 9)}, "not both"),
        ({"mask": torch.ones(9, 9).bool()}, "mask has shape"),
        ({"bias": torch.ones(1, 3, 9, 9)}, "bias has shape"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        subsampled_attention(*problem(9), **options)


def test_wrong_shapes_are_named():
    q, k, v = problem(4)
    with pytest.raises(InputError, match="local subsampling needs as many"):
        subsampled_attention(q, k[:, :3], v[:, :3])
    with pytest.raises(InputError, match="causal attention needs"):
        subsampled_attention(q, k[:, :3], v[:, :3], mode="unbiased", causal=True)
    with pytest.raises(InputError, match="must divide"):
        subsampled_attention(q[:, :, :3], k, v)
    with pytest.raises(InputError, match="at least as many heads"):
        subsampled_attention(q[:, :, :1], k, v)


def test_cross_attention_with_a_mask_and_more_targets_than_sources():
    q, k, v = problem(9, S=4)
    mask = torch.rand(2, 1, 9, 4) < 0.6
    found = subsampled_attention(q, k, v, mode="unbiased", reduction=1, mask=mask)
    torch.testing.assert_close(found, dense(q, k, v, mask))
