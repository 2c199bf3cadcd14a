"""Codes of the far part: given out by damage within a share of the cache, begun at clusters, learned query by query."""

import pytest
import torch
from convert_helpers import tiny_llama

from lineament._base.errors import InputError
from lineament.convert.inherit import calibrate, mixer_configs
from lineament.convert.parts import converted, parts
from lineament.convert.plan import Plan
from lineament.convert.select import DamageTable, allotted_codes
from lineament.convert.transfer import (
    ANSWER_WEIGHT,
    attention_kl,
    pool_batches,
    pooled_layers,
    scored_rows,
    transfer,
    transfer_loss,
)
from lineament.models import build_student
from lineament.tasks.cost import cache_bytes

PRODUCT = {"map": "product", "codes": 4}
SHAPE = {"key_heads": 2, "key_width": 64, "value_width": 64}


def table(worth):
    return DamageTable(teacher="", window=8, sinks=2, perplexity=worth, kl=worth, retrieval=worth)


def plan(**changes):
    return Plan(**{"window": 8, "sinks": 2, "keep": "none", "precision": "fp32", "options": PRODUCT, **changes})


def student_and_pools(own, length=96, rows=3):
    teacher = tiny_llama(layers=2)
    g = torch.Generator().manual_seed(0)
    windows = [torch.randint(3, 60, (1, length), generator=g) for _ in range(rows)]
    student = build_student(teacher, mixer_configs(own, parts(teacher).shapes, {})).eval()
    found = parts(teacher)
    pools = dict(pooled_layers(teacher, found.layers, found.attentions, windows, full_heads={}, precision="fp32"))
    return teacher, student, {m.layer: m.filling for m in converted(student).values()}, pools, windows


def test_heads_worth_more_get_more_codes_within_the_share():
    shapes = dict.fromkeys(range(3), SHAPE)
    worth = table([[0.01, 0.01], [0.01, 8.0], [1.0, 1.0]])
    codes = allotted_codes(plan(state_share=0.02), shapes, {}, worth)
    assert max(codes[0]) <= min(codes[2])
    assert max(codes[2]) < codes[1][1]
    assert codes[1][0] < codes[1][1]  # heads of one layer need not be alike
    numbers = sum(c * c * 65 + 10 * (128 + 2 * c) for heads in codes.values() for c in heads)
    assert numbers <= 0.02 * 3 * 2 * 32768 * 128


def test_a_head_that_stays_softmax_takes_its_share_first():
    shapes = dict.fromkeys(range(3), SHAPE)
    worth = table([[1.0, 1.0]] * 3)
    with pytest.raises(InputError, match="keep fewer heads or raise the share"):
        allotted_codes(plan(state_share=0.03), shapes, {0: (1,)}, worth)
    assert allotted_codes(plan(state_share=0.55), shapes, {0: (1,), 2: (0, 1)}, worth).keys() == {0, 1}


def test_a_state_share_needs_a_product_map():
    with pytest.raises(InputError, match="state_share gives out the codes of a product map"):
        Plan(state_share=0.02)


@torch.no_grad()
def test_codes_begin_closer_to_softmax_than_nothing_far():
    own = plan(options={"map": "product", "codes": 12})
    _, _, fillings, pools, _ = student_and_pools(own)
    for layer, pool in pools.items():
        assert calibrate(fillings[layer], pool, window=8, sinks=2)["codes"] == 12
        begun = attention_kl(fillings[layer], pool.q[0], pool.k[0], pool.x[0])
        fillings[layer].log_scale.fill_(-60.0)  # nothing far
        assert begun < 0.5 * attention_kl(fillings[layer], pool.q[0], pool.k[0], pool.x[0])


def test_dense_kl_equals_that_of_weights_read_off_by_the_identity():
    _, _, fillings, pools, _ = student_and_pools(plan())
    filling, pool = fillings[0], pools[0]
    calibrate(filling, pool, window=8, sinks=2)
    dense = attention_kl(filling, pool.q[0], pool.k[0], pool.x[0])
    masked = type("Masked", (torch.nn.Module,), {"forward": lambda self, *a, **b: filling(*a, **b)})()
    torch.testing.assert_close(dense, attention_kl(masked, pool.q[0], pool.k[0], pool.x[0]), rtol=1e-4, atol=1e-5)


def test_queries_that_look_for_an_answer_are_always_compared():
    answers = torch.zeros(2, 50, dtype=torch.bool)
    answers[0, 40:43] = True
    rows, weight = scored_rows(plan(transfer_positions=10), answers, step=3)
    assert len(rows) == 10
    assert rows.min() >= 8
    assert {39, 40, 41} <= set(rows.tolist())
    assert weight[0, [rows.tolist().index(i) for i in (39, 40, 41)]].tolist() == [ANSWER_WEIGHT] * 3
    assert weight[1].eq(1).all()
    assert torch.equal(scored_rows(plan(transfer_positions=10), answers, step=3)[0], rows)


def test_sinks_count_as_far_in_every_so_many_steps_of_a_length():
    own = plan(transfer_loss="attention-kl", transfer_far_sinks=3, transfer_lengths=(48, 96), options=PRODUCT)
    _, _, fillings, pools, _ = student_and_pools(own)
    calibrate(fillings[0], pools[0], window=8, sinks=2, sink_code=True)
    batches = pool_batches(pools[0], own)
    assert [step for step in range(12) if "sinks" in batches(step)] == [4, 5, 10, 11]
    loss, batch = transfer_loss("attention-kl"), batches(4)
    with torch.no_grad():
        far = loss(fillings[0], batch)[0]
        near = loss(fillings[0], {name: one for name, one in batch.items() if name != "sinks"})[0]
    assert far > near


def test_only_codes_learn_far_sinks():
    assert plan(transfer_far_sinks=4, options=PRODUCT, transfer_loss="both").far_sinks == 4
    assert plan(transfer_far_sinks=4, options=PRODUCT, transfer_loss="output-mse").far_sinks == 0
    for other in ({}, {"map": "elu"}):
        own = plan(transfer_loss="attention-kl", transfer_far_sinks=1, transfer_lengths=(48,), options=other)
        _, _, _, pools, _ = student_and_pools(own)
        assert "sinks" not in pool_batches(pools[0], own)(0)


def test_transfer_brings_the_weights_to_the_teacher_s(tmp_path):
    own = plan(
        transfer_loss="attention-kl", transfer_steps=100, transfer_lengths=(96,), transfer_tokens=96, transfer_lr=3e-2
    )
    teacher, _, fillings, pools, windows = student_and_pools(own)
    for layer, pool in pools.items():
        calibrate(fillings[layer], pool, window=8, sinks=2)
    before = {n: float(attention_kl(fillings[n], p.q[0], p.k[0], p.x[0]).detach()) for n, p in pools.items()}
    found = parts(teacher)
    answers = [torch.zeros_like(one, dtype=torch.bool) for one in windows]
    transfer(teacher, found.layers, found.attentions, fillings, windows, own, tmp_path, full_heads={},
             precision="fp32", answers=answers)  # fmt: skip
    after = {n: float(attention_kl(fillings[n], p.q[0], p.k[0], p.x[0]).detach()) for n, p in pools.items()}
    assert all(after[n] < 0.7 * before[n] for n in before), (before, after)


def test_the_cache_holds_factors_not_products():
    _, student, _, _, _ = student_and_pools(plan(options={"map": "product", "codes": 16}))
    heads, width, slots = 2, student.config.head_dim, 10
    state = 256 * (width + 1) + slots * (2 * width + 32)
    assert cache_bytes(student, 500) <= 2 * heads * state * 4 + 2 * 8 * heads
