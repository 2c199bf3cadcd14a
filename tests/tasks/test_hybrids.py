"""The hybrid study: arms as values, equal sizes, caches by arithmetic, damage by hand, and a run that is killed."""

import copy
import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from lineament import papers
from lineament._base.errors import InputError
from lineament._base.extras import available
from lineament.cli import run
from lineament.models import DecoderForCausalLM, StudentCache, decoder_config, parameters
from lineament.tasks import score_recall
from lineament.tasks.hybrid_study import LISTS, RATIOS, VARIANTS, arms, figures, judged, listed, run_study, share
from lineament.tasks.hybrids import Arm, arm_config, cache_arithmetic, kept_heads, recall_of, run_arm

SMOKE = Arm(variant="retnet", ratio="pure", size="smoke")


def test_every_arm_has_its_own_name_and_travels_as_json():
    for scale, made in LISTS.items():
        every = made()
        assert len({arm.name for arm in every}) == len(every), scale
        assert [Arm(**json.loads(json.dumps(arm.value()))) for arm in every] == every
    paper = [arm for arm in arms("full") if arm.size == "340m" and arm.task == "recall"]
    assert {(a.variant, a.ratio) for a in paper if a.variant != "llama"} == {(v, r) for v in VARIANTS for r in RATIOS}


@pytest.mark.filterwarnings("ignore:a ratio of")
@pytest.mark.parametrize("size", ["small", "study", "340m"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_arms_are_as_large_as_softmax(variant, size):
    softmax = parameters(arm_config(Arm(variant="llama", ratio="full", size=size)))
    for ratio in ("3:1",) if size == "340m" else ("pure", "3:1", "24:1"):
        found = parameters(arm_config(Arm(variant=variant, ratio=ratio, size=size)))
        assert abs(found / softmax - 1) <= 0.02
    if size == "340m":
        assert 3.0e8 < softmax < 4.4e8  # as named


@pytest.mark.parametrize("full_heads", [None, {0: [1]}])
@pytest.mark.parametrize("variant", [*VARIANTS, "kda"])
@torch.no_grad()
def test_cache_bytes_are_what_arithmetic_says(variant, full_heads):
    if variant == "hgrn" and full_heads:
        pytest.skip("HGRN projects no queries, so none of its heads can be full")
    config = decoder_config(
        variant, ratio=[1], full_heads=full_heads, vocab_size=16, width=32, layers=2, heads=2, key_heads=None
    )
    cache = StudentCache(config)
    DecoderForCausalLM(config)(torch.zeros(1, 37, dtype=torch.long), past_key_values=cache)
    assert cache.nbytes() == cache_arithmetic(config, 37)


def test_damage_keeps_the_heads_whose_loss_rises_most():
    arm = Arm(variant="converted", ratio="1:1", size="smoke", placement="heads")
    config = arm_config(replace(arm, variant="llama", ratio="full", placement="layers"))
    model = DecoderForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.dim() == 2 else 1)
    task, losses = replace(recall_of(arm), seed=7_778), {}
    before = score_recall(model, task, count=64).loss
    for layer, head in [(0, 0), (0, 1), (1, 0), (1, 1)]:  # a model of its own for each limited head
        own = copy.deepcopy(config)
        own.lineament["layers"][str(layer)] |= {"full_heads": [1 - head], "window": 8, "sinks": 1}
        limited = DecoderForCausalLM(own).eval()
        limited.load_state_dict(model.state_dict())
        losses[layer, head] = score_recall(limited, task, count=128).loss
    most = sorted(losses, key=losses.__getitem__)[-2:]
    assert kept_heads(arm, model) == {i: tuple(sorted(h for at, h in most if at == i)) for i in (0, 1)}
    assert score_recall(model, task, count=64).loss == before  # the model is as it was


def test_a_killed_arm_goes_on_to_the_same_result(tmp_path, monkeypatch):
    whole = run_arm(SMOKE.value(), tmp_path / "whole")
    assert set(whole["looks"]) == {"2"}
    import lineament.tasks.hybrids as room

    real, calls = room.train.fit, []

    def killed(model, batches, loss, config, **rest):
        def dies(number):
            if number == 3 and not calls:
                calls.append(number)
                raise KeyboardInterrupt
            return batches(number)

        return real(model, dies, loss, replace(config, checkpoint_every=1), **rest)

    monkeypatch.setattr(room.train, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        run_arm(SMOKE.value(), tmp_path / "killed")
    assert run_arm(SMOKE.value(), tmp_path / "killed") == whole


def test_a_subset_runs_is_kept_and_drawn(tmp_path):
    rows = run_study("smoke", tmp_path, only="*-retnet-*")
    assert [(row["variant"], row["ratio"]) for row in rows] == [("retnet", "pure"), ("retnet", "1:1")]
    assert [share(row) for row in rows] == [0.0, 50.0]
    assert (tmp_path / "recall-smoke.png").read_bytes()[:4] == b"\x89PNG"
    files = [tmp_path / arm.name / "result.json" for arm in arms("smoke", "*-retnet-*")]
    written = [file.stat().st_mtime_ns for file in files]
    assert run_study("smoke", tmp_path, only="*-retnet-*") == rows
    assert [file.stat().st_mtime_ns for file in files] == written


@pytest.mark.slow  # other interpreters
def test_a_study_killed_in_the_middle_goes_on_to_the_same_numbers(tmp_path):
    """Killed without a warning after its second arm: what is finished is read, the rest is run."""
    command = [sys.executable, "-m", "lineament", "reproduce", "hybrid-linear-attention", "--scale", "smoke"]
    command += ["--out", str(tmp_path / "killed"), "--workers", "1"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while job.poll() is None and sum(listed("smoke", out=tmp_path / "killed").values()) < 2:
        time.sleep(0.05)
    job.kill()
    job.wait()
    before = listed("smoke", out=tmp_path / "killed")
    assert 2 <= sum(before.values()) < len(before)
    whole = run_study("smoke", tmp_path / "whole")
    assert run_study("smoke", tmp_path / "killed") == whole
    assert all(listed("smoke", out=tmp_path / "killed").values())


@pytest.mark.slow
@pytest.mark.skipif(not available("ray"), reason="ray is an extra")
def test_a_real_ray_cluster_gives_the_numbers_of_this_process(tmp_path):
    only, threads = ["*-retnet-*", "*-llama-*"], torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray gives a run of one processor
    try:
        own = run_study("smoke", tmp_path / "own", only=only)
    finally:
        torch.set_num_threads(threads)
    assert run_study("smoke", tmp_path / "ray", only=only, ray="local") == own


def test_any_subset_is_chosen_by_globs_and_listed_with_what_is_finished(tmp_path, capsys):
    names = [arm.name for arm in arms("study", ["study-*-llama-*-0", "deep-text-gla-3to1-*"])]
    assert names == ["study-recall-llama-full-layers-0", "deep-text-gla-3to1-layers-0"]
    run_study("smoke", tmp_path, only="*-retnet-pure-*")
    assert sum(listed("smoke", out=tmp_path).values()) == 1
    command = ["reproduce", "hybrid-linear-attention", "--scale", "smoke", "--out", str(tmp_path), "--runs"]
    assert run([*command, "--only", "*-retnet-*", "--only", "*-llama-*", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "smoke-recall-llama-full-layers-0": False,
        "smoke-recall-retnet-pure-layers-0": True,
        "smoke-recall-retnet-1to1-layers-0": False,
    }
    assert run(command) == 0
    assert "1 of 7 are finished" in capsys.readouterr().out
    assert run(["reproduce", "hedgehog", "--runs"]) == 2
    assert "is one run, not a study" in capsys.readouterr().err


def test_plots_show_the_arms_of_earlier_parts_too(tmp_path, monkeypatch):
    import lineament.tasks.hybrid_study as room

    drawn = []
    monkeypatch.setattr(room, "figures", lambda rows: drawn.append(rows) or {})
    for only in ("*-retnet-pure-*", "*-hgrn2-pure-*"):
        run_study("smoke", tmp_path, only=only)
    assert [len(rows) for rows in drawn] == [1, 2]


def test_a_verdict_rests_on_the_arms_of_the_scales_own_size():
    rows = [{"size": arm.size} for arm in arms("study", "study-*")]
    assert judged("study", rows)
    assert not judged("study", rows[:-1])
    assert not judged("full", [{"size": arm.size} for arm in arms("full")])


def test_the_plots_have_a_line_per_mixer():
    base = {"size": "study", "placement": "layers", "full": [[], [], [], []]}
    rows = [
        base | {"variant": "gla", "recall": 0.5},
        base | {"variant": "gla", "recall": 0.9, "full": [[], [], [], [0, 1]]},
        base | {"variant": "llama", "recall": 1.0, "full": [[0, 1]] * 4},
        base | {"variant": "gla", "loss": 2.0},
    ]
    assert set(figures(rows)) == {"recall-study.png", "loss-study.png"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Arm(variant="retnett", ratio="pure", size="small"), "Did you mean 'retnet'"),
        (lambda: Arm(variant="retnet", ratio="pure", size="smal"), "Did you mean 'small'"),
        (lambda: Arm(variant="retnet", ratio="3:1", size="small", placement="heads"), "Known: converted"),
        (lambda: arms("smal"), "Did you mean 'small'"),
        (lambda: arms("small", "*-mamba-*"), "names are like small-recall-llama"),
        (lambda: arms("small", ["*-llama-*", "*-mamba-*"]), r"no arm matches '\*-mamba-\*'"),
        (lambda: papers.experiment("hedgehog", only="x"), "takes no only"),
    ],
)
def test_a_mistake_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_the_experiment_gives_no_verdict_on_a_part(tmp_path):
    evidence = papers.experiment("hybrid-linear-attention")("smoke", out=str(tmp_path), only="*-hgrn2-*")
    assert evidence.passed is None
    rules = {row["arm"]: row.get("held") for row in evidence.rows}
    assert rules["cache bytes equal the arithmetic"] is True
    assert rules["RetNet 1:1 leads RetNet by at least .10 at step 100"] is None
