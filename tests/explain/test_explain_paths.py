"""Paths of relevance beside plain loops, beside gradients with sites cut one by one, and beside `relevance` itself."""

from itertools import combinations

import pytest
import torch
from tiny_families import make
from torch import nn

from lineament import explain, models
from lineament._base.errors import InputError
from lineament.explain.places import replaced
from lineament.graph import InDouble

ALL = 10**6


@pytest.fixture(autouse=True)
def in_double():
    """Let casts to float32 in transformers' norms be casts to float64."""
    with InDouble():
        yield


def one(name, dtype=torch.float64):
    """Return a tiny model with the first row of its inputs."""
    model, inputs, target = make(name, dtype)
    return model, {key: x[:1] for key, x in inputs.items()}, target


def by_name(found):
    return {row.name: row.relevance for row in found.rows}


def test_in_a_small_net_a_path_is_a_product_of_shares():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    x = torch.randn(1, 3, dtype=torch.double)
    found = explain.paths(net, x, target=1, rules="epsilon", sites=["1", "3"], by="neuron", top=ALL, beam=None)
    (w1, w2, w3), h1 = (net[i].weight.tolist() for i in (0, 2, 4)), net[:2](x)[0].tolist()
    z1, z2, h2 = net[0](x)[0].tolist(), net[2](net[:2](x))[0].tolist(), net[:4](x)[0].tolist()
    expected = {}
    for i in range(3):
        for j in range(4):
            for k in range(3):
                share = (x[0, i].item() * w1[j][i] / z1[j]) * (h1[j] * w2[k][j] / z2[k]) * h2[k] * w3[1][k]
                if share:
                    expected[f"input[{i}] -> 1[{j}] -> 3[{k}]"] = share
    assert by_name(found) == pytest.approx(expected, rel=1e-9)
    assert found.exact
    assert [abs(row.relevance) for row in found.rows] == sorted(map(abs, expected.values()), reverse=True)
    assert found.rows[0].share == pytest.approx(found.rows[0].relevance / found.value)


def opened(model, inputs, target, sites, cells):
    """Return gradient x input at the embedding [T] when sites let gradients through in some cells only."""

    def only(site):
        def change(x):
            mask = torch.zeros_like(x)
            for at, position, head in cells:
                if at == site and head is None:
                    mask[:, position] = 1
                elif at == site:
                    mask.unflatten(-1, (4, -1))[:, position, head] = 1
            return x.detach() + mask * (x - x.detach())

        return replaced(model, site, change)

    seen = []
    with only(sites[0]), only(sites[1]), only(sites[2]):
        embed = replaced(model, "model.embed_tokens", lambda x: seen.append(x.detach().requires_grad_()) or seen[0])
        with embed:
            value = model(**inputs).logits[0, -1, target]
    (slope,) = torch.autograd.grad(value, seen[0])
    return (seen[0] * slope).sum(-1)[0].detach()


def test_in_a_decoder_a_path_is_what_comes_by_its_cells_and_no_others():
    model, inputs, _ = one("llama")
    sites = ["model.layers.0.mlp", "model.layers.1.self_attn.o_proj:input", "model.layers.1.mlp"]
    found = explain.paths(
        model, inputs, target=7, rules="gradient-x-input", sites=sites, top=ALL, beam=None
    )  # fmt: skip
    rows = [row for row in found.rows if len(row.nodes) > 2]
    assert {len(row.nodes) for row in rows} == {3, 4}
    names = dict(zip(("m0", "a1", "m1"), sites, strict=True))
    for row in [*rows[:12], *rows[-5:]]:
        start, *inner = row.nodes
        cells = [(names[node.site], node.position, node.part) for node in inner]
        parts = [(some, n) for n in range(len(cells) + 1) for some in combinations(cells, n)]
        # inclusion and exclusion: routes that may pass these cells, less those that miss one of them
        by = sum((-1) ** (len(cells) - n) * opened(model, inputs, 7, sites, some) for some, n in parts)
        assert row.relevance == pytest.approx(float(by[start.position]), rel=1e-8, abs=1e-10)


SITES = {
    "llama": ["model.layers.*"], "gpt2": ["*.mlp", "*.attn.c_proj:input"], "gemma2": ["model.layers.0.mlp"],
    "vit": ["*.layers.1", "*.layers.0"], "resnet-own": ["4", "5"], "encoder": ["layers.layers.*.linear2"],
    "vgg": ["2", "5"], "lstm": ["lstm"], "mamba": ["*.mixer"],
}  # fmt: skip


@pytest.mark.parametrize("name", SITES)
def test_all_paths_add_up_to_the_relevance_of_the_inputs(name):
    model, inputs, target = one(name)
    by = "component" if name in ("encoder", "vgg", "gpt2") else None
    found = explain.paths(model, inputs, target=target, sites=SITES[name], by=by, top=ALL, beam=None)
    whole = explain.relevance(model, inputs, target=target)
    for key, x in whole.inputs.items():
        ends = [row for row in found.rows if row.nodes[0].site == key]
        for t in {row.nodes[0].position for row in ends}:
            sums = sum(row.relevance for row in ends if row.nodes[0].position == t)
            expected = x.sum() if t is None else x[0, t].sum()
            assert sums == pytest.approx(float(expected), rel=1e-8, abs=1e-9 * abs(found.value))
    assert found.ledger.unaccounted < 1e-9
    assert found.reached == pytest.approx(found.ledger.columns["inputs"], rel=1e-9)


@pytest.mark.parametrize("rules", [name for name in explain.RULES if name != "auto"])
def test_messages_are_split_by_every_rule_set(rules):
    model, inputs, _ = one("resnet-own")
    found = explain.paths(model, inputs, target=2, rules=rules, sites=["4.conv1", "5"], top=ALL, beam=None)
    whole = explain.relevance(model, inputs, target=2, rules=rules)
    expected, size = float(whole.inputs["input"].sum()), float(whole.inputs["input"].abs().sum())
    assert sum(row.relevance for row in found.rows) == pytest.approx(expected, abs=1e-8 * size)
    assert len(found.rows) > 50


def test_paths_through_a_cell_add_up_to_what_it_holds():
    model, inputs, _ = one("llama")  # it has no biases, and with constant patterns nothing ends below
    at = "model.layers.0"
    found = explain.paths(model, inputs, rules="cp-lrp", sites=["model.layers.0", "*.mlp"], top=ALL, beam=None)
    held = explain.relevance(model, inputs, rules="cp-lrp", at=at).at[at].sum(-1)[0]
    for t, expected in enumerate(held.tolist()):
        through = [row for row in found.rows if f"{at}@{t}" in row.name.split(" -> ")]
        assert sum(row.relevance for row in through) == pytest.approx(expected, rel=1e-9, abs=1e-10)
    shape = [node.site for node in found.rows[0].nodes]
    assert shape[0] == "input_ids"
    assert at in shape


def test_a_beam_changes_which_paths_are_found_not_what_they_carry():
    model, inputs, _ = one("llama")
    every = by_name(explain.paths(model, inputs, sites="*.mlp", top=ALL, beam=None))
    few = explain.paths(model, inputs, sites="*.mlp", top=ALL, beam=6)
    assert 0 < len(few.rows) < len(every)
    assert not few.exact
    assert by_name(few) == pytest.approx({name: every[name] for name in by_name(few)}, rel=1e-9)
    assert few.ledger.unaccounted < 1e-9


def test_without_negative_relevance_what_is_above_the_dropped_is_the_largest():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    x = torch.rand(1, 6, dtype=torch.double)
    given = {"target": 0, "rules": "z-plus", "sites": nn.ReLU, "by": "neuron", "top": ALL}
    every, few = (explain.paths(net, x, **given, beam=beam) for beam in (None, 12))
    sure = [row.name for row in few.rows if abs(row.relevance) > few.largest_dropped]
    assert sure
    assert sure == [row.name for row in every.rows[: len(sure)]]


def test_sites_of_a_decoder_are_its_heads_and_mlps_and_of_others_their_blocks():
    model, inputs, _ = one("llama")
    found = explain.paths(model, inputs, beam=20, top=5)
    assert found.sites == ("input_ids", "a0", "m0", "a1", "m1")
    assert len(found.rows) == 5
    nodes = {node.name for row in explain.paths(model, inputs, beam=40, top=ALL).rows for node in row.nodes}
    assert {"input_ids@6", "m1@6"} <= nodes
    assert any(name.startswith("a1.h") and name.endswith("@6") for name in nodes)
    whole = explain.paths(model, inputs, by="position", beam=20)
    assert {node.part for row in whole.rows for node in row.nodes} == {None}
    model, inputs, _ = one("vgg")
    assert len(explain.paths(model, inputs, beam=8).sites) == 14  # (dropout hands on what it receives)
    hooks = explain.paths(one("llama")[0], one("llama")[1], sites="blocks.1.hook_resid_pre", beam=None)
    assert {node.site for row in hooks.rows for node in row.nodes} == {"input_ids", "model.layers.1:input"}


def test_students_have_paths_as_softmax_models_have():
    student = models.tiny("llama", "gated-deltanet", full_heads=(0,)).double().eval()
    inputs = {"input_ids": torch.randint(3, 61, (1, 9), generator=torch.Generator().manual_seed(0))}
    found = explain.paths(student, inputs, sites=["blocks.0.attn.hook_z", "*.mlp"], beam=2000, top=ALL)
    whole = explain.relevance(student, inputs)
    assert found.ledger.unaccounted < 1e-9
    assert {node.name for row in found.rows for node in row.nodes} >= {"a0.h0@8", "a0.h1@8"}
    assert explain.paths(student, inputs, sites="*.mlp", by="component", beam=None).reached == pytest.approx(
        float(whole.inputs["input_ids"].sum()), rel=1e-9
    )


def test_a_module_called_twice_is_two_sites():
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.turn, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.out(self.turn(self.turn(x)))

    found = explain.paths(Twice().double(), torch.rand(1, 3).double(), sites="turn", beam=None, by="component")
    assert [[node.name for node in row.nodes] for row in found.rows] == [["x", "turn#1", "turn#2"]]


def test_what_json_has():
    model, inputs, _ = one("llama", torch.float32)
    found = explain.paths(model, inputs, top=2).to_json()
    assert len(found["paths"]) == 2
    assert found["paths"][0]["path"].startswith("input_ids@")
    assert found["paths"][0]["nodes"][0] == {
        "name": found["paths"][0]["path"].split(" -> ")[0], "site": "input_ids",
        "position": found["paths"][0]["nodes"][0]["position"], "part": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top": 0}, "top is 0"),
        ({"beam": 0}, "beam 0"),
        ({"sites": "*.nothing"}, "nothing"),
        ({"sites": []}, "through none"),
        ({"by": "colour"}, "colour"),
        ({"rules": "integrated-gradients"}, "sends no messages"),
        ({"sites": "blocks.9.hook_nothing"}, "TransformerLens"),
        ({"beam": None}, "more than"),
        ({"by": "head", "sites": "*.mlp", "heads": 5}, "5 heads"),
    ],
)
def test_mistakes_are_named(options, said, monkeypatch):
    monkeypatch.setattr("lineament.explain.descent.MOST", 50)
    model, inputs, _ = one("llama")
    with pytest.raises(InputError, match=said):
        explain.paths(model, inputs, **options)


def test_a_batch_and_a_model_without_blocks_are_refused():
    model, inputs, _ = make("llama")
    with pytest.raises(InputError, match="batch of one row"):
        explain.paths(model, inputs)
    with pytest.raises(InputError, match="name sites"):
        explain.paths(nn.Linear(2, 2), torch.ones(1, 2))
