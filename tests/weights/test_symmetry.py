"""The derived groups: their size in closed form, that they leave the function alone, and that nothing wrong passes."""

import math
import os
from pathlib import Path

import pytest
import torch
from architectures import KINDS, ResNet20, lg, llama, vgg
from torch import nn

from lineament import weights
from lineament.graph import axis_rules
from lineament.weights.elements import Element
from lineament.weights.symmetry import Trial

TABLE = Path(__file__).parents[2] / "docs" / "matching.md"
BEGIN, END = "<!-- table of architectures -->", "<!-- end of the table -->"
ROWS: dict[str, str] = {}


def exact(state: dict, other: dict) -> bool:
    return all(torch.equal(x, other[name]) for name, x in state.items())


@pytest.mark.parametrize("name", KINDS)
def test_the_group_is_derived_checked_and_recovered(name):
    kind = KINDS[name]
    model = kind.model()
    found = weights.symmetry(model, *kind.args, check=0, **kind.kwargs)
    assert found.log10_order == pytest.approx(kind.order, abs=1e-9)
    assert len(found.free) == kind.free
    assert not found.axes.opaque
    trial = Trial(model, kind.args, kind.kwargs)
    errors = [trial.error(found.random(seed)) for seed in range(20)]
    assert max(errors) < 1e-10
    a = {n: x + 0.1 * torch.randn(x.shape) if x.is_floating_point() else x for n, x in model.state_dict().items()}
    a |= {n: a[owner] for n, owner in found.aliases.items()}
    b = found.random(7).apply(a)
    assert not exact(a, b)
    recovered = exact(weights.match([a, b], found)[1].apply(b), a)
    assert recovered
    ROWS[name] = (
        f"| {name} | {len(found.free)} | 10^{found.log10_order:.1f} | {sum(e > 1e-10 for e in errors)} of 20 | "
        f"{'exactly' if recovered else 'no'} |"
    )


def test_the_table_in_the_docs_is_this_one():
    """The page shows what the tests above found; LINEAMENT_WRITE_DOCS=1 writes it anew."""
    if len(ROWS) < len(KINDS):
        pytest.skip("needs all kinds of the test above")
    head = "| architecture | free classes | elements | self-check failed | planted element recovered |"
    table = "\n".join([head, "|---|---|---|---|---|", *ROWS.values()])
    text = TABLE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if os.environ.get("LINEAMENT_WRITE_DOCS"):
        TABLE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
        return
    assert table in text


def test_elements_form_a_group():
    kind = KINDS["Mixture of experts"]
    model = kind.model()
    group = weights.symmetry(model, *kind.args, check=0, **kind.kwargs)
    state = dict(model.named_parameters())
    g, h = group.random(0), group.random(1)
    together = g.then(h).apply(state)
    assert exact(h.apply(g.apply(state)), together)
    merged = group.element(g.steps[0].then(h.steps[0]).perms).apply(state)
    assert exact(merged, together)
    assert exact(g.inverse().apply(g.apply(state)), state)
    assert exact(g.then(h).inverse().apply(together), state)
    assert exact(group.identity().apply(state), state)


def test_singular_values_do_not_move():
    kind = KINDS["Llama"]
    model = kind.model()
    group = weights.symmetry(model, *kind.args, check=0, **kind.kwargs)
    for name, x in group.random(0).apply(dict(model.named_parameters())).items():
        if x.dim() == 2:
            torch.testing.assert_close(torch.linalg.svdvals(x), torch.linalg.svdvals(model.get_parameter(name)))


def test_running_statistics_move_with_their_channel():
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1))
    group = weights.symmetry(net, torch.zeros(1, 1, 2, 2))
    (cls,) = group.free
    members = {name for name, _ in group.classes[cls].members}
    assert {"1.running_mean", "1.running_var", "1.weight", "1.bias", "0.weight", "0.bias", "3.weight"} == members
    state = net.state_dict()
    state["1.running_mean"] = torch.arange(4.0)
    perm = group.random(0).permutations[cls]
    moved = group.element({cls: perm}).apply(state)
    assert moved["1.running_mean"].tolist() == perm.tolist()


def test_a_forgotten_tie_is_caught_by_the_check(monkeypatch):
    """A LayerNorm whose gain is not tied to its axis: at a fresh model nothing shows, at a jittered one it does."""

    def untied(walk, node, x, sizes, *rest):
        return x.with_dims(x.dims)

    net = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    monkeypatch.setitem(axis_rules.RULES, "layer_norm", untied)
    wrong = weights.symmetry(net, torch.zeros(1, 3), check=0)
    assert any(not c.frozen and any(name == "1.weight" for name, _ in c.members) for c in wrong.classes)
    plain = net(torch.ones(1, 3))
    hidden = next(i for i in wrong.free if ("0.weight", 0) in wrong.classes[i].members)
    moved = wrong.random(0, [hidden]).apply(net.state_dict())
    torch.testing.assert_close(torch.func.functional_call(net, moved, torch.ones(1, 3)), plain)  # hidden when fresh
    checked = weights.symmetry(net, torch.zeros(1, 3))
    assert "self-check" in checked.reasons()["0.weight[0]"]
    assert checked.error < 1e-10


def test_what_keeps_the_order_is_said():
    reasons = weights.symmetry(llama(), check=0, **KINDS["Llama"].kwargs).reasons()
    assert "inv_freq" in reasons["model.layers.0.self_attn.q_proj.weight[0]"]
    assert "output" in reasons["lm_head.weight[0]"]
    assert "embedding" in reasons["model.embed_tokens.weight[0]"]

    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.b(torch.fft.fft(self.a(x)).real)

    group = weights.symmetry(Sorted(), torch.zeros(1, 2))
    assert not group.free
    assert "no rule" in group.reasons()["a.weight[0]"]


def hand_written(spec: dict[str, tuple[str | None, ...]]) -> set[frozenset[tuple[str, int]]]:
    """A table of git re-basin (parameter -> name of the permutation per axis) as a partition of the axes."""
    classes: dict[str, set[tuple[str, int]]] = {}
    for name, axes in spec.items():
        for dim, key in enumerate(axes):
            if key is not None:
                classes.setdefault(key, set()).add((name, dim))
    return {frozenset(members) for members in classes.values()}


def derived(group: weights.Symmetry, names: set[str]) -> set[frozenset[tuple[str, int]]]:
    return {frozenset(m for m in group.classes[i].members if m[0] in names) for i in group.free}


def mlp_spec():
    spec = {"0.weight": ("P0", None), "0.bias": ("P0",)}
    for i in (1, 2):
        spec |= {f"{2 * i}.weight": (f"P{i}", f"P{i - 1}"), f"{2 * i}.bias": (f"P{i}",)}
    return spec | {"6.weight": (None, "P2"), "6.bias": (None,)}


def resnet20_spec():
    norm = lambda name, p: {f"{name}.{x}": (p,) for x in ("weight", "bias", "running_mean", "running_var")}  # noqa: E731
    spec = {"conv1.weight": ("P_bg0", None, None, None), **norm("bn1", "P_bg0")}
    for stage in (1, 2, 3):
        for b in range(3):
            at, inner, out = f"layer{stage}.{b}", f"P_{stage}_{b}", f"P_bg{stage - 1}"
            into = f"P_bg{stage - 2}" if b == 0 and stage > 1 else out
            spec |= {f"{at}.conv1.weight": (inner, into, None, None), **norm(f"{at}.bn1", inner)}
            spec |= {f"{at}.conv2.weight": (out, inner, None, None), **norm(f"{at}.bn2", out)}
            if b == 0 and stage > 1:
                spec |= {f"{at}.shortcut.0.weight": (out, into, None, None), **norm(f"{at}.shortcut.1", out)}
    return spec | {"linear.weight": (None, "P_bg2"), "linear.bias": (None,)}


def vgg16() -> tuple[nn.Module, dict[str, tuple[str | None, ...]]]:
    layers: list[nn.Module] = []
    spec: dict[str, tuple[str | None, ...]] = {}
    inward, before = 3, None
    for size in (8, 8, "M", 16, 16, "M", 24, 24, 24, "M", 32, 32, 32, "M", 32, 32, 32, "M"):  # VGG16's, narrow
        if size == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        at, here = len(layers), f"P_conv{len(layers)}"
        layers += [nn.Conv2d(inward, int(size), 3, padding=1), nn.BatchNorm2d(int(size)), nn.ReLU()]
        spec |= {f"{at}.weight": (here, before, None, None), f"{at}.bias": (here,)}
        spec |= {f"{at + 1}.{x}": (here,) for x in ("weight", "bias", "running_mean", "running_var")}
        inward, before = int(size), here
    at = len(layers) + 1
    layers += [nn.Flatten(), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 10)]
    for i, (out, into) in enumerate((("P_d0", before), ("P_d1", "P_d0"), (None, "P_d1"))):
        spec |= {f"{at + 2 * i}.weight": (out, into), f"{at + 2 * i}.bias": (out,)}
    return nn.Sequential(*layers), spec


def test_the_tables_written_by_hand_for_git_rebasin_come_out():
    mlp = nn.Sequential(
        nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    deep, deep_spec = vgg16()
    cases = (
        (mlp, mlp_spec(), torch.zeros(1, 784)),
        (ResNet20(), resnet20_spec(), torch.zeros(2, 3, 8, 8)),
        (deep, deep_spec, torch.zeros(2, 3, 32, 32)),
    )
    for model, spec, example in cases:
        group = weights.symmetry(model, example, check=0)
        assert derived(group, set(spec)) == hand_written(spec)


def test_a_flattened_map_moves_by_blocks():
    net = vgg()
    group = weights.symmetry(net, torch.zeros(1, 3, 8, 8))
    cls = next(i for i in group.free if ("7.weight", 1) in group.classes[i].members)
    perm = group.random(0).permutations[cls]
    moved = group.element({cls: perm}).apply(net.state_dict())
    before = net.state_dict()["7.weight"].view(20, 12, 4)
    torch.testing.assert_close(moved["7.weight"].view(20, 12, 4), before[:, perm])


class Packed(nn.Module):
    """One attention layer with its q, k and v packed in one of four orders."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.embed, self.qkv, self.o, self.out = (
            nn.Linear(5, 16),
            nn.Linear(16, 48),
            nn.Linear(16, 16),
            nn.Linear(16, 3),
        )
        self.norm = nn.LayerNorm(4) if order == "(3, H, hd) with a norm" else nn.Identity()

    def forward(self, x):
        x = self.embed(x)
        y = self.qkv(x)
        if self.order.startswith("(3, H, hd)"):
            q, k, v = y.unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.order == "(H, 3 hd)":  # GPT-NeoX
            q, k, v = y.unflatten(-1, (4, 12)).transpose(1, 2).chunk(3, -1)
        elif self.order == "(H, 3, hd)":  # BLOOM
            y = y.unflatten(-1, (4, 3, 4))
            q, k, v = (y[..., i, :].transpose(1, 2) for i in range(3))
        else:  # (3 H, hd)
            q, k, v = (part.transpose(1, 2) for part in y.unflatten(-1, (12, 4)).split(4, 2))
        z = nn.functional.scaled_dot_product_attention(self.norm(q), self.norm(k), v)
        return self.out((x + self.o(z.transpose(1, 2).flatten(2))).mean(1))


@pytest.mark.parametrize("order", ["(3, H, hd)", "(3, H, hd) with a norm", "(H, 3 hd)", "(H, 3, hd)", "(3 H, hd)"])
def test_packed_projections_keep_three_families(order):
    group = weights.symmetry(Packed(order), torch.zeros(1, 3, 5))
    keys = lg(4) if "norm" in order else 4 * lg(4)  # a norm over channels is shared by all heads
    assert group.log10_order == pytest.approx(lg(16) + lg(4) + keys + 4 * lg(4), abs=1e-9)


@pytest.mark.parametrize(
    ("layer", "order"),
    [
        (nn.LSTM(4, 6, bidirectional=True, batch_first=True), 2 * lg(6)),
        (nn.LSTM(4, 6, bidirectional=True, batch_first=True, proj_size=5), 2 * lg(6) + 2 * lg(5)),
        (nn.GRU(4, 6, 2, bidirectional=True, batch_first=True), 4 * lg(6)),
        (nn.RNN(4, 6, batch_first=True), lg(6)),
    ],
)
def test_recurrent_layers(layer, order):
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer
            self.out = nn.Linear(layer(torch.zeros(1, 1, 4))[0].shape[-1], 2)

        def forward(self, x):
            return self.out(self.layer(x)[0])

    assert weights.symmetry(Read(), torch.zeros(2, 3, 4)).log10_order == pytest.approx(order, abs=1e-9)


def test_an_output_that_turns_nan_is_no_symmetry():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((3,), 2.0))

        def forward(self, x):
            return x, self.weight.log()

    flip = Element((Flip(),), {})
    trial = Trial(Two(), [torch.ones(2)], {})
    assert trial.error(flip) == math.inf


class Flip:
    """Signs turned: no symmetry of a logarithm."""

    def act(self, name, x):
        return -x

    def inverse(self):
        return self


def test_another_model_is_refused():
    group = weights.symmetry(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), torch.zeros(1, 2))
    other = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).state_dict()
    with pytest.raises(ValueError, match=r"'0.weight' has shape \[4, 2\]; the symmetry group was derived for \[3, 2\]"):
        group.identity().apply(other)


def test_a_model_that_looks_at_values_is_refused():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="can't be traced"):
        weights.symmetry(Branch(), torch.zeros(1, 2))
