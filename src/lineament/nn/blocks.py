"""Exact attention inside blocks of the sequence: TransNormer's DiagAttention (arXiv:2210.10340)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError, unknown
from lineament.nn.config import MixerConfig
from lineament.nn.state import State
from lineament.ops.parallel import Part, active, exchange, tied

WEIGHTS = ("softmax", "relu")


class BlockState(NamedTuple):
    """Keys [B, C, Hk, K] and values [B, C, Hk, V] of the block begun, and how many tokens were seen [B]."""

    keys: Tensor
    values: Tensor
    count: Tensor


class DiagHeads(nn.Module):
    """Tokens attend to the earlier ones of their own block of `size`; blocks are counted from a document's start.

    Args:
        config: the shape. size: C. weights: "softmax" (T2), or "relu" of the logits, not normalised (T1; a norm on the
            output is then part of the method).
    """

    def __init__(self, config: MixerConfig, *, size: int = 64, weights: str = "softmax") -> None:
        super().__init__()
        if weights not in WEIGHTS:
            raise unknown("weights", weights, WEIGHTS)
        self.config, self.size, self.weights = config, size, weights

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, cu_seqlens: Tensor | None = None, state: State = None
    ) -> tuple[Tensor, State]:
        """See `HeadMixer`."""
        part, halo = active(), ()
        if part is not None:
            cu_seqlens = part.check_call(q.shape[1], cu_seqlens)
            state, *halo = self._begun(part, k, v, state)
        C, (B, T) = self.size, q.shape[:2]
        if cu_seqlens is None:
            lengths, most = torch.full((B,), T, device=q.device), (T + (0 if state is None else C - 1) + C - 1) // C
            first = most * torch.arange(B, device=q.device)  # the block where each row begins
            row = torch.arange(B, device=q.device)[:, None].expand(B, T)
            total = most * B
        else:
            lengths, total = cu_seqlens.diff(), T // C + 2 * (len(cu_seqlens) - 1)
            first = torch.nn.functional.pad((lengths // C + 2).cumsum(0)[:-1], (1, 0))
            row = torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(T, device=q.device), right=True)[None]
        begun = torch.zeros_like(lengths) if state is None else state.count % C
        step = torch.arange(T, device=q.device) - (0 if cu_seqlens is None else cu_seqlens[row])
        place = (first * C + begun)[row] + step  # where every token stands among the blocks
        blocks = [y.new_zeros(total * C, *y.shape[2:]) for y in (q, k, v)]
        blocks = [to.index_copy(0, place.flatten(), y.flatten(0, 1)) for to, y in zip(blocks, (q, k, v), strict=True)]
        if state is not None:  # the tokens of the block begun stand before
            offset = torch.arange(C, device=q.device)
            old = (first[:, None] * C + offset)[offset < begun[:, None]]
            kept = [y.to(q.dtype)[offset < begun[:, None]] for y in state[:2]]
            blocks[1:] = [to.index_copy(0, old, y) for to, y in zip(blocks[1:], kept, strict=True)]
        o = self._attend(*(y.unflatten(0, (total, C)).transpose(1, 2) for y in blocks))
        o = o.transpose(1, 2).flatten(0, 1).index_select(0, place.flatten()).unflatten(0, (B, T))
        return tied(o, *halo) if halo else o, self._left(blocks, first, begun, lengths, state)

    def _begun(self, part: Part, k: Tensor, v: Tensor, state: State) -> tuple[BlockState, Tensor]:
        """Fetch the tokens of the block that this rank's first document has begun on earlier ranks."""
        if state is not None:
            raise InputError("block attention begins from nothing under sequence_parallel; leave state out")

        def wants(rank: int) -> list[tuple[int, int]]:
            start = part.starts[rank]
            return [(start - (start - part.document_start(rank)) % self.size, start)]

        halo = exchange(part, torch.cat([k.flatten(2), v.flatten(2)], -1), wants, kind="halo")
        rows = len(k) if part.documents is None else len(part.borders) - 1
        filled = torch.nn.functional.pad(halo, (0, 0, 0, self.size - halo.shape[1], 0, rows - len(halo)))
        keys, values = filled.split([k[0, 0].numel(), v[0, 0].numel()], dim=-1)
        count = part.counts(rows, k.device)
        return BlockState(keys.unflatten(2, k.shape[2:]), values.unflatten(2, v.shape[2:]), count), halo

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend inside blocks [M, H, C, ..], causally."""
        k, v = (y.repeat_interleave(self.config.groups, dim=1) for y in (k, v))
        if self.weights == "softmax":
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        return (q @ k.mT).relu().tril() @ v

    def _left(self, blocks: list[Tensor], first: Tensor, begun: Tensor, lengths: Tensor, state: State) -> BlockState:
        """Return the block that is begun behind the last token of every row, zeros behind its end."""
        C, filled = self.size, (begun + lengths) % self.size
        offset = torch.arange(C, device=first.device)
        at = (first * C + begun + lengths - filled)[:, None] + offset
        real = (offset < filled[:, None])[..., None, None]
        keys, values = (
            y.index_select(0, at.clamp(max=y.shape[0] - 1).flatten()).unflatten(0, at.shape) * real for y in blocks[1:]
        )
        return BlockState(keys, values, lengths + (0 if state is None else state.count))
