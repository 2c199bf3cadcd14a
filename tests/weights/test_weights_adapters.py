"""Adapters out of two models: peft opens them and computes what the tuned model computes; so does the library."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from lineament.models import tiny_teacher
from lineament.weights import Point
from lineament.weights.lora import adapter_costs, extract_adapter

IDS = torch.arange(9)[None]


def tuned(model, folder):
    """Save a model as the base and, with every tensor moved, as the tuned one."""
    model.save_pretrained(folder / "base")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    model.save_pretrained(folder / "tuned")
    return model.eval()(IDS).logits


@pytest.mark.parametrize(
    ("family", "options", "matrices"),
    [("llama", {"tie_word_embeddings": True}, 7), ("llama", {"tie_word_embeddings": False}, 7),
     ("qwen2", {"tie_word_embeddings": True}, 7), ("gpt2", {}, 4)],
)  # fmt: skip
def test_peft_opens_what_was_extracted(tmp_path, family, options, matrices):
    teacher = tiny_teacher(family, **options)
    expected = tuned(teacher, tmp_path)
    first, second = (Point.open(tmp_path / name) for name in ("tuned", "base"))
    kept = extract_adapter(first, second, tmp_path / "lora", rank=64, base_name=str(tmp_path / "base"))
    assert len(kept) == matrices * teacher.config.num_hidden_layers
    assert min(kept.values()) > 0.999
    costs = adapter_costs(first, second, rank=64)
    assert costs["matrices"] == len(kept)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "lora").eval()(IDS).logits, expected, **close)
    opened = Point.open(tmp_path / "lora")
    assert opened.ties == first.ties
    again = opened.load_into(AutoModelForCausalLM.from_pretrained(tmp_path / "base")).eval()
    torch.testing.assert_close(again(IDS).logits, expected, **close)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_an_adapter_with_biases_is_what_peft_merges(tmp_path, bias):
    tiny_teacher("qwen2", tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], bias=bias))
    for i, (name, p) in enumerate(model.named_parameters()):
        if "lora" in name or name.endswith("bias"):
            nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(i))
    if bias == "lora_only":  # which saves those beside factors only
        for name, p in model.named_parameters():
            if name.endswith("bias") and "q_proj" not in name:
                nn.init.zeros_(p)
    model.save_pretrained(tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["bias"] == bias
    merged, expected = Point.open(tmp_path / "lora"), Point.open(model.merge_and_unload())
    for name in merged:
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flag", [True, False])
def test_layers_that_stand_the_other_way_are_known_by_themselves(tmp_path, flag):
    """peft turns its one flag for each layer; the file has that of the last one (here: written by hand)."""
    tiny_teacher("gpt2").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_proj"], fan_in_fan_out=True))
    for i, (name, p) in enumerate(model.named_parameters()):
        if "lora" in name:
            nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(i))
    model.save_pretrained(tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"fan_in_fan_out": flag}))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    merged = Point.open(tmp_path / "lora")
    expected = Point.open(PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload())
    assert any(not torch.equal(merged[name], Point.open(tmp_path / "base")[name]) for name in merged)
    for name in merged:
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-5, atol=1e-5)
