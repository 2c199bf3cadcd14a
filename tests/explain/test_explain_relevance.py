"""The relevance engine on whole models: conservation, parity with autograd, and what comes back unchanged."""

import hashlib
from contextlib import nullcontext

import pytest
import torch
from tiny_families import FAMILIES, OWN, ids, image, make
from torch import nn
from torch.utils.checkpoint import checkpoint

from lineament import explain, models
from lineament.explain.recording import prepared, record
from lineament.explain.tape import Values, build
from lineament.explain.targets import selected
from lineament.graph import InDouble, capture
from lineament.nn import BUILDERS

ALL = [*FAMILIES, *OWN]
SLOW_SETS = ["epsilon", "gamma", "alpha-beta", "dynamic", "cp-lrp", "relp", "relp-ah", "gradient-x-input"]


def explained(name, dtype, rules="attnlrp", **options):
    model, inputs, target = make(name, dtype)
    with InDouble() if dtype == torch.float64 else nullcontext():
        return explain.relevance(model, inputs, target=target, rules=rules, **options)


@pytest.mark.parametrize("name", ALL)
def test_relevance_is_conserved(name):
    found = explained(name, torch.float64)
    assert found.ledger.unaccounted <= 1e-9, found.ledger.columns
    assert not found.ledger.open


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["attnlrp", *SLOW_SETS])
@pytest.mark.parametrize("name", ALL)
def test_relevance_is_conserved_by_every_rule_set(name, rules):
    assert explained(name, torch.float32, rules).ledger.unaccounted <= 1e-4
    assert explained(name, torch.float64, rules).ledger.unaccounted <= 1e-9


@pytest.mark.parametrize("kind", BUILDERS)
def test_students_are_explained_as_softmax_models_are(kind):
    options = {"options": {"log_scale": -1.0}} if kind == "hedgehog-window" else {}
    student = models.tiny("llama", kind, **options).double()
    with InDouble():
        found = explain.relevance(student, {"input_ids": ids(13)})
    assert found.rules == "attnlrp"
    assert found.ledger.unaccounted <= 1e-9


def test_a_model_of_vector_states_is_explained_through_its_loop():
    config = models.decoder_config("hgrn", vocab_size=61, width=16, layers=2, heads=2)
    model = models.DecoderForCausalLM(config).eval().double()
    with InDouble():
        found = explain.relevance(model, {"input_ids": ids(9)})
    assert found.ledger.unaccounted <= 1e-9


@pytest.mark.parametrize("softmax", ["propagate", "stop"])
@pytest.mark.parametrize("attention", ["half", "gradient", "values"])
def test_fused_attention_is_explained_as_its_products_are(attention, softmax):
    model, inputs, target = make("llama", torch.float64)
    rules = explain.Rules(attention=attention, softmax=softmax)
    found = []
    for form in ("sdpa", "eager"):
        model.set_attn_implementation(form)
        with InDouble():
            found.append(explain.relevance(model, inputs, target=target, rules=rules).features["input_ids"])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["vit", "resnet-own", "lstm", "whisper"])
def test_gradient_x_input_is_autograds(name):
    model, inputs, target = make(name, torch.float64)
    with InDouble():
        found = explain.relevance(model, inputs, target=target, rules="gradient-x-input")
        given = {k: x.clone().requires_grad_() if x.is_floating_point() else x for k, x in inputs.items()}
        scores, places, _ = selected(model(**given), target, given)
    key = next(k for k, x in given.items() if x.requires_grad)
    (slope,) = torch.autograd.grad(scores[places].sum(), given[key])
    torch.testing.assert_close(found.inputs[key], slope * inputs[key], rtol=1e-9, atol=1e-12)


def relu_net():
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(54, 8), nn.ReLU(), nn.Linear(8, 4)
    return nn.Sequential(*layers).double()


def test_epsilon_is_gradient_x_input_on_a_biased_relu_net_and_dynamic_is_not():
    model, x = relu_net(), image(8).double()
    found = {name: explain.relevance(model, x, target=2, rules=name).inputs["input"]
             for name in ("epsilon", "gradient-x-input", "dynamic")}  # fmt: skip
    torch.testing.assert_close(found["epsilon"], found["gradient-x-input"], rtol=1e-9, atol=1e-12)
    assert (found["dynamic"] - found["epsilon"]).abs().max() > 0.01 * found["epsilon"].abs().max()


def test_linear_rules_equal_their_definitions_written_out():
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3).double(), torch.randn(4, 5, dtype=torch.double)
    w, b, z = layer.weight, layer.bias, layer(x)
    model = nn.Sequential(layer)
    seed = torch.zeros_like(z)
    seed[:, 1] = z[:, 1]
    terms = x[:, None] * w  # [B, out, in]

    def shared(terms, bias, R):
        return (terms * (R / (terms.sum(-1) + bias))[..., None]).sum(1)

    up, down = terms.clamp(min=0), terms.clamp(max=0)
    positive, favour = z > 0, 0.5
    expected = {
        explain.Epsilon(): shared(terms, b, seed),
        explain.ZPlus(): shared(up, b.clamp(min=0), seed),
        explain.AlphaBeta(3, 2): shared(up, b.clamp(min=0), 3 * seed) - shared(down, b.clamp(max=0), 2 * seed),
        explain.Gamma(favour): shared(terms + favour * up, b + favour * b.clamp(min=0), seed * positive)
        + shared(terms + favour * down, b + favour * b.clamp(max=0), seed * ~positive),
        explain.Flat(): shared(torch.ones_like(terms), 0, seed),
        explain.WSquare(): shared(w.square().expand_as(terms), b.square(), seed),
        explain.ZBox(-3.0, 3.0): shared(terms + 3 * w.clamp(min=0) - 3 * w.clamp(max=0), 0, seed),
    }
    for rule, wanted in expected.items():
        found = explain.relevance(model, x, target=1, rules=explain.Rules(linear=rule)).inputs["input"]
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-9, atol=1e-12, msg=f"{rule}")


def test_z_plus_is_not_negative_for_signed_inputs():
    model, x = relu_net(), image(8).double()
    assert bool((explain.relevance(model, x, rules="z-plus").inputs["input"] >= 0).all())


@pytest.mark.parametrize("name", ["gpt2", "llama", "resnet-own", "mamba"])
def test_values_found_again_are_those_of_the_forward_pass(name):
    model, inputs, target = make(name)
    with prepared(model), capture(model, lambda name, module: bool(name), clone=True) as seen:
        recording = record(model, inputs, [lambda name, module: bool(name)])
        root = selected(recording.output, target, inputs)[0].grad_fn
        tape = build(root, recording)
        values, found = Values(tape), 0
        for tap, places in tape.places.items():
            calls = seen[tap]
            if len(places) == len(calls) == 1 and isinstance(calls[0], torch.Tensor):
                assert torch.equal(values.get(*places[0]), calls[0]), tap
                found += 1
    assert found > 10


def test_two_rows_together_are_two_rows_alone():
    model, inputs, _ = make("gemma2")
    both = explain.relevance(model, inputs, target=torch.tensor([5, 9])).inputs["input_ids"]
    for row, target in enumerate((5, 9)):
        alone = explain.relevance(model, {"input_ids": inputs["input_ids"][row : row + 1]}, target=target)
        torch.testing.assert_close(alone.inputs["input_ids"][0], both[row], rtol=1e-4, atol=1e-5)


def test_padding_gets_nothing_and_the_last_real_token_is_explained():
    model, inputs, _ = make("llama")
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, 4:] = 0
    found = explain.relevance(model, {**inputs, "attention_mask": mask}).inputs["input_ids"]
    assert bool(found.isfinite().all())
    assert bool((found[1, 4:] == 0).all())
    short = explain.relevance(model, {"input_ids": inputs["input_ids"][1:, :4]}).inputs["input_ids"]
    torch.testing.assert_close(found[1:, :4], short, rtol=1e-4, atol=1e-5)


def test_relevance_of_modules_and_of_chosen_channels():
    model, inputs, _ = make("vgg", torch.float64)
    found = explain.relevance(model, inputs, at=["5", "10:input"], target=1)
    assert found.at["5"].shape == (2, 16, 8, 8)
    assert found.at["10:input"].shape == (2, 144)
    parts = []
    for channels in (range(0, 7), range(7, 16)):
        rules = explain.Rules(channels={"5": list(channels)})
        part = explain.relevance(model, inputs, rules=rules, target=1)
        assert part.ledger.unaccounted < 1e-9
        parts.append(part.inputs["input"])
    torch.testing.assert_close(parts[0] + parts[1], found.inputs["input"], rtol=1e-9, atol=1e-12)


def test_rules_by_module_and_rules_of_ones_own():
    def all_to_the_largest(linear, R, ledger):
        at = linear.x.abs().argmax(-1, keepdim=True)
        return torch.zeros_like(linear.x).scatter(-1, at, R.sum(-1, keepdim=True))

    model, inputs, _ = make("vgg", torch.float64)
    rules = explain.Rules(linear=explain.ZPlus(), where={"13": all_to_the_largest, nn.Conv2d: explain.Gamma(0.1)})
    found = explain.relevance(model, inputs, rules=rules, at="13:input")
    assert int((found.at["13:input"] != 0).sum()) == 2  # one per row
    assert found.ledger.unaccounted < 1e-9
    with pytest.raises(ValueError, match="no module is called 'head'"):
        explain.relevance(model, inputs, rules=explain.Rules(where={"head": explain.ZPlus()}))


def test_batch_norm_folded_is_the_folded_model():
    model, inputs, _ = make("resnet-own", torch.float64)
    folded = make("resnet-own", torch.float64)[0]
    for parent in folded.modules():
        pairs = {"conv1": "bn1", "conv2": "bn2", "0": "1"}
        for conv, norm in pairs.items():
            layers = dict(parent.named_children())
            if isinstance(layers.get(norm), nn.BatchNorm2d):
                fused = nn.utils.fuse_conv_bn_eval(layers[conv], layers[norm])
                setattr(parent, conv, fused)
                setattr(parent, norm, nn.Identity())
    for rules in ("gamma", "alpha-beta", "epsilon-plus-flat"):
        a, b = (explain.relevance(m, inputs, rules=rules, target=1).inputs["input"] for m in (model, folded))
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_half_precision_sends_single_precision_messages():
    model, inputs, _ = make("llama", torch.bfloat16)
    found = explain.relevance(model, inputs).inputs["input_ids"]
    assert found.dtype == torch.float32
    exact = explain.relevance(*make("llama")[:2]).inputs["input_ids"]
    assert torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), 0) > 0.99


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.encoder, self.reentrant = make("encoder", torch.float64)[0], reentrant

    def forward(self, x):
        for layer in self.encoder.layers.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.encoder.head(x.mean(1))


def test_checkpointed_layers_are_explained_unless_reentrant():
    plain, inputs, _ = make("encoder", torch.float64)
    found = explain.relevance(Checkpointed(False).eval(), inputs).inputs["x"]
    torch.testing.assert_close(found, explain.relevance(plain, inputs).inputs["x"])
    with pytest.raises(ValueError, match="use_reentrant=False"):
        explain.relevance(Checkpointed(True).eval(), inputs)


def state(model):
    digest = hashlib.sha256()
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(name.encode() + x.detach().float().numpy().tobytes() + str((x.requires_grad, x.grad)).encode())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return digest.hexdigest(), hooks, [m.training for m in model.modules()], [id(p) for p in model.parameters()]


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


class Fails(nn.Module):
    def forward(self, x):
        raise KeyboardInterrupt


@pytest.mark.parametrize("last", [nn.Identity(), Fails()])
def test_the_model_comes_back_as_it_was(last):
    model = nn.Sequential(*make("vgg")[0], last).eval()
    model[0].weight.requires_grad_(False)
    before = state(model)
    with pytest.raises(KeyboardInterrupt) if isinstance(last, Fails) else nullcontext():
        explain.relevance(model, image(16))
    assert state(model) == before


class Wrong(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.layer, self.what = nn.Linear(4, 4), what

    def forward(self, x):
        y = self.layer(x)
        if self.what == "opaque":
            return Opaque.apply(y)
        if self.what == "slice":
            y[:, 0] = y[:, 1] * 2
            return y
        if self.what == "in place":
            z = y.exp()
            w = z * y
            z.add_(1)
            return w
        return y / 0 * 0


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("opaque", "no rule for 1 x Opaque in the model"),
        ("slice", "written in place"),
        ("in place", "changed in place"),
        ("nan", "the explained output is nan"),
    ],
)
def test_what_cannot_be_explained_is_named(what, message):
    with pytest.raises(ValueError, match=message):
        explain.relevance(Wrong(what), torch.ones(1, 4))


class Changed(nn.Module):
    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, input_ids):
        return self.model(input_ids=self.change(input_ids))


@pytest.mark.parametrize("rules", ["attnlrp", "occlusion"])
def test_token_numbers_are_found_where_the_model_copies_them(rules):
    model, inputs, _ = make("gpt2")
    wanted, found = (
        explain.relevance(each, inputs, rules=rules).inputs["input_ids"]
        for each in (model, Changed(model, torch.clone))
    )
    torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match=r"embeddings? of (the model receive )?input_ids"):
        explain.relevance(Changed(model, lambda ids: (ids + 1) % 61), inputs, rules=rules)


def test_an_operator_without_a_rule_may_be_let_through_with_an_open_ledger():
    found = explain.relevance(Wrong("opaque"), torch.ones(1, 4), rules=explain.Rules(unknown="vjp"))
    assert found.ledger.open == ["Opaque (in the model itself)"]


def test_the_module_where_numbers_end_is_named():
    model = make("vgg")[0]
    with torch.no_grad():
        model[5].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the first module whose output is not finite is '5'"):
        explain.relevance(model, image(16), target=1)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (9, "target 9 is out of range; the output has classes 0 to 4"),
        (torch.tensor([1, 2, 3]), r"target has shape \[3\]"),
        ((3, 1), "no position"),
        (lambda output: output, "must return a scalar"),
    ],
)
def test_targets_out_of_range_are_refused(target, message):
    with pytest.raises(ValueError, match=message):
        explain.relevance(make("vgg")[0], image(16), target=target)


def test_wrong_inputs_are_refused():
    model = make("vgg")[0]
    with pytest.raises(ValueError, match="to have 3 channels, but got 1"):
        explain.relevance(model, torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match="'12' drops out in training mode"):
        explain.relevance(model.train(), image(16))
    with pytest.raises(ValueError, match="normalises by the batch"):
        explain.relevance(make("resnet-own")[0].train(), image(16))
    with pytest.raises(ValueError, match="the text has 40 tokens; the model reads 32"):
        explain.relevance(make("llama")[0], {"input_ids": ids(40)})
    with pytest.raises(ValueError, match="Did you mean 'epsilon'"):
        explain.relevance(model.eval(), image(16), rules="epsilom")
    with pytest.raises(ValueError, match="compare with no baseline"):
        explain.relevance(model, image(16), baseline=0.0)
    with pytest.raises(ValueError, match="channels 0 to 15; 16 was asked for"):
        explain.relevance(model, image(16), rules=explain.Rules(channels={"5": [16]}))


def test_coverage_lists_operators_with_their_rules():
    rows = {row["operator"]: row for row in explain.coverage(*make("llama")[:2])}
    assert rows["Mm"]["rule"] == "linear"
    assert all(row["covered"] for row in rows.values())
    opaque = {row["operator"]: row["covered"] for row in explain.coverage(Wrong("opaque"), torch.ones(1, 4))}
    assert opaque == {"Opaque": False, "Addmm": True}


def test_a_target_function_may_compute_with_the_output():
    model, inputs, _ = make("vgg", torch.float64)
    shift = torch.tensor([0.5, 2.0], dtype=torch.float64)
    found = explain.relevance(model, inputs, target=lambda y: (y[:, 1] - y[:, 2] - shift) / (shift * 3))
    assert found.ledger.unaccounted < 1e-9
    assert found.ledger.columns["constants"] == pytest.approx(-2 / 3)
