"""Capturing and patching any module's calls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import MAKERS, batch, tiny
from torch import nn

from lineament._base.errors import InputError
from lineament.graph import capture, patch


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Odd(nn.Module):
    """Takes and gives trees, and changes its input in place."""

    def forward(self, pair, *, scale, note=None):
        x, y = pair
        x.mul_(scale)
        return {"sum": x + y, "parts": (x, [y, None]), "note": note}


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd = Odd()
        self.again = self.odd

    def forward(self, x):
        first = self.odd((x.clone(), x), scale=2.0, note="first")["sum"]
        return self.again((first.clone(), first), scale=3.0)["sum"]


def test_trees_keywords_and_several_calls():
    model, x = Twice(), torch.ones(2, requires_grad=True)
    with capture(model, "odd", inputs=True, clone=True) as seen:
        model(x)
    assert len(seen["odd"]) == len(seen.inputs("odd")) == 2
    (pair,), kwargs = seen.inputs("odd")[0]
    assert pair[0].tolist() == [1, 1]  # as it was before the call
    assert kwargs == {"scale": 2.0, "note": "first"}
    first, second = seen["odd"]
    assert first["sum"].tolist() == [3, 3]
    assert second["parts"][1][1] is None
    assert not first["sum"].requires_grad
    assert hooks(model) == 0


def test_a_shared_module_is_recorded_once_and_found_by_both_names():
    with capture(model := Twice(), Odd) as seen:
        model(torch.ones(2))
    assert list(seen) == ["odd", "again"]
    assert len(seen["odd"]) == len(seen["again"]) == 2


def test_a_change_in_place_is_noticed():
    with capture(model := Twice(), "odd", inputs=True, outputs=False) as seen:
        model(torch.ones(2))
    with pytest.raises(RuntimeError, match="capture with clone=True"):
        seen["odd"]


def test_the_graph_is_kept_when_asked():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with capture(model, "0", detach=False) as seen:
        model(torch.ones(1, 2))
    seen.tensor("0").sum().backward()
    assert model[0].weight.grad is not None


def test_each_tensor_goes_through_keep_and_inference_mode_works():
    model = nn.Sequential(nn.Linear(2, 2))
    with torch.inference_mode(), capture(model, "0", keep=lambda x: x.double()) as seen:
        model(torch.ones(1, 2))
    assert seen.tensor("0").dtype == torch.float64


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(0, 3), min_size=1), st.booleans())
def test_the_forward_pass_ends_once_all_is_seen(wanted, inputs_only):
    ran = []
    model = nn.Sequential(*(Counted(i, ran) for i in range(4)))
    names = [str(i) for i in wanted]
    with capture(model, lambda name, _: name in names, inputs=inputs_only, outputs=not inputs_only, stop=True) as seen:
        model(torch.zeros(1))
    assert ran == list(range(max(wanted) + (not inputs_only)))
    assert {name: seen.tensor(name).item() for name in seen} == {n: int(n) + (not inputs_only) for n in names}
    assert hooks(model) == 0


class Counted(nn.Module):
    def __init__(self, number, ran):
        super().__init__()
        self.number, self.ran = number, ran

    def forward(self, x):
        self.ran.append(self.number)
        return x + 1


def test_stopping_after_several_calls_and_nested_captures():
    ran = []
    model = nn.Sequential(Counted(0, ran), Counted(1, ran))
    with capture(model, "1") as outer, capture(model, "0", stop=2) as inner:
        for _ in range(5):
            model(torch.zeros(1))
    assert ran == [0, 1, 0]
    assert len(inner["0"]) == 2
    assert len(outer["1"]) == 1


def test_errors_pass_and_take_the_hooks_with_them():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="shapes"), capture(model, "0"), patch(model, {"0": lambda *call: None}):
        model(torch.ones(1, 3))
    assert hooks(model) == 0
    with pytest.raises(InputError, match="neither inputs nor outputs"), capture(model, "0", outputs=False):
        pass
    with (
        pytest.raises(InputError, match="no module is called '7'"),
        patch(model, {"0": lambda *call: None, "7": print}),
    ):
        pass
    assert hooks(model) == 0


def test_reading_what_is_not_there():
    model = nn.ModuleDict({"used": nn.ReLU(), "idle": nn.ReLU()})
    with capture(model, nn.ReLU) as seen:
        model["used"](torch.ones(1))
    assert seen["idle"] == []
    with pytest.raises(InputError, match="'idle' was called 0 times"):
        seen.tensor("idle")
    with pytest.raises(KeyError, match="Did you mean 'used'"):
        seen["usd"]


@pytest.mark.parametrize("family", MAKERS)
def test_patching_a_layer_by_what_was_captured_changes_nothing(family):
    model, names = tiny(family)
    chosen = names[2]
    with torch.no_grad(), capture(model, chosen, clone=True) as seen:
        logits = model(**batch()).logits
    kept = seen[chosen][0]
    noise = {name: torch.randn(2, 9, 32) for name in names[:2]}

    def shift(name):
        def fn(module, args, kwargs, output):
            return output + noise[name] if isinstance(output, torch.Tensor) else (output[0] + noise[name], *output[1:])

        return fn

    changes = {name: shift(name) for name in noise}
    with torch.no_grad():
        with patch(model, changes):
            assert not torch.equal(model(**batch()).logits, logits)
        with patch(model, {**changes, chosen: lambda *call: kept}):
            assert torch.equal(model(**batch()).logits, logits)
        assert torch.equal(model(**batch()).logits, logits)


def test_patches_run_in_order_and_none_leaves_the_output():
    model = nn.Sequential(nn.Identity())
    changes = {"0": lambda m, a, k, out: out + 1, nn.Identity: lambda m, a, k, out: out * 10, "?": lambda *call: None}
    with patch(model, changes), capture(model, "0") as seen:
        assert model(torch.ones(1)).item() == 20
    assert seen.tensor("0").item() == 20  # a later capture sees the patched output
