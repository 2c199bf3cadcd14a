"""Bricks: one record, four verbs, and none of them changes what it shouldn't."""

import pytest
import torch
from torch import nn

from lineament._base.errors import InputError
from lineament._base.seeds import generator, seeded
from lineament.nn import Experts, ExpertsConfig
from lineament.weights import Brick, Bricks, bricks_of, rank_one_edit, with_expert


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.double)


def lora(name, seed, **fields):
    tensors = {"A": draw(2, 5, seed=seed), "B": draw(4, 2, seed=seed + 50)}
    return Brick(name, "lora", tensors, "adapter", key=draw(5, seed=seed), **fields)


def layer():
    with seeded(0):
        return Experts(ExpertsConfig(width=6, hidden=12, experts=4, active=2)).double()


def test_routing_is_a_softmax_over_the_nearest_keys():
    shelf, x = Bricks([lora("a", 1), lora("b", 2), lora("c", 3)]), draw(7, 5, seed=9)
    names, weights = shelf.route(x, top=2, temperature=0.5)
    assert names == ["a", "b", "c"]
    for token, row in zip(x, weights, strict=True):
        near = [float(torch.cosine_similarity(token, shelf[n].key, dim=0)) for n in names]
        kept = sorted(range(3), key=lambda i: -near[i])[:2]
        total = sum(torch.tensor(near[i] / 0.5).exp().item() for i in kept)
        expected = [torch.tensor(near[i] / 0.5).exp().item() / total if i in kept else 0.0 for i in range(3)]
        torch.testing.assert_close(row, torch.tensor(expected).double(), rtol=1e-5, atol=1e-7)
    assert shelf.route(x, names=["b"])[1].eq(1).all()


def test_loras_are_merged_as_products():
    shelf = Bricks([lora("a", 1), lora("b", 2)])
    both = shelf.merge(["a", "b"], "linear", name="both", weight=[3.0, 1.0])
    products = [shelf[n].tensors["B"] @ shelf[n].tensors["A"] for n in ("a", "b")]
    torch.testing.assert_close(both.tensors["weight"].double(), (3 * products[0] + products[1]) / 4)
    assert both.kind == "linear"
    torch.testing.assert_close(both.key, (shelf["a"].key + shelf["b"].key) / 2)
    assert list(shelf) == ["a", "b"]


def test_an_edit_writes_one_pair_and_leaves_what_is_orthogonal():
    w, k, v, spread = draw(4, 5), draw(5, seed=1), draw(4, seed=2), draw(5, 9, seed=3)
    covariance = spread @ spread.T / 9
    shelf = Bricks([Brick("w", "linear", {"weight": w}, "layer")])
    new = shelf.update("w", k, v, covariance=covariance).tensors["weight"]
    torch.testing.assert_close(new @ k, v)
    x, direction = draw(5, seed=4), torch.linalg.solve(covariance, k)
    x = x - (x @ direction) / (direction @ direction) * direction
    torch.testing.assert_close(new @ x, w @ x)
    assert torch.linalg.matrix_rank(new - w) == 1
    assert torch.equal(shelf["w"].tensors["weight"], w)
    torch.testing.assert_close(rank_one_edit(w, k, w @ k), w)


def test_an_edit_of_neurons_changes_what_they_say():
    (brick,) = [bricks_of(layer(), "mlp")["mlp.1"]]
    k, v = draw(3, seed=1), draw(6, seed=2)
    new = Bricks([brick]).update("mlp.1", k, v)
    torch.testing.assert_close(k @ new.tensors["outer"], v)
    assert torch.equal(new.tensors["inner"], brick.tensors["inner"])


def test_what_is_grown_says_nothing_at_first():
    shelf = Bricks([lora("a", 1), bricks_of(layer(), "mlp")["mlp.0"]])
    a, grown = shelf["a"], shelf.grow("a", 3)
    assert grown.tensors["A"].shape == (5, 5)
    torch.testing.assert_close(grown.tensors["B"] @ grown.tensors["A"], a.tensors["B"] @ a.tensors["A"])
    assert not (grown.tensors["B"][:, 2:] @ grown.tensors["A"][2:]).any()
    more = shelf.grow("mlp.0", 2)
    assert more.tensors["inner"].shape == (5, 2, 6)
    assert not more.tensors["outer"][3:].any()
    same = shelf.grow("a", 0)
    assert all(torch.equal(same.tensors[n], a.tensors[n]) for n in ("A", "B"))
    assert more.size == shelf["mlp.0"].size + 2 * 3 * 6


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 9])
def test_a_new_expert_behind_a_closed_door_changes_nothing_to_the_bit(rows):
    old, x = layer(), draw(rows, 6, seed=5)
    brick = bricks_of(layer(), "mlp")["mlp.2"]
    new = with_expert(old, brick)
    assert torch.equal(new(x), old(x))
    opened = with_expert(old, brick, closed=False)
    assert opened.router(x).shape == (rows, 5)
    opened.active = new.active = 4
    assert not torch.equal(opened(x), new(x))
    assert new.chosen(x)[:, 4].sum() == 0


def test_experts_are_bricks_and_come_back_from_a_file(tmp_path):
    shelf = bricks_of(layer(), "mlp")
    shelf.add(lora("skill", 3, tags={"wiki": 0.9}, evaluation={"loss": 2.5}))
    back = Bricks.load(shelf.save(tmp_path / "bricks.safetensors"))
    assert list(back) == list(shelf)
    for name, brick in shelf.items():
        assert (back[name].kind, back[name].level, back[name].place) == (brick.kind, brick.level, brick.place)
        assert (back[name].tags, back[name].evaluation) == (brick.tags, brick.evaluation)
        assert torch.equal(back[name].key, brick.key)
        assert all(torch.equal(back[name].tensors[n], x) for n, x in brick.tensors.items())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s: s["b"], "no brick is called 'b'"),
        (lambda s: Brick("x", "lora", {"A": draw(1, 1)}), "a brick of kind lora has A, B"),
        (lambda s: Brick("x", "mortar", {}), "unknown kind of brick"),
        (lambda s: s.route(draw(5), top=2), "top 2 of 1"),
        (lambda s: Bricks().route(draw(5)), "without a key"),
        (lambda s: s.update("a", draw(5), draw(4)), "kind lora, which can't update; linear, neurons can"),
        (lambda s: s.grow("a", -1), "can't grow by -1"),
        (lambda s: rank_one_edit(draw(4, 5), draw(4), draw(4)), r"expected \[in\]"),
        (lambda s: with_expert(layer(), s["a"]), "is no expert"),
        (lambda s: Bricks([s["a"], *bricks_of(layer(), "m").values()]).merge(["a", "m.0"], name="x"), "several kinds"),
    ],
)
def test_what_does_not_fit_is_named(call, said):
    with pytest.raises(InputError, match=said):
        call(Bricks([lora("a", 1)]))


def test_other_files_are_refused(tmp_path):
    from lineament import io

    io.save_tensors({"x": nn.Linear(1, 1).weight.detach()}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="holds no bricks"):
        Bricks.load(tmp_path / "x.safetensors")
