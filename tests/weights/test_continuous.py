"""Scalings, signs and rotations: which there are is known for each of these nets."""

import pytest
import torch
from architectures import IDS, llama
from torch import nn

from lineament import weights


def kinds(model, *args, **kwargs):
    group = weights.symmetry(model, *args, **kwargs)
    return group, weights.continuous(model, group, *args, **kwargs)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (nn.ReLU(), {"scale"}),
        (nn.Tanh(), {"sign"}),
        (nn.GELU(), set()),
        (nn.Identity(), {"scale", "sign", "rotation"}),
    ],
)
def test_an_activation_decides(activation, expected):
    net = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 5))
    _, found = kinds(net, torch.zeros(6, 3))
    assert {family.kind for family in found} == expected
    assert all(family.error < 1e-10 for family in found)
    for family in found:
        if family.kind == "scale":
            signs = {name: e for (name, _), e in family.exponents.items()}
            assert signs == {"0.weight": 1.0, "0.bias": 1.0, "2.weight": -1.0}


def test_elements_leave_the_function_alone_and_can_be_undone():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5)).double()
    group, found = kinds(net, torch.zeros(6, 3))
    x = torch.randn(6, 3, dtype=torch.float64)
    element = found[0].random(1).then(group.random(2))
    moved = element.apply(net.state_dict())
    assert not torch.allclose(moved["0.weight"], net.state_dict()["0.weight"])
    torch.testing.assert_close(torch.func.functional_call(net, moved, x), net(x))
    back = element.inverse().apply(moved)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(back[name], tensor)


def test_attention_and_norms_of_a_llama():
    model = llama(num_hidden_layers=1, hidden_size=16, num_attention_heads=4, intermediate_size=12).eval()
    group, found = kinds(model, input_ids=IDS, use_cache=False)
    stems = [
        (family.kind, frozenset(name.removesuffix(".weight").rpartition(".")[2] for name, _ in family.exponents))
        for family in found
    ]
    assert ("rotation", frozenset({"v_proj", "o_proj"})) in stems  # OV: any orthogonal matrix per group
    assert ("scale", frozenset({"q_proj", "k_proj"})) in stems  # QK: reciprocal, also per rotary frequency
    assert ("scale", frozenset({"up_proj", "down_proj"})) in stems  # SwiGLU is linear in its value path
    assert ("scale", frozenset({"input_layernorm", "q_proj", "k_proj", "v_proj"})) in stems  # RMSNorm's gain
    assert ("scale", frozenset({"norm", "lm_head"})) in stems
    frozen = [f for f in found if group.classes[f.cls].frozen and f.kind == "scale"]
    assert any({name.split(".")[-2] for name, _ in f.exponents} == {"q_proj", "k_proj"} for f in frozen)
    assert not any(family.kind == "rotation" and group.classes[family.cls].size == 12 for family in found)
