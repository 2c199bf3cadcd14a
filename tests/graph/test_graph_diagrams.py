"""Diagrams: the term computes what the model computes, spellings agree, drawings are sound, mistakes are told."""

import re
from xml.etree import ElementTree

import pytest
import small_nets
import tiny_models
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lineament import graph
from lineament._base.errors import InputError
from lineament.graph.diagrams.examples import attention
from lineament.models.tiny import tiny

IDS = {"input_ids": torch.tensor([[3, 5, 7, 2, 9, 4, 1]]), "use_cache": False}


@pytest.mark.parametrize("family", list(tiny_models.MAKERS))
def test_a_decoders_term_computes_what_it_computes(family):
    model, _ = tiny_models.tiny(family)
    found = graph.diagram(model, **IDS)
    assert found.error(**IDS) < 1e-9
    assert found.term.opaque_share == 0


@pytest.mark.parametrize("name", list(small_nets.VISION))
def test_a_nets_term_computes_what_it_computes(name):
    net, x = small_nets.vision(name)
    found = graph.diagram(net, x)
    assert found.error(x) < 1e-9
    assert found.term.opaque_share == 0


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", ["hedgehog-window", pytest.param("gated-deltanet", marks=SLOW), pytest.param("kda", marks=SLOW)]
)
def test_a_converted_student_is_drawn_and_computed(kind):
    student = tiny("llama", kind)
    found = graph.diagram(student, **IDS)
    assert found.error(**IDS) < 1e-9
    assert found.term.opaque_share <= 0.02
    assert ElementTree.fromstring(found.svg()).tag.endswith("svg")


@pytest.mark.parametrize("spelling", ["sdpa", "einsum", "module", "module with weights"])
def test_spellings_of_attention_are_one_term(spelling):
    x = torch.randn(2, 7, 24)
    one, other = (graph.diagram(attention(each), x).term for each in ("view", spelling))
    assert one.signature() == other.signature()


def test_another_algorithm_is_another_term():
    x = torch.randn(2, 7, 24)
    causal, plain = (graph.diagram(attention(each), x).term for each in ("causal", "view"))
    assert causal.signature() != plain.signature()


def test_axes_of_attention_are_the_hand_written_ones():
    term = graph.diagram(attention("view"), torch.randn(2, 7, 24)).term
    of = lambda value: [term.axes[axis].name for axis in term.values[value].axes]  # noqa: E731
    scores = next(op for op in term.ops if op.kind == "softmax")
    assert of(scores.outputs[0].value) == ["b", "x̄", "h", "x̄"]
    assert sorted(axis.size for axis in term.axes) == [2, 4, 6, 6, 7, 24, 24]


def test_equal_sizes_are_not_equal_axes():
    term = graph.diagram(attention("view"), torch.randn(24, 24, 24)).term
    assert len({axis.name for axis in term.axes}) == len(term.axes)
    assert len([axis for axis in term.axes if axis.size == 24]) == 4


def test_a_batch_changes_labels_only():
    drawn = [graph.diagram(attention("view"), torch.randn(n, 7, 24)).svg() for n in (2, 3)]
    assert drawn[0].replace("b = 2", "b = 3") == drawn[1]


def test_an_operator_acts_for_each_index_of_an_axis_that_runs_past():
    net = attention("view").double()
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    whole = graph.diagram(net, x).execute(x)[0]
    single = graph.diagram(net, x[:1])
    assert all(torch.allclose(single.execute(x[i : i + 1])[0], whole[i : i + 1]) for i in range(3))


def test_an_identity_changes_nothing():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = attention("view")

        def forward(self, x):
            eye = torch.eye(24, dtype=x.dtype)
            return self.net(torch.einsum("bti,ij->btj", x.transpose(0, 1).transpose(0, 1) * 1.0, eye))

    x = torch.randn(2, 7, 24)
    net = Padded()
    assert graph.diagram(net, x).error(x) < 1e-12
    torch.testing.assert_close(graph.diagram(net, x).execute(x), graph.diagram(net.net, x).execute(x))


def test_operations_are_those_of_the_counter():
    for net, x in (small_nets.vision("ResNet"), (attention("view"), torch.randn(2, 7, 24))):
        term = graph.diagram(net, x).term
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x)
        assert sum(term.flops(op) for op in term.ops) == counter.get_total_flops()


def boxes(svg):
    """The bounding boxes of the labels, per group of a panel."""
    for panel in re.findall(r'<g transform="translate.*?(?=<text class="c"|<text class="m")', svg, re.S):
        found = re.findall(r'<text class="l[^"]*" x="([\d.]+)" y="([\d.-]+)">([^<]*)<', panel)
        yield [(float(x), float(y), 0.6 * 10.5 * len(t.replace("̄", ""))) for x, y, t in found]


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=SLOW), "ResNet", "U-Net"])
def test_a_drawing_is_well_formed_repeatable_and_its_labels_do_not_overlap(name):
    if name in tiny_models.MAKERS:
        model, call = tiny_models.tiny(name)[0], IDS
        found, again = (graph.diagram(model, **call).svg() for _ in range(2))
    else:
        net, x = small_nets.vision(name)
        found, again = (graph.diagram(net, x).svg() for _ in range(2))
    assert found == again
    assert ElementTree.fromstring(found) is not None
    for labels in boxes(found):
        for i, (x, y, wide) in enumerate(labels):
            assert not any(abs(y - v) < 9 and x < u + w and u < x + wide for u, v, w in labels[:i])


def test_blocks_are_folded_and_told_in_words():
    model, _ = tiny_models.tiny("llama")
    found = graph.diagram(model, **IDS)
    assert "LlamaDecoderLayer ×4" in found.svg()
    assert len(re.findall(r"<[a-z]", found.svg())) < 200
    assert "LlamaDecoderLayer ×4" in found.text()
    assert len(found.panels(fold=False)) == 1
    title, words = ElementTree.fromstring(found.svg())[:2]
    assert "LlamaForCausalLM" in title.text
    assert "4 times" in words.text


def test_a_model_is_as_it_was():
    model, _ = tiny_models.tiny("llama")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph.diagram(model, **IDS).error(**IDS)
    assert model.training
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


class Writes(nn.Module):
    def forward(self, x):
        y = x * 2
        y[:, 0] = 0
        return y


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (nn.Sequential(nn.ReLU(), Branch()), r"at 1 \(test_graph_diagrams.py, line \d+: if x.sum\(\) > 0:\)"),
        (nn.Sequential(nn.ReLU(), Writes()), "writes into a part of a tensor"),
    ],
)
def test_what_cannot_be_drawn_is_named_with_its_place(net, said):
    with pytest.raises(InputError, match=said):
        graph.diagram(net, torch.ones(2, 3))


def test_an_operator_without_meaning_is_a_box_and_still_runs():
    class Net(nn.Module):
        def forward(self, x):
            return torch.fft.fft(F.relu(x)).real

    x = torch.randn(2, 5)
    found = graph.diagram(Net(), x)
    assert found.term.counts["opaque"] >= 1
    assert found.error(x) < 1e-9
    assert "can't look into" in found.text()


def test_wrong_shapes_and_endings_are_told(tmp_path):
    found = graph.diagram(nn.Linear(4, 2), torch.ones(3, 4))
    with pytest.raises(InputError, match=r"input 0 is \[5, 4\]; the term was made for \[3, 4\]"):
        found.execute(torch.ones(5, 4))
    with pytest.raises(InputError, match=r"expected .svg, .html, .txt or .json"):
        found.write(tmp_path / "x.pdf")
    for ending in ("svg", "html", "txt", "json"):
        assert found.write(tmp_path / f"x.{ending}").stat().st_size > 100
