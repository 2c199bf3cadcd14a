"""Reading long texts in pieces: the values of one call, the memory of one piece."""

import pytest
import torch

from lineament.models import DecoderForCausalLM, cache_nbytes, decoder_config, generate, prefill, tiny, tiny_teacher
from lineament.models.generate import write_text


def ids(tokens, rows=1, seed=0):
    return torch.randint(3, 61, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["hedgehog-window", "kda", "lightning"])
@pytest.mark.parametrize("piece", [1, 7, 40])
def test_pieces_give_the_logits_of_the_whole(kind, piece):
    model, text = tiny("llama", kind, full_heads=(1,)), ids(33, rows=2)
    whole = model(text).logits[:, -1]
    found = prefill(model, text, piece=piece)
    assert found.tokens == 33
    torch.testing.assert_close(found.logits, whole, rtol=1e-4, atol=1e-4)


def test_a_teacher_is_read_in_pieces_too():
    model, text = tiny_teacher("llama"), ids(33)
    torch.testing.assert_close(prefill(model, text, piece=8).logits, model(text).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_parts_may_come_one_after_another_and_generation_goes_on():
    model, text = tiny("llama", "kda"), ids(40)
    told = []
    found = prefill(model, iter(text[:, :-1].split(9, dim=1)), piece=5, progress=told.append)
    assert told[-1] == found.tokens == 39
    want = model.generate(text, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(text, past_key_values=found.cache, max_new_tokens=6, do_sample=False), want)


def peak_of_new_memory(tokens: int) -> tuple[int, int]:
    """Return (bytes of the largest tensor that the pieces made, cache bytes) for a text of so many tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    most = [0]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    most[0] = max(most[0], x.untyped_storage().nbytes())
            return out

    config = decoder_config("kda", vocab_size=61, width=16, layers=2, heads=2)
    model = DecoderForCausalLM(config).eval()
    parts = (ids(256, seed=i) for i in range(tokens // 256))
    with Count():
        found = prefill(model, parts, piece=256)
    assert found.tokens == tokens
    return most[0], cache_nbytes(found.cache)


def test_nothing_that_is_made_grows_with_the_text():
    """The largest tensor and the cache are those of a text an eighth as long."""
    assert peak_of_new_memory(1024) == peak_of_new_memory(8192)


@pytest.mark.slow
def test_a_million_tokens_in_flat_memory():
    """Peak memory of the process after 1M tokens is that after 64k, within 16 MB."""
    import resource

    model = DecoderForCausalLM(decoder_config("lightning", vocab_size=61, width=16, layers=2, heads=2)).eval()
    torch.set_num_threads(1)
    peaks = []

    def parts():
        for i in range(256):
            yield ids(4096, seed=i)
            if i in (15, 255):
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    found = prefill(model, parts(), piece=4096)
    assert found.tokens == 1 << 20
    assert bool(found.logits.isfinite().all())
    assert peaks[1] - peaks[0] < 16 * 1024  # kilobytes


def test_write_text_reads_long_prompts_in_pieces(monkeypatch):
    class Letters:
        pad_token_id, eos_token_id = 0, 2

        def __call__(self, text, return_tensors):
            return type("Found", (), {"input_ids": torch.tensor([[3 + ord(c) % 50 for c in text]])})

        def decode(self, tokens, **_):
            return " ".join(str(int(t)) for t in tokens)

    model = tiny("llama", "kda")
    whole = write_text((model, Letters()), "a long prompt, a long prompt", max_new_tokens=5)["text"]
    monkeypatch.setattr(generate, "PIECE", 8)
    assert write_text((model, Letters()), "a long prompt, a long prompt", max_new_tokens=5)["text"] == whole


def test_mistakes_are_named():
    model = tiny("llama", "kda")
    with pytest.raises(ValueError, match="no tokens to read"):
        prefill(model, ids(0))
    with pytest.raises(ValueError, match="piece is 0"):
        prefill(model, ids(3), piece=0)
    with pytest.raises(ValueError, match=r"a part has shape \[2, 3\]; expected \[1, t\]"):
        prefill(model, [ids(3), ids(3, rows=2)])
