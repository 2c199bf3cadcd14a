"""Feed-forward layers cut into experts: the same function, equal sizes, routers that learn."""

import pytest
import torch
from torch import nn

from lineament._base.errors import InputError
from lineament._base.seeds import generator, seeded
from lineament.models import experts_of, set_active_, tiny_teacher
from lineament.weights import experts


def mlp(act=nn.ReLU, units=24):
    with seeded(0):
        return nn.Sequential(nn.Linear(6, units), act(), nn.Linear(units, 4)).double()


def tokens(rows=200, width=6):
    return torch.randn(rows, width, generator=generator(1), dtype=torch.double)


@pytest.mark.parametrize("by", experts.PARTITIONS)
@pytest.mark.parametrize("count", [1, 4, 24])
def test_with_all_experts_a_layer_computes_the_same(by, count):
    plain, x = mlp(), tokens()
    cut = experts.split(plain, count, by=by, inputs=x)
    torch.testing.assert_close(cut(x), plain(x), rtol=0, atol=1e-6)
    assert cut.inner.shape == (count, 1, 24 // count, 6)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_decoder_cut_into_experts_computes_the_same(family):
    model, ids = tiny_teacher(family), torch.randint(1, 60, (6, 20), generator=generator(0))
    cut, rows = experts.split_model(model, ids, count=4, epochs=1)
    torch.testing.assert_close(cut(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert [row["layer"] for row in rows] == [0, 1, 2]
    set_active_(cut, experts.active_for(0.5, dict.fromkeys(experts_of(cut), 4)))
    assert {each.active for each in experts_of(cut).values()} == {2}
    whole = cut(ids[:1], use_cache=False).logits  # read at once, and token by token: the same experts
    first = cut(ids[:1, :9], use_cache=True)
    steps, cache = [first.logits], first.past_key_values
    for at in range(9, 20):
        out = cut(ids[:1, at : at + 1], past_key_values=cache)
        steps, cache = [*steps, out.logits], out.past_key_values
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


def test_clusters_are_of_exactly_equal_size_and_find_what_is_planted():
    centres = torch.eye(5)
    planted = torch.arange(5).repeat(8)
    rows = centres[planted] + 0.05 * torch.randn(40, 5, generator=generator(0))
    group = experts.balanced_clusters(rows, 5)
    assert group.bincount().tolist() == [8] * 5
    assert all(len(group[planted == k].unique()) == 1 for k in range(5))
    uneven = torch.cat([torch.zeros(7, 2), torch.ones(1, 2)]) + 0.01 * torch.randn(8, 2, generator=generator(0))
    assert experts.balanced_clusters(uneven, 2).bincount().tolist() == [4, 4]


def test_units_that_speak_together_are_grouped_together():
    spoken = torch.zeros(60, 12)
    for token in range(60):
        spoken[token, 4 * (token % 3) : 4 * (token % 3) + 4] = 1
    spoken += (torch.rand(60, 12, generator=generator(0)) < 0.05).float()
    group = experts.balanced_clusters(experts.together(spoken, 3), 3)
    assert all(len(group[4 * k : 4 * k + 4].unique()) == 1 for k in range(3))


def test_experts_stand_in_the_order_of_what_they_say():
    cut = experts.split(mlp(), 6, inputs=tokens())
    said = cut.scores(tokens()).mean(0)
    assert torch.equal(said, said.sort(descending=True).values)


def test_a_router_learns_who_will_speak():
    with seeded(0):
        plain = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4))
    cut = experts.split(plain, 8, by="random")
    held = {name: p.clone() for name, p in cut.named_parameters() if not name.startswith("router")}
    found = experts.learn_router(cut, tokens(2000).float(), epochs=20, batch=256)
    assert found["captured before"] < found["captured"] <= 1 + 1e-6
    assert found["captured"] == pytest.approx(experts.captured(cut, tokens(2000).float()), abs=0.05)
    assert all(torch.equal(p, held[name]) for name, p in cut.named_parameters() if name in held)


def test_an_oracle_captures_everything():
    class Oracle(nn.Module):
        def __init__(self, of):
            super().__init__()
            self.of = [of]

        def forward(self, x):
            return self.of[0].scores(x)

    cut = experts.split(mlp(), 8)
    cut.router = Oracle(cut)
    assert experts.captured(cut, tokens()) == pytest.approx(1.0)
    assert experts.use_oracle_(nn.Sequential(cut))[0].oracle


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: experts.split(mlp(), 5), "24 units"),
        (lambda: experts.split(mlp(), 4, by="luck"), "unknown way to group"),
        (lambda: experts.split(mlp(), 4, by="together"), "needs inputs"),
        (lambda: experts.split(nn.Linear(2, 2), 1), "no feed-forward layer"),
        (lambda: experts.learn_router(experts.split(mlp(), 4), tokens(5)), "too few"),
    ],
)
def test_what_does_not_fit_is_named(call, said):
    with pytest.raises(InputError, match=said):
        call()


@torch.no_grad()
@pytest.mark.parametrize("by", ["gate", "product"])
def test_a_decoder_that_skips_nothing_computes_the_same_and_skips_its_share_else(by):
    model, ids = tiny_teacher("llama"), torch.randint(1, 60, (6, 20), generator=generator(0))
    same = experts.selective_model(model, ids, 0.0, by=by)
    torch.testing.assert_close(same(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    half = experts.selective_model(model, ids, 0.5, by=by)
    whole = half(ids[:1], use_cache=False).logits
    assert not torch.allclose(whole, model(ids[:1]).logits, atol=1e-3)
    first = half(ids[:1, :-1], use_cache=True)  # the last token alone reads some rows, and says the same
    last = half(ids[:1, -1:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(last, whole[:, -1:], rtol=1e-4, atol=1e-5)


def test_only_gated_layers_without_biases_skip():
    with pytest.raises(InputError, match="only gated layers"):
        experts.selective(mlp(), tokens(), 0.5)
