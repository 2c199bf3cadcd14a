"""Chat templates by name, against the formats as their model cards write them."""

import pytest

from lineament._base.errors import InputError
from lineament.weights.templates import TEMPLATES, chosen_template

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
PROMPTS = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello"
    "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n"
    "### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n"
    "[|assistant|]",
}
STARTS = {"alpaca": "Below is an instruction", "exaone": "[|system|][|endofturn|]\n[|user|]Hi\n"}


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_writes_its_format(tokenizer, name):
    tokenizer.chat_template = chosen_template(name, ())
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == PROMPTS[name]
    without = tokenizer.apply_chat_template(CHAT[1:], tokenize=False)
    assert without.startswith(STARTS.get(name, ""))
    assert "Be brief." not in without


def test_a_template_by_vote_text_or_mistake():
    assert chosen_template("auto", ("a", "", "b", "b")) == "b"
    assert chosen_template("auto", ("",)) == chosen_template(None, ("a",)) == ""
    assert chosen_template("{{ x }}", ()) == "{{ x }}"
    with pytest.raises(InputError, match=r"'llama4' is not known by name; expected auto, chatml, llama3"):
        chosen_template("llama4", ())
