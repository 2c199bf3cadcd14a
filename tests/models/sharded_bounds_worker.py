"""One of two processes of test_models_lower_bounds.py: HGRN decoders sharded in the units that accelerate picks.

python sharded_bounds_worker.py OUT.json     (under torchrun's environment)
"""

import json
import sys

import torch
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy, get_module_children_bottom_up
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from lineament._base.seeds import seeded
from lineament.models import DecoderForCausalLM, decoder_config
from lineament.train import leave_group, sharded
from lineament.train.sharded import full


def models():
    """Decoders in which several blocks read one table of lower bounds."""
    yield "hgrn", DecoderForCausalLM(decoder_config("hgrn", vocab_size=13, width=16, layers=3, heads=2))
    hybrid = decoder_config("hgrn2", ratio="1:1", vocab_size=13, width=16, layers=6, heads=2)
    yield "hybrid", DecoderForCausalLM(hybrid)
    fla = {"vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 24, "expand_ratio": 8}
    yield "fla", AutoModelForCausalLM.from_config(AutoConfig.for_model("hgrn2", **fla))


def loss_of(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def units(model):
    """The modules that accelerate shards by default under TRANSFORMER_BASED_WRAP, inner ones first."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert policy is not None
    return [module for module in get_module_children_bottom_up(model)[:-1] if policy(module)]


def trained(model, rows):
    """Losses and the last gradients of two steps."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(2):
        optimizer.zero_grad()
        loss = loss_of(model, rows)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), {name: p.grad for name, p in model.named_parameters()}


def errors(model):
    """The largest errors of losses, gradients and weights of the sharded model, against the whole one."""
    state = PartialState()
    rows = torch.randint(0, 13, (state.num_processes, 11), generator=torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if "bounds" in name:
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    parts = units(model)
    twin = sharded(model, parts, torch.device("cpu"))
    expected, gradients = trained(model, rows)
    found, shards = trained(twin, rows[state.process_index][None])
    torch.distributed.all_reduce(found)
    whole = {name: p.detach() for name, p in model.named_parameters()}
    return {
        "loss": float((found / state.num_processes - expected).abs().max()),
        "gradient": max(float((full(shards[name]) - gradients[name]).abs().max()) for name in whole),
        "weight": max(float((full(p.detach()) - whole[name]).abs().max()) for name, p in twin.named_parameters()),
        "table": min(float(g.abs().max()) for name, g in gradients.items() if "bounds" in name),
        "units": sorted({type(part).__name__ for part in parts}),
    }


def main() -> None:
    torch.set_num_threads(1)
    PartialState(cpu=True)
    with seeded(0):
        results = {name: errors(model.double().train()) for name, model in models()}
    if PartialState().is_main_process:
        with open(sys.argv[1], "w", encoding="utf-8") as out:
            json.dump(results, out)
    leave_group()


if __name__ == "__main__":
    main()
