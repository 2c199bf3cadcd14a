"""HGRN-2 in decoders: one table of lower bounds, counted over all layers, also in hybrids and after saving."""

import torch

from lineament._base.seeds import seeded
from lineament.models import DecoderForCausalLM, decoder_config
from lineament.nn.decays import ForgetGate


@torch.no_grad()
def test_a_hybrid_counts_all_its_layers_and_saves_one_table(tmp_path):
    with seeded(0):
        model = DecoderForCausalLM(
            decoder_config("hgrn2", ratio="1:1", vocab_size=11, width=16, layers=6, heads=2)
        ).eval()
        gates = [module for module in model.modules() if isinstance(module, ForgetGate)]
        gates[0].bounds.logits.normal_()
    assert [gate.layer for gate in gates] == [0, 2, 4]
    assert [name for name, _ in model.named_parameters() if "bounds" in name] == [
        "model.layers.0.mixer.heads.filling.forget.bounds.logits"
    ]
    ids = torch.arange(10)[None]
    model.save_pretrained(tmp_path)
    again = DecoderForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    before = model(ids).logits
    gates[0].bounds.logits[3] += 2.0  # a row that only upper layers sum
    assert not torch.equal(model(ids).logits, before)
