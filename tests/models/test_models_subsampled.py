"""The attention implementation "subsampled" inside real transformers classes."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    IJepaConfig,
    IJepaForImageClassification,
)

from lineament._base.errors import InputError
from lineament.models import load_teacher, self_ensemble, subsampled, tiny_teacher
from lineament.nn import Subsampling

FAMILIES = ["llama", "qwen3", "gpt2", "mistral"]
IDS = torch.arange(1, 31).view(2, 15)


def image_model():
    config = IJepaConfig(
        image_size=4, patch_size=1, num_channels=1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=3, attn_implementation="sdpa",
    )  # fmt: skip
    return IJepaForImageClassification(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_reduction_logits_are_the_models_own(family):
    model = tiny_teacher(family)
    mask = torch.ones(2, 15, dtype=torch.int64)
    mask[1, :4] = 0  # left padding
    plain, padded = model(IDS).logits, model(IDS, attention_mask=mask).logits
    for mode in ("unbiased", "local"):
        with subsampled(model, Subsampling(mode=mode, reduction=1), when="always"):
            torch.testing.assert_close(model(IDS).logits, plain)
            found = model(IDS, attention_mask=mask).logits
        torch.testing.assert_close(found[mask.bool()], padded[mask.bool()])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_language_model_never_looks_ahead(family):
    model, changed = tiny_teacher(family), IDS.clone()
    changed[:, 9:] = 5
    with subsampled(model, Subsampling(reduction=4), when="always"):
        found = []
        for ids in (IDS, changed):
            torch.manual_seed(0)
            found.append(model(ids).logits)
    assert torch.equal(found[0][:, :9], found[1][:, :9])
    assert not torch.equal(found[0][:, 9:], found[1][:, 9:])


@torch.no_grad()
def test_packed_documents_stay_apart():
    model = tiny_teacher("llama")
    positions = torch.cat([torch.arange(6), torch.arange(9)]).expand(2, -1)
    changed = IDS.clone()
    changed[:, :6] = 3
    with subsampled(model, Subsampling(reduction=3), when="always"):
        found = []
        for ids in (IDS, changed):
            torch.manual_seed(0)
            found.append(model(ids, position_ids=positions, use_cache=False).logits[:, 6:])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_the_model_is_as_it_was_after_the_block():
    model = tiny_teacher("llama")
    before, config = model(IDS).logits, model.config.to_dict()
    with subsampled(model, when="always"):
        assert not torch.equal(model(IDS).logits, before)
    with pytest.raises(IndexError), subsampled(model, when="always"):
        model(IDS + 100)  # beyond the vocabulary
    assert torch.equal(model(IDS).logits, before)
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"


def test_the_parts_of_a_model_get_back_each_its_own():
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPModel(CLIPConfig(text_config=shape, vision_config={**shape, "image_size": 8, "patch_size": 4}))
    model.text_model.config._attn_implementation = "eager"
    with subsampled(model, when="always"):
        assert model.text_model.config._attn_implementation == "subsampled"
    parts = (model.text_model, model.vision_model)
    assert [part.config._attn_implementation for part in parts] == ["eager", "sdpa"]


def test_it_is_dense_in_eval_mode_and_generates_with_a_cache():
    model = tiny_teacher("llama")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(IDS, **options)
    with subsampled(model):
        assert torch.equal(model.generate(IDS, **options), wanted)
        assert not torch.equal(model.train()(IDS).logits, model(IDS).logits)
    with subsampled(model.eval(), Subsampling(mode="unbiased"), when="always"):
        assert model.generate(IDS, **options).shape == wanted.shape


def test_the_implementation_is_found_by_name(tmp_path):
    tiny_teacher("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="subsampled")
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_activation_checkpointing_gives_the_same_gradients():
    model, grads = tiny_teacher("llama").train(), []
    for on in (False, True):
        if on:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(3)
        with subsampled(model, Subsampling(reduction=4)):
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_encoders_of_text_and_images():
    torch.manual_seed(0)
    text = BertModel(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                intermediate_size=32)).eval()  # fmt: skip
    mask = torch.ones(2, 15, dtype=torch.int64)
    mask[1, 10:] = 0
    wanted = text(IDS, attention_mask=mask).last_hidden_state
    with subsampled(text, Subsampling(reduction=1), when="always"):
        found = text(IDS, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()])
    model, pixels = image_model(), torch.rand(3, 1, 4, 4)
    with subsampled(model, Subsampling(reduction=4, grid=(4, 4)), when="always"):
        assert not torch.equal(model(pixels).logits, model(pixels).logits)
    with subsampled(model, Subsampling(grid=(2, 4)), when="always"), pytest.raises(InputError, match="16 tokens"):
        model(pixels)


def test_an_ensemble_averages_probabilities_and_repeats():
    model, pixels = image_model(), torch.rand(3, 1, 4, 4)
    one = [self_ensemble(model, members=1, seed=s, pixel_values=pixels) for s in (5, 6, 7)]
    three = self_ensemble(model, members=3, seed=5, pixel_values=pixels)
    torch.testing.assert_close(three.exp(), torch.stack(one).exp().mean(0))
    mean = self_ensemble(model, members=3, seed=5, score=lambda out: out.logits.softmax(-1), pixel_values=pixels)
    torch.testing.assert_close(three.exp(), mean)
    with pytest.raises(InputError, match="at least 1"):
        self_ensemble(model, members=0, pixel_values=pixels)


def test_what_it_cannot_do_is_said():
    model = tiny_teacher("gemma2")
    with subsampled(model, when="always"), pytest.raises(InputError, match="uses softcap"):
        model(IDS)
    with pytest.raises(InputError, match="unknown when"), subsampled(model, when="sometimes"):
        pass


@pytest.mark.slow
@torch.no_grad()
def test_the_embedded_model_reads_text_through_it():
    model, tokenizer = load_teacher("smollm2")
    ids = tokenizer(
        "The capital of France is Paris, and the capital of Italy is Rome. " * 16, return_tensors="pt"
    ).input_ids
    dense = model(ids, labels=ids).loss
    with subsampled(model, Subsampling(reduction=1), when="always"):
        torch.testing.assert_close(model(ids, labels=ids).loss, dense, rtol=1e-4, atol=1e-4)
    with subsampled(model, Subsampling(reduction=2, sigma=16.0), when="always"):
        half = model(ids, labels=ids).loss
    assert dense < half < 11  # of 10.8 for a blind guess
