"""Every published layer joins the battery; and what each publication says of itself."""

import math
from dataclasses import replace

import pytest
import torch

from lineament._base.errors import InputError
from lineament.nn import (
    LAYERS,
    Mixer,
    MixerCache,
    MixerConfig,
    cosines,
    global_field,
    published,
    share_lower_bounds_,
)
from lineament.nn.decays import ForgetGate
from lineament.nn.latent import LatentHeads
from lineament.nn.lightnet import LightNet
from lineament.nn.positions import LearnedRotation
from lineament.nn.recurrent import Terms, recur
from lineament.testing import MIXER_LAWS, SLOW_LAWS, MixerCase, check_mixer

GROWS = ("softmax", "mla")  # they keep keys of every token
D = 16


def layer(name, heads=4, key_heads=None, **more):
    torch.manual_seed(0)
    return Mixer(*published(name, model_width=D, heads=heads, key_heads=key_heads, **more)).double().eval()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(name, law, **case):
    def make(heads, key_heads, **_):
        return layer(name, heads, key_heads, layer=1, layers=3)

    case = MixerCase(length=37, **case)
    if not check_mixer(make, case=case, begin=MixerCache, laws=[law], constant_state=name not in GROWS):
        pytest.skip("there are no backends to choose from")


@pytest.mark.parametrize("law", MIXER_LAWS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, law):
    check(name, law)


@pytest.mark.parametrize("name", ["kda", "lightnet"])
@pytest.mark.parametrize("law", ["compiled", "exported"])
def test_traced_layer(name, law):
    check(name, law)


@pytest.mark.slow
@pytest.mark.parametrize("law", SLOW_LAWS)
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in GROWS])
def test_layer_slowly(name, law):
    check(name, law)


@pytest.mark.slow
@pytest.mark.parametrize("law", ["compiled", "exported"])
@pytest.mark.parametrize("name", GROWS)
def test_softmax_layer_slowly(name, law):
    check(name, law)


def inner(name, **more):
    return layer(name, **more).heads.filling


def heads(seed=0, T=20, H=4, K=4, V=4):
    return [draw(2, T, H, width, seed=seed + i) for i, width in enumerate((K, K, V))] + [draw(2, T, D, seed=seed + 3)]


def same(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_retnet_is_gla_with_its_gate_held_constant():
    q, k, v, x = heads()
    retention, gla = inner("retnet"), inner("gla", key_width=4)
    found, _ = retention(q, k, v, x=x)
    log_decay = (1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float64))).log()
    same(found, recur(Terms(q, k, v, log_decay[:, None].expand(2, 20, 4, 4)))[0])
    gla.gate[1].bias.fill_(40.0)
    gla.gate[1].weight.zero_()
    same(gla(q, k, v, x=x)[0], recur(Terms(q, k, v))[0])  # an open gate forgets nothing


@torch.no_grad()
def test_delta_family_contains_its_members():
    q, k, v, x = heads()
    k = torch.nn.functional.normalize(k, dim=-1)
    plain, gated, kda = inner("deltanet"), inner("gated-deltanet", key_width=4, value_width=4), inner("kda")
    for mixer in (gated, kda):
        mixer.strength.load_state_dict(plain.strength.state_dict())
    gated.rate.fill_(-math.inf)
    same(gated(q, k, v, x=x)[0], plain(q, k, v, x=x)[0])  # no forgetting: DeltaNet
    for gate in (gated.decay, kda.decay[1]):
        gate.weight.zero_()
    for mixer in (gated, kda):
        mixer.rate.fill_(0.3)
        mixer.bias.fill_(-2.0)
    same(kda(q, k, v, x=x)[0], gated(q, k, v, x=x)[0])  # all channels alike: Gated DeltaNet


@torch.no_grad()
def test_fresh_orthonormal_keys_at_full_strength_are_additive():
    mixer, basis = inner("gated-deltanet", key_width=8, value_width=4), torch.linalg.qr(draw(8, 8))[0]
    q, v, x = draw(1, 8, 4, 8), draw(1, 8, 4, 4, seed=1), draw(1, 8, D, seed=2)
    k = basis[None, :, None].expand(1, 8, 4, 8)
    mixer.strength.weight.zero_()
    terms = mixer.terms(q, k, v, x)
    same(recur(terms._replace(beta=torch.ones_like(terms.beta)))[0], recur(terms._replace(beta=None))[0])


@torch.no_grad()
def test_a_key_written_twice_holds_the_last_value():
    k, v = torch.zeros(1, 2, 1, 4, dtype=torch.float64), draw(1, 2, 1, 3)
    k[..., 1] = 1
    o, _ = recur(Terms(k, k, v, None, torch.ones(1, 2, 1, dtype=torch.float64)))
    same(o[:, 1], v[:, 1])
    same(recur(Terms(k, k, v))[0][:, 1], v.sum(1))


@torch.no_grad()
def test_negative_eigenvalues_reflect():
    """beta = 2 turns what a key holds round; with nothing to write, twice is the identity."""
    assert inner("deltanet", options={"negative": True}).strongest == 2.0
    k = torch.nn.functional.normalize(draw(1, 1, 1, 4), dim=-1)
    state, none = draw(1, 1, 4, 3), torch.zeros(1, 1, 1, 3, dtype=torch.float64)
    terms = Terms(k, k, none, None, torch.full((1, 1, 1), 2.0, dtype=torch.float64))
    held, once = recur(terms, state=state.clone())
    same(held, -(k[:, 0] @ state[0, 0])[:, None])
    same(recur(terms, state=once.clone())[1], state)


@torch.no_grad()
def test_kdas_channels_forget_apart():
    """alpha = (1, 1/2) for ten steps without writing: one channel keeps 1, the other 2^-10."""
    k = torch.zeros(1, 12, 1, 2, dtype=torch.float64)
    k[0, 0, 0, 0] = k[0, 1, 0, 1] = 1
    beta = (torch.arange(12) < 2).double().view(1, 12, 1)
    log_decay = torch.tensor([0.0, math.log(0.5)], dtype=torch.float64) * (torch.arange(12) > 1).double().view(
        1, 12, 1, 1
    )
    _, state = recur(Terms(k, k, torch.ones(1, 12, 1, 1, dtype=torch.float64), log_decay, beta))
    assert state.flatten().tolist() == [1.0, 2.0**-10]


def test_the_safe_gate_stays_above_its_floor_and_is_no_clamp():
    mixer = inner("kda", options={"floor": -5.0})
    q, k, v, x = heads()
    log_decay = mixer.terms(q, k, v, 100 * x).log_decay
    assert log_decay.min() >= -5
    assert ((log_decay > -4.9) & (log_decay < -0.1)).any()


def test_a_forget_gate_at_the_bottom_gives_its_table_the_gradient_zero():
    """(What trains on several devices waits for the gradient of every parameter.)"""
    gate, z = ForgetGate(6, 0, 1), torch.ones(2, 3)
    log_f, rest = gate(z)
    (log_f.sum() + rest.sum()).backward()
    assert gate.bounds.logits.grad.eq(0).all()
    same(log_f, z.sigmoid().log(), 1e-6)


@torch.no_grad()
def test_lower_bounds_rise_from_zero_with_the_absolute_layer():
    gates = torch.nn.ModuleList(ForgetGate(6, layer, 5) for layer in (0, 1, 3, 4))  # a hybrid: layer 2 is softmax
    gates[0].bounds.logits.normal_(generator=torch.Generator().manual_seed(0))
    share_lower_bounds_(gates)
    assert [name for name, _ in gates.named_parameters()] == ["0.bounds.logits"]
    bounds = torch.stack([gates[0].bounds(gate.layer) for gate in gates])
    assert bounds[0].abs().max() == 0
    assert (bounds.diff(dim=0) > 0).all()
    share = gates[0].bounds.logits.softmax(0)
    same(bounds[2], share[1:4].sum(0))
    log_f, rest = gates[2](torch.zeros(2, 3))
    same(log_f.exp(), (bounds[2] + (1 - bounds[2]) / 2).view(2, 3), 1e-6)
    same(rest, 1 - log_f.exp(), 1e-6)


@torch.no_grad()
def test_hgrn2_leaves_its_state_alone_where_it_forgets_nothing():
    mixer = inner("hgrn2")
    q, k, v, x = heads()
    _, state = mixer(q, k, v, x=x)
    _, after = mixer(q, torch.full_like(k, 60.0), v, x=x, state=state)
    same(after, state)


def mamba_loop(mixer, q, k, v, x):
    """The published recurrence, a token and a head at a time, in transformers' layout S [P, N]."""
    B, T, H, P = v.shape
    out = torch.zeros_like(v)
    for b in range(B):
        for h in range(H):
            S = torch.zeros(P, q.shape[-1], dtype=v.dtype)
            for t in range(T):
                group = h * q.shape[2] // H
                dt = torch.nn.functional.softplus(mixer.step.weight[h] @ x[b, t] + mixer.step_bias[h])
                S = (-mixer.log_rate[h].exp() * dt).exp() * S + dt * torch.outer(v[b, t, h], k[b, t, group])
                out[b, t, h] = S @ q[b, t, group] + mixer.skip[h] * v[b, t, h]
    return out


@torch.no_grad()
def test_mamba2_is_its_published_recurrence():
    mixer = inner("mamba2", heads=4, key_heads=2)
    q, k = draw(2, 9, 2, 4), draw(2, 9, 2, 4, seed=1)
    v, x = draw(2, 9, 4, 8, seed=2), draw(2, 9, D, seed=3)
    same(mixer(q, k, v, x=x)[0], mamba_loop(mixer, q, k, v, x))


@pytest.mark.parametrize("size", [1.0, 50.0])
@torch.no_grad()
def test_lightnet_is_a_softmax_over_the_past_of_every_channel(size):
    q, k, v, x = heads()
    k = k * size / k.abs().max()
    mixer = LightNet(
        MixerConfig(kind="lightnet", heads=4, key_heads=4, key_width=4, value_width=4, model_width=D), theta=None
    )
    past = torch.ones(20, 20, dtype=torch.bool).tril()[None, :, :, None, None]
    share = k[:, None].expand(-1, 20, -1, -1, -1).masked_fill(~past, -torch.inf).softmax(2)
    same(mixer(q, k, v, x=x)[0], torch.einsum("bthk,btshk,bshv->bthv", q, share, v))
    same(mixer(q, k + 7.0, v, x=x)[0], mixer(q, k, v, x=x)[0])
    _, state = mixer(q, k, torch.ones_like(v), x=x)
    same(state.memory, torch.ones_like(state.memory))


@torch.no_grad()
def test_lightnets_last_token_sees_what_the_field_sees():
    q, k, v, x = heads(T=7)
    mixer = inner("lightnet")
    place = torch.arange(7)[None, :, None]
    same(mixer(q, k, v, x=x)[0][:, -1], global_field(q, k, v, place=place)[:, -1])


@torch.no_grad()
def test_the_field_asks_for_no_order_and_no_padding():
    q, k, v, _ = heads(T=12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    same(global_field(q, k, v)[:, order], global_field(*(x[:, order] for x in (q, k, v))))
    place = torch.cartesian_prod(torch.arange(3), torch.arange(4))[None]
    same(
        global_field(q, k, v, place=place)[:, order],
        global_field(*(x[:, order] for x in (q, k, v)), place=place[:, order]),
    )
    mask = torch.arange(12) < 9
    junk = [torch.where(mask[:, None, None], x, torch.nan) for x in (k, v)]
    same(global_field(q, *junk, mask=mask.expand(2, 12))[:, :9], global_field(q[:, :9], k[:, :9], v[:, :9]))
    assert not global_field(q, *junk, mask=torch.zeros(2, 12))[0].any()


def test_the_fields_gradient():
    q, k, v, _ = heads(T=5, H=1)
    place = torch.cartesian_prod(torch.arange(1), torch.arange(5))[None]
    given = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *qkv: global_field(*qkv, place=place), given, fast_mode=True)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_md_lrpe_depends_on_differences_of_coordinates(axes):
    q, k = draw(1, 2, 1, 5), draw(1, 2, 1, 5, seed=1)
    here, there, shift = torch.arange(axes) * 2, torch.arange(axes) + 3, torch.arange(axes) * 5 + 1
    products = [
        (cosines(q[:, :1], (here + s).view(1, 1, -1), 1e2) * cosines(k[:, :1], (there + s).view(1, 1, -1), 1e2)).sum()
        for s in (0, shift)
    ]
    same(products[1], products[0])
    same(cosines(q, torch.zeros(1, 2, axes), 1e2)[..., :5], q)


def test_learned_rotations_keep_lengths_and_depend_on_distance():
    turn = LearnedRotation(8).double()
    q, k = draw(1, 1, 1, 8), draw(1, 1, 1, 8, seed=1)
    at = [turn(q, torch.tensor([[s]])) for s in (0, 5)], [turn(k, torch.tensor([[s]])) for s in (3, 8)]
    same((at[0][0] * at[1][0]).sum(), (at[0][1] * at[1][1]).sum())
    same(at[0][1].norm(), q.norm())
    assert turn.speed.requires_grad


@torch.no_grad()
def test_norm_attention_does_not_feel_the_scale_of_its_queries():
    mixer, x = layer("norm-attention-t2"), draw(2, 20, D)
    before = mixer(x)
    mixer.slots = replace(mixer.slots, scale=3e3)
    same(mixer(x), before, 1e-4)


@pytest.mark.parametrize("name", ["diag-attention", "diag-attention-t2"])
@torch.no_grad()
def test_diag_attention_stays_inside_its_block(name):
    mixer, x = layer(name, options={"size": 8}), draw(2, 24, D)
    whole = mixer(x)
    other = x.clone()
    other[:, :8] = draw(2, 8, D, seed=9)
    same(mixer(other)[:, 8:], whole[:, 8:])
    swapped = torch.cat([x[:, 8:16], x[:, :8], x[:, 16:]], 1)
    same(mixer(swapped), torch.cat([whole[:, 8:16], whole[:, :8], whole[:, 16:]], 1))


@torch.no_grad()
def test_latent_attention_is_its_naive_form_and_knows_no_order():
    mixer, x = layer("mla"), draw(1, 9, D)
    filling = mixer.heads.filling
    assert isinstance(filling, LatentHeads)
    q = mixer.q_proj(x).unflatten(-1, (4, -1)) * mixer.config.key_width**-0.5
    c, r = filling.down(x).split([filling.rank, mixer.config.key_width - filling.own], -1)
    both = filling.up(filling.norm(c)).unflatten(-1, (4, -1))
    k = torch.cat([both[..., : filling.own], r[:, :, None].expand(-1, -1, 4, -1)], -1)
    share = torch.einsum("bthk,bshk->bhts", q, k)
    share = share.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    naive = torch.einsum("bhts,bshv->bthv", share, both[..., filling.own :])
    same(mixer(x), mixer.o_proj(naive.flatten(2)))
    cache = MixerCache()
    steps = [mixer(x[:, t : t + 1], cache=cache) for t in range(9)]
    same(torch.cat(steps, 1), mixer(x))
    held = sum(t.numel() for name, t in cache.tensors().items() if "keys" in name or "values" in name)
    assert held == 256 * (filling.rank + mixer.config.key_width - filling.own)  # one chunk of the compressed cache
    shuffled = torch.cat([x[:, [3, 1, 0, 2]], x[:, 4:]], 1)
    same(mixer(shuffled)[:, 4:], mixer(x)[:, 4:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layer("kdaa"), "unknown layer 'kdaa'. Did you mean 'kda'"),
        (lambda: layer("kda", heads=3), "heads must divide it"),
        (lambda: layer("kda", heads=4, key_heads=3), "key heads must divide the query heads"),
        (lambda: layer("kda", value_heads=6), "query heads must divide the value heads"),
        (lambda: layer("kda", options={"decy": "head"}), "Did you mean 'decay'"),
        (lambda: layer("kda", options={"decay": "heads"}), "Did you mean 'head'"),
        (lambda: layer("mla", options={"shared": 9}), "can share 0 to 5"),
        (lambda: layer("diag-attention", options={"weights": "rely"}), "Did you mean 'relu'"),
        (lambda: layer("kda")(draw(2, 3, D - 1)), r"x has shape \[2, 3, 15\]; expected size 16"),
    ],
)
def test_wrong_shapes_and_names_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("name", ["gla", "kda", "mamba2", "hgrn"])
def test_gates_that_are_nan_are_named_on_request(name):
    mixer, x = layer(name, check=True), draw(2, 5, D)
    mixer(x)
    x[1, 3, 0] = torch.nan
    with pytest.raises(InputError, match=r"log_decay is nan at \[1, 3, 0"):
        mixer(x)


@torch.no_grad()
def test_the_control_that_does_not_erase_only_adds():
    """With beta held at 1 it is plain linear attention; DeltaNet differs as soon as keys overlap."""
    q, k, v, x = heads()
    mixer = inner("deltanet", options={"erase": False})
    mixer.strength.weight.zero_()
    same(mixer(q, k, 2 * v, x=x)[0], recur(Terms(q, k, v))[0])
    assert inner("deltanet")(q, k, v, x=x)[0].allclose(mixer(q, k, v, x=x)[0]) is False
