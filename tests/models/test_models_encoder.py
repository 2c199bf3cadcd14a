"""Encoder students: names kept, padding exact, saved and loaded to the bit, cost linear in the length."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    ElectraConfig,
    ElectraModel,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaModel,
)

from lineament._base.errors import InputError
from lineament.models import head_shape
from lineament.models.encoder import build_encoder, encoder_mixers, register_encoders, self_attentions
from lineament.nn import MixerConfig

TINY = {
    "vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _registered():
    register_encoders()


def tiny(cls=BertModel, config=BertConfig, **changes):
    torch.manual_seed(0)
    return cls(config(**{**TINY, **changes})).eval()


def student_of(teacher, layers=(0, 2), kind="hedgehog", **options):
    shape = head_shape(teacher.config)
    return build_encoder(teacher, {i: MixerConfig(kind=kind, options=options, **shape) for i in layers})


def batch(T=11, real=(11, 6)):
    ids = torch.randint(3, 61, (len(real), T), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(T) < torch.tensor(real)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def hidden(model, **inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize(
    ("cls", "config"), [(BertModel, BertConfig), (RobertaModel, RobertaConfig), (ElectraModel, ElectraConfig)]
)
def test_inherited_weights_keep_their_names_and_only_mixers_are_new(cls, config):
    teacher = tiny(cls, config)
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    student = student_of(teacher)
    ours = student.state_dict()
    assert {name for name in ours if ".mixer." not in name} == set(before)
    assert all(torch.equal(ours[name], x) and torch.equal(teacher.state_dict()[name], x) for name, x in before.items())
    assert list(encoder_mixers(student)) == [0, 2]
    assert isinstance(student, cls)


def test_a_student_without_mixers_is_its_teacher():
    teacher = tiny()
    torch.testing.assert_close(hidden(build_encoder(teacher, {}), **batch()), hidden(teacher, **batch()))


@pytest.mark.parametrize("kind", ["hedgehog", "elu", "t2r", "relu", "performer", "taylor"])
def test_padding_is_exact(kind):
    student, inputs = student_of(tiny(), kind=kind), batch()
    whole = hidden(student, **inputs)
    alone = hidden(student, input_ids=inputs["input_ids"][1:, :6])
    torch.testing.assert_close(whole[1:, :6], alone, atol=1e-5, rtol=1e-4)
    other = inputs["input_ids"].clone()
    other[1, 6:] = 7
    assert torch.equal(hidden(student, input_ids=other, attention_mask=inputs["attention_mask"])[1, :6], whole[1, :6])


@pytest.mark.parametrize("side", ["left", "right"])
def test_either_side_may_be_padded(side):
    student, inputs = student_of(tiny()), batch(real=(6,))
    ids = inputs["input_ids"][:, :6]
    alone = hidden(student, input_ids=ids)
    fill = (0, 5) if side == "right" else (5, 0)
    padded = torch.nn.functional.pad(ids, fill)
    mask = torch.nn.functional.pad(torch.ones_like(ids), fill)
    positions = torch.nn.functional.pad(torch.arange(6)[None], fill)
    found = hidden(student, input_ids=padded, attention_mask=mask, position_ids=positions)
    found = found[:, :6] if side == "right" else found[:, 5:]
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("cls", "door"),
    [
        (BertModel, AutoModel),
        (BertForMaskedLM, AutoModelForMaskedLM),
        (BertForPreTraining, AutoModelForPreTraining),
        (BertForSequenceClassification, AutoModelForSequenceClassification),
    ],
)
def test_saved_and_loaded_to_the_bit(cls, door, tmp_path):
    student = student_of(tiny(cls), features=4, bias=True)
    for mixer in encoder_mixers(student).values():
        torch.nn.init.normal_(mixer.map_q.weight)
    student.save_pretrained(tmp_path)
    again = door.from_pretrained(tmp_path)
    assert type(again).__name__ == f"Lineament{cls.__name__}"
    assert torch.equal(hidden(again, **batch()), hidden(student, **batch()))


def test_a_head_is_put_on_a_student_as_on_any_model(tmp_path):
    student_of(tiny()).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    loss = model(**batch(), labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert encoder_mixers(model)[0].map_k.weight.grad.abs().sum() > 0


def test_hidden_states_can_be_asked_for():
    class Fresh(BertModel):  # a class that nobody has made a student of yet
        pass

    teacher = tiny(Fresh)
    found = student_of(teacher)(**batch(), output_hidden_states=True)
    assert len(found.hidden_states) == 4
    assert torch.equal(found.hidden_states[-1], found.last_hidden_state)


def test_memory_is_linear_in_the_length():
    student = student_of(tiny(max_position_embeddings=512, vocab_size=9), layers=(0, 1, 2))
    saved = {}
    for T in (128, 256, 512):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            student(input_ids=torch.ones(1, T, dtype=torch.long), attention_mask=torch.ones(1, T, dtype=torch.long))
        saved[T] = sum(sizes)
    assert saved[512] - saved[256] == pytest.approx(2 * (saved[256] - saved[128]), rel=0.01)


def test_what_cannot_be_converted_is_said():
    teacher = tiny()
    with pytest.raises(InputError, match="layer 3 is outside the model's layers 0 to 2"):
        student_of(teacher, layers=(3,))
    with pytest.raises(InputError, match="a student already"):
        build_encoder(student_of(teacher), {})
    with pytest.raises(InputError, match="Attention modules found: GPT2Attention"):
        self_attentions(GPT2Model(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=9)))
    with pytest.raises(InputError, match="set up as a decoder"):
        self_attentions(tiny(is_decoder=True))
    with pytest.raises(InputError, match="feature map of an encoder"):
        student_of(teacher, kind="kda")
    with pytest.raises(InputError, match="needs positions"):
        student_of(teacher, kind="cosformer")
    shape = head_shape(teacher.config)
    with pytest.raises(InputError, match="the mixer has key_width=4, the model has 8"):
        build_encoder(teacher, {0: MixerConfig(kind="elu", **{**shape, "key_width": 4})})
    with pytest.raises(InputError, match="linear or it is not"):
        build_encoder(teacher, {0: MixerConfig(kind="elu", full_heads=(1,), **shape)})


def test_a_mask_per_query_is_refused():
    student = student_of(tiny())
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    with pytest.raises(InputError, match="differs from query to query"):
        student(input_ids=torch.ones(1, 5, dtype=torch.long), attention_mask=causal)
    with pytest.raises(InputError, match="3 axes"):
        student(input_ids=torch.ones(1, 5, dtype=torch.long), attention_mask=causal[0])
    same = torch.zeros(1, 1, 5, 5)
    same[..., 4] = torch.finfo(torch.float32).min
    ids = torch.arange(1, 6)[None]
    padded = hidden(student, input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 1, 0]]))
    torch.testing.assert_close(hidden(student, input_ids=ids, attention_mask=same), padded)
