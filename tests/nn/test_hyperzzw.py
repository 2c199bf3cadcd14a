"""Hyper-kernels, standardisation and the block: what depends on what, what is centred, where gradients pass."""

import math

import pytest
import torch

from lineament import graph
from lineament._base.errors import InputError
from lineament.nn.hyper_kernel import HyperKernel, LocalKernel, renormed
from lineament.nn.hyperzzw import HyperBlock, HyperConfig
from lineament.nn.standardization import ByBatch, GroupedStandardization, by_sample

SMALL = {"global_hidden": 6, "local_hidden": 5, "channel_hidden": 4, "gate_hidden": 3, "space_hidden": 4}


def block(channels=3, factor=4, size=6, axes=2, before=(), **options):
    torch.manual_seed(0)
    return HyperBlock(channels, factor, HyperConfig(size=size, axes=axes, **SMALL, **options), before=before)


def moments(x, axes):
    return x.mean(axes), x.var(axes, correction=0)


@pytest.mark.parametrize("space", [(9,), (4, 5)])
def test_standardised_means_and_variances(space):
    x = 3 * torch.randn(6, 24, *space, dtype=torch.float64) + 7
    inner = tuple(range(2, x.dim()))
    for found, axes in ((by_sample(x), inner), (ByBatch(24)(x), (0, *inner))):
        mean, variance = moments(found, axes)
        assert mean.abs().max() < 1e-9
        assert (variance - 1).abs().max() < 1e-4  # eps
    y = GroupedStandardization(24)(x).unflatten(1, (12, 2))
    for i in range(12):
        part = x.unflatten(1, (12, 2))[:, i]
        torch.testing.assert_close(y[:, i], by_sample(part) if i % 2 else ByBatch(2)(part))


def test_running_statistics_make_a_sample_independent_of_its_batch():
    x = torch.randn(64, 4, 3) * 2 + 1
    own, running = ByBatch(4), ByBatch(4, "running")
    for _ in range(200):
        running(x)
    assert own.eval()(x[:3]).sub(own(x)[:3]).abs().max() > 0.01
    torch.testing.assert_close(running.eval()(x[:3]), running(x)[:3])
    torch.testing.assert_close(running(x), own(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("axes", [1, 2])
def test_a_kernel_is_its_equation_at_every_position(axes):
    torch.manual_seed(0)
    kernel = HyperKernel(5, axes=axes, channels=2, hidden=3, layers=2).double()
    torch.nn.init.normal_(kernel.shift)
    line = torch.linspace(-1, 1, 5).double()
    for at in torch.cartesian_prod(*[torch.arange(5)] * axes).view(-1, axes).tolist():
        c = line[at]
        wave = [torch.sin(w.weight @ c + w.bias) for w in kernel.waves]
        h = wave[0]
        for g, a in zip(wave[1:], kernel.layers, strict=True):
            h = g * (a.weight @ h + a.bias) + kernel.shift[tuple(at)]
        torch.testing.assert_close(kernel()[(slice(None), *at)], kernel.out.weight @ h + kernel.out.bias)


def test_a_kernels_beginning():
    torch.manual_seed(0)
    kernel = HyperKernel(16, hidden=400, layers=1, omega=3.0)
    assert all((layer.bias == 1).all() for layer in kernel.layers)
    assert (kernel.out.bias == 0).all()
    assert (kernel.shift == 0).all()
    # W_i is uniform on (-1, 1) / sqrt(2) times 2 pi omega gamma; E gamma^2 of shape 6 is 42, of shape 3 is 12
    for wave, square in zip(kernel.waves, (42, 12), strict=True):
        wanted = (2 * math.pi * 3.0) ** 2 * square / 6
        assert 0.7 < wave.weight.square().mean() / wanted < 1.4


def test_a_local_kernel_looks_at_its_input_and_by_sample_if_asked():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 9, 9)
    batch, sample = (LocalKernel(5, 3, channels=2, context=context) for context in ("batch", "sample"))
    assert batch(x).shape == (2, 5, 5)
    assert not torch.allclose(batch(x), batch(x + torch.rand(3, 1, 1)))
    assert sample(x).shape == (4, 2, 5, 5)
    torch.testing.assert_close(sample(x)[1:2], sample(x[1:2]))
    assert not torch.allclose(batch(x), batch(x[:2]))


def test_renormalising_passes_gradients_through_the_unit_part_alone():
    h = torch.randn(4, 4, 3, dtype=torch.float64, requires_grad=True)
    kept, renewed = torch.full((3,), 2.0).double(), torch.full((3,), 0.5).double()
    found = renormed(h, kept, renewed, 2)
    norm = h.flatten(0, 1).norm(dim=0)
    torch.testing.assert_close(found, 2 * h + 0.5 * h / norm)
    weights = torch.randn_like(h)
    a, b = (torch.autograd.grad((x * weights).sum(), h, retain_graph=True)[0] for x in (found, 0.5 * h / norm))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("gated", [True, False])
def test_a_block_is_centred_and_everything_learns(axes, gated):
    made, x = block(axes=axes, gated=gated, before=(1,)), torch.randn(5, 3, *[6] * axes)
    with graph.capture(made, "standardize") as seen:
        out, kernel = made(x, [torch.randn(5, 1, *[6] * axes)])
    assert out.shape == (5, 12, *[6] * axes)
    assert kernel.shape == (3, *[6] * axes)
    assert seen.tensor("standardize").mean(tuple({0, *range(2, x.dim())})).abs().max() < 1e-5
    (out.square().mean() + kernel.square().mean()).backward()
    silent = [name for name, p in made.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent


def test_the_global_kernel_does_not_depend_on_the_input():
    made = block().eval()
    assert torch.equal(made(torch.randn(2, 3, 6, 6))[1], made(torch.randn(2, 3, 6, 6))[1])


def test_the_branches_are_the_published_ones():
    """The block again, branch by branch, from its parts."""
    made, x = block().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    w, gelu = made.kernel(), torch.nn.functional.gelu

    def rgu(r, y):
        return r.y(gelu(by_sample(r.k(y) * r.q(r.v(y)))) + r.shift)

    def local(l, source, y):
        kernel = l.kernel(source)[:, None]
        y = torch.nn.functional.conv2d(y, kernel, padding=kernel.shape[-1] // 2, groups=3)
        return gelu(ByBatch(3)(l.mix(y))) + l.bias

    y = x.mean((2, 3))
    fast = by_sample(rgu(made.on_context, x * w) + rgu(made.on_input, x))
    m = by_sample(made.mix(x))
    hci = by_sample(x * torch.sigmoid(y * made.channel.kernel()[0] * y)[:, :, None, None])
    o, o_m, o_h = ((x * w) @ other for other in (fast, m, hci))
    c, s = o.mean((2, 3)), o.mean(1)
    score = (c * made.interaction.channel()[0] * c)[:, :, None, None] * (s * made.interaction.space()[0] * s)[:, None]
    l1, l2, l3, l4 = (local(l, *of) for l, of in zip(made.local, ((x, hci), (hci, x), (m, x), (x, m)), strict=True))
    joined = torch.cat([o, l2, fast, o_m, l1, torch.sigmoid(o) * o, l3, o_h, l4, x * torch.sigmoid(score)], 1)
    torch.testing.assert_close(made(x)[0], gelu(made.standardize(made.bottleneck(joined))) + made.bias)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: block()(torch.zeros(1, 3, 7, 7)), "made for 2 axes of 6"),
        (lambda: block(channels=5), "expected a multiple of 12"),
        (lambda: block(before=(2,)), "can't be repeated to 3"),
        (lambda: block(kernels=(3, 4, 5, 7)), "expected an odd width"),
        (lambda: block(kernels=(3, 5)), "four local branches"),
        (lambda: block(context="samples"), "Did you mean 'sample'"),
        (lambda: block(statistics="runing"), "Did you mean 'running'"),
        (lambda: HyperConfig(size=4, axes=3), "axes is 3"),
        (lambda: HyperKernel(0), "all >= 1"),
    ],
)
def test_wrong_settings_are_named(run, message):
    with pytest.raises(InputError, match=message):
        run()
