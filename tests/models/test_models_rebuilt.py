"""Wide layers and experts in transformers' own decoders: equal to a plain loop, saved, loaded, generating."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lineament._base.errors import InputError
from lineament.models import experts_of, set_active_, tiny_teacher, widen, with_mlps
from lineament.models.rebuilt import FAMILIES
from lineament.nn import Experts, ExpertsConfig

IDS = torch.arange(1, 12)[None]


def by_hand(model, groups):
    """Run the layers with the attentions of a group reading the same states, then its MLPs."""
    caught = {}
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda m, a, k: caught.update(h=a[0], k=k), with_kwargs=True
    )
    model(IDS, use_cache=False)
    handle.remove()
    h = caught["h"]
    for group in groups:
        layers = [model.model.layers[i] for i in group]
        h = h + sum(each.self_attn(each.input_layernorm(h), **caught["k"])[0] for each in layers)
        h = h + sum(each.mlp(each.post_attention_layernorm(h)) for each in layers)
    return model.lm_head(model.model.norm(h))


def uneven(model):
    """Norms that differ from channel to channel, and biases that aren't zero: the initial ones would hide mistakes."""
    for name, p in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(p, mean=1.0, std=0.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wide_layer_is_its_layers_side_by_side(family):
    model = uneven(tiny_teacher(family).double())
    wide = widen(model, [(1, 2)])
    torch.testing.assert_close(wide(IDS).logits, by_hand(model, [(0,), (1, 2)]))
    assert len(wide.model.layers) == wide.config.num_hidden_layers == 2
    assert len(model.model.layers) == 3


@torch.no_grad()
def test_groups_of_one_leave_the_model_alone():
    model = tiny_teacher("llama")
    assert torch.equal(widen(model, [(0,)])(IDS).logits, model(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_wide_model_is_an_ordinary_folder(tmp_path, attention):
    wide = widen(uneven(tiny_teacher("llama")), [(0, 1)])
    wide.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert type(loaded).__name__ == "RebuiltLlamaForCausalLM"
    assert loaded.model.layers[0].self_attn.config is loaded.config
    torch.testing.assert_close(loaded(IDS).logits, wide(IDS).logits, rtol=1e-4, atol=1e-5)
    given = loaded.generate(IDS, max_new_tokens=4, do_sample=False)
    slow = IDS
    for _step in range(4):
        slow = torch.cat([slow, wide(slow, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(given, slow)


@torch.no_grad()
def test_experts_in_a_model_are_saved_and_loaded(tmp_path):
    model = tiny_teacher("llama")
    torch.manual_seed(0)
    layer = Experts(ExpertsConfig(width=24, hidden=32, experts=4, active=2))
    rebuilt = with_mlps(widen(model, [(1, 2)]), {0: layer})
    rebuilt.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, rebuilt(IDS).logits)
    assert list(experts_of(loaded)) == [0]
    set_active_(loaded, 1).save_pretrained(tmp_path / "one")
    assert experts_of(AutoModelForCausalLM.from_pretrained(tmp_path / "one"))[0].active == 1


@pytest.mark.parametrize(
    ("groups", "said"), [([(0, 2)], "no run"), ([(2, 3)], "outside layers"), ([(0, 1), (1, 2)], "two groups")]
)
def test_groups_that_are_none_are_named(groups, said):
    with pytest.raises(InputError, match=said):
        widen(tiny_teacher("llama"), groups)


def test_other_models_are_refused():
    with pytest.raises(InputError, match="gpt2 can't be rebuilt"):
        widen(tiny_teacher("gpt2"), [(0, 1)])
    with pytest.raises(InputError, match="rebuilt already"):
        widen(widen(tiny_teacher("llama"), [(0, 1)]), [(0, 1)])
    with pytest.raises(InputError, match="layer 9 is outside"):
        with_mlps(tiny_teacher("llama"), {9: Experts(ExpertsConfig(width=24, hidden=4, experts=2, active=1))})
    with pytest.raises(InputError, match="has width 8, not 24"):
        with_mlps(tiny_teacher("llama"), {0: Experts(ExpertsConfig(width=8, hidden=4, experts=2, active=1))})
    with pytest.raises(InputError, match="has no experts"):
        set_active_(tiny_teacher("llama"), 1)
