"""Fast and slow adapters: what is averaged, what is replayed, what is measured."""

import json

import peft
import pytest
import torch
from scipy.stats import chi2
from torch import nn

from lineament import models, train, weights
from lineament._base.seeds import generator, seeded

SCALE = 32 / 4


def lora(*modules, **changes):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 32, "target_modules": list(modules), **changes})


def learner(decay=0.9, seed=0, dtype=torch.float64, **changes):
    """A small classifier whose adapters are away from zero."""
    with seeded(seed):
        net = weights.FastSlow(models.dense_classifier((6, 8, 3)).to(dtype), lora("1", "3", **changes), decay=decay)
        net.load_({name: torch.randn_like(x) / 3 for name, x in net.point().items()})
    return net


def rows(n=12, seed=1, dtype=torch.float64):
    draw = generator(seed)
    return torch.randn(n, 6, generator=draw, dtype=dtype), torch.randint(3, (n,), generator=draw)


def by_hand(net, x, adapter):
    """The first layer's outputs and the logits of the classifier, written out with W + s B A."""
    point, base, seen = net.point(adapter), net.net.state_dict(), []
    for layer in ("1", "3"):
        at = f"base_model.model.{layer}"
        a, b = (point[f"{at}.lora_{k}.default.weight"] for k in "AB")
        w = base[f"{at}.base_layer.weight"] + SCALE * b @ a
        seen.append(x @ w.T + base[f"{at}.base_layer.bias"])
        x = seen[-1].relu()
    return seen


CONFIG = train.FitConfig(steps=5, lr=1e-2, schedule="constant", seed=3)


def lessons(count=3, n=24):
    def lesson(i):
        x, y = rows(n, seed=10 + i, dtype=torch.float32)
        return weights.Lesson(f"task {i}", (x.roll(i, 1), y), (x, y))

    return [lesson(i) for i in range(count)]


def accuracy(model, test):
    return float((model(test[0]).argmax(-1) == test[1]).double().mean())


def taught(method="i-lora", decay=0.9, config=CONFIG, **options):
    with seeded(5):
        net = weights.FastSlow(models.dense_classifier((6, 8, 3)), lora("1", "3"), decay=decay)
    options = {"batch": 8, "memory": 10, "hidden": "1", **options}
    return net, weights.continual(net, lessons(), config, accuracy, method=method, **options)


def test_both_adapters_compute_the_base_plus_their_product():
    net, (x, _) = learner(), rows()
    net.load_({name: 2 * x for name, x in net.point().items()}, "slow")
    for adapter in weights.ADAPTERS:
        torch.testing.assert_close(net(x, adapter=adapter), by_hand(net, x, adapter)[1])
        torch.testing.assert_close(net.plain(adapter)(x), net(x, adapter=adapter))


def test_the_slow_adapter_is_the_moving_average_of_the_fast_one():
    net = learner(decay=0.75)
    expected = net.point("slow")
    for step in range(3):
        net.load_({name: torch.full_like(x, step) for name, x in net.point().items()})
        net.average_()
        expected = {name: 0.75 * x + 0.25 * step for name, x in expected.items()}
    torch.testing.assert_close(net.point("slow"), expected)


def test_without_memory_slow_is_fast_and_with_all_memory_it_stays():
    for decay, same in ((0.0, "fast"), (1.0, "slow")):
        net = learner(decay=decay)
        kept = net.point(same)
        net.average_()
        assert all(torch.equal(x, kept[name]) for name, x in net.point("slow").items())


def test_small_steps_are_not_lost_when_the_model_is_in_bf16():
    net = learner(decay=0.999, dtype=torch.bfloat16)
    net.load_({name: torch.ones_like(x) for name, x in net.point().items()}, "slow")
    net.load_({name: torch.full_like(x, 1.5) for name, x in net.point().items()})
    for _ in range(100):
        net.average_()
    assert all(
        x.dtype == torch.float32 and torch.allclose(x, x.new_tensor(1.5 - 0.5 * 0.999**100), atol=1e-5)
        for x in net.point("slow").values()
    )


def test_the_loss_is_the_published_one_and_its_gradient_reaches_the_fast_adapter_only():
    net, now, then = learner().eval(), rows(), rows(7, seed=2)
    net.load_({name: x + 0.1 for name, x in net.point().items()}, "slow")
    for target in ("slow", "larger"):
        loss = weights.replay_loss(net, consistency=0.7, hidden="1", target=target)
        value, _ = loss(net, (now, then))
        fast, logits = by_hand(net, then[0], "fast")
        slow, _ = by_hand(net, then[0], "slow")
        goal = slow if target == "slow" else torch.maximum(fast, slow)
        entropy = nn.functional.cross_entropy
        expected = (entropy(by_hand(net, now[0], "fast")[1], now[1]) + entropy(logits, then[1])) / 2
        torch.testing.assert_close(value, expected + 0.7 * (fast - goal).square().mean())
        value.backward()
        assert {name for name, p in net.named_parameters() if p.grad is not None} == {f"net.{n}" for n in net.names}
        assert all(x.grad is None for x in net.buffers())


def test_the_gradient_of_the_consistency_is_that_of_finite_differences():
    net, now, then = learner().eval(), rows(), rows(7, seed=2)
    net.load_({name: x + 0.1 for name, x in net.point().items()}, "slow")
    loss = weights.replay_loss(net, consistency=3.0, hidden="1")
    loss(net, (now, then))[0].backward()
    name = net.names[0]
    p = net.net.get_parameter(name)
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            p[0, 0] += sign * 1e-6
            values.append(float(loss(net, (now, then))[0]))
            p[0, 0] -= sign * 1e-6
    assert p.grad[0, 0].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_consistency_is_zero_right_after_copying_even_with_dropout_switched_off_for_the_slow_one():
    net, batch = learner(decay=0.0), (rows(), rows(7, seed=2))
    net.average_()
    loss = weights.replay_loss(net.eval(), hidden="1")
    assert loss(net, batch)[1]["consistency"] == 0
    noisy = learner(decay=0.0, lora_dropout=0.5).train()
    weights.replay_loss(noisy, hidden="1")(noisy, batch)
    assert all(module.training for module in noisy.modules())


def test_hidden_positions_of_an_attention_mask_do_not_count():
    teacher = models.tiny_teacher("llama")
    net = weights.FastSlow(teacher, lora("q_proj", "v_proj")).eval()
    net.load_({name: x + 0.05 for name, x in net.point().items()})
    ids = torch.randint(1, 61, (2, 7), generator=generator(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 2] = -100  # the padding before it would have to predict it
    loss = weights.replay_loss(net, hidden="model.norm")
    found = []
    for filler in (0, 5):  # left padding by whatever token
        batch = {"input_ids": ids.where(mask == 1, filler), "attention_mask": mask, "labels": labels}
        found.append(loss(net, (batch, batch)))
    assert found[0][1]["consistency"] > 0
    torch.testing.assert_close(found[0][0], found[1][0])


def test_replay_is_i_lora_without_consistency_step_for_step():
    nets = [taught("replay")[0], taught("i-lora", consistency=0.0, hidden=None)[0], taught("i-lora")[0]]
    points = [net.point() for net in nets]
    assert all(torch.equal(points[0][name], points[1][name]) for name in points[0])
    assert any(not torch.equal(points[0][name], points[2][name]) for name in points[0])


def test_the_base_is_left_alone_and_the_slow_adapter_never_learns():
    net, stream = taught()
    with seeded(5):
        base = models.dense_classifier((6, 8, 3)).state_dict()
    held = net.net.state_dict()
    for name, x in base.items():
        layer, kind = name.split(".")
        assert torch.equal(held[f"base_model.model.{layer}.base_layer.{kind}"], x)
    with seeded(5):
        still = weights.FastSlow(models.dense_classifier((6, 8, 3)), lora("1", "3"), decay=1.0)
    start = still.point("slow")
    weights.continual(still, lessons(), CONFIG, accuracy, batch=8, memory=10, hidden="1")
    assert all(torch.equal(x, start[name]) for name, x in still.point("slow").items())
    assert len(stream.points["slow"]) == 3


def test_an_interrupted_stream_goes_on_to_the_same_bits(tmp_path):
    whole, stream = taught(out=tmp_path / "whole")

    def stop(model, test, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 7:  # after the second task
            raise KeyboardInterrupt
        return accuracy(model, test)

    with seeded(5):
        net = weights.FastSlow(models.dense_classifier((6, 8, 3)), lora("1", "3"), decay=0.9)
    options = {"batch": 8, "memory": 10, "hidden": "1", "out": tmp_path / "cut"}
    with pytest.raises(KeyboardInterrupt):
        weights.continual(net, lessons(), CONFIG, stop, **options)
    again, resumed = taught(out=tmp_path / "cut")
    assert resumed.scores == stream.scores
    for adapter in weights.ADAPTERS:
        assert all(torch.equal(x, again.point(adapter)[name]) for name, x in whole.point(adapter).items())


def test_the_reservoir_holds_every_row_equally_often():
    size, count, trials = 5, 20, 4000
    held = torch.zeros(count)
    for seed in range(trials):
        memory = weights.Reservoir(size, seed=seed)
        for part in torch.arange(count).split((7, 1, 12)):
            memory.add(part)
        held[memory.rows] += 1
    expected = trials * size / count
    # inclusions of one trial are dependent, (N - 1) / (N - n) makes the statistic chi-square
    statistic = float(((held - expected) ** 2 / expected).sum()) * (count - 1) / (count - size)
    assert held.sum() == trials * size
    assert statistic < chi2.ppf(0.999, count - 1)


def test_the_reservoir_keeps_rows_whole_and_refuses_others():
    memory = weights.Reservoir(50, seed=1)
    memory.add({"x": torch.arange(200)[:, None].expand(-1, 3), "y": torch.arange(200)})
    drawn = memory.draw(30, seed=4)
    assert torch.equal(drawn["x"], drawn["y"][:, None].expand(-1, 3))
    assert torch.equal(drawn["y"], memory.draw(30, seed=4)["y"])
    with pytest.raises(ValueError, match="pad all to one length"):
        memory.add({"x": torch.zeros(2, 4), "y": torch.zeros(2)})
    with pytest.raises(ValueError, match="the memory is empty"):
        weights.Reservoir(3).draw(1, seed=0)


@pytest.mark.parametrize("form", ["factors", "product"])
def test_the_line_interpolates_what_its_form_says(form):
    net, data = learner(seed=0), rows(40)
    ends = [net.point(), {name: -0.5 * x for name, x in net.point().items()}]
    found = weights.line(net, *ends, {"old": [data]}, form=form, points=5)
    expected = []
    for t in found.t:
        if form == "factors":
            net.load_({name: (1 - t) * x + t * ends[1][name] for name, x in ends[0].items()})
            logits = by_hand(net, data[0], "fast")[1]
        else:
            plain = [net.plain(end) for end in ends]
            mixed = {n: (1 - t) * a + t * plain[1].state_dict()[n] for n, a in plain[0].state_dict().items()}
            logits = torch.func.functional_call(plain[0], mixed, (data[0],))
        expected.append(float(nn.functional.cross_entropy(logits, data[1])))
    assert found.values() == pytest.approx(expected)


def test_the_forms_differ_in_the_middle_only():
    net, data = learner(seed=0), rows(40)
    ends = [net.point(), {name: -0.5 * x for name, x in net.point().items()}]
    one, other = (weights.line(net, *ends, [rows(40)], form=form).values() for form in ("factors", "product"))
    assert (one[0], one[-1]) == pytest.approx((other[0], other[-1]))
    assert one[5] != pytest.approx(other[5])
    assert len(data[0]) == 40


def test_scores_follow_their_definitions():
    a = [[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.75, 0.4, 0.9]]
    assert weights.forgetting(a) == pytest.approx(((0.9 - 0.75) + (0.8 - 0.4)) / 2)
    assert weights.backward_transfer(a) == pytest.approx(((0.75 - 0.9) + (0.4 - 0.8)) / 2)
    stream = weights.Stream(("a", "b", "c"), {"fast": a, "slow": a}, {})
    assert stream.average("slow") == pytest.approx((0.75 + 0.4 + 0.9) / 3)
    assert stream.forgetting() == -stream.backward_transfer()
    assert weights.forgetting([[0.9]]) == 0


def test_adapters_are_saved_as_peft_folders_that_points_and_peft_open(tmp_path):
    teacher = models.tiny_teacher("llama")
    teacher.save_pretrained(tmp_path / "base")
    net = weights.FastSlow(teacher, lora("q_proj", "v_proj")).eval()
    net.load_({name: x + 0.1 for name, x in net.point().items()})
    net.load_({name: x - 0.1 for name, x in net.point().items()}, "slow")
    before = net.point()
    net.save(tmp_path / "adapters")
    assert all(torch.equal(x, net.point()[name]) for name, x in before.items())
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    for adapter in weights.ADAPTERS:
        folder = tmp_path / "adapters" / adapter
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
        opened = peft.PeftModel.from_pretrained(models.tiny_teacher("llama"), str(folder))
        torch.testing.assert_close(opened(input_ids=ids).logits, net(input_ids=ids, adapter=adapter).logits)
        merged = weights.Point.open(folder, base=tmp_path / "base", any_base=True)
        other = models.tiny_teacher("llama")
        merged.load_into(other)
        torch.testing.assert_close(other(input_ids=ids).logits, net(input_ids=ids, adapter=adapter).logits)
    with net.using("slow") as inner:
        assert inner.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (1, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: learner(decay=1.5), "decay is 1.5; expected from 0 to 1"),
        (lambda: weights.FastSlow(nn.Linear(2, 2), lora("q_proj")), "peft can't adapt this Linear"),
        (lambda: learner()(rows()[0], adapter="slo"), "unknown adapter 'slo'"),
        (lambda: learner().load_({}), "expected one that `point` of this learner gave"),
        (lambda: weights.replay_loss(learner()), "give hidden, or consistency=0"),
        (lambda: weights.replay_loss(learner(), hidden="1", target="max"), "unknown target 'max'"),
        (lambda: weights.line(learner(), {}, {}, [], form="sum"), "unknown form of the line 'sum'"),
        (lambda: taught("ewc"), "unknown method 'ewc'"),
        (lambda: taught(batch=100), "a batch of 100 rows was asked of 24"),
        (lambda: weights.continual(learner(), [], CONFIG, accuracy), "there are no tasks"),
        (lambda: weights.Reservoir(0), "a memory of 0 rows"),
        (lambda: weights.forgetting([[1.0, 2.0]]), "expected one row and column per task"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
