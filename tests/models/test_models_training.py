"""Students train like any transformers model: checkpointing, PEFT, Trainer, hidden states, export."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, pipeline

from lineament.models import ADAPTERS, mixers_of, tiny

T = 24
LOUD = {"log_scale": -1.0, "decay": True}


def ids(rows=2, length=T, seed=0):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def student(kind="hedgehog-window", family="llama", **changes):
    return tiny(
        family, kind, layers=(1, 2), full_heads=(1,), options=LOUD if kind == "hedgehog-window" else {}, **changes
    )


def gradients(model, tokens, **kwargs):
    model.zero_grad()
    model(tokens, labels=tokens, **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["hedgehog-window", "kda", "lolcats"])
def test_checkpointing_gives_the_same_gradients(kind):
    model, tokens = student(kind).train(), ids()
    plain = gradients(model, tokens)
    assert any("mixer" in name for name in plain)
    model.gradient_checkpointing_enable()
    kept = gradients(model, tokens, position_ids=None)
    assert plain.keys() == kept.keys()
    for name in plain:
        torch.testing.assert_close(kept[name], plain[name])


def test_checkpointing_a_packed_row_gives_the_same_gradients():
    model, tokens = student().train(), ids(1)
    packed = {"position_ids": torch.cat([torch.arange(10), torch.arange(T - 10)])[None]}
    plain = gradients(model, tokens, **packed)
    model.gradient_checkpointing_enable()
    kept = gradients(model, tokens, **packed)
    for name in plain:
        torch.testing.assert_close(kept[name], plain[name])


def test_hidden_states_come_out():
    model, tokens = student(), ids()
    out = model(tokens, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert torch.equal(out.logits, model(tokens).logits)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox", "opt"])
def test_lora_joins_the_projections_and_merges(family):
    peft = pytest.importorskip("peft")
    model, tokens = student(family=family), ids()
    before = model(tokens).logits.detach()
    config = peft.LoraConfig(r=2, target_modules=list(ADAPTERS[family].projections), task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    torch.testing.assert_close(wrapped(input_ids=tokens).logits, before)
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    tuned = wrapped(input_ids=tokens).logits
    assert not torch.allclose(tuned, before)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, tuned, atol=1e-4, rtol=1e-4)
    assert merged.generate(tokens, max_new_tokens=3).shape[1] == T + 3


def test_trainer_takes_steps_and_the_result_loads(tmp_path):
    model = student()
    data = [{"input_ids": row, "labels": row} for row in ids(8)]
    before = mixers_of(model)[1].filling.map_k.weight.detach().clone()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        gradient_checkpointing=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    assert not torch.equal(mixers_of(model)[1].filling.map_k.weight, before)
    trainer.save_model(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(ids()).logits, model.eval()(ids()).logits)


def test_students_are_pickled_and_copied():
    model, tokens = student(), ids()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # our own bytes
        assert torch.equal(other(tokens).logits, model(tokens).logits)


def test_a_pipeline_writes():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
    write = pipeline("text-generation", model=student(), tokenizer=tokenizer)
    text = write("w5 w6 w7", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("w5 w6 w7")
    assert len(text) > len("w5 w6 w7")


@pytest.mark.parametrize("kind", ["hedgehog-window", "hedgehog", "kda"])
def test_the_forward_is_exported(kind):
    model, tokens = student(kind), ids(1)
    program = torch.export.export(model, (tokens,), {"use_cache": False}, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(tokens, use_cache=False).logits, model(tokens).logits)
