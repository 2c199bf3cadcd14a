"""Damage is measured without touching the model, and the keep rules choose by it."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from convert_helpers import tiny_llama

from lineament._base.errors import InputError
from lineament.convert.inspect import ModelInfo, kept_count
from lineament.convert.measure import estimate_damage, measure_damage, with_slopes
from lineament.convert.plan import Plan
from lineament.convert.probe import limit_heads, mix_heads, probing
from lineament.convert.select import DamageTable, answer_samples, correlation, kept_heads, text_sample

WINDOW, SINKS = 8, 2


def parts(model):
    layers = model.model.layers
    return [f"model.layers.{i}" for i in range(len(layers))], [layer.self_attn for layer in layers]


def ids(rows=2, length=48, seed=0):
    return torch.randint(3, 200, (rows, length), generator=torch.Generator().manual_seed(seed))


def samples():
    answer = torch.zeros(3, 40, dtype=torch.bool)
    answer[:, -3:] = True
    return [text_sample(ids(), first=10, every=2), *answer_samples(ids(3, 40, seed=1), answer, batch=2)]


@pytest.fixture(scope="module")
def teacher():
    return tiny_llama(layers=3)


def damage(model, method=measure_damage):
    return method(model, *parts(model), samples(), key_heads=2, window=WINDOW, sinks=SINKS, teacher="x")


@torch.no_grad()
def test_limited_attention_is_softmax_on_window_and_sinks(teacher):
    _, attentions = parts(teacher)
    x = ids()
    with probing(attentions, limit_heads({1: (0, 1)}, window=WINDOW, sinks=SINKS)):
        probed = teacher(input_ids=x).logits
    T = x.shape[1]
    n = torch.arange(T)
    mask = (n <= n[:, None]) & ((n > n[:, None] - WINDOW) | (n < SINKS))
    old = attentions[1].forward
    attentions[1].forward = lambda *a, attention_mask=None, **k: old(*a, attention_mask=mask[None, None], **k)
    try:
        masked = teacher(input_ids=x).logits
    finally:
        del attentions[1].forward
    torch.testing.assert_close(probed, masked, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_window_as_long_as_the_text_changes_nothing(teacher):
    _, attentions = parts(teacher)
    whole = teacher(input_ids=ids()).logits
    with probing(attentions, limit_heads(dict.fromkeys(range(3), (0, 1)), window=64, sinks=0)):
        torch.testing.assert_close(teacher(input_ids=ids()).logits, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [measure_damage, estimate_damage])
def test_the_model_comes_back_bit_identical(method):
    model = tiny_llama(layers=2)
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    logits = model(input_ids=ids()).logits
    damage(model, method)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model(input_ids=ids()).logits, logits)
    assert model.config._attn_implementation == "sdpa"
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())


def test_the_model_comes_back_after_an_error(teacher):
    _, attentions = parts(teacher)

    def fail(call):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), probing(attentions, fail):
        teacher(input_ids=ids())
    assert teacher.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in attentions)


def test_damage_equals_the_plain_way(teacher):
    """The prefix reuse gives what running the whole limited model gives."""
    table = damage(teacher)
    _, attentions = parts(teacher)
    text = samples()[0]

    def loss():
        with torch.no_grad():
            logs = teacher(input_ids=text.ids).logits.float().log_softmax(-1)
        return -logs[text.rows, text.positions - 1].gather(-1, text.ids[text.rows, text.positions][:, None]).mean()

    whole = loss()
    for layer, head in ((0, 1), (2, 0)):
        with probing(attentions, limit_heads({layer: (head,)}, window=WINDOW, sinks=SINKS)):
            assert abs(float(loss() - whole) - table.perplexity[layer][head]) < 1e-5
    assert all(x >= -1e-6 for row in table.kl for x in row)


def test_the_estimate_knows_the_worst_heads(teacher):
    """One backward ranks the heads much as the measurement does."""
    estimate, measured = damage(teacher, estimate_damage), damage(teacher)
    assert estimate.about["method"] == "gates"
    found = correlation(measured, estimate)
    assert set(found) == {"kl", "retrieval", "worst_quarter_shared"}
    assert found["kl"] > 0


def test_the_estimate_is_a_slope(teacher):
    """The retrieval column equals a finite difference along one head's gate."""
    layer, head, step = 1, 0, 1e-3
    answers = samples()[1:]
    estimate = estimate_damage(teacher, *parts(teacher), answers, key_heads=2, window=WINDOW, sinks=SINKS, teacher="x")

    def loss(gate):
        def handle(call):
            full = call.ordinary()
            if call.layer != layer:
                return full
            limited = mix_heads(full, call.limited(WINDOW, SINKS), (head,), 2)
            return full + gate * (limited - full)

        total, count = 0.0, 0
        for one in answers:
            with torch.no_grad(), probing(parts(teacher)[1], handle):
                logs = teacher(input_ids=one.ids).logits.double().log_softmax(-1)
            picked = logs[one.rows, one.positions - 1].gather(-1, one.ids[one.rows, one.positions][:, None])
            total, count = total - float(picked.sum()), count + len(one.rows)
        return total / count

    slope = (loss(step) - loss(-step)) / (2 * step)
    assert estimate.retrieval[layer][head] == pytest.approx(slope, abs=2e-3, rel=0.02)


def test_layers_that_stay_as_they_are_are_never_limited(teacher):
    """Sliding layers keep their window in the student, so neither a head's damage nor its slope may count theirs."""
    seen = []
    whole = damage(teacher)
    some = measure_damage(
        teacher, *parts(teacher), samples(), key_heads=2, window=WINDOW, sinks=SINKS, teacher="x", free=(1,),
        on_progress=lambda done, all_: seen.append((done, all_)),
    )  # fmt: skip
    for name in ("perplexity", "kl", "retrieval"):
        before, found = getattr(whole, name), getattr(some, name)
        assert (found[0], found[1], found[2]) == ([0.0, 0.0], before[1], [0.0, 0.0])
    assert seen == [(i, 2 * len(samples())) for i in range(1, 2 * len(samples()) + 1)]

    answers, step, g = samples()[1:], 1e-3, 0.5
    slopes = with_slopes(some, teacher, *parts(teacher), answers, key_heads=2, free=(1,)).slopes[str(g)]["retrieval"]

    def loss(gates):
        def handle(call):
            full = call.ordinary()
            if call.layer != 1:
                return full
            groups = full.shape[2] // 2
            return full + gates.repeat_interleave(groups)[:, None] * (call.limited(WINDOW, SINKS) - full)

        logs = []
        for one in answers:
            with torch.no_grad(), probing(parts(teacher)[1], handle):
                found = teacher(input_ids=one.ids).logits.double().log_softmax(-1)
            logs.append(found[one.rows, one.positions - 1].gather(-1, one.ids[one.rows, one.positions][:, None]))
        return -float(torch.cat(logs).mean())

    for head in (0, 1):
        up, down = (torch.full((2,), g) for _ in range(2))
        up[head], down[head] = g + step, g - step
        assert slopes[1][head] == pytest.approx((loss(up) - loss(down)) / (2 * step), abs=2e-3, rel=0.02)
    assert slopes[0] == slopes[2] == [0.0, 0.0]


def table(rows):
    return DamageTable(teacher="t", window=8, sinks=2, perplexity=rows, kl=rows, retrieval=[[0.0] * 2] * len(rows))


def test_keep_rules_choose():
    scores = table([[0.1, 0.0], [0.0, 0.9], [0.2, 0.3], [0.0, 0.0]])
    assert kept_heads(Plan(keep="none"), 4, 2) == {}
    assert kept_heads(Plan(keep="all"), 2, 2) == {0: (0, 1), 1: (0, 1)}
    assert kept_heads(Plan(keep="every:2"), 4, 2) == {1: (0, 1), 3: (0, 1)}
    assert kept_heads(Plan(keep="0,2"), 4, 2) == {0: (0, 1), 2: (0, 1)}
    assert kept_heads(Plan(keep="auto:1"), 4, 2, scores) == {1: (0, 1)}
    assert kept_heads(Plan(keep="auto-heads:0.4"), 4, 2, scores) == {1: (1,), 2: (0, 1)}
    assert sum(map(len, kept_heads(Plan(keep="auto-heads:0.25"), 4, 2, scores).values())) == 2
    assert kept_heads(Plan(keep="auto-heads:0.1"), 4, 2, scores) == {1: (1,)}  # at least one
    assert kept_heads(Plan(keep="auto-heads:0"), 4, 2, scores) == {}


def test_keep_rules_count_only_layers_that_may_be_converted():
    worth = [[1.0] if i % 6 < 5 else [0.1 * i] for i in range(18)]  # as in Gemma 3: layers 5, 11 and 17 don't slide
    scores = DamageTable(teacher="t", window=8, sinks=2, perplexity=worth, kl=worth, retrieval=worth)
    sliding = [i for i in range(18) if i % 6 < 5]
    info = ModelInfo(
        name="m", kind="gemma3_text", layers=18, heads=4, key_heads=1, head_width=8, width=32, vocabulary=99,
        kept_layers=tuple(sliding),
    )  # fmt: skip
    for keep, expected in {
        "auto-heads:0.25": [17], "auto-heads:0.7": [11, 17], "auto:1": [17], "all": [5, 11, 17], "every:12": [11],
        "0,5": [5], "none": [],
    }.items():  # fmt: skip
        plan = Plan(keep=keep)
        assert list(kept_heads(plan, 18, 1, scores, sliding=sliding)) == expected, keep
        assert kept_count(info, plan) == len(expected), keep
    with pytest.raises(InputError, match="the model has 3 to convert"):
        kept_heads(Plan(keep="auto:4"), 18, 1, scores, sliding=sliding)


def test_keep_rules_refuse():
    with pytest.raises(InputError, match="names layer 7; the model has layers 0 to 3"):
        kept_heads(Plan(keep="0,7"), 4, 2)
    with pytest.raises(InputError, match="asks for 9 layers"):
        kept_heads(Plan(keep="auto:9"), 4, 2)
    with pytest.raises(InputError, match="needs a damage table"):
        kept_heads(Plan(keep="auto-heads:0.5"), 4, 2)


def test_both_kinds_of_damage_have_a_voice():
    one = DamageTable(teacher="t", window=8, sinks=2, perplexity=[[9.0, 0.0]], kl=[[3.0, 1.0]], retrieval=[[-5.0, 2.0]])
    assert one.scores() == [[0.75, 1.25]]


def test_slopes_have_a_voice(teacher):
    plain = damage(teacher)
    full = with_slopes(plain, teacher, *parts(teacher), samples(), key_heads=2)
    assert set(full.slopes) == {"0.5", "1.0"}
    assert full.scores() != plain.scores()
    assert sum(map(sum, full.scores())) == pytest.approx(2.0)
    assert DamageTable.from_json(full.to_json()) == full


def test_the_figure_leaves_blank_what_was_not_measured(monkeypatch):
    drawn = []
    monkeypatch.setattr("lineament.report.figures.heatmap", lambda values, **_: drawn.append(values) or b"")
    some = replace(table([[0.0, 0.0], [1.0, 3.0]]), about={"layers": [1]})
    some.figure()
    assert drawn == [[[pytest.approx(math.nan, nan_ok=True), 0.25], [pytest.approx(math.nan, nan_ok=True), 0.75]]]


def test_a_table_survives_its_file(tmp_path):
    one = table([[0.1, 0.2]])
    one.save(tmp_path / "damage.json")
    assert DamageTable.load(tmp_path / "damage.json") == one
    with pytest.raises(InputError, match="lacks kl"):
        DamageTable.from_json({k: v for k, v in one.to_json().items() if k != "kl"})
