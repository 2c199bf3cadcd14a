"""One of two processes of test_models_lower_bounds.py: HGRN decoders sharded by blocks, as by accelerate (FSDP2).

python sharded_bounds_worker.py OUT.json     (under torchrun's environment)
"""

import json
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from lineament._base.seeds import seeded
from lineament.models import DecoderForCausalLM, decoder_config


def models():
    """Decoders in which several blocks read one table of lower bounds."""
    shape = {"vocab_size": 13, "width": 16, "heads": 2}
    yield "hgrn", DecoderForCausalLM(decoder_config("hgrn", layers=3, **shape))
    yield "hybrid", DecoderForCausalLM(decoder_config("hgrn2", ratio="1:1", layers=6, **shape))
    fla = {"vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 24, "expand_ratio": 8}
    yield "fla", AutoModelForCausalLM.from_config(AutoConfig.for_model("hgrn2", **fla))


def loss_of(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def errors(model, accelerator):
    """The largest errors of loss, gradients and of the weights after two steps, against the whole model's."""
    rows = torch.randint(0, 13, (accelerator.num_processes, 11), generator=torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if "bounds" in name:
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    expected, gradients, start = [], {}, {k: v.clone() for k, v in model.state_dict().items()}
    alone = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        alone.zero_grad()
        loss = loss_of(model, rows)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        alone.step()
        expected.append(loss.item())
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.load_state_dict(start)
    alone.zero_grad()

    twin, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = loss_of(twin, rows[accelerator.process_index][None])
        loss.backward()
        optimizer.step()
        found.append(accelerator.reduce(loss.detach(), "mean").item())
    named = dict(twin.named_parameters())
    return {
        "loss": max(abs(a - b) for a, b in zip(expected, found, strict=True)),
        "gradient": max(float((p.grad.full_tensor() - gradients[n]).abs().max()) for n, p in named.items()),
        "weight": max(float((p.detach().full_tensor() - weights[n]).abs().max()) for n, p in named.items()),
        "table": min(float(g.abs().max()) for n, g in gradients.items() if "bounds" in n),
        "units": sum(type(module).__name__.startswith("FSDP") for module in twin.modules()),
    }


def main() -> None:
    torch.set_num_threads(1)
    results = {}
    with seeded(0):
        built = list(models())
    for name, model in built:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        results[name] = errors(model.double().train(), accelerator)
        accelerator.free_memory()
    if accelerator.is_main_process:
        with open(sys.argv[1], "w", encoding="utf-8") as out:
            json.dump(results, out)
    accelerator.end_training()


if __name__ == "__main__":
    main()
