"""The processes of `accelerate launch`: who writes, who waits, and whether distillation shards its models."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, patch_environment
from torch import nn

from lineament import io
from lineament._base.errors import InputError
from lineament.train import gather_, sharded

PATIENCE = timedelta(hours=12)  # the others wait while the main process measures; NCCL alone would wait for minutes
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config",
}
REFUSED_OF_FSDP = {
    "FSDP_OFFLOAD_PARAMS": "--fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "--fsdp_activation_checkpointing",
}


@dataclass(frozen=True)
class Sharding:
    """How distillation shards the teacher and the student: by decoder layers, as torch's FSDP2 does.

    Args:
        reshard: give a layer's weights back after its forward, and gather them again for its backward.
    """

    reshard: bool = True


def join_processes() -> Sharding | None:
    """Join the processes of `accelerate launch`, before anything is loaded.

    Returns:
        How distillation shards its models; None where every process holds them whole.

    Raises:
        InputError: accelerate is configured in a way that a conversion can't follow.
    """
    for name, said in REFUSED.items():
        if parse_flag_from_env(name):
            raise InputError(f"a conversion runs under accelerate launch --multi_gpu or --use_fsdp, without {said}")
    found = None
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise InputError("a conversion needs FSDP2; add --fsdp_version 2 after --use_fsdp")
        for name, said in REFUSED_OF_FSDP.items():
            if parse_flag_from_env(name):
                raise InputError(f"a conversion runs under FSDP without {said}; set it to false")
        found = Sharding(os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false")
    PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
    return found if PartialState().num_processes > 1 else None


def whole_models() -> AbstractContextManager[None]:
    """Keep accelerate, transformers and peft from sharding anything of their own accord for the time of a block."""
    return patch_environment(ACCELERATE_USE_FSDP="false", FSDP_CPU_RAM_EFFICIENT_LOADING="false")


def is_main() -> bool:
    """Say whether this process is the one that writes."""
    return PartialState().is_main_process


def wait_for_all() -> None:
    """Wait until every process is here."""
    PartialState().wait_for_everyone()


def any_process(flag: bool) -> bool:
    """Say whether a flag is up in any process; all must ask."""
    state = PartialState()
    if state.num_processes == 1:
        return flag
    total = torch.tensor(float(flag), device=state.device)
    torch.distributed.all_reduce(total)
    return bool(total > 0)


@contextmanager
def shared_folder(out: Path, *, resume: bool, scratch: str) -> Iterator[Path]:
    """`io.building_folder` for the main process; the others wait until it stands, and again before it is renamed."""
    if is_main():
        with io.building_folder(out, resume=resume, scratch=scratch) as partial:
            wait_for_all()
            yield partial
            wait_for_all()
    else:
        wait_for_all()
        yield io.partial_path(out)
        wait_for_all()


@contextmanager
def in_shards(
    how: Sharding | None, student: Any, teacher: nn.Module, layers: Sequence[str], device: torch.device
) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Give a student that learns and its teacher sharded over the processes, for the time of a block.

    The whole models wait in host memory; at the end the student, in every process, holds what its shards have learned.

    Args:
        how: None gives the models themselves. student: it may wear LoRA. layers: names of the decoder layers in both.
    """
    if how is None:
        yield student, teacher
        return
    plain = student.get_base_model() if hasattr(student, "get_base_model") else student
    twins = []
    for model, inside in ((student, plain), (teacher, teacher)):
        units = [inside.get_submodule(name) for name in layers]
        twins.append(sharded(model, units, device, reshard=how.reshard))
        model.to("cpu")
    yield twins[0], twins[1]
    gather_(student, twins.pop(0))
    student.to(device)
    teacher.to(device)
