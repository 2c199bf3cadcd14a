"""fla's families: names and shapes as in its checkpoints, every layer equal to its equation written as a loop."""

import copy
import json

import pytest
import torch
from torch.nn.functional import logsigmoid, sigmoid, silu, softplus
from transformers import AutoConfig, AutoModelForCausalLM

from lineament.models import FLA, load_model, prefill

SHAPE = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
OWN = {
    "gla": {"num_heads": 4, "num_kv_heads": 2},
    "retnet": {"num_heads": 4, "num_kv_heads": 2},
    "hgrn2": {"expand_ratio": 8},
    "delta_net": {"num_heads": 4, "use_gate": True, "allow_neg_eigval": True},
    "gated_deltanet": {"head_dim": 8, "num_heads": 2, "num_v_heads": 4},
    "kda": {"head_dim": 8, "num_heads": 4},
}
NAMES = {  # of the linear layer, from fla's modules
    "gla": {"q_proj": (16, 32), "k_proj": (8, 32), "v_proj": (16, 32), "g_proj": (32, 32), "gk_proj.0": (16, 32),
            "gk_proj.1": (8, 16), "g_norm_swish_gate": (8,), "o_proj": (32, 32)},
    "retnet": {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (32, 32), "g_proj": (64, 32),
               "g_norm_swish_gate": (16,), "o_proj": (32, 64)},
    "hgrn2": {"q_proj": (32, 32), "f_proj": (32, 32), "i_proj": (32, 32), "g_norm": (32,), "o_proj": (32, 32)},
    "delta_net": {"q_proj": (32, 32), "q_conv1d": (32, 1, 4), "b_proj": (4, 32), "g_proj": (32, 32), "o_norm": (8,)},
    "gated_deltanet": {"q_proj": (16, 32), "v_proj": (64, 32), "a_proj": (4, 32), "b_proj": (4, 32),
                       "v_conv1d": (64, 1, 4), "g_proj": (64, 32), "o_norm": (16,), "o_proj": (32, 64)},
    "kda": {"f_proj.0": (8, 32), "f_proj.1": (32, 8), "b_proj": (4, 32), "g_proj.0": (8, 32), "g_proj.1": (32, 8),
            "o_norm": (8,), "o_proj": (32, 32)},
}  # fmt: skip


def fla_model(family, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SHAPE, **OWN[family], **changes}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(std=p.shape[-1] ** -0.5)
            elif "norm" in name or "lower_bounds" in name:
                p.add_(torch.randn_like(p) * 0.3)
    model.generation_config.eos_token_id = None
    return model.eval()


def ids(tokens=19, rows=2):
    return torch.randint(3, 61, (rows, tokens), generator=torch.Generator().manual_seed(0))


def convolved(layer, name, y):
    """Causal depthwise convolution and SiLU, a loop over taps."""
    w = dict(layer.named_parameters())[f"{name}_conv1d.weight"].detach()[:, 0]
    padded = torch.nn.functional.pad(y, (0, 0, 3, 0))
    return silu(sum(padded[:, j : j + y.shape[1]] * w[:, j] for j in range(4)))


def normed(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x):
    """Rotary positions as complex numbers (halves convention)."""
    half = x.shape[-1] // 2
    speed = 1e4 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * speed
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([z.real, z.imag], dim=-1)


def loop(q, k, v, decay, beta=None):
    """The recurrence; every input [B, T, H, ..] with as many heads, decay [B, T, H, 1 or K] as a factor."""
    state, outputs = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1], dtype=q.dtype), []
    for t in range(q.shape[1]):
        state = state * decay[:, t, ..., None]
        write = v[:, t]
        if beta is not None:
            write = beta[:, t, :, None] * (write - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t, ..., None] * write[..., None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1)


def expected(family, layer, x, config, bound):
    """A linear layer by its paper's equation, in float64."""
    p = {n: w.detach() for n, w in layer.named_parameters()}

    def proj(name, width, groups=1):
        y = x @ p[f"{name}_proj.weight"].T
        y = convolved(layer, name, y) if f"{name}_conv1d.weight" in p else y
        return y.unflatten(-1, (-1, width)).repeat_interleave(groups, dim=2)

    def low_rank(name):
        y = x @ p[f"{name}.0.weight"].T @ p[f"{name}.1.weight"].T
        return y + p[f"{name}.1.bias"] if f"{name}.1.bias" in p else y

    eps, gate = config.norm_eps, None
    if family in ("gla", "retnet"):
        K, V = (4, 8) if family == "gla" else (8, 16)
        q, k, v = proj("q", K), proj("k", K, 2), proj("v", V, 2)
        if family == "gla":
            decay = (logsigmoid(low_rank("gk_proj")) / 16).exp().unflatten(-1, (-1, K)).repeat_interleave(2, dim=2)
        else:
            q, k = turned(q), turned(k)
            decay = (1 - 2.0 ** (-5.0 - torch.arange(4.0).double()))[:, None].expand(*q.shape[:3], 1)
        o, gate = loop(q * K**-0.5, k, v, decay), silu(proj("g", V))
        norm = p["g_norm_swish_gate.weight"]
    elif family == "hgrn2":
        keep = sigmoid(proj("f", 8).flatten(2))
        keep = (bound + (1 - bound) * keep).unflatten(-1, (-1, 8))
        o = loop(silu(proj("q", 8)) * 8**-0.5, 1 - keep, proj("i", 8), keep).flatten(2)
        norm = p["g_norm.weight"]
    else:
        K, V, groups = {"delta_net": (8, 8, 1), "gated_deltanet": (8, 16, 2), "kda": (8, 8, 1)}[family]
        q, k, v = normed(proj("q", K, groups)) * K**-0.5, normed(proj("k", K, groups)), proj("v", V)
        beta = sigmoid(x @ p["b_proj.weight"].T) * (2 if family == "delta_net" else 1)
        decay = torch.ones(*q.shape[:3], 1, dtype=q.dtype)
        if family == "gated_deltanet":
            decay = (-p["A_log"].exp() * softplus(x @ p["a_proj.weight"].T + p["dt_bias"])).exp()[..., None]
        if family == "kda":
            step = softplus(low_rank("f_proj") + p["dt_bias"]).unflatten(-1, (4, 8))
            decay = (-p["A_log"].exp()[:, None] * step).exp()
        o, norm = loop(q, k, v, decay, beta), p["o_norm.weight"]
        gate = sigmoid(low_rank("g_proj").unflatten(-1, (-1, V))) if family == "kda" else silu(proj("g", V))
    o = rms(o, norm, eps)
    o = o if gate is None else o * gate
    return (o if o.dim() == 3 else o.flatten(2)) @ p["o_proj.weight"].T


@pytest.mark.parametrize("family", FLA)
def test_names_and_shapes_are_those_of_its_checkpoints(family):
    tensors = fla_model(family).state_dict()
    for name, shape in NAMES[family].items():
        assert tuple(tensors[f"model.layers.0.attn.{name}.weight"].shape) == shape, name
    around = ("attn_norm", "mlp_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    expected = {"model.embeddings.weight", "model.norm.weight", "lm_head.weight"}
    assert expected | {f"model.layers.1.{name}.weight" for name in around} <= set(tensors)
    assert ("model.lower_bounds" in tensors) == (family == "hgrn2")


@pytest.mark.parametrize("family", FLA)
def test_every_layer_equals_its_equation(family):
    model = fla_model(family).double()
    x = torch.randn(2, 13, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    share = model.model.lower_bounds.detach().softmax(0) if family == "hgrn2" else torch.zeros(2, 32)
    for i, block in enumerate(model.model.layers):
        bound = share[1] if i else torch.zeros(32, dtype=torch.float64)
        block.attn.lower_bound = bound
        with torch.no_grad():
            found = block.attn(x)
        torch.testing.assert_close(found, expected(family, block.attn, x, model.config, bound), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", FLA)
def test_a_hybrid_is_saved_loaded_and_read_in_pieces(family, tmp_path):
    attn = [{"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 5 if family == "gla" else None}]
    model = fla_model(family, attn=attn)
    text = ids()
    logits = model(text).logits
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == family
    assert "lineament" not in saved
    again = load_model(tmp_path)
    torch.testing.assert_close(again(text).logits, logits)
    torch.testing.assert_close(prefill(again, text, piece=6).logits, logits[:, -1], rtol=1e-4, atol=1e-4)
    mask = torch.ones_like(text)
    mask[1, :4] = 0
    padded = model(text, attention_mask=mask).logits[1, 4:]
    torch.testing.assert_close(padded, model(text[1:, 4:]).logits[0], rtol=1e-4, atol=1e-4)
    written = model.generate(text, max_new_tokens=4, do_sample=False)
    assert torch.equal(model(written[:, :-1]).logits[:, -4:].argmax(-1), written[:, -4:])


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_can_grow(tied):
    model, text = fla_model("gla", tie_word_embeddings=tied), ids()
    before = model(text).logits
    model.resize_token_embeddings(64)
    assert model.get_input_embeddings() is model.model.embeddings
    assert len(model.model.embeddings.weight) == len(model.lm_head.weight) == 64
    torch.testing.assert_close(model(text).logits[..., :61], before)


@pytest.mark.parametrize("family", FLA)
def test_a_model_in_training_can_be_copied(family):
    model, text = fla_model(family), ids()
    model(text, labels=text).loss.backward()
    torch.testing.assert_close(copy.deepcopy(model)(text).logits, model(text).logits)


def test_what_is_not_read_is_refused():
    with pytest.raises(ValueError, match="attnres_block_size=2"):
        AutoConfig.for_model("gla", **SHAPE, attnres_block_size=2)
