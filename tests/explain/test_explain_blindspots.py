"""Level set traversal: its laws on a plane where everything is known, and on a small net; the command."""

import json

import pytest
import torch
from PIL import Image
from tiny_families import make
from torch import nn
from transformers import ViTImageProcessor

from lineament import explain
from lineament._base.errors import InputError
from lineament.cli import run
from lineament.explain.blindspots import margin, orthogonal


def images(count=4, seed=0, size=6):
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(size=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(size * size, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def test_steps_are_orthogonal_to_the_gradient():
    v, g = images(3) - 0.5, images(3, seed=1) - 0.5
    inner = (orthogonal(v, g) * g).flatten(1).sum(1)
    assert (inner.abs() < 1e-12 * v.norm() * g.norm()).all()
    assert torch.equal(orthogonal(v, torch.zeros_like(g)), v)


def test_on_a_plane_the_margin_stays_and_the_walk_ends_at_the_projection():
    torch.manual_seed(0)
    plane = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).double()
    x, t = images() * 0.2 + 0.4, images(seed=1) * 0.2 + 0.4  # far enough from the edges that nothing is clipped
    options = {"parallel": 0.0, "tolerance": 1.0, "slope": "margin", "jitter": 0.0}
    found = explain.blind_spots(plane, x, t, steps=2000, **options)
    normal = (plane[1].weight[1] - plane[1].weight[0]).view(1, 1, 6, 6)
    before, after = (margin(plane(each), found.labels) for each in (x, found.images))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)
    across = ((t - x) * normal).flatten(1).sum(1).view(-1, 1, 1, 1) / normal.square().sum()
    projection = t - across * normal
    torch.testing.assert_close(found.images, projection, rtol=0, atol=1e-6)


@pytest.mark.parametrize("slope", ["loss", "margin"])
@pytest.mark.parametrize("stop", ["reject", "first"])
def test_confidence_is_kept_and_images_stay_images(slope, stop):
    found = explain.blind_spots(net(), images(), images(seed=1), steps=60, rate=0.05, slope=slope, stop=stop)
    assert (found.start - found.confidence < 0.2).all()
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    distances = found.distances()
    assert (distances["share"] < 1).all()
    assert (distances["rmse"] <= distances["linf"]).all()


def test_a_source_that_is_its_target_stays_but_for_the_jitter():
    x = images()
    found = explain.blind_spots(net(), x, x, steps=30, parallel=0.0)
    assert (found.images - x).abs().max() <= 2 / 255 + 1e-9


def test_the_order_of_a_batch_does_not_matter():
    x, t = images(), images(seed=1)
    pairs = ((x, t), (x.flip(0), t.flip(0)))
    one, other = (explain.blind_spots(net(), a, b, steps=20, jitter=0.0).images for a, b in pairs)
    torch.testing.assert_close(one, other.flip(0), rtol=1e-9, atol=1e-12)


def test_halving_the_rate_halves_the_drift():
    model, x, t = net(), images() * 0.4 + 0.3, images(seed=1) * 0.4 + 0.3
    drift = []
    for rate, steps in ((0.02, 20), (0.01, 40)):
        found = explain.blind_spots(model, x, t, steps=steps, rate=rate, parallel=0.0, tolerance=2.0, slope="margin")
        begun = explain.blind_spots(model, x, t, steps=0).images
        drift.append(
            (margin(model(found.images), found.labels) - margin(model(begun), found.labels)).abs().mean().item()
        )
    assert drift[1] / drift[0] == pytest.approx(0.5, abs=0.1)


def test_the_line_stops_where_confidence_falls():
    model, x, t = net(), images(), images(seed=1)
    found = explain.straight_line(model, x, t, tolerance=0.05)
    sure = explain.confidence_path(model, x, t, found.labels, points=101)["confidence"]
    for i in range(4):
        last = next((k - 1 for k in range(101) if sure[i, 0] - sure[i, k] >= 0.05), 100)
        torch.testing.assert_close(found.images[i], x[i] + last / 100 * (t[i] - x[i]), rtol=0, atol=1e-6)


def test_a_triangle_of_one_point_is_that_point():
    model, x = net(), images(1)[0]
    label = int(model(x[None]).argmax())
    found = explain.confidence_triangle(model, x, x, x, label)
    sure = model(x[None]).softmax(1)[0, label].item()
    assert found["mean"] == pytest.approx(sure)
    assert found["share"]["0.1"] == 1
    assert found["dip"] == pytest.approx(0, abs=1e-12)


def test_structural_similarity_knows_equal_from_other():
    x, y = images(2, size=16), images(2, seed=1, size=16)
    torch.testing.assert_close(explain.ssim(x, x), torch.ones(2, dtype=torch.float64))
    assert (explain.ssim(x, y) < 0.5).all()


def test_mistakes_are_named(capsys):
    x = images()
    for wrong, words in (
        (lambda: explain.blind_spots(net(), x, x[:2]), "expected equal"),
        (lambda: explain.blind_spots(net(), x * 2, x), "put the normalisation into the classifier"),
        (lambda: explain.blind_spots(net(), x, x, slope="sign"), "unknown slope"),
        (lambda: explain.blind_spots(net(), x, x, stop="never"), "unknown stop"),
    ):
        with pytest.raises(InputError, match=words):
            wrong()
    assert run(["blindspots", "nowhere/at/all", "--image", "a.png", "--target", "b.png"]) == 2


def test_the_command_walks_from_one_picture_to_another(capsys, tmp_path):
    make("vit")[0].save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    for name, colour in (("red", (200, 30, 60)), ("blue", (20, 40, 220))):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
    page = tmp_path / "blind.html"
    command = ["blindspots", str(tmp_path / "vit"), "--image", str(tmp_path / "red.png")]
    command += ["--target", str(tmp_path / "blue.png"), "--steps", "3"]
    assert run([*command, "--html", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["start"] - found["confidence"] < 0.2
    assert len(found["path"]) == 11
    assert "blind spot" in page.read_text()
