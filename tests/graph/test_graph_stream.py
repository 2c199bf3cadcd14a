"""Layer by layer, and on from the middle, is the model itself to the bit."""

import pytest
import torch
from tiny_models import MAKERS, batch, tiny
from torch import nn

from lineament._base.errors import InputError
from lineament.graph import capture, hidden_of, run_from, stream


def layer_inputs(model, names, inputs):
    with torch.no_grad(), capture(model, lambda name, _: name in names, inputs=True, outputs=False, clone=True) as seen:
        logits = model(**inputs, use_cache=False).logits
    return [seen.inputs(name)[0] for name in names], logits


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, (tuple, list)):
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b or a is b


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", MAKERS)
def test_a_stream_gives_each_layer_what_the_model_gives_it(family, padded):
    model, names = tiny(family)
    expected, _ = layer_inputs(model, names, batch(padded))
    seen = []
    for (name, layer, args, kwargs), (own_args, own_kwargs) in zip(
        stream(model, names, batch(padded)), expected, strict=True
    ):
        assert layer is model.get_submodule(name)
        assert type(hidden_of(args, kwargs)) is torch.Tensor
        same(args, own_args)
        same(kwargs, own_kwargs)
        seen.append(name)
    assert seen == names
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", MAKERS)
def test_going_on_from_any_layer_is_the_model_to_the_bit(family, padded):
    model, names = tiny(family)
    calls, logits = layer_inputs(model, names, batch(padded))
    hidden = [hidden_of(*call) for call in calls]
    with torch.no_grad():
        last = model.get_submodule(names[-1])(*calls[-1][0], **calls[-1][1])
        hidden.append(last if isinstance(last, torch.Tensor) else last[0])
        for start in range(5):
            assert torch.equal(run_from(model, names, start, hidden[start], batch(padded)), logits), start


def test_a_sliding_layer_keeps_its_own_mask():
    model, names = tiny("gemma3")
    masks = [kwargs["attention_mask"] for _, _, _, kwargs in stream(model, names, batch(padded=True))]
    assert not torch.equal(masks[0], masks[1])


def test_layers_before_the_start_are_not_run():
    model, names = tiny("llama")
    (*_, (args, kwargs), _), logits = layer_inputs(model, names, batch())
    for name in names[:2]:
        model.get_submodule(name).mlp.forward = None
    with torch.no_grad():
        assert torch.equal(run_from(model, names, 2, hidden_of(args, kwargs), batch()), logits)


def test_gradients_reach_the_later_layers_only():
    model, names = tiny("gpt2")
    hidden = torch.randn(2, 9, 32, requires_grad=True)
    run_from(model, names, 2, hidden, batch()).sum().backward()
    grads = [any(p.grad is not None for p in model.get_submodule(name).parameters()) for name in names]
    assert grads == [False, False, True, True]
    assert hidden.grad is not None


def test_gradient_checkpointing_recomputes_the_right_layers():
    model, names = tiny("llama")
    hidden = torch.randn(2, 9, 32)
    gradients = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        run_from(model, names, 2, hidden.clone().requires_grad_(), batch()).square().mean().backward()
        gradients.append(model.model.layers[2].self_attn.q_proj.weight.grad.clone())
    assert torch.equal(*gradients)


def test_a_stream_leaves_the_callers_gradient_mode_alone():
    model, names = tiny("llama")
    for _, _, args, kwargs in stream(model, names, batch()):
        assert torch.is_grad_enabled()
        assert not hidden_of(args, kwargs).requires_grad


def test_a_changed_layer_counts_from_then_on():
    model, names = tiny("llama")
    steps = stream(model, names, batch())
    _, layer, args, kwargs = next(steps)
    with torch.no_grad():
        layer.mlp.down_proj.weight.zero_()
        expected = layer(*args, **kwargs)
    assert torch.equal(hidden_of(*next(steps)[2:]), expected)


def test_several_batches_go_through_together():
    model, names = tiny("llama")
    batches = [batch(), batch(padded=True)]
    for i, steps in enumerate(zip(*(stream(model, names, b) for b in batches), strict=True)):
        assert {name for name, *_ in steps} == {names[i]}


class Shared(nn.Module):
    """One layer standing in three places, called with a tuple for a result and the hidden states by keyword."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer()] * 3)
        self.head = nn.Linear(4, 7)

    def forward(self, x):
        for layer in self.layers:
            x = layer(hidden_states=x, scale=2.0)[0]
        return self.head(x)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, hidden_states, scale):
        return self.map(hidden_states) * scale, "weights"


def test_a_layer_in_several_places_and_tuples_and_keywords():
    model, x, names = Shared(), torch.randn(2, 3, 4), ["layers.0", "layers.1", "layers.2"]
    hidden = [hidden_of(args, kwargs) for _, _, args, kwargs in stream(model, names, x)]
    assert torch.equal(hidden[0], x)
    for start in range(3):
        assert torch.equal(run_from(model, names, start, hidden[start], x), model(x))


def test_wrong_layers_are_named():
    model, names = tiny("llama")
    with pytest.raises(InputError, match=r"Did you mean 'model\.layers\.0'"):
        next(stream(model, ["model.layer.0"], batch()))
    with pytest.raises(InputError, match=r"'model\.layers\.0' was called out of turn"):
        list(stream(model, names[::-1], batch()))
    model.idle = nn.Identity()
    with pytest.raises(InputError, match="did not call 'idle'"):
        list(stream(model, [*names, "idle"], batch()))
    with pytest.raises(InputError, match="start is 5; expected 0 to 4"):
        run_from(model, names, 5, torch.zeros(2, 9, 32), batch())
    with pytest.raises(InputError, match="no layers were given"):
        list(stream(model, [], batch()))
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_forward_that_was_replaced_before_comes_back():
    model, names = tiny("llama")
    layer = model.get_submodule(names[1])
    calls = []
    own = layer.forward
    layer.forward = mine = lambda *args, **kwargs: (calls.append(1), own(*args, **kwargs))[1]
    list(stream(model, names, batch()))
    assert layer.forward is mine
    assert calls == [1]
