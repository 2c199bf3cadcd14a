"""Every family: a student reads a text whole, in chunks, token by token, padded and packed, and is saved whole."""

from types import MethodType

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaAttention

import lineament.models as models
from lineament._base.errors import InputError
from lineament.models import ADAPTERS, StudentCache, build_student, head_shape, tiny, tiny_teacher
from lineament.models.adapters import Adapter, adapter_for
from lineament.nn import MixerConfig

FAMILIES = sorted(ADAPTERS)
LOUD = {"log_scale": -1.0}  # a far part that is heard
T = 26


def ids(rows=2, length=T, seed=0):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def student(family, **changes):
    """A student with a softmax layer, a mixed layer and a linear one, where the family allows it."""
    if family == "gemma2":  # squashed logits: nothing exact inside a converted layer
        return tiny(family, "hedgehog", layers=(1, 2), **changes)
    layers = (1, 2)
    return tiny(family, layers=layers, options=LOUD, full_heads=(1,), **changes)


def near(ours, theirs, tolerance=1e-4):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@torch.no_grad()
def read(model, tokens, cuts, **kwargs):
    cache, outs = None, []
    for a, b in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        out = model(tokens[:, a:b], past_key_values=cache, use_cache=True, **kwargs)
        cache = out.past_key_values
        outs.append(out.logits)
    return torch.cat(outs, dim=1), cache


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prefill_equals_chunks_equals_tokens(family):
    model, tokens = student(family), ids()
    whole = model(tokens, use_cache=False).logits
    chunks, cache = read(model, tokens, [9, 10, 11, 20])
    near(chunks, whole)
    near(read(model, tokens, range(1, T))[0], whole)
    assert cache.get_seq_length() == T
    assert cache.nbytes() == sum(x.numel() * x.element_size() for x in cache.tensors().values())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_folder_loads_without_its_head_too(family, tmp_path):
    """As `AutoModel` for states, and with a fresh head as `AutoModelForSequenceClassification`."""
    whole, tokens = student(family), ids()
    whole.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path).eval()
    states = whole(tokens, use_cache=False, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(bare(tokens, use_cache=False).last_hidden_state, states)
    first = bare(tokens[:, :9], use_cache=True)
    rest = bare(tokens[:, 9:], past_key_values=first.past_key_values, use_cache=True).last_hidden_state
    near(rest, states[:, 9:])
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, pad_token_id=0).eval()
    near(getattr(judge, judge.base_model_prefix)(tokens, use_cache=False).last_hidden_state, states, 0)
    assert judge(tokens).logits.shape == (2, 3)
    for again in (bare, judge):
        again.save_pretrained(tmp_path / "again")
        back = type(again).from_pretrained(tmp_path / "again").eval()
        assert torch.equal(back(tokens)[0], again(tokens)[0])


def test_a_teacher_hooked_by_accelerate_is_refused():
    teacher = tiny_teacher()
    add_hook_to_module(teacher.model.layers[1].self_attn, ModelHook())
    with pytest.raises(InputError, match=r"layers\.1\.self_attn is hooked by accelerate.*without device_map"):
        build_student(teacher, {})


@torch.no_grad()
def test_a_mixer_that_is_passed_over_is_an_error():
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    attention.forward = MethodType(LlamaAttention.forward, attention)  # what a hook made before the conversion leaves
    with pytest.raises(InputError, match="mixer in layer 1 is passed over"):
        model(ids(), use_cache=False)


@torch.no_grad()
def test_they_are_equal_to_1e_9_in_float64():
    model, tokens = student("llama").double(), ids()
    whole = model(tokens, use_cache=False).logits
    near(read(model, tokens, [9, 10, 20])[0], whole, 1e-9)
    near(read(model, tokens, range(1, T))[0], whole, 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_padded_row_equals_the_row_alone(family):
    model, tokens = student(family), ids()
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    left = model(tokens, attention_mask=mask, position_ids=positions).logits
    near(left[1:, 9:], model(tokens[1:, 9:]).logits)
    near(left[:1], model(tokens[:1]).logits)
    right = model(tokens, attention_mask=mask.flip(1)).logits
    near(right[1:, :-9], model(tokens[1:, :-9]).logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_documents_equal_documents_alone(family):
    model, tokens = student(family), ids()
    model.train()
    positions = torch.cat([torch.arange(10), torch.arange(T - 10)])[None].expand(2, -1)
    packed = model(tokens, position_ids=positions).logits
    near(packed[:, 10:], model(tokens[:, 10:]).logits)
    near(packed[:, :10], model(tokens[:, :10]).logits)
    ones = model(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits
    assert torch.equal(ones, packed)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_jump_in_positions_is_a_distance_where_the_mask_says_that_all_is_one_text(family):
    """Teacher and student alike: the same as reading the second part later, beside the first one's cache."""
    tokens, positions = ids(), torch.cat([torch.arange(10), torch.arange(10, T) + 7])[None].expand(2, -1)
    for model in (student(family), tiny_teacher(family)):
        whole = model(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens), use_cache=False).logits
        first = model(tokens[:, :10], position_ids=positions[:, :10], use_cache=True)
        rest = model(tokens[:, 10:], position_ids=positions[:, 10:], past_key_values=first.past_key_values).logits
        near(whole, torch.cat([first.logits, rest], 1))
        assert (whole - model(tokens, use_cache=False).logits)[:, 10:].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["mistral", "phi3"])
@torch.no_grad()
def test_packed_documents_keep_a_window_that_the_config_has_for_all_layers(family):
    teacher, tokens = tiny_teacher(family, sliding_window=4), ids()
    model = build_student(teacher, {1: MixerConfig(kind="kda", **head_shape(teacher.config))})
    positions = torch.cat([torch.arange(10), torch.arange(T - 10)])[None].expand(2, -1)
    packed = model.train()(tokens, position_ids=positions).logits
    near(packed[:, 10:], model(tokens[:, 10:]).logits)
    near(packed[:, :10], model(tokens[:, :10]).logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saved_and_loaded_is_bit_identical(family, tmp_path):
    model, tokens = student(family), ids()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == type(model).__name__
    assert AutoConfig.from_pretrained(tmp_path).lineament == model.config.lineament
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma2"])
@torch.no_grad()
def test_a_window_over_the_whole_text_is_the_teacher(family):
    teacher, tokens = tiny_teacher(family), ids()
    shape = head_shape(teacher.config)
    mixers = {i: MixerConfig(kind="hedgehog-window", window=T + 1, options=LOUD, **shape) for i in (1, 2)}
    near(build_student(teacher, mixers)(tokens).logits, teacher(tokens).logits, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_full_heads_everywhere_are_the_teacher(family):
    teacher, tokens = tiny_teacher(family), ids()
    shape = head_shape(teacher.config)
    every = tuple(range(shape["key_heads"]))
    mixers = {i: MixerConfig(kind="kda", full_heads=every, **shape) for i in (1, 2)}
    if family == "gemma2":
        with pytest.raises(InputError, match="attn_logit_softcapping"):
            build_student(teacher, mixers)
        return
    model = build_student(teacher, mixers)
    expected = teacher(tokens).logits
    near(model(tokens).logits, expected, 1e-5)
    near(read(model, tokens, range(1, T))[0], expected, 1e-5)


@torch.no_grad()
def test_an_unconverted_gemma2_layer_squashes_its_logits_like_the_teacher():
    teacher, tokens = tiny_teacher("gemma2", attn_implementation="eager"), ids()
    model = build_student(teacher, {})
    near(model(tokens).logits, teacher(tokens).logits, 1e-5)
    near(read(model, tokens, range(1, T))[0], teacher(tokens).logits, 1e-5)


def test_the_teacher_is_not_changed_and_weights_are_copies():
    teacher = tiny_teacher()
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    model = build_student(teacher, {1: MixerConfig(kind="kda", **head_shape(teacher.config))})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert all(torch.equal(before[name], x) for name, x in teacher.state_dict().items())
    assert type(teacher).__name__ == "LlamaForCausalLM"
    assert teacher.config.model_type == "llama"
    assert set(before) < set(model.state_dict())
    shared = build_student(teacher, {}, share=True)
    assert shared.model.norm.weight is teacher.model.norm.weight


def test_an_unknown_architecture_names_its_modules_and_the_row_to_write():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(InputError, match=r"BloomAttention at transformer.h.0.self_attention.*ADAPTERS\['bloom'\]"):
        build_student(model, {})
    with pytest.raises(InputError, match="Did you mean 'llama'"):
        adapter_for(type("C", (), {"model_type": "lama"})())


def test_a_family_is_a_row():
    assert ADAPTERS["mistral"] == Adapter(model_type="mistral")
    assert models.attentions(tiny_teacher("opt"))[2][0] == "model.decoder.layers.2.self_attn"


@pytest.mark.parametrize(
    ("family", "changes", "sliding"),
    [
        ("gemma3_text", {}, (0,)),
        ("llama", {}, ()),
        ("mistral", {"sliding_window": 8}, (0, 1, 2)),  # no layer_types: the window is every layer's
        ("mistral", {"sliding_window": None}, ()),
        ("mistral", {"sliding_window": 256}, ()),  # of 256 positions
        ("phi3", {"sliding_window": 8}, (0, 1, 2)),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, (1, 2)),
        ("qwen2", {"sliding_window": 8}, ()),
    ],
)
def test_sliding_layers(family, changes, sliding):
    assert models.sliding_layers(tiny_teacher(family, **changes).config) == sliding


@pytest.mark.parametrize(
    ("changes", "layer", "message"),
    [
        ({}, 3, "layers 0 to 2"),
        ({"key_width": 4}, 0, "key_width=4, the model has 8"),
    ],
)
def test_a_mixer_that_does_not_fit_is_refused(changes, layer, message):
    teacher = tiny_teacher()
    shape = {**head_shape(teacher.config), **changes}
    with pytest.raises(InputError, match=message):
        build_student(teacher, {layer: MixerConfig(kind="kda", **shape)})


def test_full_heads_in_a_sliding_layer_are_refused():
    with pytest.raises(InputError, match="sliding window in the teacher"):
        tiny("gemma3_text", full_heads=(0,))


def test_a_student_of_a_newer_format_is_refused(tmp_path):
    model = tiny()
    model.config.lineament = {**model.config.lineament, "format": 99}
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="format 99"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_student_is_not_converted_again():
    with pytest.raises(InputError, match="student already"):
        build_student(tiny(), {})


@torch.no_grad()
def test_bf16_from_end_to_end(tmp_path):
    model, tokens = student("llama"), ids()
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    logits, cache = read(half, tokens, [9, 10])
    assert logits.dtype == torch.bfloat16
    assert cache.tensors()["1.filling.far"].dtype == torch.float32
    near(logits.float(), model(tokens).logits, 0.1)
    assert half.generate(tokens, max_new_tokens=3).shape == (2, T + 3)


def test_a_wrong_mask_or_cache_is_refused():
    model, tokens = tiny(), ids()
    with pytest.raises(InputError, match="padding mask"):
        model(tokens, attention_mask=torch.ones(2, 1, T, T))
    with pytest.raises(InputError, match="position_ids restart"):
        model(tokens, position_ids=torch.arange(T)[None] % 9, past_key_values=StudentCache(model.config))
