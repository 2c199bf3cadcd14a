"""Training one model on sequences that are spread over ranks."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.ops.parallel import sequence_parallel, stretches

IGNORED = -100  # transformers' label of tokens without a target


def sequence_parallel_loss(
    model: nn.Module,
    input_ids: Tensor,
    *,
    labels: Tensor | None = None,
    group: Any = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Return this rank's share of the next-token loss of sequences that all ranks read together.

    Every rank calls it with the same whole sequences and works on its own stretch (`stretches`). The mean over ranks of
    the shares is the mean loss, and so is the mean of their gradients that of one process: DDP, `accelerate launch` and
    `train.fit` take those means; without them call `average_gradients_` after `backward`.

    Args:
        model: a student or a decoder of this library, bare or wrapped for data parallelism.
        input_ids: [B, T], the same on every rank; B = 1 with cu_seqlens.
        labels: [B, T] as in transformers, -100 for tokens that are no target; input_ids if None.
        group: as in `sequence_parallel`.
        cu_seqlens: [N + 1], borders of packed documents; their first tokens are no targets.

    Returns:
        A scalar; multiplied by the number of ranks, so that means over ranks are right.

    Raises:
        InputError: fewer tokens than ranks, no target at all, or torch.distributed is not initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise InputError("sequence_parallel_loss needs torch.distributed; start with accelerate launch or torchrun")
    world = dist.get_world_size(group)
    lengths = stretches(input_ids.shape[1], world)
    labels = input_ids if labels is None else labels
    if labels.shape != input_ids.shape:
        raise InputError(f"labels has shape {list(labels.shape)}; input_ids has {list(input_ids.shape)}")
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if cu_seqlens is not None:
        ends = torch.as_tensor(cu_seqlens, device=targets.device)[1:] - 1
        targets = targets.index_fill(1, ends[ends >= 0], IGNORED)
    scored = int((targets != IGNORED).sum())
    if not scored:
        raise InputError("no token has a target; give sequences of at least two tokens")
    with sequence_parallel(lengths[dist.get_rank(group)], group=group, cu_seqlens=cu_seqlens) as part:
        logits = model(input_ids=part.take(input_ids)).logits
    logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    total = nn.functional.cross_entropy(logits, part.take(targets).flatten(), ignore_index=IGNORED, reduction="sum")
    return total * (world / scored)


def average_gradients_(model: nn.Module, *, group: Any = None) -> None:
    """Replace every gradient by its mean over the ranks: what a data-parallel wrapper does by itself."""
    world = dist.get_world_size(group)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad, group=group)
            p.grad /= world
