"""Decoders from scratch: which layers are full, equal arms, one cache for both kinds of layer, files, generation."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lineament._base.errors import InputError
from lineament._base.seeds import seeded
from lineament.models import (
    FAMILIES,
    DecoderConfig,
    DecoderForCausalLM,
    Family,
    StudentCache,
    decoder_config,
    full_layers,
    match_parameters,
    parameters,
)
from lineament.models.families import family
from lineament.nn import LAYERS, Slots, published

T = 23
HERE = list(FAMILIES)
SIZES = {"vocab_size": 40, "width": 32, "layers": 3, "heads": 2}


def decoder(name="gated-deltanet", *, ratio=(1,), dtype=torch.float64, **changes):
    with seeded(0):
        model = DecoderForCausalLM(decoder_config(name, ratio=ratio, **{**SIZES, **changes}))
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def ids(rows=2, length=T, seed=0):
    return torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def near(ours, theirs, tolerance=1e-9):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("layers", [4, 12, 24, 25])
@pytest.mark.parametrize("linear", [1, 3, 6, 12, 24])
def test_a_ratio_ends_every_group_with_a_full_layer(linear, layers):
    by_hand, since = [], 0
    for i in range(layers):  # count linear layers since the last full one
        if since == linear:
            by_hand, since = [*by_hand, i], 0
        else:
            since += 1
    if by_hand:
        assert full_layers(f"{linear}:1", layers) == tuple(by_hand)
        return
    with pytest.warns(UserWarning, match="in the middle third"):
        (only,) = full_layers(f"{linear}:1", layers)
    assert layers / 3 <= only <= 2 * layers / 3


def test_pure_full_and_listed_layers():
    assert full_layers("pure", 12) == ()
    assert full_layers("0:1", 3) == full_layers("full", 3) == (0, 1, 2)
    assert full_layers([5, 1], 6) == (1, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: full_layers("3-1", 4), "linear:full such as '3:1'"),
        (lambda: full_layers([4], 4), "from 0 to 3"),
        (lambda: decoder_config("gated-deltanett", **SIZES), "Did you mean 'gated-deltanet'"),
        (lambda: decoder_config("kda", **{**SIZES, "heads": 3}), "3 heads don't divide the 32 channels"),
        (lambda: decoder_config("kda", ratio=["kda", "llama"], **SIZES), "2 families are listed for 3 layers"),
        (lambda: decoder_config("kda", full_heads={3: [0]}, **SIZES), "layers 0 to 2"),
        (lambda: decoder_config("kda", full_heads={0: [2]}, **SIZES), "key-value heads 0 to 1"),
        (lambda: decoder_config("kda", ratio="2:1", full_heads={2: [0]}, **SIZES), "layer 2, softmax as a whole"),
        (lambda: decoder_config("kda", mpl="gelu", **SIZES), "Did you mean 'mlp'"),
        (lambda: DecoderForCausalLM(decoder_config("kda", mlp="swiglo", **SIZES)), "Did you mean 'swiglu'"),
        (lambda: DecoderForCausalLM(decoder_config("kda", norm="rmss", **SIZES)), "Did you mean 'rms'"),
        (lambda: DecoderForCausalLM(DecoderConfig()), "says nothing of its layers"),
        (lambda: match_parameters(decoder_config("kda", **SIZES), 100), "take fewer heads"),
        (lambda: match_parameters(decoder_config("kda", intermediate_size=0, **SIZES), 9999), "no MLP to widen"),
    ],
)
def test_a_mistake_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_config_that_lost_a_layer_is_refused():
    config = decoder_config("kda", **SIZES)
    del config.lineament["slots"]["1"]
    with pytest.raises(InputError, match=r"slots for \[0, 2\]"):
        DecoderForCausalLM(config)
    config = decoder_config("kda", **SIZES)
    config.lineament["slots"]["1"]["ropee"] = 1e4
    with pytest.raises(InputError, match="Did you mean 'rope'"):
        DecoderForCausalLM(config)


def test_the_softmax_family_is_a_llama():
    ours = decoder("llama", heads=4, key_heads=2, tie_word_embeddings=False)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=ours.config.intermediate_size, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        )
    ).double()  # fmt: skip
    names = {"self_attn": "mixer", "input_layernorm": "mixer_norm", "post_attention_layernorm": "mlp_norm"}
    state = {}
    for name in theirs.state_dict():
        own = name
        for a, b in names.items():
            own = own.replace(a, b)
        state[name] = ours.state_dict()[own]
    theirs.load_state_dict(state)
    near(ours(ids()).logits, theirs.eval()(ids()).logits, 1e-6)


@pytest.mark.parametrize("name", HERE)
@torch.no_grad()
def test_a_hybrid_read_in_pieces_and_token_by_token_is_the_hybrid_read_whole(name):
    model, tokens = decoder(name), ids()
    whole = model(tokens).logits
    cache, parts = StudentCache(model.config), []
    for a, b in [(0, 7), (7, 12), *((t, t + 1) for t in range(12, T))]:
        parts.append(model(tokens[:, a:b], past_key_values=cache).logits)
    near(torch.cat(parts, 1), whole)
    assert cache.nbytes() == sum(x.numel() * x.element_size() for x in cache.tensors().values())


@pytest.mark.parametrize("name", HERE)
@torch.no_grad()
def test_padding_and_packing_change_nothing(name):
    model, tokens = decoder(name), ids(1)
    alone = model(tokens).logits
    for real in (slice(5, 5 + T), slice(0, T)):  # padding left, right
        block, mask = ids(1, T + 5, seed=3), torch.zeros(1, T + 5, dtype=torch.long)
        block[:, real], mask[:, real] = tokens, 1
        near(model(block, attention_mask=mask).logits[:, real], alone)
    two = torch.cat([ids(1, 9, seed=4), tokens], 1)
    positions = torch.cat([torch.arange(9), torch.arange(T)])[None]
    near(model(two, position_ids=positions).logits[:, 9:], alone)


@pytest.mark.parametrize("ratio", [(1,), "pure", ["kda", "lightning", "llama"]])
@torch.no_grad()
def test_crop_beams_and_files_go_through_one_cache(ratio, tmp_path):
    model, tokens = decoder(ratio=ratio), ids()
    expected = model(tokens).logits[:, 17:]
    cache = StudentCache(model.config)
    model(tokens[:, :12], past_key_values=cache)
    cache.activate_past_recording()
    model(tokens[:, 12:17], past_key_values=cache)
    model(ids(seed=9)[:, :2], past_key_values=cache)
    cache.crop(-2)
    assert cache.get_seq_length() == 17
    cache.save(tmp_path / "cache.safetensors")
    near(model(tokens[:, 17:], past_key_values=copy.deepcopy(cache)).logits, expected)
    again = StudentCache.load(tmp_path / "cache.safetensors", model.config)
    near(model(tokens[:, 17:], past_key_values=again).logits, expected)
    cache.crop(0)
    order = torch.tensor([1, 1, 0])
    cache.reorder_cache(order)
    near(model(tokens[order][:, 17:], past_key_values=cache).logits, expected[order])


def test_generation_goes_on_as_the_full_forward_would():
    model, prompt = decoder(dtype=torch.float32), ids(2, 6)
    with torch.no_grad():
        tokens = prompt
        for _ in range(5):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), tokens)
    mask = torch.ones_like(prompt)
    mask[1, :2] = 0  # a shorter prompt, padded on the left
    padded = model.generate(prompt, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(padded[1:, 6:], model.generate(prompt[1:, 2:], max_new_tokens=5, do_sample=False)[:, 4:])
    helped = model.generate(prompt[:1], assistant_model=decoder("lightning", dtype=torch.float32), max_new_tokens=5)
    assert torch.equal(helped, tokens[:1])


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_is_an_ordinary_safetensors_model(tied, tmp_path):
    model = decoder("kda", dtype=torch.float32, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "lineament-decoder"


@pytest.mark.parametrize("name", [n for n in HERE if FAMILIES[n].mlp_share])
@pytest.mark.parametrize("ratio", ["pure", "3:1"])
def test_arms_are_made_equal_by_the_width_of_the_mlp(name, ratio):
    sizes = {"vocab_size": 64, "width": 64, "layers": 4, "heads": 2}
    target = decoder_config("llama", intermediate_size=320, **sizes)
    found = match_parameters(decoder_config(name, ratio=ratio, **sizes), target)
    counted = [sum(p.numel() for p in DecoderForCausalLM(c).parameters()) for c in (found, target)]
    assert counted == [parameters(found), parameters(target)]
    assert abs(counted[0] / counted[1] - 1) <= 0.02


def test_heads_may_stay_full_inside_a_linear_layer():
    model = decoder(ratio="pure", full_heads={0: [1], 2: [0, 1]})
    whole, cache = model(ids()).logits, StudentCache(model.config)
    with torch.no_grad():
        model(ids()[:, :9], past_key_values=cache)
        near(model(ids()[:, 9:], past_key_values=cache).logits, whole[:, 9:])
    kept = {name for name in cache.tensors() if name.endswith("keys")}
    assert kept == {"0.full.keys", "2.full.keys"}


@pytest.mark.parametrize("changes", [{"post_norm": True}, {"norm": "layer", "mlp": "gelu"}, {"intermediate_size": 0}])
def test_a_block_is_its_equation(changes):
    model = decoder("lightning", **changes)
    block = model.model.layers[0]
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    if changes.get("post_norm"):
        y = x + block.mixer_norm(block.mixer(x))
        y = y + block.mlp_norm(block.mlp(y))
    else:
        y = x + block.mixer(block.mixer_norm(x))
        y = y if block.mlp is None else y + block.mlp(block.mlp_norm(y))
    near(block(x), y)


def test_checkpointed_blocks_have_the_same_gradients():
    model, tokens = decoder().train(), ids()
    model(tokens, labels=tokens).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(tokens, labels=tokens).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name])


@pytest.mark.parametrize("by", ["argument", "config"])
def test_outputs_can_be_asked_for_as_a_tuple(by):
    model, tokens = decoder(), ids()
    expected = model(tokens, labels=tokens)
    model.config.return_dict = by != "config"
    loss, logits = model(tokens, labels=tokens, use_cache=False, **({"return_dict": False} if by == "argument" else {}))
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)


def test_a_family_is_a_value():
    own = Family(kind="lightning", slots=Slots(conv=3), mlp="geglu", mlp_share=1.0, full=Slots(qk_norm="rms"))
    model = decoder(own, ratio="1:1")
    assert model.config.mlp == "geglu"
    assert model.model.layers[1].mixer.q_norm is not None
    assert model.model.layers[2].mixer.heads.filling.place == (2, 3)  # decay by the layer's place


@pytest.mark.parametrize("name", sorted(set(LAYERS) - set(FAMILIES)))
def test_a_family_of_a_published_layer_is_that_layer(name):
    own = family(name).layer(32, 2, None, 1, 3)
    assert own == published(name, model_width=32, heads=2, layer=1, layers=3)[0]
