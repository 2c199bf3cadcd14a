"""Merges: laws of every row, and each row against its published definition, written out plainly in float64."""

import math
import weakref

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lineament._base.errors import InputError
from lineament.testing import MERGE_LAWS, check_merge
from lineament.weights import METHODS, Point, fisher, grams, merge
from lineament.weights.settings import evaluate
from lineament.weights.task_vectors import top_mask

OPTIONS = {
    "linear": {"weight": 0.7}, "task_arithmetic": {"weight": 0.7}, "ties": {"weight": 0.7, "density": 0.4},
    "dare_linear": {"weight": 0.7, "density": 0.4}, "dare_ties": {"weight": 0.7, "density": 0.4},
    "breadcrumbs": {"weight": 0.7, "density": 0.4}, "breadcrumbs_ties": {"weight": 0.7, "density": 0.4},
    "della": {"weight": 0.7, "density": 0.4}, "della_linear": {"weight": 0.7, "density": 0.4},
    "slerp": {"t": 0.3}, "nuslerp": {"weight": 0.7}, "multislerp": {"weight": 0.7}, "nearswap": {"t": 0.1},
    "sce": {"select_topk": 0.5}, "fisher": {}, "regmean": {},
}  # fmt: skip
DRAWS = {"dare_linear", "dare_ties", "della", "della_linear"}


def model(seed, shape=(6, 5), dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(shape, generator=g).to(dtype), "b": torch.randn(shape[-1], generator=g).to(dtype)}


def run(method, *, seed=0, **options):
    row = METHODS[method]

    def merged(models, base):
        stats = [{n: x.abs() if method == "fisher" else torch.eye(1) for n, x in m.items()} for m in models]
        extra = {"statistics": stats} if row.statistics else {}
        if method == "regmean":
            extra = {"statistics": [{"matrix": torch.eye(5)} for _ in models]}
        return dict(merge(models, method, base=base, seed=seed, **extra, **options))

    return merged


@pytest.mark.parametrize("law", MERGE_LAWS)
@pytest.mark.parametrize("method", METHODS)
def test_every_row_obeys_the_laws(method, law):
    row = METHODS[method]
    if (law, method) == ("same", "fisher") or (
        law == "order" and method in {"slerp", "nearswap", "arcee_fusion", *DRAWS}
    ):
        pytest.skip("no symmetric merge, or equal models have unequal statistics")
    models = min(row.models[1], 3)
    shapes = {"matrix": (7, 5), "vector": (9,), "one": (1, 1), "long": (3, 4097), "cube": (3, 2, 5)}
    options = OPTIONS.get(method, {})
    if law == "order" and method == "passthrough":
        models = 1
    check_merge(
        run(method, **options), models=models, base=row.base != "none", laws=[law], shapes=shapes, tolerance=2e-5
    )


def doubles(n=3, shape=(6, 5)):
    return model(99, shape)["w"].double(), [model(i, shape)["w"].double() for i in range(n)]


def merged(method, n=3, shape=(6, 5), **options):
    row = METHODS[method]
    return merge(
        [model(i, shape) for i in range(n)], method, base=model(99, shape) if row.base != "none" else None, **options
    )["w"].double()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_linear_and_task_arithmetic():
    base, x = doubles()
    close(merged("linear", weight=[1, 2, 5]), (x[0] + 2 * x[1] + 5 * x[2]) / 8)
    close(merged("linear", weight=[1, 2, 5], normalize=False), x[0] + 2 * x[1] + 5 * x[2])
    close(merged("linear", weight=1.0), sum(x) / 3)
    assert torch.equal(
        merge([model(i) for i in range(3)], "average")["w"], merge([model(i) for i in range(3)], weight=1)["w"]
    )
    deltas = [0.2 * (x[0] - base), 0.5 * (x[1] - base), -0.1 * (x[2] - base)]
    close(merged("task_arithmetic", weight=[0.2, 0.5, -0.1]), base + sum(deltas))
    close(merged("task_arithmetic", weight=[0.2, 0.5, -0.1], normalize=True), base + sum(deltas) / 0.6)
    close(merged("task_arithmetic", weight=[0.2, 0.5, -0.1], scale=1.5), base + 1.5 * sum(deltas))


def plain_trim(delta, keep):
    order = delta.abs().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[order[keep]] = True
    return mask.view(delta.shape)


def plain_elect(deltas, weights, normalize, base):
    out = base.clone()
    for place in range(base.numel()):
        entries = [(w * d.flatten()[place].item(), w) for d, w in zip(deltas, weights, strict=True)]
        sign = 1 if sum(e for e, _ in entries) >= 0 else -1
        agree = [(e, w) for e, w in entries if e * sign > 0]
        divisor = sum(w for _, w in agree) if normalize and agree else 1
        out.view(-1)[place] += sum(e for e, _ in agree) / divisor
    return out


@pytest.mark.parametrize("shape", [(6, 5), (1, 1), (17,)])
def test_ties_trims_elects_and_averages(shape):
    base, x = doubles(shape=shape)
    k = max(1, int(0.4 * base.numel()))
    deltas = [d * plain_trim(d, slice(k)) for d in (y - base for y in x)]
    close(merged("ties", shape=shape, weight=[1, 0.5, 2], density=0.4), plain_elect(deltas, [1, 0.5, 2], True, base))
    close(
        merged("ties", shape=shape, weight=1.0, density=0.4, normalize=False),
        plain_elect(deltas, [1, 1, 1], False, base),
    )


def test_breadcrumbs_drop_outliers_and_small_entries():
    base, x = doubles()
    n, kept, top = 30, int(0.4 * 30), int(0.1 * 30)
    deltas = [d * plain_trim(d, slice(top, top + kept)) for d in (y - base for y in x)]
    close(merged("breadcrumbs", weight=0.5, density=0.4, gamma=0.1), base + 0.5 * sum(deltas))
    close(merged("breadcrumbs_ties", weight=0.5, density=0.4, gamma=0.1), plain_elect(deltas, [0.5] * 3, False, base))
    # a density that leaves no room for gamma wins over it
    wide = [d * plain_trim(d, slice(n - int(0.95 * n), n)) for d in (y - base for y in x)]
    close(merged("breadcrumbs", weight=0.5, density=0.95, gamma=0.9), base + 0.5 * sum(wide))


def test_tied_magnitudes_keep_exactly_the_share_and_the_first_ones():
    x = torch.tensor([1.0, -1.0, 1.0, 1.0, 0.5, 1.0])
    assert top_mask(x, 3).tolist() == [True, True, True, False, False, False]
    big = torch.randint(-3, 4, (300_001,), generator=torch.Generator().manual_seed(0)).float()
    for count in (1, 1000, 150_000, 299_999):
        mask = top_mask(big, count)
        assert int(mask.sum()) == count
        assert torch.equal(mask, plain_trim(big, slice(count)))
    smooth = torch.randn(300_001, generator=torch.Generator().manual_seed(1))
    assert torch.equal(top_mask(smooth, 12345), plain_trim(smooth, slice(12345)))
    sorted_input = torch.arange(100_000.0)  # a sample of every n-th entry must not be misled by order
    assert torch.equal(top_mask(sorted_input, 777), plain_trim(sorted_input, slice(777)))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_the_expected_share_and_restores_what_it_names(method):
    zeros, x = {"w": torch.zeros(400, 500)}, model(0, (400, 500))["w"]
    for rescale, factor in [("none", 1.0), ("1/density", 1 / 0.3)]:
        found = merge([{"w": x}], method, base=zeros, weight=1.0, density=0.3, rescale=rescale)["w"]
        kept = found != 0
        torch.testing.assert_close(found[kept], x[kept] * factor)
        assert abs(float(kept.double().mean()) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 200_000)
    l1 = merge([{"w": x}], method, base=zeros, weight=1.0, density=0.3)["w"]
    assert float(l1.abs().sum()) == pytest.approx(float(x.abs().sum()), rel=1e-5)
    other = merge([{"w": x}], method, base=zeros, weight=1.0, density=0.3, seed=1)["w"]
    assert not torch.equal(l1 != 0, other != 0)


def test_della_keeps_larger_entries_with_higher_probability():
    zeros = {"w": torch.zeros(500, 400)}
    x = torch.arange(1.0, 401).repeat(500, 1)
    found = merge([{"w": x}], "della_linear", base=zeros, weight=1.0, density=0.5, epsilon=0.3, rescale="none")["w"]
    share = (found != 0).double().mean(0)
    expected = torch.linspace(0.2, 0.8, 400, dtype=torch.float64)
    assert float((share - expected).abs().max()) < 5 * 0.5 / math.sqrt(500)
    assert abs(float(share.mean()) - 0.5) < 0.01


@pytest.mark.parametrize("unrelated", [True, False])
def test_slerp_and_nuslerp(unrelated):
    base, x = doubles(2)
    a, b = (base, x[0]) if unrelated else (base, base * 2)
    angle = torch.arccos(((a * b).sum() / a.norm() / b.norm()).clamp(-1, 1))
    expected = 0.7 * a + 0.3 * b
    if unrelated:
        expected = (torch.sin(0.7 * angle) * a + torch.sin(0.3 * angle) * b) / torch.sin(angle)
    close(merge([{"w": b.float()}], "slerp", base={"w": a.float()}, t=0.3)["w"].double(), expected)
    close(merge([{"w": a.float()}, {"w": b.float()}], "nuslerp", weight=[0.7, 0.3])["w"].double(), expected)
    if unrelated:
        for row_wise, axis in [(False, 1), (True, 0)]:
            angle = torch.arccos(
                (a * b).sum(axis, keepdim=True) / a.norm(dim=axis, keepdim=True) / b.norm(dim=axis, keepdim=True)
            )
            rows = (torch.sin(0.7 * angle) * a + torch.sin(0.3 * angle) * b) / torch.sin(angle)
            found = merge([{"w": a.float()}, {"w": b.float()}], "nuslerp", weight=[0.7, 0.3], nuslerp_flatten=False,
                          nuslerp_row_wise=row_wise)["w"]  # fmt: skip
            close(found.double(), rows)
        u, v = x[0] - base, x[1] - base
        angle = torch.arccos((u * v).sum() / u.norm() / v.norm())
        close(merged("nuslerp", 2, weight=1.0), base + (torch.sin(angle / 2) * (u + v)) / torch.sin(angle))


def test_multislerp_is_the_mean_direction_with_the_mean_length():
    base, x = doubles()
    w = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    v = [y - base for y in x]
    mean = sum(c * d / d.norm() for c, d in zip(w, v, strict=True))
    length = sum(c * d.norm() for c, d in zip(w, v, strict=True))
    close(merged("multislerp", weight=[2, 3, 5]), base + mean / mean.norm() * length)
    with pytest.raises(InputError, match="sum to zero"):
        merged("multislerp", weight=[1, -1, 0])


def test_karcher_is_where_the_pulls_cancel():
    """The defining property, not the iteration: the logarithms of all directions at the mean sum to zero."""
    x = doubles()[1]
    found = merged("karcher", max_iter=100, tol=1e-7)
    mean = found / found.norm()
    total = torch.zeros_like(mean)
    for y in x:
        u = y / y.norm()
        cosine = (u * mean).sum()
        total += torch.arccos(cosine) / torch.sqrt(1 - cosine**2) * (u - cosine * mean)
    assert float(total.norm()) < 1e-5
    assert float(found.norm()) == pytest.approx(float(sum(y.norm() for y in x) / 3), rel=1e-5)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock(filter_wise):
    base, x = doubles()
    out = torch.empty_like(base)
    for rows in range(len(base)) if filter_wise else [slice(None)]:
        d = [(y - base)[rows].flatten() for y in x]
        pairs = [(0, 1), (0, 2), (1, 2)]
        cosine = sum(float(d[i] @ d[j] / d[i].norm() / d[j].norm()) for i, j in pairs) / 3
        t = 3 * cosine / (1 + 2 * cosine)
        out[rows] = t * (sum(x) / 3)[rows] + (1 - t) * base[rows]
    close(merged("model_stock", filter_wise=filter_wise), out)


def test_sce_ram_nearswap_and_arcee_fusion():
    base, x = doubles()
    d = torch.stack([y - base for y in x])
    keep = plain_trim(d.var(0, unbiased=False), slice(15))
    chosen = d * keep
    w = chosen.square().mean((1, 2))
    w = w / w.sum()
    sign = torch.where(chosen.sum(0) >= 0, 1.0, -1.0)
    agree = (chosen.sign() == sign).double() * w[:, None, None]
    close(merged("sce", select_topk=0.5), base + (chosen * agree).sum(0) / agree.sum(0).clamp(min=1e-6))
    changed = d.abs() > 0.5
    count = changed.sum(0)
    own, shared = (changed & (count == 1)), (changed & (count > 1))
    close(merged("ram", epsilon=0.5), base + (d * own).sum(0) + (d * shared).sum(0) / count.clamp(min=1))
    gain = 1 + 0.3 * (shared.sum((1, 2)) / own.sum((1, 2)).clamp(min=0.5)).clamp(max=0.8)
    close(merged("ramplus_tl", epsilon=0.5, r=0.3, alpha=0.8),
          base + (d * own * gain[:, None, None]).sum(0) + (d * shared).sum(0) / count.clamp(min=1))  # fmt: skip
    step = d[0].abs().clamp(max=0.2) * d[0].sign()
    close(merged("nearswap", 1, t=0.2), base + step)
    p, q = x[0].softmax(-1) + 1e-8, base.softmax(-1) + 1e-8
    importance = d[0].abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    s = importance.flatten().sort().values
    limit = s[int(0.5 * 29)] + 1.5 * (s[int(0.75 * 29)] - s[int(0.25 * 29)])
    close(merged("arcee_fusion", 1), base + d[0] * (importance >= limit))


def test_task_singular_vectors_and_isotropic_merging():
    base, x = doubles(2)
    d = [y - base for y in x]
    close(merged("tsv", 1, weight=0.7), base + 0.7 * d[0])  # one task keeps all of itself
    u, s, v = zip(*(torch.linalg.svd(e, full_matrices=False) for e in d), strict=True)
    k = 5 // 2
    left, right = torch.cat([a[:, :k] for a in u], 1), torch.cat([a[:k] for a in v], 0)
    values = torch.cat([a[:k] for a in s])
    # nearest orthonormal by the polar factor X (X^T X)^-1/2, not by the same SVD
    polar = [y @ _inverse_root(y.T @ y) for y in (left, right.T)]
    # float32 singular vectors of the library beside float64: 7e-6 measured
    torch.testing.assert_close(merged("tsv", 2), base + polar[0] * values @ polar[1].T, rtol=1e-4, atol=3e-5)
    total = d[0] + d[1]
    found = (merged("iso_c", 2) - base) / torch.linalg.svdvals(total).mean()
    close(found, total @ _inverse_root(total.T @ total))
    vectors = merge([model(0), model(1)], "iso_c", base=model(99))["b"]
    close(vectors, (model(0)["b"] + model(1)["b"]) / 2)


def _inverse_root(gram):
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.rsqrt() @ vectors.T


def test_fisher_weights_entries_and_regmean_fits_outputs():
    g = torch.Generator().manual_seed(0)
    nets = [nn.Linear(4, 3).double() for _ in range(2)]
    inputs = [torch.randn(50, 4, generator=g, dtype=torch.float64) * torch.tensor([1, 2, 0.5, 3]) for _ in nets]
    stats = [grams(net, [x[:20], x[20:]], lambda m, b: m(b)) for net, x in zip(nets, inputs, strict=True)]
    torch.testing.assert_close(stats[0]["weight"].double(), inputs[0].T @ inputs[0] / 50, rtol=1e-5, atol=1e-6)
    found = merge(nets, "regmean", statistics=stats, shrink=1.0)["weight"].double()
    # least squares on the stacked inputs and outputs
    x = torch.cat(inputs)
    y = torch.cat([i @ net.weight.T for i, net in zip(inputs, nets, strict=True)])
    torch.testing.assert_close(found, torch.linalg.lstsq(x, y).solution.T, rtol=1e-4, atol=1e-5)
    close(merge(nets, "regmean", statistics=stats)["bias"].double(), (nets[0].bias + nets[1].bias) / 2)
    mean = ((nets[0].weight + nets[1].weight) / 2).detach()
    seen = (torch.arange(4) != 2).float()
    dead, nothing = ([{"weight": stat["weight"] * x * x[:, None]} for stat in stats] for x in (seen, 0 * seen))
    found = merge(nets, "regmean", statistics=dead)["weight"]
    close(found[:, 2], mean[:, 2])  # an input that nobody ever saw
    assert not torch.allclose(found[:, 1], mean[:, 1], rtol=1e-3)
    close(merge(nets, "regmean", statistics=nothing)["weight"], mean)

    target = torch.zeros(3, dtype=torch.float64)
    info = [
        fisher(net, x[:6].split(1), lambda m, b: (m(b) - target).square().sum())
        for net, x in zip(nets, inputs, strict=True)
    ]
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for row in inputs[0][:6]:
        expected += (2 * nets[0](row)[:, None] * row[None]).square() / 6
    torch.testing.assert_close(info[0]["weight"].double(), expected.detach(), rtol=1e-5, atol=1e-6)
    found = merge(nets, "fisher", statistics=info, floor=0.0)["weight"].double()
    f = [i["weight"].double() for i in info]
    close(found, ((f[0] * nets[0].weight + f[1] * nets[1].weight) / (f[0] + f[1])).detach())


def test_options_follow_layers_filters_and_models():
    names = [f"layers.{i}.{part}" for i in range(3) for part in ("mlp.w", "attn.w")]
    a, b = ({n: torch.full((2,), float(k)) for n in ["embed.w", *names]} for k in (0, 1))
    found = merge([a, b], "linear", weight=[0.5, {"mlp": [0, 1], "*": 0.5}], normalize=False)
    assert [found[n][0].item() for n in names] == [0, 0.5, 0.5, 0.5, 1, 0.5]
    assert found["embed.w"][0].item() == 0.5
    with pytest.raises(InputError, match=r"weight has no value for 'embed\.w'"):
        merge([a, b], "linear", weight=[1.0, {"layers": 1.0}])
    assert evaluate([{"filter": "mlp", "value": [1, 2]}, {"value": 9}], "x.mlp", 0.5) == 1.5
    assert evaluate(["1e-1", "3e-1"], "x", 0.5) == pytest.approx(0.2)


def test_a_base_among_the_models_is_not_a_task(tmp_path):
    base = Point.open(model(99)).save(tmp_path / "base")
    a = Point.open(model(0)).save(tmp_path / "a")
    found = merge([base, a], "task_arithmetic", base=base, weight=0.5)
    close(found["w"], (model(99)["w"] + model(0)["w"]) / 2)


def test_a_list_per_model_counts_the_models_given():
    layers = [f"layers.{i}.w" for i in range(3)]
    base, a, c = ({n: torch.full((2,), k) for n in layers} for k in (0.0, 1.0, 2.0))
    expected = {n: torch.full((2,), 2.5) for n in layers}
    given = [([base, a, c], [9.0, 0.5, 1.0]), ([base, a, c], [0.5, 1.0]), ([a, base, c], [0.5, 9.0, 1.0])]
    for points, weight in given:
        found = merge(points, "task_arithmetic", base=base, weight=weight)
        assert all(torch.equal(found[n], expected[n]) for n in layers)
    with pytest.raises(InputError, match=r"weight is a list of 3 for 2 models; .* once per model"):
        merge([a, c], "task_arithmetic", base=base, weight=[0.0, 0.5, 1.0])
    found = merge([a, c], "task_arithmetic", base=base, weight=[[0.0, 0.5, 1.0]] * 2)
    assert [found[n][0].item() for n in layers] == [0.0, 1.5, 3.0]


def test_results_keep_dtype_and_integers():
    a, b = ({**model(i, dtype=torch.bfloat16), "n": torch.tensor(7)} for i in range(2))
    found = merge([a, b], weight=1)
    assert found["w"].dtype == torch.bfloat16
    assert found["n"] == 7
    expected = ((a["w"].double() + b["w"].double()) / 2).bfloat16()
    assert torch.equal(found["w"], expected)
    with pytest.raises(InputError, match=r"'n' .* differs"):
        merge([a, {**b, "n": torch.tensor(8)}], weight=1)["n"]


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("tise", {}, "Did you mean 'ties'"),
        ("ties", {"densty": 0.5, "weight": 1}, "Did you mean 'density'"),
        ("linear", {}, "linear needs weight for each model"),
        ("linear", {"weight": "much"}, r"weight of model 1 is 'much'; expected a finite number"),
        ("linear", {"weight": float("nan")}, "finite number"),
        ("linear", {"weight": True}, "finite number"),
        ("linear", {"weight": [[], 1, 1]}, "empty list"),
        ("linear", {"weight": 1, "normalize": 3}, "expected a true or false"),
        ("slerp", {"t": 0.5}, "expected exactly 1"),
        ("ties", {"weight": 1, "base": None}, "give base"),
        ("fisher", {}, "needs statistics"),
        ("ties", {"weight": 1, "density": 7}, "density is 7.0; expected a share from 0 to 1"),
        ("della", {"weight": 1, "density": 0.9}, r"density 0\.9 -/\+ epsilon 0\.15 must lie within"),
        ("linear", {"weight": [[{"filter": 3, "value": 1}, 1], 1, 1]}, "the filter 3; expected text"),
    ],
)
def test_a_mistake_is_named_before_anything_is_read(method, options, said):
    options = {"base": model(99), **options}
    with pytest.raises(InputError, match=said):
        merge([model(0), model(1), model(2)], method, **options)


def test_weights_that_cancel_and_nothing_to_merge():
    with pytest.raises(InputError, match="sum to zero"):
        merge([model(0), model(1)], weight=[1, -1])["w"]
    with pytest.raises(InputError, match="nothing to merge"):
        merge([], weight=1)
    broken = model(1)
    broken["w"][2, 3] = float("inf")
    with pytest.raises(InputError, match="'w' of a state dict holds 1 NaN or infinite"):
        merge([model(0), broken], "ties", base=model(99), weight=1, density=0.2)["w"]


class LiveBytes(TorchDispatchMode):
    """Adds up the tensors that operators allocate, and the most that live at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {
            x.untyped_storage().data_ptr() for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        for x in pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in old:
                size = x.untyped_storage().nbytes()
                self.now += size
                weakref.finalize(x, self.free, size)
        self.most = max(self.most, self.now)
        return out

    def free(self, size):
        self.now -= size


BOUNDED = [name for name in METHODS if name not in ("fisher", "regmean", "tsv", "iso_c", "passthrough", *DRAWS)]


@pytest.mark.parametrize("method", [*BOUNDED, "dare_ties"])
def test_memory_is_bounded_by_inputs_and_two_more(method, tmp_path):
    """(inputs + 2) x the largest tensor in float32, and pieces of a fixed size: here 12 MB of the 256 allowed."""
    row, shape = METHODS[method], (1024, 2048)
    count = min(row.models[1], 3)
    points = [Point.open(model(i, shape, torch.bfloat16)) for i in range(count + 1)]
    base = points.pop() if row.base != "none" else None
    point = merge(points, method, base=base, **OPTIONS.get(method, {}))
    with LiveBytes() as live:
        point["w"]
    assert live.most <= (count + (base is not None) + 2) * math.prod(shape) * 4 + 12e6


@pytest.mark.parametrize("method", ["tsv", "iso_c"])
def test_spectra_keep_one_task_at_a_time(method):
    """The factors of one matrix, the triples kept of all (about two matrices), and what is orthonormalised."""
    shape, count = (128, 192), 8
    base, *points = (Point.open(model(i, shape)) for i in range(count + 1))
    point = merge(points, method, base=base, weight=1.0)
    with LiveBytes() as live:
        point["w"]
    assert live.most <= 8 * math.prod(shape) * 4
