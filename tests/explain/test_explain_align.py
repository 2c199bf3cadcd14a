"""Alignment: a network whose alignment is known by construction, one that has none, and the laws of interchange."""

from dataclasses import replace

import pytest
import torch
from tiny_families import make, word_tokenizer
from torch import nn

from lineament import explain
from lineament._base.errors import InputError
from lineament.explain.align import ADAM
from lineament.explain.interchange import Layer
from lineament.nn import Reordered, Reversible, Rotation
from lineament.tasks import Algorithm, Examples, counterfactual, interventions
from lineament.tasks.prompt_pairs import INDIRECT_OBJECT, indirect_object_pairs, mention_examples

XOR = Algorithm(
    "xor of ands", ("bits",),
    {"left": (("bits",), lambda x: (x[:, 0] > 0) & (x[:, 1] > 0)),
     "right": (("bits",), lambda x: (x[:, 2] > 0) & (x[:, 3] > 0)),
     "out": (("left", "right"), lambda a, b: (a ^ b).long())}, "out",
)  # fmt: skip
BLOCKS = {"left": slice(0, 1), "right": slice(1, 2)}


class Known(nn.Module):
    """Computes XOR exactly; after "mix" the two ANDs lie along two orthogonal directions of a known rotation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.ands, self.mix, self.unmix = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        Q = nn.init.orthogonal_(torch.empty(4, 4))
        with torch.no_grad():
            self.ands.weight.zero_()
            self.ands.weight[0, :2], self.ands.weight[1, 2:] = 1.0, 1.0
            self.ands.bias.copy_(torch.tensor([-1.0, -1.0, 0.3, 0.7]))
            self.mix.weight.copy_(Q)
            self.unmix.weight.copy_(Q.T)
        self.requires_grad_(True)

    def forward(self, bits: torch.Tensor) -> torch.Tensor:
        a, b = self.unmix(self.mix(self.ands(bits).relu()))[:, :2].unbind(1)
        same = (a - b).abs()
        return torch.stack([0.5 - same, same - 0.5], 1)


def bits(count=64, seed=0):
    x = torch.randint(2, (count, 4), generator=torch.Generator().manual_seed(seed)).float()
    return Examples(x, {"bits": x})


def known_rotation(model):
    phi = Rotation(4)
    phi.linear.weight = model.mix.weight.detach().T  # z = h Q undoes the mixing
    return phi


FEW = explain.AlignConfig(size=1, batch=64, tests=500, fit=replace(ADAM, steps=100, lr=0.03))


def test_the_known_alignment_scores_one_and_a_wrong_one_does_not():
    model, examples = Known().eval(), bits()
    drawn = interventions(XOR, examples)(400, 0)
    phi = known_rotation(model)
    answers = explain.interchange(model, "mix", phi, BLOCKS, examples, drawn)
    assert torch.equal(answers.argmax(1), drawn.labels)
    other = {"left": slice(2, 3), "right": slice(3, 4)}  # orphans: nothing changes
    unchanged = explain.interchange(model, "mix", phi, other, examples, drawn)
    assert torch.equal(unchanged.argmax(1), drawn.before)


def test_a_rotation_is_found_where_there_is_one_and_neurons_only_where_they_are_apart():
    model = Known().eval()
    found = explain.align(model, "mix", XOR, bits(), bits(seed=1), FEW)
    assert (found.iia, found.accuracy) == (1.0, 1.0)
    assert found.chance < 0.8
    assert found.drift < 1e-5
    neurons = replace(FEW, map="neurons")
    assert explain.align(model, "ands", XOR, bits(), bits(seed=1), neurons).iia == 1.0
    assert explain.align(model, "mix", XOR, bits(), bits(seed=1), neurons).iia < 0.95


def test_a_network_that_computes_something_else_has_no_alignment():
    model = Known().eval()
    with torch.no_grad():
        model.ands.weight[1] = 0.0  # it never looks at the right pair
    found = explain.align(model, "mix", XOR, bits(), bits(seed=1), FEW)
    assert found.iia < 0.9
    assert found.accuracy < 0.9


@pytest.mark.parametrize("make_map", [Rotation, lambda D: Rotation(D, rank=2), lambda D: Reversible(D, blocks=3)])
def test_no_change_no_source_and_a_whole_source(make_map):
    torch.manual_seed(0)
    model, examples = Known().eval(), bits(30)
    model.requires_grad_(False)
    phi, rows = make_map(4), torch.arange(30)
    natural, everything = model(examples.inputs), torch.full((30, 2), True)
    source = rows.flip(0)[:, None].expand(-1, 2)

    def answers(blocks, sources, mask):
        drawn = counterfactual(XOR, examples, rows, sources, mask)
        return explain.interchange(model, "mix", phi, blocks, examples, drawn)

    torch.testing.assert_close(answers(BLOCKS, source, ~everything), natural, rtol=0, atol=1e-5)
    torch.testing.assert_close(answers(BLOCKS, rows[:, None].expand(-1, 2), everything), natural, rtol=0, atol=1e-5)
    if not isinstance(phi, Rotation) or phi.Q.shape[1] == 4:
        whole = {"left": slice(0, 3), "right": slice(3, 4)}
        torch.testing.assert_close(answers(whole, source, everything), natural.flip(0), rtol=0, atol=1e-5)


def test_it_is_the_intervention_written_out_row_by_row():
    torch.manual_seed(0)
    model, examples, phi = Known().eval(), bits(20), Reversible(4, blocks=2, hidden=6)
    drawn = interventions(XOR, examples)(25, 1)
    found = explain.interchange(model, "mix", phi, BLOCKS, examples, drawn)
    for n in range(25):
        z = phi(model.mix(model.ands(examples.inputs[drawn.base[n]]).relu()))
        z = z.clone()
        for j, block in enumerate(BLOCKS.values()):
            if drawn.mask[n, j]:
                z[block] = phi(model.mix(model.ands(examples.inputs[drawn.sources[n, j]]).relu()))[block]
        a, b = model.unmix(phi.inverse(z))[:2]
        torch.testing.assert_close(found[n, 1], (a - b).abs() - 0.5)


def test_coordinates_inside_a_block_may_be_permuted():
    model, examples = Known().eval(), bits(40)
    drawn = interventions(XOR, examples)(100, 0)
    wide = {"left": slice(0, 2), "right": slice(2, 4)}
    h = [explain.interchange(model, "ands", Reordered(order), wide, examples, drawn)
         for order in ([0, 2, 1, 3], [2, 0, 3, 1])]  # fmt: skip
    torch.testing.assert_close(h[0], h[1])
    assert torch.equal(h[0].argmax(1), drawn.labels)


def test_gradients_reach_the_map_through_base_sources_and_inverse():
    torch.manual_seed(0)
    model, examples = Known().double().eval(), bits(8)
    examples = Examples(examples.inputs.double(), examples.values)
    phi = Reversible(4, blocks=1, hidden=3).double()
    drawn = interventions(XOR, examples)(16, 2)
    site, weight = Layer(model, "mix", examples), phi.F[0][0].weight

    def loss():
        return site.answers(drawn.base, site.exchanged(phi, BLOCKS, drawn)).square().sum()

    (g,) = torch.autograd.grad(loss(), weight)
    for i, j in ((0, 0), (2, 1)):
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                weight[i, j] += step
                values.append(float(loss()))
                weight[i, j] -= step
        torch.testing.assert_close(float(g[i, j]), (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_a_whole_source_gives_the_source_in_any_model_and_leaves_it_as_it_was(family):
    model, inputs, _ = make(family)
    model.eval()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    layer = next(name for name, _ in reversed(list(model.named_modules())) if name.endswith(".1"))
    values = {"v": torch.arange(2)}
    one = Algorithm("copy", ("v",), {"copy": (("v",), lambda v: v), "out": (("copy",), lambda v: v)}, "out")
    examples = Examples(inputs, values, positions=None if family != "vit" else torch.zeros(2, dtype=torch.long))
    drawn = counterfactual(one, examples, torch.tensor([0, 1]), torch.tensor([[1], [0]]), torch.full((2, 1), True))
    phi = Rotation(32)
    try:
        found = explain.interchange(model, layer, phi, {"copy": slice(0, 32)}, examples, drawn)
    except InputError as error:  # a backbone without classes answers hidden states
        pytest.fail(str(error))
    natural = model(**inputs).logits if hasattr(model(**inputs), "logits") else model(**inputs)[0]
    expected = natural[:, -1] if natural.dim() == 3 else natural
    torch.testing.assert_close(found, expected.flip(0), rtol=1e-4, atol=1e-4)
    explain.align(
        model, layer, one, examples, examples, explain.AlignConfig(batch=2, tests=4, fit=replace(ADAM, steps=1))
    )
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def refused(match, model=None, layer="mix", algorithm=XOR, examples=None, **changes):
    with pytest.raises(InputError, match=match):
        explain.align(model or Known().eval(), layer, algorithm, examples or bits(8), bits(8), replace(FEW, **changes))


def test_what_cannot_be_aligned_is_refused_in_a_line():
    refused("no module is called 'mixx' in Known. Did you mean 'mix'", layer="mixx")
    refused("means 3 places; name one", layer=nn.Linear)
    refused("2 variables of 3 coordinates each do not fit a layer 4 wide; size can be 1 to 2", size=3)
    refused("'bits' is missing", examples=Examples(bits(8).inputs, {"b": bits(8).inputs}))
    three = replace(XOR, functions={**XOR.functions, "out": (("left", "right"), lambda a, b: 2 + (a ^ b).long())})
    refused("answers 2 to 3 and the model has 2 answers", algorithm=three)
    refused("NaN or infinity", examples=Examples(torch.full((4, 4), torch.nan), {"bits": torch.zeros(4, 4)}))
    refused("drops out in training mode", model=nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), layer="0")
    with pytest.raises(InputError, match="Did you mean 'rotation'"):
        explain.AlignConfig(map="rotatoin")
    blocks, drawn = {"left": slice(0, 2), "right": slice(1, 3)}, interventions(XOR, bits())(4, 0)
    with pytest.raises(InputError, match="neither overlap nor are empty"):
        explain.interchange(Known().eval(), "mix", Rotation(4), blocks, bits(), drawn)


@pytest.mark.parametrize("objective", ["choices", "all", "difference"])
def test_every_objective_finds_the_known_alignment(objective):
    config = replace(FEW, objective=objective, changing=0.5)
    assert explain.align(Known().eval(), "mix", XOR, bits(), bits(seed=1), config).iia == 1.0


def test_a_search_goes_on_where_it_was_interrupted(tmp_path):
    model, short = Known().eval(), replace(FEW, fit=replace(FEW.fit, steps=6, checkpoint_every=2))
    whole = explain.align(model, "mix", XOR, bits(), bits(seed=1), short)
    draws, calls = model.unmix.forward, []

    def killed(x):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return draws(x)

    model.unmix.forward = killed
    with pytest.raises(KeyboardInterrupt):
        explain.align(model, "mix", XOR, bits(), bits(seed=1), short, out=tmp_path)
    del model.unmix.forward
    assert all(p.requires_grad for p in model.parameters())
    again = explain.align(model, "mix", XOR, bits(), bits(seed=1), short, out=tmp_path)
    assert torch.equal(again.map.Q, whole.map.Q)


def test_a_sweep_says_what_each_map_is_worth():
    seen, maps = [], {"rotation": "rotation", "none": lambda width: Reordered(range(width))}
    found = explain.complexity(
        Known().eval(), "mix", XOR, bits(), bits(seed=1), maps=maps, config=FEW,
        on_done=lambda *args: seen.append(args[:2]),
    )  # fmt: skip
    assert seen == [("rotation", "model"), ("rotation", "untrained"), ("none", "model"), ("none", "untrained")]
    assert [row["map"] for row in found.rows()] == ["none", "none", "rotation", "rotation"]
    assert found.verdict("rotation") == "aligned"
    assert found.verdict("none") == "not aligned"
    assert found.png()[:4] == b"\x89PNG"
    same = explain.Complexity(
        {"rotation": {"model": found.found["rotation"]["model"], "untrained": found.found["rotation"]["model"]}}
    )
    assert same.verdict("rotation") == "empty"
    with pytest.raises(InputError, match="no map to align with"):
        explain.complexity(Known().eval(), "mix", XOR, bits(), bits(), maps={})


def test_an_untrained_copy_is_drawn_anew_as_a_whole_or_in_part():
    model = make("gpt2")[0].eval()
    whole, part = explain.untrained_copy(model), explain.untrained_copy(model, nn.Embedding)
    tied = "transformer.wte.weight"
    assert not torch.equal(whole.state_dict()[tied], model.state_dict()[tied])
    name = "transformer.h.0.mlp.c_fc.weight"
    assert not torch.equal(whole.state_dict()[name], model.state_dict()[name])
    assert torch.equal(part.state_dict()[name], model.state_dict()[name])
    assert not torch.equal(part.state_dict()[tied], model.state_dict()[tied])
    assert not whole.training

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

    with pytest.raises(InputError, match="pass untrained= yourself"):
        explain.untrained_copy(nn.Sequential(Bare()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_token_is_found_whichever_side_is_padded(side):
    model, _, _ = make("gpt2")
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    if side == "left":
        ids[1], mask[1] = ids[1].roll(2), mask[1].roll(2)
    examples = Examples({"input_ids": ids, "attention_mask": mask}, {"v": torch.zeros(2)})
    site = Layer(model.eval(), "transformer.h.0", examples)
    assert site.positions.tolist() == [3, 1 if side == "right" else 3]
    scores = site.answers(torch.arange(2))
    full = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(scores, full[torch.arange(2), site.positions], rtol=1e-5, atol=1e-5)


def test_indirect_objects_are_read_off_prompts_and_looked_for_in_a_decoder():
    pairs = indirect_object_pairs(30, seed=3)
    words = sorted(
        {w for pair in pairs for w in (pair.clean + " " + pair.answer[0]).replace(".", " .").replace(",", " ,").split()}
    )
    tokenizer = word_tokenizer(["?", *words][:61])
    examples = mention_examples(tokenizer, pairs)
    for pair, second, choices in zip(pairs, examples.values["second"], examples.choices, strict=True):
        names = [pair.answer[0].strip(), pair.distractor[0].strip()]
        first = min(names, key=pair.clean.index)
        assert bool(second) == (pair.answer[0].strip() != first)
        assert len(choices) == 2
    model = make("gpt2")[0].eval()
    config = explain.AlignConfig(batch=8, tests=40, fit=replace(ADAM, steps=2))
    found = explain.align(model, "transformer.h.1", INDIRECT_OBJECT, examples, examples, config)
    assert found.blocks == {"second is it": slice(0, 16)}
    assert 0 <= found.iia <= 1
