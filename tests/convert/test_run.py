"""A whole conversion on a tiny teacher: what comes out, what is refused, and going on after a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from convert_helpers import teacher_folder, text_folder, tiny_llama, tiny_plan, tiny_tokenizer

from lineament._base.errors import InputError
from lineament.cli import run as command_line
from lineament.convert import Plan, evaluate_folder, inspect, run, write_report
from lineament.io import open_weights, partial_path
from lineament.tasks.perplexity import window_nll


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One finished conversion: (teacher folder, text folder, student folder, evidence)."""
    root = tmp_path_factory.mktemp("run")
    teacher, text = teacher_folder(root / "teacher"), text_folder(root / "text")
    before = (teacher / "model.safetensors").read_bytes()
    evidence = run(teacher, tiny_plan(text), root / "student")
    assert (teacher / "model.safetensors").read_bytes() == before
    return teacher, text, root / "student", evidence


def test_the_folder_is_complete(made):
    _, _, student, evidence = made
    names = {path.name for path in student.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "evidence.json", "damage.json", "plan.json"} <= names
    assert "tokenizer.json" in names
    assert "work" not in names
    assert not partial_path(student).exists()
    assert json.loads((student / "evidence.json").read_text())["rows"]
    measures = [row["measure"] for row in evidence.rows]
    assert any(one.startswith("perplexity") for one in measures)
    assert any(one.startswith("cache bytes") for one in measures)
    row = next(row for row in evidence.rows if row["measure"].startswith("perplexity"))
    assert {"student", "teacher", "ratio", "low", "high", "state_off", "untrained"} <= set(row)
    assert "## Plan" in (student / "README.md").read_text()


@torch.no_grad()
def test_the_student_loads_and_speaks(made):
    from transformers import AutoModelForCausalLM

    import lineament.models  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(made[2])
    assert type(model).__name__ == "LineamentLlamaForCausalLM"
    ids = torch.randint(3, 200, (1, 40))
    assert model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=2).shape[1] <= 44


def test_a_student_s_folder_is_measured_and_reported(made, tmp_path):
    found = evaluate_folder(made[2], lengths=(32, 64), tokens=128, prompts=0, speed=False)
    assert [row["measure"] for row in found.rows][:2] == [f"perplexity {made[1]} 32", f"perplexity {made[1]} 64"]
    assert all(row["state_off"] and row["untrained"] for row in found.rows[:2])
    page = write_report(found, tmp_path / "report.html")
    assert "perplexity" in page.read_text()
    with pytest.raises(InputError, match="does not name its teacher"):
        evaluate_folder(made[0], prompts=0)
    with pytest.raises(InputError, match="length 0"):
        evaluate_folder(made[2], lengths=(0,))


def test_a_student_s_folder_is_measured_on_the_accelerator(made, monkeypatch):
    room, seen = sys.modules["lineament.convert.evaluate"], []

    def look(*models, untrained, **_):
        seen.extend((one.device.type, one.dtype) for one in (*models[:2], untrained))
        raise KeyboardInterrupt

    monkeypatch.setattr("lineament.models.place.PartialState", lambda: SimpleNamespace(device=torch.device("meta")))
    monkeypatch.setattr(room, "evaluate", look)
    with pytest.raises(KeyboardInterrupt):
        evaluate_folder(made[2], dtype="bf16")
    assert seen == [("meta", torch.bfloat16)] * 3


def test_the_command_says_its_rows_and_goes_on_when_cut_off(made, tmp_path, monkeypatch, capsys):
    calls, room = [], sys.modules["lineament.convert.evaluate"]

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    def counted(model, ids, **options):
        calls.append(ids.shape)
        return window_nll(model, ids, **options)

    command = ["evaluate", str(made[2]), "--length", "64", "--tokens", "128", "--prompts", "0", "--no-speed", "--json"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(room, "cache_bytes", stop)
        assert command_line(command) == 1
    said = capsys.readouterr()
    assert not said.out
    assert " 64: student" in said.err
    assert "the same command goes on" in said.err
    monkeypatch.setattr(room, "window_nll", counted)
    assert command_line(command) == 0
    assert not calls
    assert json.loads(capsys.readouterr().out)["rows"]
    assert not list((tmp_path / "lineament" / "evaluate").iterdir())  # nothing is kept of what is whole


def test_a_conversion_leaves_small_numbers_as_they_were(made):
    tiny = torch.tensor([1e-40])
    assert float(tiny * 0.5) > 0


def test_inspect_loads_no_weights(made):
    found = inspect(made[0], tiny_plan(made[1]))
    assert found.info.layers == 3
    assert found.info.parameters == sum(p.numel() for p in tiny_llama().parameters())
    assert found.caches[0]["ratio"] < 1
    with pytest.raises(InputError, match="at least 1 token"):
        inspect(made[0], contexts=(0,))


def test_what_learned_is_not_the_teacher(made):
    ours, theirs = open_weights(made[2]), open_weights(made[0])
    mixers = [name for name in ours.names if ".mixer." in name]
    assert mixers
    moved = [n for n in theirs.names if n in ours and not torch.equal(ours.load(n), theirs.load(n))]
    assert moved
    assert all("_proj" in name or "norm" in name for name in moved)  # LoRA on the projections, merged, and the norms
    assert not any("lora" in name for name in ours.names)


def test_the_same_call_twice_gives_the_same_weights(made, tmp_path):
    teacher, text, student, _ = made
    run(teacher, tiny_plan(text), tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"distil": "none", "transfer_loss": "both"},
        {"distil": "full", "keep": "1", "extend_steps": 2, "extend_lengths": (96,)},
        {"distil": "mixers", "keep": "none", "teacher_topk": 8, "options": {"decay": True, "query_scale": True}},
        {"mixer": "hedgehog", "window": 0, "sinks": 0, "transfer_loss": "attention-kl", "damage": "gates"},
        {"mixer": "gated-deltanet", "keep": "every:2", "distil_steps": 2},
        {"mixer": "softmax-window", "transfer_steps": 0, "distil": "none"},
        {"budget": "3s", "evaluate_tokens": 0},
        {"keep": "none", "state_share": 0.02, "options": {"map": "product", "query_scale": True}},
    ],
)
def test_other_plans_run(made, tmp_path, changes):
    teacher, text, _, _ = made
    evidence = run(teacher, tiny_plan(text, **changes), tmp_path / "student")
    assert (tmp_path / "student" / "model.safetensors").exists()
    if "budget" in changes:
        resolved = Plan.from_json(json.loads((tmp_path / "student" / "plan.json").read_text()))
        assert resolved.distil_steps >= 2
    assert evidence.name == "conversion"


TUNED = {"keep": "all", "distil_kl": 0.0, "distil_next": 1.0, "transfer_steps": 0}


def test_a_teacher_can_be_tuned_on_the_same_tokens(made, tmp_path):
    from transformers import AutoModelForCausalLM

    evidence = run(made[0], tiny_plan(made[1], **TUNED, distil_steps=8), tmp_path / "tuned")
    row = next(row for row in evidence.rows if row["measure"].startswith("perplexity"))
    assert row["ratio"] < 1  # it was trained on text like that, the teacher is random
    assert row["state_off"] is None
    assert row["untrained"] is None
    assert all(row["ratio"] == 1 for row in evidence.rows if row["measure"].startswith("cache bytes"))
    tuned, teacher = (AutoModelForCausalLM.from_pretrained(one) for one in (tmp_path / "tuned", made[0]))
    assert not any(".mixer" in name for name, _ in tuned.named_modules())
    tokens = torch.randint(3, 200, (1, 40))
    with torch.no_grad():
        logits = tuned(tokens).logits
        assert not torch.equal(logits, teacher(tokens).logits)
        teacher.load_state_dict(tuned.state_dict())  # the very same architecture
        torch.testing.assert_close(logits, teacher(tokens).logits, atol=1e-5, rtol=1e-5)


def test_a_cut_off_evaluation_goes_on(made, tmp_path, monkeypatch):
    calls, room = [], sys.modules["lineament.convert.evaluate"]  # the package has a function of that name

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    def counted(model, ids, **options):
        calls.append(ids.shape)
        return window_nll(model, ids, **options)

    monkeypatch.setattr(room, "cache_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        run(made[0], tiny_plan(made[1]), tmp_path / "student")
    monkeypatch.undo()
    monkeypatch.setattr(room, "window_nll", counted)
    evidence = run(made[0], tiny_plan(made[1]), tmp_path / "student")
    assert not calls  # the perplexities were all there
    assert evidence.rows == made[3].rows


@pytest.mark.parametrize(("dtype", "saved"), [(None, torch.bfloat16), ("fp32", torch.float32)])
def test_a_student_is_saved_as_its_teacher_was_and_under_its_licence(tmp_path, dtype, saved):
    from transformers import AutoModelForCausalLM

    teacher = tmp_path / "teacher"
    tiny_llama().bfloat16().save_pretrained(teacher)
    tiny_tokenizer().save_pretrained(teacher)
    (teacher / "README.md").write_text("---\nlicense: mit\n---\n# Teacher\n")
    out, text = tmp_path / "student", text_folder(tmp_path / "text")
    run(teacher, tiny_plan(text, keep="1", transfer_steps=0, distil_steps=1, evaluate_tokens=0), out, dtype=dtype)
    held = open_weights(out)
    assert {(".mixer." in name, held.dtype(name)) for name in held.names} == {(True, torch.float32), (False, saved)}
    assert next(AutoModelForCausalLM.from_pretrained(out, dtype="auto").parameters()).dtype == saved
    assert "its licence: mit" in (out / "README.md").read_text()


def test_a_loaded_model_is_left_alone(tmp_path):
    model, tokenizer, text = tiny_llama(), tiny_tokenizer(), text_folder(tmp_path / "text")
    before = {name: one.clone() for name, one in model.state_dict().items()}
    run((model, tokenizer), tiny_plan(text, distil="full", distil_steps=2), tmp_path / "student")
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_refusals_leave_nothing(made, tmp_path):
    teacher, text, student, _ = made
    plan = tiny_plan(text)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.txt").write_text("  \n")
    short = tmp_path / "short"
    short.mkdir()
    (short / "a.txt").write_text("only a few words here")
    cases = [
        (teacher, plan, student, "exists"),
        (teacher, plan.change({"keep": "0,9"}), None, "layers 0 to 2"),
        (teacher, plan.change({"data": "wiki-sampl"}), None, "wiki-sample"),
        (teacher, plan.change({"data": str(empty)}), None, "text"),
        (teacher, plan.change({"data": str(short)}), None, "one batch needs"),
        (teacher, "defalt", None, "Did you mean 'default'"),
        (tmp_path / "nowhere", plan, None, "nowhere"),
        (text, plan, None, "config"),
    ]
    for model, one, out, message in cases:
        target = out or tmp_path / "refused"
        with pytest.raises(InputError, match=message):
            run(model, one, target)
        assert out is not None or not target.exists()
        assert not partial_path(target).exists()


def _broken(teacher: Path, root: Path, kind: str) -> Path:
    """Copy a teacher and break it."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = root / kind
    shutil.copytree(teacher, folder)
    weights = folder / "model.safetensors"
    if kind == "no weights":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "lying header":
        raw = weights.read_bytes()
        weights.write_bytes((len(raw) * 2).to_bytes(8, "little") + raw[8:])
    elif kind == "NaN":
        tensors = load_file(weights)
        tensors["model.norm.weight"][0] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
    elif kind == "pickle":
        weights.unlink()
        torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    elif kind == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif kind == "encoder":
        from transformers import BertConfig, BertModel

        shutil.rmtree(folder)
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        BertModel(BertConfig(vocab_size=99, **shape)).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no weights", "weights"),
        ("truncated", "model.safetensors"),
        ("lying header", "model.safetensors"),
        ("NaN", "model.norm.weight"),
        ("pickle", "pickle"),
        ("no tokenizer", "tokenizer"),
        ("encoder", "encoder"),
    ],
)
def test_broken_models_are_refused(made, tmp_path, kind, message):
    folder = _broken(made[0], tmp_path, kind)
    with pytest.raises(InputError, match=message):
        run(folder, tiny_plan(made[1]), tmp_path / "student")
    assert not (tmp_path / "student").exists()


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {"num_key_value_heads": 1, "num_local_experts": 2}, "MixtralAttention at model.layers.0.self_attn"),
        ("mamba", {}, "no adapter for model_type 'mamba'"),
        ("gemma2", {"num_key_value_heads": 1}, "attn_logit_softcapping"),
    ],
)
def test_what_a_config_rules_out_is_said_without_weights(tmp_path, family, changes, message):
    from transformers import AutoConfig

    AutoConfig.for_model(family, **SMALL, **changes).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    plan = tiny_plan(tmp_path, transfer_lengths=(16,), distil_lengths=(16,))
    with pytest.raises(InputError, match=message):
        run(tmp_path, plan, tmp_path / "student")
    with pytest.raises(InputError, match=message):
        inspect(tmp_path, plan)


def test_another_plan_is_not_mixed_in(made, tmp_path, monkeypatch):
    teacher, text, _, _ = made
    out = tmp_path / "student"

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lineament.convert.stages.distil_all", stop)
    with pytest.raises(KeyboardInterrupt):
        run(teacher, tiny_plan(text), out)
    monkeypatch.undo()
    assert partial_path(out).exists()
    with pytest.raises(InputError, match="plan fields window"):
        run(teacher, tiny_plan(text, window=20), out)
    with pytest.raises(InputError, match="resume"):
        run(teacher, tiny_plan(text), out, resume=False)
    run(teacher, tiny_plan(text), out)
    assert (out / "model.safetensors").read_bytes() == (made[2] / "model.safetensors").read_bytes()


def test_work_on_other_weights_or_text_is_not_mixed_in(tmp_path):
    from dataclasses import replace

    from lineament.convert.folders import look
    from lineament.convert.job import Job
    from lineament.convert.run import _same_work

    def job(seed=0, text="some text", **changes):
        model = tiny_llama(seed=seed)
        documents = {split: {"mine": [f"{text} {split}"]} for split in ("train", "place", "test")}
        plan, info = tiny_plan(tmp_path, **changes), look((model, None))
        made = Job(plan=plan, info=info, teacher=model, tokenizer=None, documents=documents, name="teacher")
        return replace(made, plan=plan.change({"data": "mine"}))

    asked = tmp_path / "work" / "asked.json"
    asked.parent.mkdir()
    _same_work(asked, job())
    _same_work(asked, job())
    for other, message in [
        (job(seed=1), "other weights of teacher"), (job(text="another"), "other text: mine"),
        (replace(job(), name="pupil"), "other model teacher"), (job(window=20), "other plan fields window"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            _same_work(asked, other)
    before = json.loads(asked.read_text())
    asked.write_text(json.dumps({"plan": before["plan"], "model": "teacher"}))
    _same_work(asked, job(seed=1))  # begun when no digests were written down
    asked.write_text(json.dumps({"plan": {**before["plan"], "gone": 1}, "model": "teacher"}))
    with pytest.raises(InputError, match="other plan fields gone"):
        _same_work(asked, job())


SCRIPT = """
import json, sys
from lineament.convert import Plan, evaluate_folder, inspect, run, write_report
run(sys.argv[1], Plan.from_json(json.loads(sys.argv[2])), sys.argv[3])
"""


def _command(teacher, text, out):
    plan = json.dumps(tiny_plan(text).to_json())
    return [sys.executable, "-c", SCRIPT, str(teacher), plan, str(out)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # the same number of threads in every process


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory):
    """The student of a process that nobody kills, and how long it took."""
    out, start = tmp_path_factory.mktemp("undisturbed") / "student", time.monotonic()
    subprocess.run(_command(*made[:2], out), check=True, env=ENVIRONMENT, capture_output=True)
    return out, time.monotonic() - start


def _killed_and_finished(made, undisturbed, out: Path, draw: random.Random, times: int) -> None:
    """Kill the conversion at random moments, let it finish, and compare the weights bit for bit."""
    teacher, text, _, _ = made
    student, seconds = undisturbed
    for _ in range(times):
        process = subprocess.Popen(
            _command(teacher, text, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
        )
        # the work shows in the partial folder; kill at a random moment after it appears
        end = time.monotonic() + 120
        while not partial_path(out).exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        try:
            process.wait(timeout=draw.uniform(0.0, 0.7 * seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if out.exists():
            break
    if not out.exists():
        subprocess.run(_command(teacher, text, out), check=True, env=ENVIRONMENT, capture_output=True)
    ours, theirs = open_weights(out), open_weights(student)
    assert ours.names == theirs.names
    assert all(torch.equal(ours.load(name), theirs.load(name)) for name in ours.names)


def test_killed_three_times(made, undisturbed, tmp_path):
    _killed_and_finished(made, undisturbed, tmp_path / "student", random.Random(0), 3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_twenty_times(made, undisturbed, tmp_path):
    draw = random.Random(1)
    for number in range(7):
        _killed_and_finished(made, undisturbed, tmp_path / f"student{number}", draw, 3)
