"""Selecting and swapping: by identity, and out of the traps."""

import pytest
import torch
from tiny_models import MAKERS, batch, tiny
from torch import nn

from lineament._base.errors import InputError
from lineament.graph import outline, select, swap, swapped, tied


def places(model):
    return {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}


@pytest.mark.parametrize("family", MAKERS)
def test_a_block_gives_back_the_very_same_modules_in_their_order(family):
    model, names = tiny(family)
    before, logits = places(model), model(**batch()).logits
    state = list(model.state_dict())
    with swapped(model, {names[1]: Bypass(), names[3]: Bypass()}):
        assert not torch.equal(model(**batch()).logits, logits)
    with pytest.raises(RuntimeError, match="stop"), swapped(model, {names[1]: Bypass(), names[3]: Bypass()}):
        raise RuntimeError("stop")
    assert places(model) == before
    assert list(model.state_dict()) == state
    assert torch.equal(model(**batch()).logits, logits)


class Bypass(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def test_select_by_glob_class_and_predicate():
    model, names = tiny("llama")
    attention = list(select(model, "*.self_attn"))
    assert attention == [f"{name}.self_attn" for name in names]
    assert list(select(model, type(model.model.layers[0].self_attn))) == attention
    assert list(select(model, lambda name, module: hasattr(module, "q_proj"))) == attention
    assert select(model, "") == {"": model}
    assert "" not in select(model, "*")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "*.self_atn",
            r"no module is called '\*\.self_atn' in LlamaForCausalLM\..*model\.layers\.\* \(LlamaDecoderLayer x4\)",
        ),
        ("model.layers.0.self_atn", r"Did you mean 'model\.layers\.0\.self_attn'"),
        (nn.Conv2d, "no module is a Conv2d"),
        (lambda name, module: False, "no module fits the predicate"),
    ],
)
def test_nothing_found_says_what_there_is(where, message):
    with pytest.raises(InputError, match=message):
        select(tiny("llama")[0], where)


def test_the_outline_folds_numbers():
    assert outline(tiny("llama")[0])["model.layers.*.mlp"] == ("LlamaMLP", 4)
    assert outline(nn.Sequential(nn.ReLU(), nn.GELU()))["*"] == ("ReLU, ...", 2)
    assert "block2.fc1" in outline(nn.ModuleDict({"block2": nn.ModuleDict({"fc1": nn.ReLU()})}))


def test_swap_hands_back_what_it_replaced_and_keeps_the_mode():
    model, names = tiny("llama")
    before = places(model)
    bypass = Bypass().train()
    old = swap(model, {names[0]: bypass})
    assert model.get_submodule(names[0]) is bypass
    assert not bypass.training
    swap(model, old)
    assert places(model) == before


def test_a_swap_that_can_not_be_leaves_the_model_alone():
    model, names = tiny("llama")
    before = places(model)
    for new, message in [
        ({names[0]: Bypass(), "model.layers.9": Bypass()}, "no module is called 'model.layers.9'"),
        ({names[0]: Bypass(), f"{names[0]}.mlp": Bypass()}, "lies inside 'model.layers.0'"),
        ({"": Bypass()}, "the model itself"),
        ({names[0]: 3}, "should become a int"),
    ]:
        with pytest.raises(InputError, match=message):
            swap(model, new)
    assert places(model) == before


def test_a_shared_module_is_swapped_in_all_its_places_or_not_at_all():
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(2, 2)})
    assert list(select(model, "b")) == ["b"]  # also under its second name
    with pytest.raises(InputError, match="a and b are one shared module"):
        swap(model, {"b": nn.Identity()})
    with swapped(model, {"a": nn.Identity(), "b": nn.Identity()}):
        assert model["a"] is not model["b"]
    assert model["a"] is model["b"] is layer


def test_a_place_inside_a_shared_module_is_one_place():
    block = nn.ModuleDict({"inner": nn.ReLU()})
    model = nn.ModuleDict({"a": block, "b": block})
    new = nn.GELU()
    swap(model, {"a.inner": new})
    assert model["b"]["inner"] is new
    with pytest.raises(InputError, match=r"'a\.inner' and 'b\.inner' are one place"):
        swap(model, {"a.inner": nn.ReLU(), "b.inner": nn.ReLU()})


def test_a_tied_weight_does_not_come_loose_unseen():
    model, _ = tiny("gpt2")
    assert tied(model) == [["transformer.wte.weight", "lm_head.weight"]]
    new = nn.Linear(32, 61, bias=False)
    with pytest.raises(InputError, match=r"lm_head\.weight is tied to transformer\.wte\.weight"):
        swap(model, {"lm_head": new})
    new.weight = model.transformer.wte.weight
    swap(model, {"lm_head": new})
    assert tied(model)
    swap(model, {"lm_head": nn.Linear(32, 61, bias=False)}, untie=True)
    assert not tied(model)
