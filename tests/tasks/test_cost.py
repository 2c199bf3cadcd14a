"""Bytes of cache, speeds in turn, peak memory."""

import pytest
import torch
from transformers import DynamicCache

from lineament._base.errors import InputError
from lineament.models import DecoderForCausalLM, StudentCache, decoder_config, tiny, tiny_teacher
from lineament.tasks import cache_bytes, decode_speed, filled_cache, is_student, peak_memory, prefill_speed
from lineament.tasks import cost as room


@pytest.fixture(autouse=True)
def _short_reading(monkeypatch):
    monkeypatch.setattr(room, "READ", 32)


def test_a_stretched_cache_has_the_size_of_a_read_one():
    model = tiny_teacher("llama")
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.zeros(1, 100, dtype=torch.long), past_key_values=cache)
    read = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(model, 100) == read
    assert cache_bytes(model, 200) == 2 * read
    assert cache_bytes(model, 3) == read * 3 // 100


def test_sliding_layers_do_not_grow():
    model = tiny_teacher("gemma3_text")
    one, two, three = (cache_bytes(model, n) for n in (64, 128, 192))
    assert two - one == three - two
    assert two < 2 * one
    assert filled_cache(model, 128).get_seq_length() == 128


def test_a_students_state_does_not_grow_and_its_full_heads_do():
    student = tiny("llama")
    assert is_student(student)
    assert not is_student(tiny_teacher("llama"))
    assert cache_bytes(student, 64) == cache_bytes(student, 4096)
    part = tiny("llama", full_heads=(1,))
    cache = filled_cache(part, 300)
    assert cache.get_seq_length() == 300
    assert all(layer.state.full.length == 300 for layer in cache.layers)
    assert cache_bytes(part, 64) < cache_bytes(part, 4096) < cache_bytes(tiny_teacher("llama"), 4096) * 0.6


def test_latents_grow_as_if_all_had_been_read():
    model = DecoderForCausalLM(decoder_config("mla", vocab_size=61, width=24, layers=2, heads=2)).eval()
    read = StudentCache(model.config)
    with torch.no_grad():
        model(torch.zeros(1, 256, dtype=torch.long), past_key_values=read)
    assert cache_bytes(model, 256) == read.nbytes()  # a multiple of what a buffer grows by


def test_a_static_cache_holds_as_much():
    cache = filled_cache(tiny_teacher("llama"), 100, static=True)
    assert int(cache.get_seq_length()) == 100


def test_the_models_take_turns_and_the_better_cache_counts():
    models = {"student": tiny("llama", full_heads=(0,)), "teacher": tiny_teacher("llama")}
    found = decode_speed(models, 100, tokens=3, warmup=1)
    assert list(found) == ["student", "teacher"]
    assert found["student"].cache == "student"
    teacher = found["teacher"]
    assert {teacher.cache, *teacher.slower} == {"dynamic", "static"}
    assert all(teacher.median <= other for other in teacher.slower.values())
    assert len(teacher.seconds) == 3


def test_a_long_prompt_is_read_both_ways_and_the_better_one_counts(monkeypatch):
    monkeypatch.setattr(room, "PIECE", 32)
    models = {"student": tiny("llama", full_heads=(0,)), "teacher": tiny_teacher("llama")}
    tries = prefill_speed(models, 70, repeats=1)
    for name, cache in (("student", "student"), ("teacher", "dynamic")):
        assert {tries[name].cache, *tries[name].slower} == {cache, f"{cache}, in pieces"}
        assert all(tries[name].median <= other for other in tries[name].slower.values())
    read = prefill_speed(models, 20, repeats=2)["student"]
    assert (read.cache, len(read.seconds)) == ("student", 2)
    assert read.tokens_per_second == pytest.approx(20 / read.median)


@pytest.mark.parametrize(("pieces", "tries"), [(2.0, 1), (1.1, 3)])
def test_a_way_that_is_clearly_slower_is_tried_once(monkeypatch, pieces, tries):
    tried = []

    def clock(steps, repeats, *_):
        tried.extend(name for name in steps for _ in range(repeats))
        return {name: [pieces if name.endswith("in pieces") else 1.0] * repeats for name in steps}

    monkeypatch.setattr(room, "PIECE", 32)
    monkeypatch.setattr(room, "in_turn", clock)
    found = prefill_speed({"teacher": tiny_teacher("llama")}, 70, repeats=3)["teacher"]
    assert (found.cache, found.seconds) == ("dynamic", (1.0,) * 3)
    assert sum(name.endswith("in pieces") for name in tried) == tries


def test_peak_memory_sees_what_was_held():
    held = 60_000_000
    with peak_memory() as before:
        pass
    with peak_memory() as peak:
        block = torch.ones(held // 4)
        del block
    assert peak.bytes >= held
    assert peak.bytes >= before.bytes


def test_nothing_to_measure():
    with pytest.raises(InputError, match="at least 1"):
        cache_bytes(tiny_teacher("llama"), 0)
    with pytest.raises(InputError, match="no model"):
        decode_speed({}, 10)
