"""One rank of tests/models/test_models_parallel.py: tiny models whose sequence is spread over the ranks.

python parallel_worker.py OUT.json     (under torchrun's or accelerate launch's environment)
"""

import json
import sys
from itertools import pairwise

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from lineament.models import DecoderForCausalLM, average_gradients_, decoder_config, sequence_parallel_loss, tiny
from lineament.ops import sequence_parallel

T, PACKED = 29, (0, 5, 6, 20, 29)


def models():
    """Pure and hybrid students: converted layers, softmax layers and heads, a sliding layer."""
    yield "kda", tiny("llama", "kda")
    yield "hybrid window", tiny("llama", "hedgehog-window", layers=(0, 2), full_heads=(1,))
    shape = {"vocab_size": 61, "width": 16, "layers": 2, "heads": 2}
    torch.manual_seed(0)  # the same weights on every rank
    yield "hybrid decoder", DecoderForCausalLM(decoder_config("gated-deltanet", ratio="1:1", **shape))
    tiny_fla = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "head_dim": 8}
    hybrid = {"num_heads": 2, "attn": {"layers": [1], "num_heads": 2}}
    yield "fla hybrid", AutoModelForCausalLM.from_config(AutoConfig.for_model("gated_deltanet", **tiny_fla, **hybrid))
    yield "sliding", tiny("gemma3_text", "lightning", layers=(1,))


def one_process(model, ids, documents):
    """Mean loss over every document by itself, and its gradients."""
    model.zero_grad()
    rows = [ids] if documents is None else [ids[:, a:b] for a, b in pairwise(documents)]
    total = 0
    for row in rows:
        logits = model(input_ids=row, use_cache=False).logits[:, :-1].flatten(0, 1)
        total = total + cross_entropy(logits, row[:, 1:].flatten(), reduction="sum")
    loss = total / sum(row[:, 1:].numel() for row in rows)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compared(model, ids, documents, wrapped, group_sum) -> dict[str, float]:
    expected, gradients = one_process(model, ids, documents)
    model.zero_grad()
    loss = sequence_parallel_loss(wrapped, ids, cu_seqlens=documents)
    loss.backward()
    if wrapped is model:
        average_gradients_(model)
    mean = group_sum(loss.detach())
    found = {"loss": abs(mean - expected)}
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, whole in gradients.items():
        found[name] = float((model.get_parameter(name).grad - whole).abs().max()) / largest
    return found


def refused(model, ids) -> list[str]:
    found = []
    for more in ({"use_cache": True}, {"attention_mask": torch.zeros_like(ids)}):
        try:
            with sequence_parallel(ids.shape[1]):
                model(input_ids=ids, **more)
        except ValueError as error:
            found.append(str(error))
    return found


def main() -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)

    def mean(x):
        return float(accelerator.reduce(x, "mean"))

    results = {}
    for name, model in models():
        model = model.double().train()
        ids = torch.randint(3, 61, (2, T), generator=torch.Generator().manual_seed(0))
        results[f"{name} packed"] = compared(model, ids[:1], PACKED, model, mean)
        results[name] = compared(model, ids, None, model, mean)
    messages = refused(model, ids)
    wrapped = accelerator.prepare(model)
    results["data-parallel wrapper"] = compared(model, ids, None, wrapped, mean)
    if accelerator.is_main_process:
        found = {"processes": accelerator.num_processes, "errors": results, "refused": messages}
        with open(sys.argv[1], "w", encoding="utf-8") as out:
            json.dump(found, out)
    accelerator.end_training()


if __name__ == "__main__":
    main()
