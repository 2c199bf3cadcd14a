"""Models whose weights are sharded over processes (torch's FSDP2), made beside the whole ones."""

import atexit
import copy
import os
import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lineament._base.errors import InputError


def sharded(model: nn.Module, units: Iterable[nn.Module], device: torch.device, *, reshard: bool = True) -> nn.Module:
    """Return a twin of a model, of which every process holds a part of each weight; the model itself is not touched.

    `train.fit` trains it like any other model, if the loss calls the twin itself: the weights of a unit are gathered
    when its forward and its backward run.

    Args:
        model: whole and the same in every process; tied weights stay tied.
        units: modules inside the model whose weights are gathered together, such as its decoder layers; of nested
            ones the inner first. What is left is one unit more.
        device: where the parts go. reshard: give a unit's weights back after its forward, and gather them again.

    Raises:
        InputError: there is one process, a weight can't be cut (quantised, or a number without an axis), or what
            learns has several dtypes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        raise InputError("sharding needs several processes; start with accelerate launch or torchrun")
    require_shardable(model)
    if len(learning := {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}) > 1:
        raise InputError(f"weights that learn are {' and '.join(sorted(learning))}; FSDP needs one dtype, load the "
                         "model in float32")  # fmt: skip
    # fully_shard copies this process's part, so the twin may start on the very numbers of the whole model
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach().contiguous(), p.requires_grad) for p in model.parameters()
    }
    parts = list(units)
    twin = copy.deepcopy(model, memo)
    how = {"mesh": init_device_mesh(device.type, (dist.get_world_size(),)), "reshard_after_forward": reshard}
    for part in [*parts, model]:
        fully_shard(memo[id(part)], **how)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return twin


def require_shardable(model: nn.Module) -> None:
    """Raise InputError for the first weight that FSDP can't cut, such as a quantised one."""
    for name, p in model.named_parameters():
        if type(p) is not nn.Parameter or not p.is_floating_point() or not p.dim():
            raise InputError(f"{name} ({type(p).__name__}, {p.dtype}, {list(p.shape)}) can't be sharded: FSDP takes "
                             "plain floating-point weights with an axis")  # fmt: skip


@torch.no_grad()
def gather_(model: nn.Module, twin: nn.Module) -> None:
    """Copy what the sharded twin of a model has learned into the model; every process takes part."""
    for name, p in twin.named_parameters():
        if p.requires_grad:
            model.get_parameter(name).copy_(full(p))


def is_sharded(model: nn.Module) -> bool:
    """Say whether a model is one that `sharded` returned."""
    return any(_is_shard(p) for p in model.parameters())


def _is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # what DTensor adds; asked so, one process need not import it


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor, for which every process must ask; another tensor comes back as it is."""
    return tensor.full_tensor() if _is_shard(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor, the same in every process, where `like` is, and sharded as that is if of its shape."""
    tensor = tensor.to(like.device)
    if not _is_shard(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # nothing is sent


def leave_group() -> None:
    """End torch.distributed's group of processes and, with it, this process: exit code 0. Without a group, do nothing.

    The last line of a script that sharded a model. Exit functions run and streams are flushed, but the interpreter is
    not taken apart: torch keeps meshes of sharded tensors in caches, so threads of their group outlive
    `destroy_process_group`, and processes that ended beside such threads have been seen to abort.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
