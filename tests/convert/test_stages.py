"""Single stages: the no-op start, transfer on the teacher's activations, what is drawn and scored."""

import pytest
import torch
from convert_helpers import text_folder, tiny_llama, tiny_plan, tiny_tokenizer

from lineament._base.errors import InputError
from lineament.convert.distil import Teacher, batches, learners, merged, scored_positions
from lineament.convert.evaluate import state_off
from lineament.convert.folders import look
from lineament.convert.inherit import calibrate, mixer_configs
from lineament.convert.parts import converted, lora_targets, parts, teacher_digest
from lineament.convert.plan import Plan
from lineament.convert.positions import jumped_positions, model_inputs
from lineament.convert.probe import limit_heads, probing
from lineament.convert.text import Corpus, load_documents, make_corpus
from lineament.convert.transfer import attention_kl, pooled_layers, relative_error, transfer
from lineament.models import build_student, tiny_teacher

WINDOW, SINKS = 8, 2
FULL = {0: (1,), 2: (0, 1)}


def ids(length=48, rows=1, seed=0):
    return torch.randint(3, 200, (rows, length), generator=torch.Generator().manual_seed(seed))


def student_and_teacher(**changes):
    teacher = tiny_llama(layers=3)
    plan = Plan(**{"window": WINDOW, "sinks": SINKS, "keep": "none", "precision": "fp32", **changes})
    return build_student(teacher, mixer_configs(plan, parts(teacher).shapes, FULL)).eval(), teacher, plan


def pools(teacher, windows):
    found = parts(teacher)
    return pooled_layers(teacher, found.layers, found.attentions, windows, full_heads=FULL, precision="fp32")


@torch.no_grad()
def test_the_swap_alone_equals_window_and_sinks():
    student, teacher, _ = student_and_teacher()
    fillings = {one.layer: one.filling for one in converted(student).values()}
    assert set(fillings) == {0, 1}  # layer 2 is softmax as a whole
    for layer, pool in pools(teacher, [ids(seed=1), ids(seed=2)]):
        if layer in fillings:
            assert calibrate(fillings[layer], pool, window=WINDOW, sinks=SINKS, share=1e-6)["log_scale"]
    limits = {0: (0,), 1: (0, 1)}
    with probing(parts(teacher).attentions, limit_heads(limits, window=WINDOW, sinks=SINKS)):
        limited = teacher(input_ids=ids(seed=2)).logits
    swapped = student(input_ids=ids(seed=2)).logits
    torch.testing.assert_close(swapped, limited, atol=2e-4, rtol=2e-4)
    with state_off(student) as silent:
        torch.testing.assert_close(silent(input_ids=ids(seed=2)).logits, limited, atol=1e-4, rtol=1e-4)
    assert torch.equal(student(input_ids=ids(seed=2)).logits, swapped)


def test_the_pool_holds_the_teacher_s_own_activations():
    teacher = tiny_llama(layers=3)
    seen = []
    hook = teacher.model.layers[2].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    teacher(input_ids=ids())
    hook.remove()
    found = dict(pools(teacher, [ids()]))
    torch.testing.assert_close(found[2].x[0], seen[0], atol=0, rtol=0)
    assert found[0].q[0].shape == (1, 48, 2, 8)
    assert found[0].k[0].shape == (1, 48, 1, 8)
    assert found[1].q[0].shape == (1, 48, 4, 8)


def test_transfer_learns_and_finishes_once(tmp_path):
    student, teacher, plan = student_and_teacher(
        transfer_steps=25, transfer_lengths=(48,), transfer_tokens=48, options={"log_scale": -2.0}
    )
    found, fillings = parts(teacher), {one.layer: one.filling for one in converted(student).values()}
    before = {name: one.clone() for name, one in teacher.state_dict().items()}

    def go():
        return transfer(
            teacher, found.layers, found.attentions, fillings, [ids(seed=3)], plan, tmp_path, full_heads=FULL,
            precision="fp32",
        )  # fmt: skip

    results = go()
    assert set(results) == {0, 1}
    assert all(one["after"] < one["before"] for one in results.values())
    assert all(torch.equal(one, before[name]) for name, one in teacher.state_dict().items())
    learned = {layer: {n: p.clone() for n, p in one.state_dict().items()} for layer, one in fillings.items()}
    for one in fillings.values():
        one.reset_parameters()
    assert go() == results  # read back, not trained again
    assert all(
        torch.equal(p, learned[layer][n]) for layer, one in fillings.items() for n, p in one.state_dict().items()
    )


def test_what_may_learn_is_named(tmp_path):
    student, teacher, plan = student_and_teacher(learns=("colour",), transfer_steps=1)
    found, fillings = parts(teacher), {one.layer: one.filling for one in converted(student).values()}
    with pytest.raises(InputError, match="matches no parameter of the mixer; it has log_scale"):
        transfer(
            teacher, found.layers, found.attentions, fillings, [ids()], plan, tmp_path, full_heads=FULL,
            precision="fp32",
        )  # fmt: skip


@torch.no_grad()
def test_attention_kl_is_nought_for_the_teacher_s_attention():
    student, teacher, _ = student_and_teacher(mixer="softmax-window", window=64)
    filling = next(iter(converted(student).values())).filling
    pool = dict(pools(teacher, [ids()]))[0]
    assert abs(float(attention_kl(filling, pool.q[0], pool.k[0], pool.x[0]))) < 1e-4
    assert float(relative_error(filling(pool.q[0], pool.k[0], pool.v[0], x=pool.x[0])[0], pool.target[0])) < 1e-8


def test_lora_merged_equals_lora_at_work():
    student, _, plan = student_and_teacher(distil="lora", lora_rank=2)
    model = learners(student, plan, lora_targets(student, "attention"))
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "lora_" in name:
                one.normal_(std=0.05)
    at_work = model(input_ids=ids()).logits
    plain = merged(model)
    torch.testing.assert_close(plain(input_ids=ids()).logits, at_work, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name, _ in plain.named_parameters())


def test_lora_targets_are_checked():
    student, *_ = student_and_teacher()
    assert lora_targets(student, "attention") == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert {"up_proj", "q_proj"} <= set(lora_targets(student, "all"))
    with pytest.raises(InputError, match="names no projection"):
        lora_targets(student, "colour")


def test_cached_logits_are_the_teacher_s_best(tmp_path):
    teacher = tiny_llama()
    batch, keep = {"ids": ids(rows=2)}, torch.tensor([3, 10, 40])
    whole = Teacher(teacher, "fp32").logits(batch, keep).log_softmax(-1)
    cached = Teacher(teacher, "fp32", tmp_path, top=16)
    for _ in range(2):  # made, then read
        found = cached.logits(batch, keep)
        best = whole.topk(16, dim=-1)
        torch.testing.assert_close(found.gather(-1, best.indices), best.values, atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(found.exp().sum(-1), torch.ones(2, 3), atol=1e-2, rtol=1e-2)
    assert cached.nbytes() > 0


def test_positions_of_half_the_rows_jump_once_and_stay_below_their_reach():
    for seed in range(50):
        steps = (found := jumped_positions(ids(rows=3), 200, seed)).diff(dim=1)
        assert found[:, 0].eq(0).all()
        assert found.max() < 200
        assert (steps != 1).sum(1).le(1).all()
        assert steps.min() == 1
    far = [jumped_positions(ids(), 200, seed).max() for seed in range(50)]
    assert max(far) > 180  # the whole reach is used
    assert 0.35 < sum(int(jumped_positions(ids(), 200, seed).max() > 47) for seed in range(200)) / 200 < 0.65
    assert jumped_positions(ids(), 48, 0) is None


def test_jumps_reach_pool_batches_and_cached_logits(tmp_path):
    teacher = tiny_llama(layers=3)
    far = model_inputs(ids(seed=1), jumped_positions(ids(), 200, 1))
    own, plain = (dict(pools(teacher, [one]))[0] for one in (far, ids(seed=1)))
    rotated = own.k[0] - plain.k[0]
    place = int((far["position_ids"].diff() != 1).nonzero()[0, 1]) + 1
    assert rotated[:, :place].abs().max() == 0
    assert rotated[:, place:].abs().amax((0, 2, 3)).min() > 0
    corpus = make_corpus({"a": ["w1 w2 w3 w4 " * 60]}, tiny_tokenizer())
    draw = batches(Plan(distil_tokens=96), corpus, None, (48,), reach=200)
    batch, keep = draw(3), torch.tensor([10, 40])
    assert torch.equal(batch["positions"], draw(3)["positions"])
    assert batch["positions"].shape == (2, 48)
    expected = teacher(**model_inputs(batch["ids"], batch["positions"])).logits[:, keep]
    torch.testing.assert_close(Teacher(teacher, "fp32").logits(batch, keep), expected)
    cached = Teacher(teacher, "fp32", tmp_path, top=8)
    still = {name: one for name, one in batch.items() if name != "positions"}
    assert (cached.logits(batch, keep) - cached.logits(still, keep)).abs().max() > 0.01
    assert len(list(tmp_path.iterdir())) == 2


def test_batches_are_functions_of_the_step(tmp_path):
    documents = load_documents([str(text_folder(tmp_path / "text"))])
    corpus = make_corpus(documents["train"], tiny_tokenizer(), seed=5)
    plan = tiny_plan(tmp_path, distil_lengths=(32, 48), distil_tokens=96)
    draw, again = batches(plan, corpus, None, (32, 48)), batches(plan, corpus, None, (32, 48))
    assert [draw(step)["ids"].shape for step in range(3)] == [(3, 32), (2, 48), (3, 32)]
    assert all(torch.equal(draw(step)["ids"], again(step)["ids"]) for step in (7, 0, 3))
    assert not torch.equal(draw(0)["ids"], draw(2)["ids"])


def test_splits_share_no_document(tmp_path):
    documents = load_documents([str(text_folder(tmp_path / "text", documents=40))])
    found = [set(documents[split][str(tmp_path / "text")]) for split in ("train", "place", "test")]
    assert all(found)
    assert len(set.union(*found)) == sum(map(len, found))


def test_short_documents_are_joined():
    corpus = Corpus(((torch.arange(5), torch.arange(5, 12)),), front=(99,))
    assert corpus.batch(0, 9, 2).shape == (2, 9)
    assert corpus.batch(0, 9, 2)[:, 0].tolist() == [99, 99]
    with pytest.raises(InputError, match="12 tokens and one batch needs 40"):
        corpus.batch(0, 41, 1)


def test_answers_are_always_scored():
    weight = torch.ones(1, 47)
    weight[0, [3, 46]] = 4.0
    plan = Plan(window=8, distil_positions=10)
    keep = scored_positions(plan, 48, weight, 0)
    assert {3, 46} <= set(keep.tolist())
    assert len(keep) == 10
    assert all(one >= 8 for one in keep.tolist() if one != 3)
    assert len(scored_positions(Plan(distil_positions=0), 48, weight, 0)) == 47


def test_a_model_is_named_by_its_weights():
    one, other = tiny_llama(), tiny_llama(seed=1)
    assert teacher_digest(one) == teacher_digest(tiny_llama()) != teacher_digest(other)


def test_layers_that_slide_are_seen_from_the_config_alone():
    assert look((tiny_teacher("mistral", sliding_window=8), None)).kept_layers == (0, 1, 2)
    assert look((tiny_teacher("mistral", sliding_window=None), None)).kept_layers == ()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "qwen3", "gemma3_text", "phi3"])
def test_every_family_is_taken_apart(family):
    teacher = tiny_teacher(family)
    found, info = parts(teacher), look((teacher, None))
    assert len(found.layers) == len(found.attentions) == info.layers == 3
    assert set(found.shapes) == set(range(3)) - set(info.kept_layers)
    rows = [dict(pooled_layers(
        teacher, found.layers, found.attentions, [torch.randint(3, 60, (1, 20))], full_heads={}, precision="fp32"
    ))]  # fmt: skip
    assert set(rows[0]) == {0, 1, 2}
