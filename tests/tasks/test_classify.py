"""Accuracy and loss of classifiers."""

import pytest
import torch
from torch import nn

from lineament._base.errors import InputError
from lineament.tasks.classify import accuracy, class_loss


def test_accuracy_does_not_depend_on_the_batches():
    logits, labels = torch.randn(17, 4), torch.randint(0, 4, (17,))
    expected = float((logits.argmax(1) == labels).double().mean())
    assert accuracy(nn.Identity(), logits, labels) == accuracy(nn.Identity(), logits, labels, batch_size=5) == expected
    assert float(class_loss(nn.Identity(), (logits, labels))[0]) == pytest.approx(
        float(-logits.log_softmax(1)[range(17), labels].mean())
    )
    with pytest.raises(InputError, match="17 inputs and 3 labels"):
        accuracy(nn.Identity(), logits, labels[:3])
