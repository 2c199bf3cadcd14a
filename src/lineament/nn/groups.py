"""Heads of one layer that differ in size: one filling for each group of like heads."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lineament.nn.state import State


class HeadGroups(nn.Module):
    """Several head mixers side by side, each for some of the key-value heads.

    Args:
        groups: {name: (its key-value heads, ascending; its filling)}, which share out all heads of the layer.
        queries: query heads per key-value head.

    Example:
        >>> from lineament.nn import MixerConfig, build
        >>> shape = {"heads": 3, "key_heads": 3, "key_width": 8, "value_width": 8, "model_width": 8}
        >>> options = {"map": "product", "codes": [2, 4, 2]}
        >>> mixer = build(MixerConfig(kind="hedgehog-window", window=2, sinks=1, options=options, **shape)).filling
        >>> {name: heads for name, (heads, _) in mixer.groups.items()}
        {'codes_2': (0, 2), 'codes_4': (1,)}
    """

    def __init__(self, groups: dict[str, tuple[tuple[int, ...], nn.Module]], queries: int) -> None:
        super().__init__()
        self.fillings = nn.ModuleDict({name: filling for name, (_, filling) in groups.items()})
        self.heads = [heads for heads, _ in groups.values()]
        self.wide = [tuple(h * queries + g for h in heads for g in range(queries)) for heads in self.heads]
        order = [h for heads in self.wide for h in heads]
        self._back = [order.index(h) for h in range(len(order))]

    @property
    def groups(self) -> dict[str, tuple[tuple[int, ...], nn.Module]]:
        """Return {name: (key-value heads, filling)}."""
        return {name: (heads, one) for heads, (name, one) in zip(self.heads, self.fillings.items(), strict=True)}

    def parts(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Cut tensors with heads on axis 2 up by group; those with as many as there are query heads by query heads."""
        count = len(self._back)
        return [
            tuple(x[:, :, list(wide if x.shape[2] == count else heads)] for x in tensors)
            for heads, wide in zip(self.heads, self.wide, strict=True)
        ]

    def log_weights(self, q: Tensor, k: Tensor, rows: Tensor, *, sinks: int | None = None) -> Tensor:
        """See `HedgehogWindow.log_weights`."""
        parts = zip(self.fillings.values(), self.parts(q, k), strict=True)
        weights = [one.log_weights(*own, rows, sinks=sinks) for one, own in parts]  # pyright: ignore[reportCallIssue]
        return torch.cat(weights, 1)[:, self._back]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, cu_seqlens: Tensor | None = None, state: State = None
    ) -> tuple[Tensor, State]:
        """See `HeadMixer`; the state is a tuple, one entry per group."""
        outs, states = [], []
        before: Sequence[State] = state if state is not None else [None] * len(self.heads)
        for filling, own, past in zip(self.fillings.values(), self.parts(q, k, v), before, strict=True):
            o, after = filling(*own, x=x, cu_seqlens=cu_seqlens, state=past)
            outs.append(o)
            states.append(after)
        return torch.cat(outs, 2)[:, :, self._back], tuple(states)
