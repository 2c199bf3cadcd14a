"""HGRN-2 in decoders: one table of lower bounds, counted over all layers, also in hybrids and after saving."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_a_decoder_sharded_by_blocks_gathers_its_table_for_every_block(tmp_path):
    """Two gloo processes, in the units that accelerate picks for FSDP2, against the whole model."""
    worker, out = Path(__file__).with_name("sharded_bounds_worker.py"), tmp_path / "found.json"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = subprocess.run(
        [sys.executable, *launch, str(worker), str(out)], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr[-3000:]
    for name, found in json.loads(out.read_text()).items():
        assert found["table"] > 1e-6, name  # the table learns
        assert found["units"] == (["FlaBlock"] if name == "fla" else ["DecoderBlock", "LowerBounds"])
        limit = 1e-8 if name == "fla" else 1e-12  # fla's table is summed in float32
        assert max(found["loss"], found["gradient"], found["weight"]) < limit, (name, found)
