"""Other people's models on our operators: outputs, gradients, generation and saved weights stay theirs."""

import pytest
import torch

from lineament.models import load_model, speed_up_, tiny_teacher
from other_weights import FAMILIES, other_model


def ids(tokens=37, rows=2, seed=0):
    return torch.randint(3, 61, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def outputs(model, text, mask=None):
    """Logits of real tokens and every gradient of their loss."""
    model.zero_grad()
    logits = model(text, attention_mask=mask, use_cache=False).logits
    logits = logits if mask is None else logits[mask.bool()]
    logits.float().logsumexp(-1).square().mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=FAMILIES)
def model(request):
    return other_model(request.param)


def test_logits_and_gradients_are_theirs(model):
    text, mask = ids(), torch.ones(2, 37, dtype=torch.long)
    mask[1, :5] = 0
    theirs, gradients = outputs(model, text, mask)
    with speed_up_(model) as sped:
        assert len(sped.layers) >= 1
        ours, own = outputs(model, text, mask)
    largest = max(float(g.abs().max()) for g in gradients.values())
    assert float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())
    assert set(own) == set(gradients)
    for name, g in gradients.items():
        assert float((own[name] - g).abs().max()) < 1e-4 * largest, name


def test_generation_with_their_cache_and_the_way_back(model):
    text = ids(9)
    theirs = model.generate(text, max_new_tokens=8, do_sample=False)
    state = {n: x.clone() for n, x in model.state_dict().items()}
    sped = speed_up_(model)
    assert torch.equal(model.generate(text, max_new_tokens=8, do_sample=False), theirs)
    assert all(torch.equal(x, state[n]) for n, x in model.state_dict().items())
    with pytest.raises(ValueError, match="restore it first"):
        speed_up_(model)
    sped.restore()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_saved_checkpoint_loads_in_its_own_format_and_runs_alike(model, tmp_path):
    with speed_up_(model):
        model.save_pretrained(tmp_path)
        again = load_model(tmp_path)
    assert type(again) is type(model)
    with speed_up_(again):
        torch.testing.assert_close(again(ids()).logits, model(ids()).logits, rtol=1e-4, atol=1e-4)


def test_the_operators_take_packed_documents():
    from lineament.models.speed_up import gated_delta

    torch.manual_seed(0)
    q, k, v = torch.randn(1, 12, 2, 4), torch.randn(1, 12, 2, 4), torch.randn(1, 12, 4, 3)
    g, beta = -torch.rand(1, 12, 4), torch.rand(1, 12, 4)
    packed = gated_delta(q, k, v, g=g, beta=beta, cu_seqlens=torch.tensor([0, 5, 12]))[0]
    apart = [
        gated_delta(*(x[:, a:b] for x in (q, k, v)), g=g[:, a:b], beta=beta[:, a:b])[0] for a, b in ((0, 5), (5, 12))
    ]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1))


def test_a_model_without_such_layers_is_refused_and_left_alone():
    model = tiny_teacher("llama")
    with pytest.raises(ValueError, match="has no layer whose recurrence is known here"):
        speed_up_(model)


def test_checkpoints_that_do_not_fit_are_refused_with_all_names(tmp_path):
    from safetensors.torch import load_file, save_file

    other_model("mamba2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "backbone.layers.0.mixer.A_log"
    save_file(
        {n: x for n, x in tensors.items() if n != name} | {"surplus.weight": torch.ones(2)}, file, {"format": "pt"}
    )
    with pytest.raises(ValueError, match=f"lacks 1 weights: {name}; has surplus 1 weights: surplus.weight"):
        load_model(tmp_path)
    save_file(tensors | {"surplus.weight": torch.ones(2)}, file, {"format": "pt"})
    assert load_model(tmp_path, surplus="ignore").training is False
    save_file(tensors | {name: torch.ones(3)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"has misshapen 1 weights: {name}"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="unknown way with surplus weights 'ignor'"):
        load_model(tmp_path, surplus="ignor")
