"""The cache: crop by replay, beams, rows, files; and generate in all its ways."""

import copy
import io as stream

import pytest
import torch
from transformers import DynamicCache, StaticCache

from lineament._base.errors import InputError
from lineament.models import DecoderForCausalLM, StudentCache, cache_nbytes, decoder_config, tiny, tiny_teacher

LOUD = {"log_scale": -1.0, "decay": True}
KINDS = ["hedgehog-window", "kda", "hedgehog", "cosformer", "lightning", "softmax-window", "lolcats"]
T = 26


def ids(rows=2, length=T, seed=0):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def student(kind="hedgehog-window", family="llama"):
    """Layers: softmax, mixed, mixed."""
    return tiny(family, kind, layers=(1, 2), full_heads=(1,), options=LOUD if kind == "hedgehog-window" else {})


def filled(model, tokens):
    cache = StudentCache(model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    return cache


@torch.no_grad()
def after(model, cache, tokens):
    return model(tokens, past_key_values=cache).logits


def near(ours, theirs, tolerance=1e-4):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_crop_takes_back_what_was_recorded(kind):
    model, tokens = student(kind), ids()
    expected = after(model, filled(model, tokens[:, :17]), tokens[:, 17:])
    cache = filled(model, tokens[:, :12])
    cache.activate_past_recording()
    for a, b in [(12, 15), (15, 16), (16, 19)]:  # several forwards between two crops
        after(model, cache, tokens[:, a:b])
    after(model, cache, ids(seed=9)[:, :2])
    cache.crop(-4)
    assert cache.get_seq_length() == 17
    near(after(model, cache, tokens[:, 17:21]), expected[:, :4])
    cache.crop(0)
    near(after(model, cache, tokens[:, 21:24]), expected[:, 4:7])
    cache.crop(-3)
    near(after(model, cache, tokens[:, 21:]), expected[:, 4:])


def test_crop_is_refused_before_anything_is_changed():
    model, tokens = student(), ids()
    cache = filled(model, tokens)
    with pytest.raises(InputError, match="activate_past_recording"):
        cache.crop(-1)
    cache.activate_past_recording()
    after(model, cache, tokens[:, :2])
    with pytest.raises(InputError, match="2 tokens recorded"):
        cache.crop(-3)
    assert {layer.get_seq_length() for layer in cache.layers} == {T + 2}


def test_rows_are_reordered_selected_and_repeated():
    model, tokens = student(), ids(3)
    order = torch.tensor([2, 0, 0])
    cache = filled(model, tokens[:, :20])
    expected = after(model, copy.deepcopy(cache), tokens[:, 20:])
    cache.reorder_cache(order)
    near(after(model, cache, tokens[order][:, 20:]), expected[order])
    cache = filled(model, tokens[:, :20])
    cache.batch_repeat_interleave(2)
    near(after(model, cache, tokens[:, 20:].repeat_interleave(2, 0)), expected.repeat_interleave(2, 0))
    cache = filled(model, tokens[:, :20])
    cache.batch_select_indices(torch.tensor([True, False, True]))
    near(after(model, cache, tokens[[0, 2], 20:]), expected[[0, 2]])


def test_rows_stay_while_tokens_are_recorded():
    model, tokens = student(), ids()
    cache = filled(model, tokens[:, :20])
    cache.activate_past_recording()
    after(model, cache, tokens[:, 20:])
    for change in (lambda: cache.batch_repeat_interleave(2), lambda: cache.reorder_cache(torch.tensor([1, 0]))):
        with pytest.raises(InputError, match=r"crop\(0\) first"):
            change()


def test_reset_begins_again():
    model, tokens = student(), ids()
    cache = filled(model, tokens)
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes()) == (0, 0)
    near(after(model, cache, tokens), model(tokens).logits, 1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompts_state_is_saved_and_loaded_bit_identical(kind, family, tmp_path):
    model, tokens = student(kind, family), ids()
    cache = filled(model, tokens[:, :20])
    cache.save(tmp_path / "prompt.safetensors")
    loaded = StudentCache.load(tmp_path / "prompt.safetensors", model.config)
    assert loaded.get_seq_length() == 20
    assert torch.equal(after(model, loaded, tokens[:, 20:]), after(model, cache, tokens[:, 20:]))


@pytest.mark.parametrize("name", ["mla", "lightnet", "diag-attention", "codes by head"])
def test_states_that_are_buffers_or_have_parts_are_saved_too(name, tmp_path):
    if name == "codes by head":
        model = tiny("llama", full_heads=(1,), options={"map": "product", "codes": [2, 4, 4]})
    else:
        model = DecoderForCausalLM(decoder_config(name, vocab_size=61, width=24, layers=2, heads=2)).eval()
    tokens = ids()
    cache = filled(model, tokens[:, :20])
    after(model, cache, tokens[:, 20:21])  # buffers have spare room by now, which is not saved
    cache.save(tmp_path / "prompt.safetensors")
    loaded = StudentCache.load(tmp_path / "prompt.safetensors", model.config)
    assert loaded.nbytes() <= cache.nbytes()
    assert torch.equal(after(model, loaded, tokens[:, 21:]), after(model, cache, tokens[:, 21:]))


def test_a_cache_of_another_model_is_refused(tmp_path):
    cache = filled(student(), ids())
    cache.save(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="GrowingLayer where this model needs a MixerLayer"):
        StudentCache.load(tmp_path / "a.safetensors", tiny().config)
    for other in (student("kda"), student("hedgehog")):
        with pytest.raises(InputError, match="other widths, heads or mixers"):
            StudentCache.load(tmp_path / "a.safetensors", other.config)


def test_the_state_stays_constant_while_a_teachers_cache_grows():
    model, teacher = tiny(), tiny_teacher()
    sizes = [filled(model, ids(1, n)).nbytes() for n in (40, 80, 160)]
    assert len(set(sizes)) == 1
    with torch.no_grad():
        assert cache_nbytes(teacher(ids(1, 160), use_cache=True).past_key_values) == 160 * 3 * 2 * 3 * 8 * 4


def test_an_empty_dynamic_cache_is_taken_over_and_others_are_refused():
    model, teacher, tokens = student(), tiny_teacher(), ids()
    cache = DynamicCache()
    near(after(model, cache, tokens), model(tokens).logits, 1e-6)
    assert isinstance(cache, StudentCache)
    with torch.no_grad():
        full = teacher(tokens, use_cache=True).past_key_values
    with pytest.raises(InputError, match="StudentCache"):
        model(tokens, past_key_values=full)
    with pytest.raises(InputError, match="StaticCache"):
        model(tokens, past_key_values=StaticCache(config=teacher.config, max_cache_len=64))
    with pytest.raises(InputError, match="cache_implementation"):
        model.generate(tokens, max_new_tokens=2, cache_implementation="static")


def greedy(model, tokens, count):
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tokens


def test_generate_is_greedy_without_a_cache():
    model, tokens = student(), ids()
    out = model.generate(tokens, max_new_tokens=8, do_sample=False)
    assert torch.equal(out, greedy(model, tokens, 8))


def test_unequal_prompts_generate_what_they_do_alone():
    model, tokens = student(), ids()
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    out = model.generate(tokens * mask, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(out[1:, -8:], greedy(model, tokens[1:, 9:], 8)[:, -8:])


def test_beams_find_what_they_find_without_a_cache():
    model, tokens = student(), ids()
    beams = {"num_beams": 3, "max_new_tokens": 7, "do_sample": False}
    assert torch.equal(model.generate(tokens, **beams), model.generate(tokens, use_cache=False, **beams))


def test_sampling_is_repeatable_and_streams():
    model, tokens = student(), ids(1)

    class Streamer:
        seen: list = []  # noqa: RUF012

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.seen.append(None)

    outs = []
    for _ in range(2):
        torch.manual_seed(0)
        outs.append(model.generate(tokens, max_new_tokens=6, do_sample=True, streamer=Streamer()))
    assert torch.equal(*outs)
    assert Streamer.seen[: T + 6] == outs[0][0].tolist()


def test_assisted_generation_gives_the_greedy_text():
    model, tokens = student(), ids(1)
    plain = model.generate(tokens, max_new_tokens=12, do_sample=False)
    helped = model.generate(tokens, max_new_tokens=12, do_sample=False, assistant_model=student("kda"))
    assert torch.equal(plain, helped)
    looked_up = model.generate(tokens.repeat(1, 2), max_new_tokens=9, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, model.generate(tokens.repeat(1, 2), max_new_tokens=9, do_sample=False))


def test_a_cache_is_used_again_and_prefill_goes_in_chunks():
    model, tokens = student(), ids(1)
    cache = filled(model, tokens[:, :15])
    out = model.generate(tokens, max_new_tokens=5, do_sample=False, past_key_values=cache)
    expected = model.generate(tokens, max_new_tokens=5, do_sample=False)
    assert torch.equal(out, expected)
    chunked = model.generate(tokens, max_new_tokens=5, do_sample=False, prefill_chunk_size=7)
    assert torch.equal(chunked, expected)


def test_write_text_streams_and_counts():
    from lineament.models import write_text

    class Tokenizer:
        pad_token_id, eos_token_id, chat_template = 0, 2, None

        def __call__(self, text, return_tensors):
            return type("E", (), {"input_ids": torch.tensor([[ord(c) % 57 + 3 for c in text]])})

        def decode(self, tokens, **_):
            return " ".join(str(int(t)) for t in torch.as_tensor(tokens).flatten()) + " "

    target = stream.StringIO()
    found = write_text((student(), Tokenizer()), "abcdef", max_new_tokens=5, stream=target)
    assert (found["prompt_tokens"], found["tokens"]) == (6, 5)
    assert found["cache_bytes"] > 0
    assert target.getvalue().strip()
    with pytest.raises(InputError, match="empty"):
        write_text((student(), Tokenizer()), " ")
    with pytest.raises(InputError, match="chat template"):
        write_text((student(), Tokenizer()), "hello", chat=True)
    learned = student(family="gpt2")  # of 256 positions
    assert write_text((learned, Tokenizer()), 250 * "a", max_new_tokens=7)["tokens"] == 7
    with pytest.raises(InputError, match="250 tokens and 8 are to follow, but the model has learned 256"):
        write_text((learned, Tokenizer()), 250 * "a", max_new_tokens=8)
