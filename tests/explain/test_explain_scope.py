"""The linear replay: f = A x + r on every architecture, and A beside matrices written down by hand in float64."""

import hashlib
import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from tiny_families import COMMON, FAMILIES, IMAGE, OWN, VGG, ids, image, make, saved_decoder, vision
from torch import nn
from transformers import ViTImageProcessor

from lineament import explain, models
from lineament._base.errors import InputError
from lineament.cli import run
from lineament.graph import InDouble

QUICK = ["gpt2", "llama", "gemma2", "vit", "resnet-own", "unet", "encoder"]
INPUTS = {"t5": "decoder_input_ids", "whisper": "input_features"}


def replayed(name, dtype=torch.float64, **choices):
    model, inputs, target = make(name, dtype)
    with InDouble() if dtype == torch.float64 else nullcontext():
        return explain.scope(model, inputs, of=INPUTS.get(name), output=target, **choices)


def dense(found):
    """Return A as a matrix, from one probe per place."""
    n = found.input.numel()
    return found.columns(*range(n)).reshape(n, -1).T


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in {**FAMILIES, **OWN} if n not in QUICK)]
)
def test_the_map_at_x_is_the_model_and_its_transpose_is_adjoint(name):
    found = replayed(name)
    assert found.error < 1e-12
    u, v = random(*found.input.shape), random(*found.output.shape, seed=1)
    torch.testing.assert_close((found.linear(u) * v).sum(), (u * found.transposed(v)).sum(), rtol=1e-10, atol=1e-10)
    both = found(torch.stack([u, 2 * u]))  # affine: I(2u) = 2 I(u) - I(0)
    torch.testing.assert_close(both[1], 2 * both[0] - found.bias, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(both[0], found.linear(u) + found.bias, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("center", ["data", "probe"])
@pytest.mark.parametrize("gate", ["half", "linear"])
@pytest.mark.parametrize("offset", ["tangent", "mask"])
def test_every_choice_gives_the_model_back(center, gate, offset):
    choices = {"center": center, "gate": gate, "offset": offset}
    assert replayed("gpt2", **choices).error < 1e-12
    assert replayed("llama", **choices).error < 1e-12


@pytest.mark.parametrize(
    "kind", ["gla", *(pytest.param(k, marks=pytest.mark.slow) for k in ("hedgehog-window", "gated-deltanet"))]
)
def test_linear_mixers_are_replayed_too(kind):
    student = models.tiny("llama", kind).double()
    with InDouble():
        assert explain.scope(student, {"input_ids": ids(5)}).error < 1e-12


def test_a_net_of_relus_and_maxima_is_its_jacobian():
    torch.manual_seed(0)
    net, x = VGG().double().eval(), image(16)[:1].double()
    found = explain.scope(net, x)
    jacobian = torch.autograd.functional.jacobian(net, x).view(5, -1)
    torch.testing.assert_close(found.rows(*range(5)).view(5, -1), jacobian, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.columns(7).view(5), jacobian[:, 7], rtol=1e-10, atol=1e-12)


class Block(nn.Module):
    """One head of attention and a gated MLP behind an RMS norm, on [T, D], so that A can be written down."""

    def __init__(self, width=5, hidden=7):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        p = (self.q(x) @ self.k(x).mT).softmax(-1)
        h = x + self.o(p @ self.v(x))
        n = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
        return h + self.down(nn.functional.silu(self.gate(n)) * self.up(n))

    def by_hand(self, x):
        """Return A [T D, T D] and r, from the weights and what x decides."""
        T, D = x.shape
        eye = torch.eye(T * D, dtype=x.dtype)
        p = (self.q(x) @ self.k(x).mT).softmax(-1)
        first = eye + torch.kron(p, self.o.weight @ self.v.weight)
        r = (p.sum(-1)[:, None] * (self.o.weight @ self.v.bias) + self.o.bias).flatten()
        h = (first @ x.flatten() + r).view(T, D)
        second, after = eye.clone(), torch.zeros(T, D, dtype=x.dtype)
        for t in range(T):
            scale = (h[t].square().mean() + 1e-6).rsqrt()
            g, u = self.gate(h[t] * scale), self.up(h[t] * scale)
            by_gate, by_up = (u * g.sigmoid() / 2)[:, None], (g * g.sigmoid() / 2)[:, None]
            inner = by_gate * self.gate.weight + by_up * self.up.weight
            second[t * D : (t + 1) * D, t * D : (t + 1) * D] += self.down.weight @ inner * scale
            shift = by_gate[:, 0] * self.gate.bias + by_up[:, 0] * self.up.bias
            after[t] = self.down.weight @ shift + self.down.bias
        return second @ first, second @ r + after.flatten()


@pytest.mark.parametrize("T", [1, 4])
def test_a_transformer_block_is_the_matrix_written_down_by_hand(T):
    torch.manual_seed(0)
    block, x = Block().double(), random(T, 5)
    with torch.no_grad():
        A, r = block.by_hand(x)
    found = explain.scope(block, x)
    torch.testing.assert_close(dense(found), A, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.bias.flatten(), r, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.rows((T - 1, 2)).flatten(), A[(T - 1) * 5 + 2], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("norm", "dims"), [(nn.LayerNorm([6, 2, 2]), (1, 2, 3)), (nn.InstanceNorm2d(6, affine=True), (2, 3))]
)
def test_norms_keep_the_statistics_of_the_data_or_the_centre_of_the_probe(norm, dims):
    x, u = random(1, 6, 2, 2), random(1, 6, 2, 2, seed=1)
    norm = norm.double()
    with torch.no_grad():
        for p in norm.parameters():
            p.normal_(generator=torch.Generator().manual_seed(2))
    shape = (1, 6, 2, 2) if norm.weight.numel() > 6 else (1, 6, 1, 1)
    weight, bias = norm.weight.detach().view(shape), norm.bias.detach().view(shape)
    sigma = (x.var(dims, unbiased=False, keepdim=True) + norm.eps).sqrt()
    for center, mean in (("data", x.mean(dims, keepdim=True)), ("probe", u.mean(dims, keepdim=True))):
        found = explain.scope(norm, x, center=center)
        torch.testing.assert_close(found(u), weight * (u - mean) / sigma + bias, rtol=1e-10, atol=1e-12)


def test_singular_values_are_those_of_the_dense_map():
    torch.manual_seed(0)
    block, x = Block().double(), random(3, 5)
    found = explain.scope(block, x)
    u, s, v = found.singular(3)
    values = torch.linalg.svdvals(dense(found))[:3]
    torch.testing.assert_close(s, values, rtol=1e-6, atol=1e-9)
    for i in range(3):  # A v = s u
        torch.testing.assert_close(found.linear(v[i]), s[i] * u[i], rtol=1e-5, atol=1e-6)


class Voting(nn.Module):
    """A net with everything that can part a vote from relevance: a norm, a gate, a sigmoid."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.three, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.norm(nn.functional.gelu(self.one(x)))
        return self.head(torch.sigmoid(self.two(h)) * self.three(h))


def test_votes_are_relevance_under_three_conditions_and_not_without_one():
    torch.manual_seed(1)
    net, x = Voting().double(), random(1, 6)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    relevance = explain.relevance(net, x, target=1, rules=explain.Rules(softmax="stop", attention="values"))
    same = explain.scope(net, x, center="probe")
    torch.testing.assert_close(same.votes((0, 1)), relevance.inputs["x"], rtol=1e-12, atol=1e-12)
    for dropped in ({"center": "data"}, {"gate": "linear"}, {"offset": "mask"}):
        found = explain.scope(net, x, **{"center": "probe", **dropped})
        assert found.error < 1e-12
        assert (found.votes((0, 1)) - relevance.inputs["x"]).abs().max() > 1e-3, dropped


def test_without_biases_the_map_is_everything_and_scale_does_not_change_it():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3, bias=False)
    ).double()
    x = random(1, 1, 8, 8)
    found, scaled = explain.scope(net, x), explain.scope(net, 3 * x)
    assert found.bias.abs().max() == 0
    torch.testing.assert_close(found.rows(0, 1, 2), scaled.rows(0, 1, 2), rtol=1e-12, atol=1e-12)
    assert found.bias_share(0, 1) == 0


def test_raw_inputs_get_a_map_of_their_own():
    torch.manual_seed(0)
    net, raw = VGG().double().eval(), image(16)[:1].double()
    mean, std = random(3, 1, 1), random(3, 1, 1, seed=1).abs() + 0.5
    found = explain.scope(net, (raw - mean) / std).unnormalised(mean, std)
    torch.testing.assert_close(found.input, raw, rtol=1e-12, atol=1e-12)
    assert found.error < 1e-12
    votes = found.votes((0, 2)).sum() + found.bias[0, 2]
    torch.testing.assert_close(votes, found.output[0, 2], rtol=1e-10, atol=1e-12)


def test_the_model_runs_as_it_is_and_comes_back_as_it_was():
    model, inputs, _ = make("gpt2", torch.float32)

    def state():
        tensors = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
        flags = [p.requires_grad for p in model.parameters()], [len(m._forward_hooks) for m in model.modules()]
        return hashlib.sha256(tensors).hexdigest(), flags

    with torch.no_grad():
        plain, before = model(**inputs).logits, state()
    found = explain.scope(model, inputs)
    assert torch.equal(found.output, plain)
    assert state() == before
    assert found.error < 1e-4
    with pytest.raises(InputError):
        explain.scope(model, inputs, output=lambda out: out.logits.argmax(-1).float())
    assert state() == before


def test_mistakes_are_named():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.ones(1, 3)
    found = explain.scope(net, x)
    for wrong, words in (
        (lambda: explain.scope(net, x, center="middle"), "unknown choice for center"),
        (lambda: explain.scope(net.bfloat16(), x.bfloat16()), "model.float"),
        (lambda: explain.scope(nn.Sequential(nn.Dropout(0.5)).train(), x), "model.eval"),
        (lambda: explain.scope(nn.Bilinear(3, 3, 1), {"input1": x, "input2": x}), "choose one by of="),
        (lambda: explain.scope(nn.Softmax(-1), x), "only through decisions"),
        (lambda: found.rows(2), "outside the output's 2 places"),
        (lambda: found.rows((0, 5)), "none of the output"),
        (lambda: found.singular(2), "1 to 1"),
        (lambda: found(torch.ones(3)), "expected"),
    ):
        with pytest.raises(InputError, match=words):
            wrong()


@pytest.fixture
def decoder(tmp_path):
    words = ["[UNK]", "the", "capital", "of", "france", "is", "paris"]
    return saved_decoder(tmp_path, words, "gpt2")


def test_the_command_reads_a_text(decoder, capsys, tmp_path):
    text = ["scope", decoder, "--text", "the capital of france is", "--target", "paris", "--singular", "2"]
    assert run([*text, "--html", str(tmp_path / "scope.html"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(found["votes"]) + found["bias"] == pytest.approx(found["value"], rel=1e-4)
    assert len(found["singular"]) == len(found["basis"]) == 2
    assert "Singular basis" in (tmp_path / "scope.html").read_text()
    assert run(text) == 0
    assert "bias response" in capsys.readouterr().out
    assert run(["scope", decoder, "--text", " "]) == 2
    assert run(["scope", decoder]) == 2


def test_the_command_reads_a_picture(capsys, tmp_path):
    make("vit")[0].save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    Image.new("RGB", (40, 30), (200, 30, 60)).save(tmp_path / "red.png")
    picture = ["scope", str(tmp_path / "vit"), "--image", str(tmp_path / "red.png"), "--singular", "1"]
    assert run([*picture, "--html", str(tmp_path / "scope.html"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert torch.tensor(found["pixels"]).shape == (32, 32)
    assert found["linear"] + found["bias"] == pytest.approx(found["value"], rel=1e-4)
    two = vision("ViTConfig", "ViTForImageClassification", **COMMON, **IMAGE, num_labels=2)()[0]
    two.save_pretrained(tmp_path / "vit2")
    shutil.copy(tmp_path / "vit" / "preprocessor_config.json", tmp_path / "vit2")
    assert run(["scope", str(tmp_path / "vit2"), *picture[2:4], "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["singular"]) == 1  # of a map to two outputs there is no more
    assert run([*picture, "--target", "99"]) == 2
    assert "out of range" in capsys.readouterr().err
