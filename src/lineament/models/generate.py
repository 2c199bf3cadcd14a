"""Write a text with a model and say what it cost."""

import math
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from lineament._base.errors import InputError
from lineament._base.seeds import seeded
from lineament.models.adapters import learned_positions
from lineament.models.load import load_teacher
from lineament.models.place import find_device, find_dtype
from lineament.models.prefill import PIECE, prefill


def write_text(
    model: str | Path | tuple[Any, Any],
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    chat: bool = False,
    seed: int = 0,
    stream: TextIO | None = None,
    device: str = "auto",
    dtype: str = "fp32",
) -> dict[str, Any]:
    """Continue a prompt.

    Args:
        model: a name as in `load_teacher`, or (model, tokenizer).
        temperature: 0 takes the likeliest token; else sample.
        chat: wrap the prompt in the tokenizer's chat template.
        seed: of the sampling. stream: where to write the text while it comes.
        device, dtype: of a model given by name, see `find_device` and `find_dtype`; one already loaded stays as it is.

    Returns:
        text, prompt_tokens, tokens (new ones), seconds, tokens_per_second, cache_bytes.

    Raises:
        InputError: an empty prompt, no room for a token, a temperature below 0, more tokens than the model has learned
            positions for, no chat template, or no such device or dtype.
    """
    if max_new_tokens < 1 or not 0 <= temperature < math.inf:
        raise InputError(f"max_new_tokens={max_new_tokens}, temperature={temperature}; expected >= 1 and a number >= 0")
    network: Any
    network, tokenizer = model if isinstance(model, tuple) else _placed(model, device, dtype)
    ids = _ids(tokenizer, prompt, chat).to(network.device)
    _check_length(network, ids.shape[1], max_new_tokens)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    if stream is not None:
        from transformers import TextStreamer

        options["streamer"] = _streamer(stream, TextStreamer, tokenizer)
    start = time.perf_counter()
    with torch.no_grad(), seeded(seed):
        if ids.shape[1] > PIECE:  # all but the last token, so that generate has one to begin with
            options["past_key_values"] = prefill(network, ids[:, :-1]).cache
        out = network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, return_dict_in_generate=True,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **options,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    new = out.sequences[0, ids.shape[1] :]
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": ids.shape[1],
        "tokens": len(new),
        "seconds": seconds,
        "tokens_per_second": len(new) / seconds,
        "cache_bytes": cache_nbytes(out.past_key_values),
    }


def _placed(name: str | Path, device: str, dtype: str) -> tuple[Any, Any]:
    home = find_device(device)
    network, tokenizer = load_teacher(name, dtype=find_dtype(dtype))
    return network.to(home), tokenizer


def _check_length(network: Any, prompt: int, new: int) -> None:
    limit = learned_positions(network.config)
    if limit is not None and prompt + new - 1 > limit:  # the last one is not read
        raise InputError(
            f"the prompt has {prompt} tokens and {new} are to follow, but the model has learned {limit} positions; "
            "shorten either"
        )


def _ids(tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    if not prompt.strip():
        raise InputError("the prompt is empty; give at least one word to go on from")
    if not chat:
        return tokenizer(prompt, return_tensors="pt").input_ids
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the model's tokenizer has no chat template; leave --chat out")
    turns = [{"role": "user", "content": prompt}]
    given = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return given["input_ids"]


def _streamer(target: TextIO, base: Any, tokenizer: Any) -> Any:
    """Return transformers' text streamer writing to `target`."""

    class ToFile(base):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            target.write(text)
            target.flush()

    return ToFile(tokenizer, skip_prompt=True, skip_special_tokens=True)


def cache_nbytes(cache: Any) -> int:
    """Return the bytes of any transformers cache; a student's counts every tensor it holds.

    Example:
        >>> from transformers import DynamicCache
        >>> cache = DynamicCache()
        >>> _ = cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), 0)
        >>> cache_nbytes(cache)
        320
    """
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes())
    held = [getattr(layer, name, None) for layer in getattr(cache, "layers", []) for name in ("keys", "values")]
    return sum(x.numel() * x.element_size() for x in held if isinstance(x, Tensor))
