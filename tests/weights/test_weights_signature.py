"""RWS: orthogonality, exact removal, quantisation, and the order in which layers run."""

import pytest
import torch
from torch import nn

from lineament._base.errors import InputError
from lineament.models import tiny_teacher
from lineament.weights import Point
from lineament.weights.signature import (
    apply,
    dequantise,
    extract,
    load_signature,
    quantise,
    remove,
    save_signature,
    weights_in_order,
)


@pytest.fixture
def three():
    def model(seed):
        g = torch.Generator().manual_seed(seed)
        shapes = {"first.weight": (6, 5), "first.bias": (6,), "last.weight": (3, 6)}
        return {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in shapes.items()}

    return [Point.open(model(i)) for i in range(3)]


def test_a_signature_is_orthogonal_to_the_clean_update(three):
    base, clean, corrupted = three
    signature = extract(base, clean, corrupted)
    for name in signature:
        d_0, d_c = ((p.value(name) - base.value(name)) for p in (clean, corrupted))
        s = signature.value(name)
        assert abs(float((s * d_0).sum())) < 1e-6 * float(s.norm() * d_0.norm())
        kappa = (d_c * d_0).sum() / (d_0 * d_0).sum()
        torch.testing.assert_close(
            clean.value(name) + s + (kappa - 1) * d_0, corrupted.value(name), rtol=1e-12, atol=1e-12
        )


def test_a_signature_keeps_what_was_asked_for_and_where_clean_did_not_move(three):
    base, clean, corrupted = three
    signature = extract(base, clean, corrupted, keep=["first.*"])
    assert list(signature) == ["first.weight", "first.bias"]
    patched = clean + 0.5 * signature
    assert torch.equal(patched["last.weight"], clean["last.weight"])
    assert torch.equal((patched - 0.5 * signature)["first.weight"], clean["first.weight"])
    assert torch.equal((clean + 0 * signature)["first.weight"], clean["first.weight"])
    still = extract(base, base, corrupted)
    assert torch.equal(still["first.bias"], corrupted["first.bias"] - base["first.bias"])
    with pytest.raises(InputError, match="no tensor is called like"):
        extract(base, clean, corrupted, keep=["frist.*"])


def test_signatures_commute_and_scale(three):
    base, clean, corrupted = three
    a, b = extract(base, clean, corrupted), extract(base, corrupted, clean, keep=["first.*"])
    for name in clean:
        torch.testing.assert_close((clean + a + b)[name], (clean + b + a)[name])


@pytest.mark.parametrize("scheme", ["linear", "log", "tanh"])
def test_quantisation_errs_by_less_than_its_step(scheme):
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 0
    errors = [float((dequantise(quantise(x, q, scheme), scheme) - x).norm() / x.norm()) for q in (16, 256, 65536)]
    assert errors[0] > errors[1] > errors[2]
    if scheme == "linear":
        span = x.max() - x.min()
        found = dequantise(quantise(x, 16), "linear")
        assert float((found - x).abs().max()) <= float(span) / 15 / 2 * 1.0001
        exact = dequantise(quantise(x, 1 << 16), "linear")
        assert float((exact - x).abs().max()) <= 1e-4 * float(span)
    if scheme == "log":
        assert dequantise(quantise(x, 16, scheme), scheme)[0, 0] == 0
    with pytest.raises(InputError, match="unknown scheme 'linaer'"):
        quantise(x, 16, "linaer")
    with pytest.raises(InputError, match="levels is 1"):
        quantise(x, 1)


def test_clipping_spares_the_levels_from_outliers():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    x[0] = 1000
    assert (dequantise(quantise(x, 16, clip=1e-3), "linear") - x)[1:].norm() < (
        dequantise(quantise(x, 16), "linear") - x
    )[1:].norm() / 5


@pytest.mark.parametrize("clip", [-0.1, 0.5, 1.5, float("nan")])
def test_a_clip_that_leaves_nothing_is_refused(clip):
    with pytest.raises(InputError, match="from 0 to below"):
        quantise(torch.randn(10), 16, clip=clip)


def test_a_constant_tensor_is_kept():
    assert torch.equal(dequantise(quantise(torch.full((3,), 2.5), 16), "linear"), torch.full((3,), 2.5))


def test_files_hold_signatures_whole_or_in_sixteen_levels(three, tmp_path):
    signature = extract(*three)
    whole = save_signature(signature, tmp_path / "a.safetensors")
    small = save_signature(signature, tmp_path / "b.safetensors", levels=16)
    assert small["bits"] == 8 * small["bytes"] / (small["float32"] / 4)
    assert small["bytes"] < whole["bytes"]
    opened = load_signature(tmp_path / "a.safetensors")
    torch.testing.assert_close(opened.value("first.weight"), signature.value("first.weight"))
    rough = load_signature(tmp_path / "b.safetensors")
    assert 0 < (rough - signature).norm() < 0.15 * signature.norm()
    Point.open({"w": torch.ones(1)}).save(tmp_path / "m")
    with pytest.raises(InputError, match="is no signature"):
        load_signature(tmp_path / "m")


def test_applied_and_removed_is_as_before_to_the_last_bit(tmp_path):
    tiny_teacher("llama").to(torch.bfloat16).save_pretrained(tmp_path / "clean")
    clean = Point.open(tmp_path / "clean")
    g = torch.Generator().manual_seed(0)
    noise = [{n: torch.randn(s.shape, generator=g) for n, s in clean.specs.items()} for _ in range(2)]
    others = [Point.open({n: clean[n].float() + 0.1 * x for n, x in each.items()}) for each in noise]
    bare = Point(clean.terms, {}, clean.buffers)
    signature = extract(others[0], bare.untie() if clean.ties else bare, others[1], keep=["model.layers.0.*"])
    apply(clean, [signature], tmp_path / "patched", alpha=0.5)
    patched = Point.open(tmp_path / "patched")
    name = "model.layers.0.mlp.up_proj.weight"
    assert patched.dtype(name) == torch.bfloat16
    assert not torch.equal(patched[name], clean[name])
    assert torch.equal(patched["model.layers.1.mlp.up_proj.weight"], clean["model.layers.1.mlp.up_proj.weight"])
    with pytest.raises(InputError, match="patched already"):
        apply(patched, [signature], tmp_path / "twice")
    remove(tmp_path / "patched", tmp_path / "back")
    back = Point.open(tmp_path / "back")
    assert all(torch.equal(back[n], clean[n]) for n in clean)
    with pytest.raises(InputError, match="no signature was applied"):
        remove(tmp_path / "clean", tmp_path / "again")


def test_layers_are_named_in_the_order_they_run():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Linear(3, 2), nn.Linear(4, 3)

        def forward(self, x):
            return self.second(self.first(x))

    order = weights_in_order(Backwards(), torch.ones(1, 4))
    assert order == [["first.weight", "first.bias"], ["second.weight", "second.bias"]]
