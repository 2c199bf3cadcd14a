"""Which of several classes: loss and accuracy of any module that maps inputs to logits."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError


def class_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Mapping[str, float]]:
    """Return the mean cross-entropy of a batch (inputs, labels [B]), as `train.fit` wants a loss."""
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels), {}


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor, *, batch_size: int = 1000) -> float:
    """Return the share of inputs whose largest logit is the label's.

    Args:
        inputs: [N, ...]. labels: [N].

    Raises:
        InputError: nothing to score, or unequal numbers of both.

    Example:
        >>> accuracy(nn.Identity(), torch.eye(3), torch.tensor([0, 1, 1]))
        0.6666666666666666
    """
    if not len(labels) or len(inputs) != len(labels):
        raise InputError(
            f"accuracy was asked of {len(inputs)} inputs and {len(labels)} labels; expected as many, and some"
        )
    pairs = zip(inputs.split(batch_size), labels.split(batch_size), strict=True)
    return sum(int((model(x).argmax(-1) == y).sum()) for x, y in pairs) / len(labels)
