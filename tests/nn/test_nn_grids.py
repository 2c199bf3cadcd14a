"""Layers over grids: LightNet's field beside a loop over tokens, axes in any order, and scans one by one."""

import math

import pytest
import torch

from lineament.models import GridClassifier
from lineament.nn import Field, Mixer, Scanned, ToeplitzEncoding, coordinates, cosines, global_field, published
from lineament.nn.config import MixerConfig
from lineament.nn.lightnet import LightNet

D, GRID = 16, (3, 4)
N = math.prod(GRID)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(name="lightnet", **more):
    torch.manual_seed(0)
    return Mixer(*published(name, model_width=D, heads=4, **more)).double()


def same(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def turned(x, place, theta):
    """MD-LRPE of one vector [K] at one place, channel by channel."""
    slot = math.ceil(len(x) / len(place))
    angles = [place[j // slot] * theta ** (-2 * (j % slot) / slot) for j in range(len(x))]
    return torch.stack(
        [f(torch.tensor(a, dtype=x.dtype)) * x[j] for f in (torch.cos, torch.sin) for j, a in enumerate(angles)]
    )


@pytest.mark.parametrize("grid", [(5,), (2, 3), (2, 1, 2)])
def test_cosines_are_the_formula_channel_by_channel(grid):
    x, place = draw(1, math.prod(grid), 2, 5), coordinates(grid).double()
    found = cosines(x, place[None], 1e2)
    for n, at in enumerate(place.tolist()):
        for h in range(2):
            same(found[0, n, h], turned(x[0, n, h], at, 1e2))


@pytest.mark.parametrize("groups", [1, 2])
def test_the_field_is_a_loop_over_tokens(groups):
    q, k, v = draw(2, N, 2 * groups, 4), draw(2, N, 2, 4, seed=1), draw(2, N, 2, 3, seed=2)
    place, expected = coordinates(GRID).double(), torch.zeros(2, N, 2 * groups, 3, dtype=torch.float64)
    for b in range(2):
        for h in range(2 * groups):
            own, S = h // groups, torch.zeros(8, 3, dtype=torch.float64)
            whole = sum(k[b, n, own].exp() for n in range(N))
            for n in range(N):
                S += torch.outer(turned(k[b, n, own].exp() / whole, place[n].tolist(), 1e4), v[b, n, own])
            for n in range(N):
                expected[b, n, h] = turned(q[b, n, h], place[n].tolist(), 1e4) @ S
    same(global_field(q, k, v, place=place[None]), expected)


def test_shares_do_not_underflow_under_autocast():
    q, k, v = draw(1, 40, 2, 4).float(), draw(1, 40, 2, 4, seed=1).float(), draw(1, 40, 2, 3, seed=2).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = global_field(q, k, v)
    same(found, global_field(q, k, v), 1e-6)


@torch.no_grad()
def test_the_layers_last_token_is_the_causal_layers():
    """On a line, with the same weights: what the last token of the causal layer sees is what all see here."""
    causal, x = layer(), draw(2, N, D)
    same(Field(causal)(x, grid=(N,))[:, -1], causal(x)[:, -1])


@torch.no_grad()
def test_axes_may_come_in_any_order():
    x = draw(2, *GRID, D)
    other = x.transpose(1, 2)
    plain, placed = Field(layer(options={"theta": None})), Field(layer())
    found = plain(other.flatten(1, 2), grid=GRID[::-1]).unflatten(1, GRID[::-1]).transpose(1, 2)
    same(found.flatten(1, 2), plain(x.flatten(1, 2), grid=GRID))
    found = placed(other.flatten(1, 2), grid=GRID[::-1]).unflatten(1, GRID[::-1]).transpose(1, 2)
    assert not torch.allclose(found.flatten(1, 2), placed(x.flatten(1, 2), grid=GRID))  # positions know their axis


@torch.no_grad()
def test_class_tokens_stand_at_zero_and_padding_is_not_seen():
    field, x = Field(layer()), draw(2, 2 + N, D)
    whole = field(x, grid=GRID)
    swapped = torch.cat([x[:, [1, 0]], x[:, 2:]], 1)
    same(field(swapped, grid=GRID), torch.cat([whole[:, [1, 0]], whole[:, 2:]], 1))
    mask = torch.arange(2 + N).expand(2, -1) > 0
    same(field(x, grid=GRID, mask=mask)[:, 1:], field(x[:, 1:], grid=GRID))
    assert not torch.allclose(whole[:, 1:], field(x[:, 1:], grid=GRID))


def test_gradients_of_a_field():
    field = Field(layer())
    x = draw(1, N + 1, D).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: field(x, grid=GRID), x, fast_mode=True)


@torch.no_grad()
def test_a_virtual_zero_is_one_more_logit_that_nobody_reads():
    q, k, v, x = draw(1, 7, 2, 4), draw(1, 7, 2, 4, seed=1), draw(1, 7, 2, 3, seed=2), draw(1, 7, D, seed=3)
    config = MixerConfig(kind="lightnet", heads=2, key_heads=2, key_width=4, value_width=3, model_width=D)
    found, _ = LightNet(config, theta=None, virtual_zero=True)(q, k, v, x=x)
    for t in range(7):
        share = k[:, : t + 1].exp() / (1 + k[:, : t + 1].exp().sum(1, keepdim=True))
        S = torch.einsum("bshk,bshv->bhkv", share, v[:, : t + 1])
        same(found[:, t], torch.einsum("bhk,bhkv->bhv", q[:, t], S))


def test_a_causal_token_of_logit_minus_infinity_has_no_influence():
    x = draw(1, 6, D)
    config = MixerConfig(kind="lightnet", heads=2, key_heads=2, key_width=4, value_width=3, model_width=D)
    mixer, kept = LightNet(config, theta=None), [1, 2, 4]
    q, k, v = draw(1, 6, 2, 4), draw(1, 6, 2, 4, seed=1), draw(1, 6, 2, 3, seed=2)
    k[:, [0, 3, 5]] = -math.inf
    leaves = [y.requires_grad_() for y in (q, k, v)]
    found, _ = mixer(*leaves, x=x)
    same(found[:, kept], mixer(*(y[:, kept] for y in leaves), x=x[:, kept])[0])
    found.square().sum().backward()
    assert all(y.grad.isfinite().all() for y in leaves)
    assert not k.grad[:, [0, 3, 5]].any()


@pytest.mark.parametrize("scans", [1, 2, 4])
@torch.no_grad()
def test_scans_are_the_layer_run_in_every_order(scans):
    causal, x = layer("lightning"), draw(2, N, D)
    index = torch.arange(N).view(GRID)
    rows, columns = index.flatten(), index.T.flatten()
    expected = torch.zeros_like(x)
    for order in [rows, rows.flip(0), columns, columns.flip(0)][:scans]:
        expected[:, order] += causal(x[:, order])
    same(Scanned(causal, scans)(x, grid=GRID), expected)


@torch.no_grad()
def test_two_scans_see_the_whole_grid_and_one_does_not():
    x = draw(1, N, D)
    other = torch.cat([x[:, :-1], draw(1, 1, D, seed=5)], 1)
    for scans, sees in ((1, False), (2, True), (4, True)):
        layer_ = Scanned(layer("lightning"), scans)
        assert torch.allclose(layer_(x, grid=GRID)[:, 0], layer_(other, grid=GRID)[:, 0]) is not sees


def test_pixels_and_patches_are_classified():
    net = GridClassifier([Field(layer()) for _ in range(2)], D, patch=2, encode=ToeplitzEncoding(D, 4, axes=2)).double()
    logits = net(draw(3, 1, 6, 8))
    assert logits.shape == (3, 10)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Field(layer("lightning")), "made of a LightNet layer .* given 'lightning'"),
        (lambda: Field(layer(options={"virtual_zero": True})), "without virtual zero"),
        (lambda: Field(layer())(draw(1, 5, D), grid=GRID), "a grid of 3 x 4 has 12 tokens; x has 5"),
        (lambda: Scanned(layer())(draw(1, 5, D), grid=GRID), "a grid of 3 x 4 has 12 tokens; x has 5"),
        (lambda: Scanned(layer(), 3)(draw(1, N, D), grid=GRID), "scans=3 for 2 axes; expected 1, 2 or 4"),
        (lambda: global_field(draw(1, 5, 2, 4), draw(1, 5, 4, 4), draw(1, 5, 4, 4)), "at least as many heads"),
        (lambda: global_field(*[draw(1, 5, 2, 4)] * 3, place=draw(1, 4, 2)), "place has shape"),
    ],
)
def test_wrong_grids_and_layers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
