"""Images to images: what is done to them, and how the result is scored."""

import math

import pytest
import torch
from torch import nn

from lineament import data, tasks
from lineament._base.errors import InputError
from lineament._base.seeds import generator
from lineament.report import front


def test_noise_has_its_size_and_its_seed():
    x = torch.zeros(200, 1, 12, 12)
    once = tasks.noisy(x, 0.25, seed=3)
    assert torch.equal(once, tasks.noisy(x, 0.25, seed=3))
    assert not torch.equal(once, tasks.noisy(x, 0.25, seed=4))
    assert float(once.std()) == pytest.approx(0.25, rel=0.02)


def test_a_lowered_image_is_the_mean_of_each_square():
    x = torch.rand(2, 1, 4, 6, generator=generator(0))
    found = tasks.lowered(x)
    for i in range(4):
        for j in range(6):
            top, left = i // 2 * 2, j // 2 * 2
            torch.testing.assert_close(found[:, :, i, j], x[:, :, top : top + 2, left : left + 2].mean((2, 3)))
    with pytest.raises(InputError, match="can't be averaged over squares of 4"):
        tasks.lowered(x, 4)


def test_prototypes_are_class_means_and_outputs_go_to_the_next_one():
    x, y = torch.rand(30, 1, 2, 2, generator=generator(0)), torch.arange(30) % 3
    found = tasks.class_means(x, y, 3)
    for k in range(3):
        torch.testing.assert_close(found[k], x[y == k].mean(0))
    near = found[[2, 0, 1]] + 1e-3
    assert tasks.nearest_prototype(near, found).tolist() == [2, 0, 1]
    with pytest.raises(InputError, match="expected some of each"):
        tasks.class_means(x, y, 4)


def test_psnr_is_that_of_the_mean_over_everything():
    y = torch.rand(50, 1, 3, 3, generator=generator(1))
    x = y + 0.1 * torch.randn(y.shape, generator=generator(2))
    expected = -10 * math.log10(float((x - y).double().square().mean()))
    assert tasks.psnr(nn.Flatten(), x, y, batch_size=7) == pytest.approx(expected)
    assert float(tasks.restoration_loss(nn.Flatten(), (x, y))[0]) == pytest.approx(10 ** (-expected / 10))
    with pytest.raises(InputError, match="50 inputs and 0 targets"):
        tasks.psnr(nn.Flatten(), x, y[:0])


def test_the_front_is_what_nobody_beats():
    draw = generator(0)
    rows = [{"cost": int(c), "value": int(v)} for c, v in torch.randint(12, (60, 2), generator=draw).tolist()]
    found = front(rows, "cost", "value")
    for row in rows:
        better = [o for o in rows if o["cost"] <= row["cost"] and o["value"] >= row["value"] and o != row]
        assert (row in found) == (not better)
    values = sorted({row["value"] for row in found})
    assert list(dict.fromkeys(row["value"] for row in found)) == values
    assert front([], "cost", "value") == []
    assert front([{"cost": 1.0, "value": math.nan}, {"cost": math.nan, "value": 1.0}], "cost", "value") == []


def test_patches_are_pieces_of_the_photographs_and_apart():
    try:
        train, test = (data.load_patches(12, split=split, stride=12) for split in ("train", "test"))
    except InputError as error:
        pytest.skip(str(error))
    assert train.shape == (2 * 35 * 48, 1, 12, 12)
    assert test.shape == (2 * 35 * 5, 1, 12, 12)
    assert train.min() >= 0
    assert 0.9 < train.max() <= 1
    seen = {patch.numpy().tobytes() for patch in train}
    busy = [patch for patch in test if patch.std() > 0.02]  # a clear sky looks the same everywhere
    assert len(busy) > 100
    assert not any(patch.numpy().tobytes() in seen for patch in busy)
    with pytest.raises(InputError, match="no patch of 500 pixels"):
        data.load_patches(500)
    with pytest.raises(InputError, match="unknown split 'all'"):
        data.load_patches(split="all")
