"""A training run on disk: one safetensors file that is replaced whole, and a log of JSON lines."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lineament import io
from lineament._base.errors import InputError
from lineament.train.sharded import full, shard_like

FILE, METRICS = "checkpoint.safetensors", "metrics.jsonl"


def random_states() -> tuple[dict[str, Tensor], str]:
    """Return the states of all generators: tensors, and JSON for python's and numpy's."""
    tensors = {"cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        tensors[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    kind, keys, *rest = np.random.get_state()
    numpy: list[Any] = [kind, np.asarray(keys).tolist(), *rest]
    return tensors, json.dumps({"python": random.getstate(), "numpy": numpy})


def restore_random_states(tensors: Mapping[str, Tensor], others: str) -> None:
    """Put all generators where `random_states` found them."""
    torch.set_rng_state(tensors["cpu"])
    for name, state in tensors.items():
        if name.startswith("cuda."):
            torch.cuda.set_rng_state(state, int(name.removeprefix("cuda.")))
    saved = json.loads(others)
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that belong to a model's state (running means and the like), which training may change."""
    named = dict(model.named_buffers())
    return {name: named[name] for name in model.state_dict() if name in named}


def save(
    folder: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    digest: str,
    *,
    ended: bool = False,
    writes: bool = True,
) -> None:
    """Write all that training goes on from after `step` steps; the former file stays until the new one is whole.

    Of sharded parameters every process must call it, since they are gathered; one of them `writes`. `ended` says
    that the run is over before all of its steps.
    """
    tensors = {f"parameter:{name}": p.detach() for name, p in parameters.items()}
    tensors |= {f"buffer:{name}": b for name, b in buffers.items()}
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            if value is not None:
                tensors[f"state:{key}:{name}"] = torch.as_tensor(value)
    generators, others = random_states()
    tensors |= {f"random:{name}": state for name, state in generators.items()}
    saved = {}
    for name, tensor in tensors.items():
        whole = full(tensor.detach())
        if writes:
            saved[name] = whole.to("cpu").contiguous().clone()
    if writes:
        about = {"step": str(step), "config": digest, "random": others, "ended": str(int(ended))}
        io.save_tensors(saved, folder / FILE, metadata=about)


def load(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    digest: str,
) -> tuple[int, bool]:
    """Restore parameters, buffers, optimiser and generators in place; return the finished steps, and whether it ended.

    Raises:
        InputError: the checkpoint belongs to another configuration or another model.
    """
    weights = io.open_weights(folder / FILE)
    if weights.metadata.get("config") != digest:
        raise InputError(f"{folder / FILE} was written with other settings; remove the folder or restore the settings")
    names = {name.partition(":")[2] for name in weights.names if name.startswith("parameter:")}
    if names != set(parameters):
        odd = sorted(names ^ set(parameters))[:3]
        raise InputError(f"{folder / FILE} holds other parameters than the model learns, e.g. {', '.join(odd)}")
    odd = [name for name, p in parameters.items() if weights.shape(f"parameter:{name}") != tuple(p.shape)]
    if odd:
        raise InputError(f"{folder / FILE} holds {odd[0]} in another shape than the model's")
    generators = {}
    with torch.no_grad():
        for entry in weights.names:
            kind, _, rest = entry.partition(":")
            if kind == "parameter":
                parameters[rest].copy_(shard_like(weights.load(entry), parameters[rest]))
            elif kind == "buffer":
                buffers[rest].copy_(weights.load(entry))
            elif kind == "random":
                generators[rest] = weights.load(entry)
            else:
                key, _, name = rest.partition(":")
                value = weights.load(entry)
                p = parameters[name]
                optimizer.state[p][key] = value if value.dim() == 0 else shard_like(value, p)
    restore_random_states(generators, weights.metadata["random"])
    return int(weights.metadata["step"]), weights.metadata.get("ended") == "1"


def log_up_to(path: Path, step: int) -> None:
    """Drop the lines of `path` from `step` on: they are of steps that an interruption lost and that run again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except ValueError:
            break  # a line cut short by a kill
    io.write_text(path, "".join(f"{line}\n" for line in kept))
