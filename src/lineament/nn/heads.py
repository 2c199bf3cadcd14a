"""One converted layer: some heads ordinary softmax, the rest a linear filling; padding and packing for both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lineament._base.shapes import bind
from lineament.nn.config import MixerConfig
from lineament.nn.rows import Rows
from lineament.nn.softmax import KeyValues, causal_softmax
from lineament.nn.state import State, cloned, leaves, tree_map


class HeadMixer(Protocol):
    """What a filling is: any module with this forward.

    `forward(q [B, T, Hq, K] (scaled), k [B, T, Hk, K], v [B, T, Hk, V], *, x [B, T, D], cu_seqlens, state)` returns
    o [B, T, Hq, V] and the state after the last token. With cu_seqlens [N + 1] (B = 1) the state's rows are the N
    documents. With T = 1, a state and no gradient, the state may be changed in place. A mixer that `keeps_keys` of all
    tokens takes `rows` in place of cu_seqlens.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, cu_seqlens: Tensor | None = None, state: State = None
    ) -> tuple[Tensor, State]: ...


@dataclass
class LayerState:
    """What a converted layer remembers: the filling's state and the full heads' keys and values."""

    filling: State = None
    full: KeyValues | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Name every tensor held."""
        found = {f"filling.{name}": x for name, x in leaves(self.filling)}
        if self.full is not None:
            found |= {f"full.{name}": x for name, x in self.full.tensors().items()}
        return found

    def select(self, index: Tensor) -> None:
        """Keep (or repeat) the given rows."""
        self.filling = tree_map(lambda x: x.index_select(0, index.to(x.device)), self.filling)
        if self.full is not None:
            self.full.select(index)

    def copy(self) -> "LayerState":
        """Return a state that in-place steps on this one can't reach."""
        return LayerState(cloned(self.filling), self.full.copy() if self.full is not None else None)


def _runs(heads: Sequence[int]) -> list[tuple[int, int]]:
    """Group ascending heads into (start, stop) runs.

    Example:
        >>> _runs([0, 2, 3])
        [(0, 1), (2, 4)]
    """
    runs: list[tuple[int, int]] = []
    for head in heads:
        if runs and runs[-1][1] == head:
            runs[-1] = (runs[-1][0], head + 1)
        else:
            runs.append((head, head + 1))
    return runs


def _take(x: Tensor, runs: list[tuple[int, int]], groups: int = 1) -> Tensor:
    """Take runs of heads from [B, T, H, K]; a single run is a view."""
    parts = [x.narrow(2, a * groups, (b - a) * groups) for a, b in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class ConvertedHeads(nn.Module):
    """A layer's heads, mixed: `config.full_heads` by causal softmax, the others by the filling.

    Args:
        config: the whole layer. filling: a head mixer for the heads that are not full; None when all are.

    Example:
        >>> from lineament.nn import build
        >>> config = MixerConfig(kind="lightning", heads=4, key_heads=2, key_width=8, value_width=8, model_width=32)
        >>> q, k = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8)
        >>> o, state = build(config)(q, k, k, x=torch.randn(1, 5, 32))
        >>> o.shape
        torch.Size([1, 5, 4, 8])
    """

    def __init__(self, config: MixerConfig, filling: nn.Module | None) -> None:
        super().__init__()
        self.config, self.filling = config, filling
        full = set(config.full_heads)
        self._full = _runs(config.full_heads)
        self._rest = _runs([h for h in range(config.key_heads) if h not in full])
        self._order = sorted([(run, True) for run in self._full] + [(run, False) for run in self._rest])

    def extra_repr(self) -> str:
        return f"kind={self.config.kind!r}, full_heads={self.config.full_heads}"

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        x: Tensor,
        rows: Rows | None = None,
        cu_seqlens: Tensor | None = None,
        state: LayerState | None = None,
        keep: bool | None = None,
    ) -> tuple[Tensor, LayerState | None]:
        """Mix all heads of a layer.

        Args:
            q: [B, T, Hq, K], scaled. k: [B, T, Hk, K]. v: [B, T, Hk, V]. x: [B, T, D], the layer's input.
            rows: padding and packing of the block, None when there is neither. With rows that pad and no packing the
                state's rows are the block's rows.
            cu_seqlens: [N + 1], short for `rows=Rows.packed(cu_seqlens, T)`.
            state: what the last call returned, or `LayerState()` to begin.
            keep: return a state (default: when one is given or nothing is full). False spares the full heads' cache.

        Returns:
            o [B, T, Hq, V], heads in their order, and the state (None when not kept).
        """
        if cu_seqlens is not None:
            rows = Rows.packed(cu_seqlens, q.shape[1])
        keep = (state is not None or not self._full) if keep is None else keep
        state = state if state is not None else LayerState()
        if not self._full:
            o, state.filling = self._fill(q, k, v, x, rows, state.filling)
            return o, state if keep else None
        groups = self.config.groups
        if keep and state.full is None:
            state.full = KeyValues()
        full = (_take(q, self._full, groups), _take(k, self._full), _take(v, self._full))
        o_full = causal_softmax(*full, rows=rows, past=state.full if keep else None)
        if not self._rest:
            return o_full, state if keep else None
        rest = (_take(q, self._rest, groups), _take(k, self._rest), _take(v, self._rest))
        o_rest, state.filling = self._fill(*rest, x, rows, state.filling)
        return self._assemble(o_full, o_rest), state if keep else None

    def _fill(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rows: Rows | None, state: State
    ) -> tuple[Tensor, State]:
        assert self.filling is not None
        if rows is None:
            return self.filling(q, k, v, x=x, state=state)
        if getattr(self.filling, "keeps_keys", False):
            return self.filling(q, k, v, x=x, rows=rows, state=state)
        packed = (rows.pack(part) for part in (q, k, v))
        o, state = self.filling(*packed, x=rows.pack(x), cu_seqlens=rows.cu_seqlens, state=state)
        return rows.unpack(o), state

    def _assemble(self, o_full: Tensor, o_rest: Tensor) -> Tensor:
        parts, at = [], [0, 0]
        for (a, b), full in self._order:
            width = (b - a) * self.config.groups
            parts.append((o_full if full else o_rest).narrow(2, at[full], width))
            at[full] += width
        return torch.cat(parts, dim=2)


def check_heads_input(config: MixerConfig, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> None:
    """Check the axes of a layer's heads against its config, once, at a public door."""
    bind(
        f"q: B T {config.heads} {config.key_width}, k: B T {config.key_heads} {config.key_width}, "
        f"v: B T {config.key_heads} {config.value_width}, x: B T {config.model_width}",
        q, k, v, x,
    )  # fmt: skip
