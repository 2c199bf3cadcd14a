"""Scores of text: against the model's own loss, in any batching, with paired intervals."""

import math

import pytest
import torch
import transformers

from lineament._base.errors import InputError
from lineament.tasks import agreement, bootstrap_ratio, context_gain, gain_kept, perplexity, perplexity_by_length
from lineament.tasks.perplexity import ContextGain
from lineament.tasks.predictions import hidden_states, logits_of, next_token_loss, token_nll

TEXT = torch.randint(128, (5, 40), generator=torch.Generator().manual_seed(0))


def test_it_is_the_models_own_loss(model):
    found = perplexity(model, TEXT, batch_size=2)
    losses = [model(input_ids=row[None], labels=row[None]).loss for row in TEXT]
    torch.testing.assert_close(found.per_window, torch.stack(losses).double() * 39, rtol=1e-5, atol=1e-5)
    assert found.tokens == 5 * 39
    assert found.value == pytest.approx(math.exp(found.nll_sum / found.tokens))


def test_of_packed_documents_the_first_tokens_are_no_targets(model):
    at = torch.cat([torch.arange(15), torch.arange(1), torch.arange(24)])
    packed = {"input_ids": TEXT[:1], "position_ids": at[None]}
    apart = [token_nll(model, TEXT[:1, a:b]) for a, b in ((0, 15), (16, 40))]  # one token alone predicts nothing
    torch.testing.assert_close(next_token_loss(model, packed)[0], torch.cat(apart, 1).mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(next_token_loss(model, TEXT)[0], token_nll(model, TEXT).mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_pieces_of_logits_change_nothing(model, chunk):
    torch.testing.assert_close(token_nll(model, TEXT, chunk=chunk), token_nll(model, TEXT), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(token_nll(model, TEXT, last=9, chunk=chunk), token_nll(model, TEXT)[:, -9:])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Gemma2", {"final_logit_softcapping": 0.5, "head_dim": 8}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Cohere", {"logit_scale": 0.0625}),
    ],
)
def test_capped_and_scaled_logits_are_those_of_the_model(family, changes):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{family}Config")(vocab_size=128, num_key_value_heads=1, **sizes, **changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        expected = model(input_ids=TEXT, use_cache=False).logits
        torch.testing.assert_close(logits_of(model, hidden_states(model, TEXT)), expected)


def test_wrapped_models_are_scored_with_their_adapters(model):
    peft = pytest.importorskip("peft")
    import copy

    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    expected = wrapped.eval()(input_ids=TEXT[:1], labels=TEXT[:1]).loss.detach()
    found = perplexity(wrapped, TEXT[:1])
    assert found.nll == pytest.approx(float(expected), rel=1e-5)
    assert found.nll != pytest.approx(perplexity(model, TEXT[:1]).nll, rel=1e-5)


def test_the_interval_holds_the_ratio_and_pairs_windows(model, other):
    ours, theirs = perplexity(model, TEXT), perplexity(other, TEXT)
    ratio, low, high = bootstrap_ratio(ours, theirs, draws=200)
    assert ratio == pytest.approx(ours.value / theirs.value)
    assert low <= ratio <= high
    assert bootstrap_ratio(ours, ours) == (1.0, 1.0, 1.0)
    with pytest.raises(InputError, match="score both on the same ones"):
        bootstrap_ratio(ours, perplexity(other, TEXT[:2]))


def test_gain_from_context(model, other):
    gain = context_gain(model, TEXT, tail=8, short=4)
    long, short = token_nll(model, TEXT)[:, -8:], token_nll(model, TEXT[:, -12:])[:, -8:]
    torch.testing.assert_close(gain.per_window, (short - long).double().mean(1), rtol=1e-5, atol=1e-6)
    assert gain_kept(gain, gain)[0] == pytest.approx(1.0)
    assert len(gain_kept(context_gain(other, TEXT, tail=8, short=4), gain, draws=50)) == 3
    nothing = ContextGain(gain.long, gain.long)
    assert all(math.isnan(x) for x in gain_kept(nothing, nothing))
    with pytest.raises(InputError, match="more than tail"):
        context_gain(model, TEXT, tail=30, short=10)


def test_several_lengths_out_of_documents(model, letters, filler):
    found = perplexity_by_length(model, filler, letters, [16, 64], max_tokens=256)
    assert {length: score.tokens for length, score in found.items()} == {16: 16 * 15, 64: 4 * 63}


def test_a_model_agrees_with_itself_and_less_with_another(model, other):
    same = agreement(model, model, TEXT)
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert (same.top1, same.tokens) == (1.0, 5 * 39)
    found = agreement(model, other, TEXT, last=10)
    with torch.no_grad():
        ours, theirs = (m(input_ids=TEXT).logits[:, -11:-1].log_softmax(-1) for m in (model, other))
    expected = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum") / 50
    assert found.kl == pytest.approx(float(expected), rel=1e-4)
    assert found.top1 == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()))


@pytest.mark.parametrize("last", [0, 40, 41])
def test_agreement_on_more_predictions_than_there_are_is_refused(model, last):
    with pytest.raises(InputError, match="expected 1 to 39"):
        agreement(model, model, TEXT, last=last)


@pytest.mark.parametrize(
    ("text", "last", "message"),
    [
        (TEXT[0], None, "expected \\[N, T\\]"),
        (TEXT[:0], None, "at least one window"),
        (TEXT[:, :1], None, "at least 2"),
        (TEXT, 40, "expected 1 to 39"),
    ],
)
def test_bad_windows(model, text, last, message):
    with pytest.raises(InputError, match=message):
        perplexity(model, text, last=last)
