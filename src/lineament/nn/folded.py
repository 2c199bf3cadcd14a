"""Weights folded together for decoding: one product per token in place of a dozen small operators."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Folded:
    """Derived tensors of a module, made again when its parameters change.

    A call over whole sequences `forget`s them; steps in between use them as long as the watched parameters count no
    change. So one that leaves no trace (`p.data` written in place) can only be missed in the middle of one text.
    """

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._made: tuple[Tensor, ...] = ()

    def forget(self) -> None:
        """Make them anew at the next step."""
        self._key, self._made = None, ()

    def get(self, parameters: Sequence[Tensor | None], make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return what `make` made of these parameters."""
        key = tuple((id(p), 0 if p.is_inference() else p._version) for p in parameters if p is not None)
        if key != self._key:
            self._made, self._key = make(), key
        return self._made


def fold_gates(
    weight: tuple[Tensor, Tensor],
    factor: tuple[Tensor, Tensor],
    bias: tuple[Tensor | None, Tensor | None],
    column: tuple[Tensor, Tensor],
    constant: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Fold a query and a key map and one scalar gate each into one matrix and one bias per head.

    Args:
        weight: [Hq, K, F] and [Hk, K, F]. factor: [Hq] and [Hk], what the maps' outputs are multiplied by, the
            scale of their inputs included; the biases are scaled already.
        bias: [Hq, F] and [Hk, F], or None. column: [Hq, K] and [Hk, K], constant: [Hq] and [Hk]: the gates.

    Returns:
        [Hq + Hk, K, F + 1] and [Hq + Hk, 1, F + 1].
    """
    whole, low = [], []
    for w, f, b, c, d in zip(weight, factor, bias, column, constant, strict=True):
        whole.append(torch.cat([w * f[:, None, None], c[..., None]], dim=-1))
        low.append(torch.cat([w.new_zeros(w.shape[0], w.shape[2]) if b is None else b, d[:, None]], dim=-1))
    return torch.cat(whole), torch.cat(low)[:, None]
