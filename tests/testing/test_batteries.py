"""The batteries pass what is right, and each kind of mistake breaks the law that is meant for it."""

import pytest
import torch
from torch import nn

from lineament._base.errors import InputError
from lineament.testing import INPUTS, MIXER_LAWS, OP_LAWS, MixerCase, OpCase, check_mixer, check_op, rms, same


def loop(q, k, v, log_decay, state, wrong=""):
    """The decayed recurrence as a loop, with room for mistakes."""
    heads, expand = max(k.shape[2], v.shape[2]), torch.Tensor.repeat_interleave
    if wrong == "heads" and q.shape[2] != k.shape[2]:
        expand = lambda x, n, dim: x.repeat(1, 1, n, 1)  # noqa: E731 (interleaved instead of consecutive)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    narrow = v.dtype
    k, v = (expand(x, heads // x.shape[2], dim=2).to(dtype) for x in (k, v))
    out = max(q.shape[2], heads)
    q, k_out = expand(q, out // q.shape[2], dim=2).to(dtype), out // heads
    outputs = []
    if wrong == "in place":
        state.mul_(1.01)
    for t in range(q.shape[1]):
        if log_decay is not None:
            decay = log_decay[:, t].to(dtype).exp()
            decay = decay[..., None] if decay.ndim == 2 else decay
            decay = decay.detach() if wrong == "gradient" else decay
            if wrong != "extreme":
                state = state * decay[..., None]
            else:
                state = state * (log_decay[:, t].clamp_min(-0.5).to(dtype)[..., None, None].exp())
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        if wrong == "edge" and t == 8:
            state = state * 1.001
        wide = state.repeat_interleave(k_out, dim=1)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], wide))
    o = torch.stack(outputs, 1).to(narrow)
    if wrong == "noise":
        o = o + 1e-4 * torch.rand_like(o)
    return o, state.to(narrow) if wrong == "narrow state" else state


def make_op(wrong=""):
    def op(q, k, v, log_decay=None, *, state=None, cu_seqlens=None, backend):
        mistake = "" if backend == "reference" else wrong
        heads, rows = max(k.shape[2], v.shape[2]), 1 if cu_seqlens is None else len(cu_seqlens) - 1
        if state is None:
            wide = torch.promote_types(q.dtype, torch.float32)
            state = torch.zeros(q.shape[0] if cu_seqlens is None else rows, heads, k.shape[3], v.shape[3], dtype=wide)
        if cu_seqlens is None or mistake == "packed":
            return loop(q, k, v, log_decay, state, mistake)
        parts = []
        for row, (a, b) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens[1:].tolist(), strict=False)):
            pieces = [None if x is None else x[:, a:b] for x in (q, k, v, log_decay)]
            parts.append(loop(*pieces, state[row : row + 1], mistake))
        return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts])

    return op


def try_op(wrong, laws=None):
    return check_op(make_op(wrong), "fast", inputs=INPUTS["decayed_attention"], chunk=8, laws=laws)


def test_a_right_operator_passes_every_law():
    assert try_op("") == list(OP_LAWS)


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        ("edge", "reference"),
        ("gradient", "gates"),
        ("gradient", "gradcheck"),
        ("extreme", "extreme"),
        ("edge", "cut"),
        ("packed", "packed"),
        ("heads", "grouped"),
        ("narrow state", "bf16"),
        ("in place", "pure"),
        ("noise", "pure"),
    ],
)
def test_a_mistake_in_an_operator_is_found(wrong, law):
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        try_op(wrong, [law])
    assert law.split()[0] in str(caught.value) or isinstance(caught.value, RuntimeError)


def test_unknown_laws_and_operators_are_named():
    with pytest.raises(InputError, match=r"unknown law 'gate'\. Did you mean 'gates'"):
        try_op("", ["gate"])
    with pytest.raises(InputError, match="unknown operator 'op'"):
        check_op(make_op(), "fast")
    with pytest.raises(InputError, match="unknown law 'cut'"):
        check_mixer(Toy, laws=["cut"])


def test_the_same_case_gives_the_same_inputs():
    case = OpCase(extreme=True, length=40)
    first, second = INPUTS["delta_rule"](case), INPUTS["delta_rule"](case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None)
    assert first[-1].isneginf().any()


def test_comparisons_say_how_far_off():
    same({"a": torch.ones(2)}, {"a": torch.ones(2)}, 0.0, "x")
    with pytest.raises(AssertionError, match=r"x\.a differs by 0\.5 of its largest value; allowed is 0\.1"):
        same({"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([2.0, 2.0])}, 0.1, "x")
    with pytest.raises(AssertionError, match="differs by inf"):
        same(torch.tensor([float("nan")]), torch.ones(1), 0.1, "x")
    with pytest.raises(AssertionError, match=r"shape \(1,\); expected \(2,\)"):
        same(torch.ones(1), torch.ones(2), 0.1, "x")
    with pytest.raises(AssertionError, match="the tensors are"):
        same((torch.ones(1), None), (torch.ones(1), torch.ones(1)), 0.1, "x")
    with pytest.raises(AssertionError, match="NaN or infinity"):
        rms(torch.tensor([float("inf")]), torch.ones(1), 0.1, "x")


class Toy(nn.Module):
    """Decayed attention with a gate from the layer's input, with room for mistakes."""

    def __init__(self, *, heads, key_heads, key_width, value_width, model_width, wrong=""):
        super().__init__()
        self.groups, self.wrong, self.backend = heads // key_heads, wrong, "auto"
        self.gate = nn.Linear(model_width, key_heads)
        self.wide = value_width

    def forward(self, q, k, v, *, x, cu_seqlens=None, state=None):
        log_decay = nn.functional.logsigmoid(self.gate(x))
        if self.wrong == "naive gate":
            log_decay = (1 / (1 + (-self.gate(x)).exp())).log()
        if self.wrong == "narrow" and v.dtype == torch.float32:
            v = v.bfloat16().float()
        if self.wrong == "backend" and self.backend == "chunked":
            v = v * 1.0001
        if self.wrong == "future":
            log_decay = log_decay - 1e-3 * x.abs().mean((1, 2), keepdim=True)
        if self.wrong == "batch":
            v = v - 1e-3 * v.mean(0, keepdim=True)
        if self.wrong == "in place":
            v.mul_(1.0001)
        if self.wrong == "own heads":
            k = k + 1e-2 * k.flip(2)
        if self.wrong == "random":
            v = v + 1e-3 * torch.randn_like(v)
        if self.wrong == "gradient":
            v = v + (v * 0.1).detach()
        if self.wrong == "step" and q.shape[1] == 1:
            log_decay = log_decay * 1.01
        if self.wrong == "overflow":
            k = k.exp() ** 20
        if self.wrong == "forgets":
            state = None
        if self.wrong == "detached" and state is not None:
            state = state.detach()
        if self.wrong == "state in place" and state is not None and q.shape[1] > 1:
            state.mul_(1.1)
        if self.wrong == "rows last" and state is not None:
            state = state.movedim(1, 0)
        history = None
        if self.wrong == "grows":
            history = k if state is None else torch.cat([state[1], k], 1)
            state = None if state is None else state[0]
        op = make_op("packed" if self.wrong == "documents" and cu_seqlens is not None else "")
        o, state = op(q, k, v, log_decay, state=state, cu_seqlens=cu_seqlens, backend="fast")
        if self.wrong == "documents" and cu_seqlens is not None:
            state = state.expand(len(cu_seqlens) - 1, -1, -1, -1)
        if self.wrong == "rows last":
            state = state.movedim(0, 1)
        o = o.float() if self.wrong == "dtype" else o
        return (o, state) if history is None else (o, (state, history))


def try_mixer(wrong, laws=None):
    case = MixerCase(length=14, key_width=4, value_width=4, model_width=6)
    return check_mixer(lambda **shape: Toy(**shape, wrong=wrong), case=case, laws=laws)


def test_a_right_mixer_passes_every_law():
    assert try_mixer("") == list(MIXER_LAWS)


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        ("dtype", "shape"),
        ("future", "causal"),
        ("forgets", "chunked"),
        ("step", "stepwise"),
        ("batch", "batched"),
        ("documents", "packed"),
        ("documents", "padded"),
        ("own heads", "grouped"),
        ("rows last", "reordered"),
        ("detached", "gradients"),
        ("gradient", "gradcheck"),
        ("overflow", "large"),
        ("random", "deterministic"),
        ("in place", "pure"),
        ("state in place", "pure"),
        ("grows", "constant"),
        ("detached", "loop"),
        ("step", "loop"),
        ("backend", "backends"),
        ("narrow", "float32"),
        ("naive gate", "extreme"),
    ],
)
def test_a_mistake_in_a_mixer_is_found(wrong, law):
    with pytest.raises((AssertionError, RuntimeError)):
        try_mixer(wrong, [law])
