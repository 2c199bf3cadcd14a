"""What a rank knows about its stretch of the sequence."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from lineament._base.errors import InputError


@dataclass(frozen=True)
class Part:
    """A rank's stretch of one sequence, or of documents packed in one row.

    Attributes:
        group: the process group. rank: this process's place in it.
        lengths: tokens of every rank, in order.
        documents: global borders of packed documents, or None when every row is one document through all ranks.
        traffic: bytes that this rank received, by "state", "halo" (convolution tails, windows, sinks) and "softmax"
            (keys and values), forward and backward.

    Example:
        >>> part = Part(None, 1, (4, 4), (0, 3, 6, 8))
        >>> part.before, part.goes_on, part.borders
        (1, False, [0, 2, 4])
    """

    group: Any
    rank: int
    lengths: tuple[int, ...]
    documents: tuple[int, ...] | None = None
    traffic: Counter[str] = field(default_factory=Counter, compare=False)

    @property
    def world(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> list[int]:
        """Where every rank's stretch begins, and the length of the whole."""
        found = [0]
        for length in self.lengths:
            found.append(found[-1] + length)
        return found

    def document_start(self, rank: int) -> int:
        """Return where the document that holds the rank's first token begins."""
        if self.documents is None:
            return 0
        return self.documents[bisect_right(self.documents, self.starts[rank]) - 1]

    @property
    def holders(self) -> range:
        """The earlier ranks that hold tokens of this rank's first document."""
        start = self.document_start(self.rank)
        return range(bisect_right(self.starts, start) - 1, self.rank) if self.before else range(0)

    @property
    def before(self) -> int:
        """Tokens of this rank's first document that earlier ranks hold."""
        return self.starts[self.rank] - self.document_start(self.rank)

    @property
    def goes_on(self) -> bool:
        """Whether this rank's last document goes on at the next rank."""
        stop = self.starts[self.rank + 1]
        return self.rank + 1 < self.world and (self.documents is None or stop not in self.documents)

    @cached_property
    def borders(self) -> list[int]:
        """Borders of the documents inside this stretch, counted from its first token; empty documents left out."""
        start, stop = self.starts[self.rank], self.starts[self.rank + 1]
        inner = {b - start for b in self.documents or () if start < b < stop}
        return [0, *sorted(inner), stop - start]

    def cu_seqlens(self, device: torch.device | str = "cpu") -> Tensor | None:
        """Return `borders` as a tensor, None when nothing is packed."""
        return None if self.documents is None else torch.tensor(self.borders, device=device)

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Return each local token's position in its document, int64 [T]."""
        steps = torch.arange(self.lengths[self.rank], device=device)
        first = [-self.before if i == 0 else b for i, b in enumerate(self.borders[:-1])]
        sizes = [b - a for a, b in pairwise(self.borders)]
        return steps - torch.tensor(first, device=device).repeat_interleave(torch.tensor(sizes, device=device))

    def counts(self, rows: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the tokens that came before in each row (or local document), int64 [rows]."""
        found = torch.zeros(rows, dtype=torch.int64, device=device)
        found[: 1 if self.documents is not None else rows] = self.before
        return found

    def take(self, x: Tensor, axis: int = 1) -> Tensor:
        """Cut this rank's stretch out of a tensor of the whole sequence."""
        if x.shape[axis] != self.starts[-1]:
            raise InputError(f"the tensor has {x.shape[axis]} tokens; the ranks hold {self.starts[-1]} in all")
        return x.narrow(axis, self.starts[self.rank], self.lengths[self.rank])

    def check_call(self, tokens: int, cu_seqlens: Tensor | None) -> Tensor | None:
        """Return the local cu_seqlens for a call of an op, after checking that it is about this stretch.

        Raises:
            InputError: another number of tokens, or borders that `sequence_parallel` was not told.
        """
        if torch.compiler.is_compiling():
            raise InputError("sequence parallelism runs eagerly; leave torch.compile out of this context")
        if tokens != self.lengths[self.rank]:
            raise InputError(f"the call has T={tokens}; this rank's stretch has {self.lengths[self.rank]} tokens")
        if cu_seqlens is None:
            return self.cu_seqlens()
        if self.documents is None:
            raise InputError("give the borders of the whole packed row to sequence_parallel(cu_seqlens=...) too")
        given = sorted(set(cu_seqlens.tolist()))
        if given != self.borders:
            raise InputError(f"cu_seqlens is {given}; this rank's stretch has the borders {self.borders}")
        return torch.tensor(self.borders, device=cu_seqlens.device)


_active: list[Part] = []  # a list and not a context variable: autograd's own threads must see it as well
_groups: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # a world that was ended takes its group and threads along


def active() -> Part | None:
    """Return the part of the innermost `sequence_parallel`, or None outside of one."""
    return _active[-1] if _active else None


@contextmanager
def alone() -> Iterator[None]:
    """Run a block as if no `sequence_parallel` were open: its tokens are this rank's alone."""
    held = _active.copy()
    _active.clear()
    try:
        yield
    finally:
        _active[:] = held


def stretches(tokens: int, ranks: int) -> list[int]:
    """Share a number of tokens over ranks as evenly as it goes, longer stretches first.

    Example:
        >>> stretches(10, 4)
        [3, 3, 2, 2]
    """
    if ranks < 1 or tokens < ranks:
        raise InputError(f"{tokens} tokens can't be shared by {ranks} ranks; every rank needs at least one")
    return [tokens // ranks + (rank < tokens % ranks) for rank in range(ranks)]


@contextmanager
def sequence_parallel(
    tokens: int, *, group: Any = None, cu_seqlens: Tensor | Sequence[int] | None = None
) -> Iterator[Part]:
    """Run the recurrences inside as one sequence over all ranks of a group; a collective, entered by every rank.

    Run the backward inside too where activations are recomputed (gradient checkpointing). Every rank must differentiate
    its own outputs: gradients travel back along the same collectives.

    Args:
        tokens: of this rank's stretch; stretches may differ in length.
        group: the process group whose ranks hold the sequence in order. None: all processes, over a group of its own,
            so that no collective of a data-parallel wrapper comes in between.
        cu_seqlens: [N + 1], the borders of documents packed in the whole row, the same on every rank. None: each row of
            the batch is one document through all ranks.

    Yields:
        The rank's `Part`; its `traffic` counts bytes received.

    Raises:
        InputError: torch.distributed is not initialised, a rank has no tokens, or borders don't fit the whole row.

    Example:
        with sequence_parallel(q.shape[1]):
            o, state = delta_rule(q, k, v, beta, log_decay)  # this rank's tokens, the whole sequence's values
    """
    if not dist.is_available() or not dist.is_initialized():
        raise InputError(
            "sequence_parallel needs torch.distributed; start with torchrun or accelerate launch, or call "
            "torch.distributed.init_process_group"
        )
    group = _own_group() if group is None else group
    lengths = _agreed(tokens, group)
    if min(lengths) < 1:
        raise InputError(f"the ranks hold {list(lengths)} tokens; every rank needs at least one, so use fewer ranks")
    part = Part(group, dist.get_rank(group), lengths, _documents(cu_seqlens, sum(lengths)))
    _active.append(part)
    try:
        yield part
    finally:
        _active.pop()


def _documents(cu_seqlens: Tensor | Sequence[int] | None, total: int) -> tuple[int, ...] | None:
    if cu_seqlens is None:
        return None
    borders = [int(b) for b in (cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)]
    rising = all(a <= b for a, b in pairwise(borders))
    if len(borders) < 2 or borders[0] != 0 or borders[-1] != total or not rising:
        raise InputError(f"cu_seqlens is {borders}; expected a rising list from 0 to {total}, all ranks' tokens")
    return tuple(sorted(set(borders)))


def _device(group: Any) -> torch.device:
    """Return where a group's tensors must be."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
    )


def _agreed(tokens: int, group: Any) -> tuple[int, ...]:
    mine = torch.tensor([tokens], device=_device(group))
    found = mine.new_empty(dist.get_world_size(group))
    all_gather(found, mine, group)
    return tuple(found.tolist())


def all_gather(out: Tensor, mine: Tensor, group: Any) -> None:
    """Gather flat tensors of one size (the newer name of the call where torch has it)."""
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(out, mine, group=group)


def _own_group() -> Any:
    world = dist.group.WORLD
    if world not in _groups:
        _groups[world] = dist.new_group()
    return _groups[world]
