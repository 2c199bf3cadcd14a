"""What a model costs: bytes of cache, seconds per token, peak memory; several models in one run, taking turns.

A cache of any length is had without reading so much text: a short text is read, then what grows with the context
(keys and values of softmax heads) is repeated up to the length. Sizes and times are those of a real cache.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from lineament._base.errors import InputError
from lineament._base.seeds import generator
from lineament.models import StudentCache, cache_nbytes, learned_positions, prefill
from lineament.models.prefill import PIECE
from lineament.nn import KeyValues
from lineament.tasks.predictions import plain

CPU = torch.device("cpu")
READ = 512  # tokens really read before a cache is stretched; longer than any window here
SPARE = 8  # tokens of room beyond those that are timed
CLEAR = 1.25  # one way to read a prompt that takes so much longer than the other is not tried again


def new_cache(model: nn.Module, room: int, *, static: bool = False) -> Any:
    """Return an empty cache: a student's own, else transformers' dynamic one, or its static one with `room` tokens."""
    config = plain(model).config
    if is_student(model):
        return StudentCache(config)
    return StaticCache(config=config, max_cache_len=room) if static else DynamicCache(config=config)


def is_student(model: nn.Module) -> bool:
    """Say whether some layers of a model have been converted."""
    return bool(getattr(plain(model).config.get_text_config(), "lineament", None))


@torch.no_grad()
def filled_cache(model: nn.Module, context: int, *, static: bool = False, room: int = 64, seed: int = 0) -> Any:
    """Return a cache that holds `context` tokens, most of them repetitions.

    Args:
        model: a causal language model, in eval mode.
        context: tokens. room: further ones that a static cache has place for.
        static: transformers' static cache; ignored for students.
        seed: of the tokens read.
    """
    if context < 1:
        raise InputError(f"the context is {context} tokens; expected at least 1")
    inner = plain(model)
    config = inner.config.get_text_config()
    longest = learned_positions(config) or context
    read = min(context, max(READ, getattr(config, "sliding_window", None) or 0), longest)
    ids = torch.randint(config.vocab_size, (1, read), generator=generator(seed)).to(next(inner.parameters()).device)
    cache = new_cache(model, context + room, static=static)
    inner(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    for layer in cache.layers:
        _stretch(layer, context - read)
    return cache


def _stretch(layer: Any, tokens: int) -> None:
    """Let a layer of a cache hold more tokens by repeating those it has."""
    if tokens <= 0:
        return
    if getattr(layer, "is_sliding", False):  # full already; only the count goes on
        layer.cumulative_length += tokens
    elif hasattr(layer, "state"):  # a mixer's layer: full heads and latents grow, other states don't
        layer.seen += tokens
        for buffer in (layer.state.full, layer.state.filling):
            if isinstance(buffer, KeyValues):
                buffer.append(*_repeated(buffer, buffer.length, tokens))
    else:
        layer.update(*_repeated(layer, int(layer.get_seq_length()), tokens))


def _repeated(holder: Any, length: int, tokens: int) -> tuple[Tensor, Tensor]:
    index = torch.arange(tokens, device=holder.keys.device) % length
    keys = holder.keys[:, :, index]
    return keys, keys if holder.values is None else holder.values[:, :, index]  # (latents hold both in one)


def cache_bytes(model: nn.Module, context: int) -> int:
    """Return the bytes of a model's cache after `context` tokens of one sequence, in the model's own dtype.

    Softmax models are measured with transformers' dynamic cache, students with their own (spare room included).
    """
    return cache_nbytes(filled_cache(model, context))


@dataclass(frozen=True)
class Speed:
    """Seconds measured.

    Args:
        seconds: of each repetition. what: "decode" (one token) or "prefill" (the whole text). context: tokens before
            the decoded one, or tokens of the text. cache: "student", "dynamic" or "static"; ", in pieces" behind it.
    """

    seconds: tuple[float, ...]
    what: str
    context: int
    cache: str
    slower: dict[str, float] = field(default_factory=dict)  # median seconds of the caches that lost

    @property
    def median(self) -> float:
        """Median seconds of a repetition."""
        return median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second at the median."""
        return (self.context if self.what == "prefill" else 1) / self.median


Step = Callable[[], Any]


def in_turn(
    steps: Mapping[str, Step],
    repeats: int,
    warmup: int = 1,
    device: torch.device = CPU,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Run steps in turn and return the seconds of each, so that whatever else the machine does falls on all of them.

    Args:
        clock: `time.thread_time` for work on one thread of a busy machine: waiting for other processes doesn't count.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warmup + repeats):
        for name, step in steps.items():
            _wait(device)
            start = clock()
            step()
            _wait(device)
            if number >= warmup:
                times[name].append(clock() - start)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _device(models: Mapping[str, nn.Module]) -> torch.device:
    if not models:
        raise InputError("there is no model to time")
    return next(plain(next(iter(models.values()))).parameters()).device


def _decoder(model: nn.Module, context: int, tokens: int, static: bool) -> Step:
    inner, cache = plain(model), filled_cache(model, context, static=static, room=tokens + SPARE)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=next(inner.parameters()).device)
    return lambda: inner(input_ids=ids, past_key_values=cache, use_cache=True)


@torch.no_grad()
def decode_speed(
    models: Mapping[str, nn.Module], context: int, *, tokens: int = 16, warmup: int = 2, static: bool = True
) -> dict[str, Speed]:
    """Time one token after `context` others; the models take turns, token by token.

    Args:
        models: name -> causal language model, all on one device.
        context: tokens in the cache.
        tokens: repetitions of each. warmup: more of them, not counted.
        static: softmax models are timed with the static cache too, and the faster of the two counts.

    Returns:
        name -> speed.
    """
    device, steps = _device(models), {}
    for name, model in models.items():
        kinds = ["student"] if is_student(model) else ["dynamic", "static"] if static else ["dynamic"]
        for kind in kinds:
            steps[f"{name}\n{kind}"] = _decoder(model, context, tokens + warmup, kind == "static")
    times = in_turn(steps, tokens, warmup, device)
    return {name: _best(name, times, "decode", context) for name in models}


def _best(name: str, times: Mapping[str, list[float]], what: str, context: int) -> Speed:
    own = {key.partition("\n")[2]: seconds for key, seconds in times.items() if key.partition("\n")[0] == name}
    fastest = min(own, key=lambda kind: median(own[kind]))
    slower = {kind: median(seconds) for kind, seconds in own.items() if kind != fastest}
    return Speed(tuple(own[fastest]), what, context, fastest, slower)


@torch.no_grad()
def prefill_speed(models: Mapping[str, nn.Module], length: int, *, repeats: int = 3, seed: int = 0) -> dict[str, Speed]:
    """Time reading a prompt of `length` tokens into an empty cache; the models take turns.

    A long prompt is read in one call and in pieces (`models.prefill`), and each model's faster way counts. A way
    that takes a quarter more than the other is tried once only.

    Args:
        models: name -> causal language model, all on one device.
        length: tokens of the prompt, random ones.
        repeats: of a way; medians are compared, since one try says little on a busy machine.
    """
    device, steps = _device(models), {}
    for name, model in models.items():
        inner = plain(model)
        ids = torch.randint(inner.config.get_text_config().vocab_size, (1, length), generator=generator(seed))
        kind = "student" if is_student(model) else "dynamic"
        steps[f"{name}\n{kind}"] = _reader(model, ids.to(device), length)
        if length > PIECE:
            steps[f"{name}\n{kind}, in pieces"] = partial(prefill, inner, ids.to(device), piece=PIECE)
    times = in_turn(steps, 1, 0, device)
    best = {name: min(s[0] for key, s in times.items() if key.partition("\n")[0] == name) for name in models}
    near = {key: step for key, step in steps.items() if times[key][0] <= CLEAR * best[key.partition("\n")[0]]}
    for key, seconds in in_turn(near, repeats - 1, 0, device).items():
        times[key] += seconds
    return {name: _best(name, times, "prefill", length) for name in models}


def _reader(model: nn.Module, ids: Tensor, length: int) -> Step:
    inner = plain(model)

    def read() -> None:
        inner(input_ids=ids, past_key_values=new_cache(model, length), use_cache=True, logits_to_keep=1)

    return read


@dataclass
class Peak:
    """Most memory in use while a block ran, in bytes; set when the block ends."""

    bytes: int = 0


@contextmanager
def peak_memory(device: str | torch.device = "cpu") -> Iterator[Peak]:
    """Measure the most memory in use during a block: of the device, or of this process when the device is the CPU.

    Where the system can't start the count anew (outside Linux), the CPU's number is the process's peak so far.
    """
    device, peak = torch.device(device), Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    restarted = _restart_peak()
    yield peak
    peak.bytes = _resident_peak() if restarted else _lifetime_peak()


def _restart_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), _lifetime_peak())


def _lifetime_peak() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
