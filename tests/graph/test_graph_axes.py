"""Axes of small graphs: what is tied, cut, kept apart and frozen, and why."""

import pytest
import torch
from torch import nn

from lineament import graph


def free(model, *args):
    found = graph.axes(model, *args)
    return {frozenset(c.members) for c in found.classes if not c.frozen}, found


def test_a_residual_stream_is_one_class():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.up, self.down, self.out = (nn.Linear(*s) for s in ((2, 4), (4, 6), (6, 4), (4, 2)))

        def forward(self, x):
            x = self.into(x)
            return self.out(x + self.down(torch.relu(self.up(x))))

    classes, found = free(Net(), torch.zeros(1, 2))
    stream = {("into.weight", 0), ("into.bias", 0), ("up.weight", 1), ("down.weight", 0), ("down.bias", 0)}
    assert frozenset(stream | {("out.weight", 1)}) in classes
    assert frozenset({("up.weight", 0), ("up.bias", 0), ("down.weight", 1)}) in classes
    assert len(classes) == 2
    assert not found.opaque


def test_concatenation_lays_classes_end_to_end():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(2, 3), nn.Linear(2, 4), nn.Linear(7, 1)

        def forward(self, x):
            return self.out(torch.cat([self.a(x), self.b(x)], -1))

    found = graph.axes(Net(), torch.zeros(1, 2))
    (cut,) = found.tensors["out.weight"][1]
    assert isinstance(cut, graph.Cut)
    assert [part[0].size for part in cut.parts] == [3, 4]
    assert [part[0].cls for part in cut.parts] == [found.tensors[f"{n}.weight"][0][0].cls for n in "ab"]


def test_a_bilinear_head_has_channels_inside_heads():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)

        def forward(self, x):
            q, k = (f(x).unflatten(-1, (2, 3)).transpose(0, 1) for f in (self.q, self.k))
            return (q @ k.mT).sum(0)

    found = graph.axes(Net(), torch.zeros(5, 4))
    heads, channels = found.tensors["q.weight"][0]
    assert found.classes[channels.cls].outer == (heads.cls,)
    assert not found.classes[heads.cls].frozen
    assert found.tensors["k.weight"][0] == (heads, channels)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x.cumsum(-1), "order along an axis"),
        (lambda x: x[..., torch.tensor([1, 0, 2, 3])], "positions taken by number"),
        (lambda x: x * torch.arange(4.0), "positions"),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), "a constant"),
        (lambda x: torch.cat([x[..., ::2], x[..., 1::2]], -1), "every 2th position"),
        (lambda x: torch.fft.fft(x).real, "no rule"),
        (lambda x: torch.zeros(x.shape).copy_(x), "no rule"),
    ],
)
def test_what_depends_on_the_order_is_frozen(change, reason):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.b(change(self.a(x)))

    classes, found = free(Net(), torch.zeros(1, 2))
    assert not classes
    assert any(reason in (c.why or "") for c in found.classes)


def test_a_constant_that_is_one_number_ties_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.b(self.a(x) * torch.full((4,), 2.0) + torch.zeros(1, 4))

    assert len(free(Net(), torch.zeros(1, 2))[0]) == 1


def test_modes_are_given_back():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    net[1].eval()
    graph.trace(net, torch.zeros(1, 2))
    assert net.training
    assert not net[1].training


def test_a_trace_runs_on_other_weights():
    net = nn.Linear(2, 3)
    traced = graph.trace(net, torch.zeros(4, 2))
    state = {name: torch.randn(p.shape) for name, p in net.named_parameters()}
    x = torch.randn(4, 2)
    torch.testing.assert_close(traced.run(state, [x])[0], torch.func.functional_call(net, state, x))
