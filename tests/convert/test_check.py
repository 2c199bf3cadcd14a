"""Problems are named before anything is loaded; the budget becomes steps."""

from contextlib import nullcontext

import pytest
import torch

from lineament.convert.budget import Timing, resolve_budget, seconds_per_step
from lineament.convert.check import check
from lineament.convert.inspect import ModelInfo, inspection, kept_count, memory_plan, state_bytes
from lineament.convert.plan import Plan
from lineament.convert.thresholds import DEMO, HOUR, NO_SOFTMAX, bar_of

INFO = ModelInfo(
    name="m", kind="llama", layers=8, heads=4, key_heads=2, head_width=16, width=64, vocabulary=100,
    parameters=1000, positions=4096,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": "0,9"}, "names layer 9; the model has layers 0 to 7"),
        ({"keep": "auto:9"}, "asks for 9 layers; the model has 8 to convert"),
        ({"keep": "every:9"}, "keeps nothing in 8 layers"),
        ({"options": {"colour": 1}}, "has no option 'colour'"),
        ({"mixer": "kda", "transfer_loss": "attention-kl"}, "use output-mse"),
        ({"mixer": "softmax-window", "window": 0, "sinks": 0}, "attends to nothing"),
        ({"mixer": "lolcats", "window": 0}, "needs a window"),
        ({"distil_lengths": (8192,)}, "made for 4096 positions; --set distil_lengths=2048,4096"),
    ],
)
def test_each_problem_is_named(changes, message):
    problems = check(Plan(**changes), INFO)
    assert any(message in one for one in problems), problems


def test_all_problems_at_once():
    assert len(check(Plan(keep="0,9", options={"colour": 1}, distil_lengths=(8192,)), INFO)) == 3


def test_the_default_plan_fits():
    assert check(Plan(), INFO) == []


def test_memory_and_disk_are_asked(tmp_path, monkeypatch):
    big = ModelInfo(**{**vars(INFO), "parameters": 10**9})
    assert any("of memory" in one for one in check(Plan(), big, memory=10**9))
    monkeypatch.setattr("lineament.io.free_bytes", lambda path: 10)
    assert any("of disk" in one for one in check(Plan(), big, tmp_path / "out", memory=10**15))


def test_every_stage_has_a_memory_figure():
    assert set(memory_plan(INFO, Plan())) == {"teacher", "transfer", "distil", "evaluate"}


def test_inspection_counts_bytes():
    found = inspection(INFO, Plan(keep="0,1"), {0: (0, 1), 1: (0, 1)}, (1024, 1 << 15))
    (short, long) = found.caches
    assert short["teacher"] == 8 * 2 * 2 * 16 * 4 * 1024
    assert long["ratio"] < short["ratio"] < 1
    assert found.rows[0]["then"] == "softmax"
    assert found.to_json()["full_heads"] == {"0": [0, 1], "1": [0, 1]}
    assert len(found.tables()) == 3


def test_sliding_layers_remember_their_window():
    slides = ModelInfo(**{**vars(INFO), "kept_layers": (0, 2), "sliding_window": 512})
    (long,) = inspection(slides, Plan(keep="none"), None, (4096,)).caches
    free = (slides.layers - 2) * slides.key_heads
    state = state_bytes(slides, Plan(keep="none"))
    sliding, head = 2 * slides.key_heads * 2 * slides.head_width * 4 * 512, 2 * slides.head_width * 4 * 4096
    assert (long["teacher"], long["student"]) == (sliding + free * head, sliding + free * state)


def test_a_model_of_sliding_layers_alone_is_refused():
    slides = ModelInfo(**{**vars(INFO), "kept_layers": tuple(range(8)), "sliding_window": 512})
    (problem,) = check(Plan(keep="none"), slides)
    assert "sliding window of 512 tokens" in problem
    assert "sliding_window to null" in problem


def test_squashed_logits_and_students_are_refused():
    squashes = ModelInfo(**{**vars(INFO), "softcap": 50.0})
    plain = {"mixer": "kda", "window": 0, "sinks": 0, "options": {}}
    found = {
        (mixer, keep): bool(check(Plan(keep=keep, **({} if mixer == "ours" else plain)), squashes))
        for mixer in ("ours", "kda")
        for keep in ("none", "every:4", "auto-heads:0.25", "auto-heads:0", "all")
    }
    assert [pair for pair, refused in found.items() if not refused] == [
        ("ours", "all"), ("kda", "none"), ("kda", "every:4"), ("kda", "auto-heads:0"), ("kda", "all"),
    ]  # fmt: skip
    (problem,) = check(Plan(keep="none"), ModelInfo(**{**vars(INFO), "kind": "lineament-llama"}))
    assert problem == "m is a student already; convert its teacher"


def test_only_logits_that_are_held_count():
    wide = ModelInfo(**{**vars(INFO), "vocabulary": 10**6})
    some, every = (memory_plan(wide, Plan(distil_positions=n))["distil"] for n in (64, 0))
    assert every - some == 3 * (2048 - 64) * 10**6 * 4
    assert memory_plan(wide, Plan(evaluate_lengths=(8192,))) == memory_plan(wide, Plan(evaluate_lengths=(512,)))


def test_kept_heads_are_counted_without_a_table():
    assert [kept_count(INFO, Plan(keep=k)) for k in ("none", "every:4", "0,3", "auto:3", "auto-heads:0.25")] == [
        0, 4, 4, 6, 4,
    ]  # fmt: skip
    assert state_bytes(INFO, Plan(mixer="kda")) == 16 * 16 * 4


def test_a_budget_becomes_steps():
    timing = Timing(pool=5.0, transfer_step=2.0, distil_step=4.0)
    plan = resolve_budget(Plan(budget="10min", budget_transfer=0.5, extend_steps=30, distil_steps=90), timing)
    assert plan.transfer_steps == int((0.5 * 600 * 0.92 - 5) / 2)
    assert plan.distil_steps + plan.extend_steps == int(0.5 * 600 * 0.92 / 4)
    assert plan.extend_steps == round((plan.distil_steps + plan.extend_steps) / 4)
    alone = resolve_budget(Plan(budget="10min", distil="none"), timing)
    assert alone.transfer_steps == int((600 * 0.92 - 5) / 2)
    assert resolve_budget(Plan(), timing) == Plan()
    assert plan.transfer_pool == Plan().transfer_pool


def test_timed_batches_come_to_where_the_module_is():
    module = torch.nn.Linear(2, 3, device="meta")

    def loss(module, batch):
        assert batch["x"][0].is_meta
        return module(batch["x"][0]).sum(), {}

    assert seconds_per_step(module, loss, lambda step: {"x": [torch.ones(4, 2)]}, context=nullcontext) > 0


def test_every_batch_is_run_once_before_the_clock_starts(monkeypatch):
    module, seen = torch.nn.Linear(2, 3), []
    now = iter([100.0, 106.0])

    def clock():
        seen.append("clock")
        return next(now)

    def loss(module, batch):
        return module(batch).sum(), {}

    def batches(step):
        seen.append(step)
        return torch.ones(4, 2)

    monkeypatch.setattr("lineament.convert.budget.time.perf_counter", clock)
    assert seconds_per_step(module, loss, batches, context=nullcontext, steps=3, optimiser=1.5) == 3.0
    assert seen == [0, 1, 2, "clock", 0, 1, 2, "clock"]
    assert module.weight.grad is None


def test_a_small_budget_makes_the_pool_smaller_before_it_gives_up_steps():
    timing = Timing(pool=240.0, transfer_step=10.0, distil_step=100.0)  # for 24 windows
    plan = resolve_budget(Plan(budget=str(400 / 0.92), budget_transfer=0.5, transfer_pool=24), timing)
    assert plan.transfer_pool == 10  # half of 200 s, at 10 s a window
    assert plan.transfer_steps == 10
    tiny = resolve_budget(Plan(budget="40", budget_transfer=0.5, transfer_pool=24), timing)
    assert (tiny.transfer_pool, tiny.transfer_steps) == (4, 2)
    assert resolve_budget(Plan(budget="40", transfer_pool=3), timing).transfer_pool == 3


def test_quick_steps_leave_their_time_to_more_windows_and_to_distillation():
    quick = Timing(pool=120.0, transfer_step=0.1, distil_step=10.0)  # for 12 windows
    asked = {"budget_transfer": 0.5, "transfer_pool": 12}
    plan = resolve_budget(Plan(budget=str(200 / 0.92), **asked), quick)
    assert plan.transfer_pool == 9  # and not 5: 100 s hold 9 windows with ten steps each
    assert plan.transfer_steps == 90
    assert plan.distil_steps == 10  # 101 s, not 100
    long = resolve_budget(Plan(budget=str(2000 / 0.92), **asked), quick)
    assert (long.transfer_pool, long.transfer_steps) == (12, 120)
    assert long.distil_steps == int((2000 - 120 - 12) / 10)
    alone = resolve_budget(Plan(budget=str(2000 / 0.92), **asked, distil="none"), quick)
    assert alone.transfer_steps == int((2000 - 120) / 0.1)  # nothing else could use the time


def test_which_goals_a_plan_is_held_to():
    assert bar_of(Plan()) is DEMO
    assert bar_of(Plan(budget="1h")) is HOUR
    assert bar_of(Plan(budget="1h", keep="none")) is NO_SOFTMAX
