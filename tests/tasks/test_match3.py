"""Match3 against plain loops."""

from itertools import permutations, product

import pytest
import torch

from lineament._base.errors import InputError
from lineament.ops import tensor_attention
from lineament.tasks import match3, match3_batch, match3_by_hand


@pytest.mark.parametrize("distinct", [True, False])
def test_labels_are_the_definition(distinct):
    x, found = match3_batch(7, 5, 20, generator=torch.Generator().manual_seed(0), distinct=distinct)
    others = (
        (lambda i: permutations([j for j in range(5) if j != i], 2))
        if distinct
        else (lambda i: product(range(5), repeat=2))
    )
    for row, labels in zip(x.tolist(), found.tolist(), strict=True):
        assert labels == [any((row[i] + row[j] + row[k]) % 7 == 0 for j, k in others(i)) for i in range(5)]


def test_two_tokens_have_no_triple_and_a_wrong_modulus_is_named():
    assert not match3(torch.tensor([0, 0]), 5).any()
    with pytest.raises(InputError, match="modulus is 0"):
        match3(torch.tensor([0]), 0)


@pytest.mark.parametrize(("modulus", "n"), [(11, 8), (53, 10), (101, 16), (199, 24)])
def test_one_layer_of_attention_over_pairs_solves_it_by_hand(modulus, n):
    x, wanted = match3_batch(modulus, n, 16, generator=torch.Generator().manual_seed(n), distinct=False)
    out = tensor_attention(*match3_by_hand(x, modulus))[:, :-1, 0, 0]
    assert torch.equal(out > 0.5, wanted)
    assert wanted.any()
    assert not wanted.all()
    rest = n**2 / (4 * (n + 1) ** 2)
    assert out[wanted].min() >= 1 - rest
    assert out[~wanted].max() <= rest
