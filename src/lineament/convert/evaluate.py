"""Measure a student beside its teacher, and beside the baselines that it must beat."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lineament._base.errors import InputError
from lineament.convert.parts import converted
from lineament.convert.precision import autocast, resolve
from lineament.convert.thresholds import CACHE_CONTEXT, Bar, verdict
from lineament.data import windows
from lineament.graph import swapped
from lineament.nn import build
from lineament.report import Evidence
from lineament.tasks.agreement import agreement
from lineament.tasks.cost import Speed, cache_bytes, decode_speed, prefill_speed
from lineament.tasks.haystack import Haystack
from lineament.tasks.perplexity import bootstrap_ratio, context_gain, gain_kept, perplexity
from lineament.tasks.retrieval import KINDS, Retrieval, make_prompts, paired_points, score

Row = dict[str, Any]
RETRIEVAL_LENGTHS = (512, 1024, 4096)
SPEED_CONTEXTS = {"decode": (128, 2048, 8192, 32768), "prefill": (2048, 4096, 8192)}
LITTLE = 0.005  # a mean gain in perplexity below this is called next to nothing
COSTS = ("cache bytes", "decode", "prefill")
CACHE_CONTEXTS = (512, 2048, 8192, CACHE_CONTEXT)


@contextmanager
def state_off(student: nn.Module) -> Iterator[nn.Module | None]:
    """Give the student with its linear state switched off: the same weights, window, sinks and softmax heads.

    Yields None when the student has nothing exact to fall back on (no window and no sinks).
    """
    found = converted(student)
    if not found or not all(mixer.config.window or mixer.config.sinks for mixer in found.values()):
        yield None
        return
    silent = {name: build(replace(mixer.config, kind="softmax-window", options={})) for name, mixer in found.items()}
    with swapped(student, silent):
        yield student


def evaluate(
    student: Any,
    teacher: Any,
    tokenizer: Any,
    *,
    texts: Mapping[str, Sequence[str]],
    lengths: Sequence[int] = (512, 2048, 8192),
    tokens: int = 32768,
    prompts: int = 40,
    retrieval_lengths: Sequence[int] = RETRIEVAL_LENGTHS,
    untrained: nn.Module | None = None,
    bar: Bar | None = None,
    speed: bool = False,
    seed: int = 0,
    precision: str = "fp32",
    on_row: Callable[[Row], None] | None = None,
) -> Evidence:
    """Compare a student with its teacher on the same text and prompts.

    Args:
        texts: {name: test documents}, never trained on.
        lengths: contexts of the perplexity; each document gives windows of that many tokens.
        tokens: about how many tokens per text and length. prompts: retrieval prompts per length; 0 = none.
        untrained: window + sinks with the same softmax heads and the teacher's weights, the second baseline.
        bar: the goals; None reports without a verdict.
        speed: time decode and prefill too. precision: "fp32", or "bf16" autocast for all models alike; "auto" is bf16
            where that is fast.
        on_row: called with each row as it is measured.

    Returns:
        Evidence whose rows have one measure each: student, teacher, ratio, interval, baselines, goal, verdict.
    """
    if not any(any(text.strip() for text in one) for one in texts.values()):
        raise InputError("there is no test text; give --data with more text")
    start, rows = time.perf_counter(), []
    measure = _Measure(student.eval(), teacher.eval(), tokenizer, untrained, bar, seed)
    hay = Haystack([text for one in texts.values() for text in one], tokenizer)
    limit = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
    retrieval_lengths = [one for one in retrieval_lengths if limit is None or one <= limit]
    device = next(student.parameters()).device
    precision = resolve(precision, device)
    with torch.no_grad(), autocast(precision, device):
        for row in _quality_rows(measure, texts, lengths, tokens, prompts, retrieval_lengths, hay):
            rows.append(row)
            if on_row:
                on_row(row)
    rows += cost_rows(student, teacher, bar=bar, speed=speed)
    return concluded(rows, bar=bar, seed=seed, seconds=time.perf_counter() - start, precision=precision)


def cost_rows(student: nn.Module, teacher: nn.Module, *, bar: Bar | None = None, speed: bool = True) -> list[Row]:
    """Return the rows on bytes of cache and, if asked, on speed: nothing here depends on text or training."""
    with torch.no_grad():
        return list(_Measure(student.eval(), teacher.eval(), None, None, bar, 0).bytes_and_speed(speed))


def concluded(rows: Sequence[Row], *, bar: Bar | None, seed: int, seconds: float, precision: str) -> Evidence:
    """Put measured rows into evidence with a verdict over all that have a goal."""
    return Evidence(
        name="conversion",
        rows=rows,
        claim="the student keeps its teacher's quality for a fraction of the cache",
        threshold=f"goals for {bar.name}: {_say(bar)}" if bar else "none set",
        passed=passed(rows),
        seeds=[seed],
        seconds=seconds,
        notes=_notes(rows) + f"; quality measured in {precision}",
    )


def passed(rows: Sequence[Row]) -> bool | None:
    """Say whether every row with a goal reached it; None when there is no goal."""
    verdicts = [row["verdict"] for row in rows if row.get("verdict")]
    return all(one == "pass" for one in verdicts) if verdicts else None


def _quality_rows(measure, texts, lengths, tokens, prompts, retrieval_lengths, hay) -> Iterator[Row]:
    yield from measure.perplexities(texts, lengths, tokens)
    if prompts:
        for length in retrieval_lengths:
            yield from measure.retrieval(length, prompts, hay)
    yield from measure.agreements(texts, tokens)
    yield from measure.gains(texts, tokens)


class _Measure:
    """One comparison: the models and how each measure is taken of all of them."""

    def __init__(self, student, teacher, tokenizer, untrained, bar: Bar | None, seed: int) -> None:
        self.student, self.teacher, self.tokenizer = student, teacher, tokenizer
        self.untrained, self.bar, self.seed = untrained, bar, seed

    def _others(self) -> Iterator[tuple[str, Any]]:
        """Yield the baselines: (name, context manager giving a model or None)."""
        yield "state_off", state_off(self.student)
        yield "untrained", nullcontext(self.untrained)

    def _windows(self, documents: Sequence[str], length: int, tokens: int) -> torch.Tensor | None:
        """Cut windows of the test documents; None when none is long enough."""
        try:
            return windows(documents, self.tokenizer, length, max_tokens=max(tokens, length))
        except InputError:
            return None

    def perplexities(self, texts, lengths, tokens) -> Iterator[Row]:
        for name, documents in texts.items():
            for length in lengths:
                ids = self._windows(documents, length, tokens)
                if ids is None:
                    yield {"measure": f"perplexity {name} {length}", "note": "no document is long enough"}
                    continue
                ours, theirs = perplexity(self.student, ids), perplexity(self.teacher, ids)
                ratio, low, high = bootstrap_ratio(ours, theirs, seed=self.seed)
                goal = self.bar.perplexity.get(length) if self.bar else None
                row = {
                    "measure": f"perplexity {name} {length}", "student": ours.value, "teacher": theirs.value,
                    "ratio": ratio, "low": low, "high": high,
                }  # fmt: skip
                for other, context in self._others():
                    with context as model:
                        row[other] = None if model is None else perplexity(model, ids).value
                yield row | {"goal": goal, "verdict": verdict(ratio, goal), "tokens": ours.tokens}

    def retrieval(self, length: int, count: int, hay: Haystack) -> Iterator[Row]:
        """Yield one row per kind and one over all kinds for a length."""
        share = max(1, -(-count // len(KINDS)))
        found: dict[str, list[Retrieval]] = {}
        for kind in KINDS:
            try:
                some = make_prompts(self.tokenizer, kind, length, share, filler=hay, seed=self.seed + 1)
                scored = {name: score(model, some) for name, model in self._models()}
            except InputError as error:
                yield {"measure": f"retrieval {kind} {length}", "note": str(error)}
                return
            for name, one in scored.items():
                found.setdefault(name, []).append(one)
            shown = {name: 100 * one.token_accuracy for name, one in scored.items()}
            yield {"measure": f"retrieval {kind} {length}", **shown, "prompts": share}
        yield self._retrieval_total(length, {name: _joined(some) for name, some in found.items()})

    def _models(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield every model that is there: student, teacher, the baselines."""
        yield from (("student", self.student), ("teacher", self.teacher))
        for name, context in self._others():
            with context as model:
                if model is not None:
                    yield name, model

    def _retrieval_total(self, length: int, found: dict[str, Retrieval]) -> Row:
        gap, low, high = paired_points(found["student"], found["teacher"], seed=self.seed)
        mean = {name: 100 * one.token_accuracy for name, one in found.items()}
        prompts = len(found["student"].total)
        row: Row = {
            "measure": f"retrieval {length}", **mean, "lost": -gap, "low": -high, "high": -low, "prompts": prompts,
        }  # fmt: skip
        if self.bar is None:
            return row
        if self.bar.above_off is not None:
            gained = mean["student"] - mean.get("state_off", 0.0)
            return row | {"goal": self.bar.above_off, "verdict": verdict(gained, self.bar.above_off, at_most=False)}
        goal = self.bar.points.get(length)
        return row | {"goal": goal, "verdict": verdict(-gap, goal)}

    def agreements(self, texts, tokens) -> Iterator[Row]:
        for name, documents in texts.items():
            ids = self._windows(documents, 1024, tokens // 4)
            if ids is not None:
                found = agreement(self.student, self.teacher, ids)
                yield {"measure": f"KL to teacher {name} 1024", "student": found.kl, "teacher": 0.0}
                yield {"measure": f"same next token {name} 1024", "student": found.top1, "teacher": 1.0}

    def gains(self, texts, tokens) -> Iterator[Row]:
        for name, documents in texts.items():
            ids = self._windows(documents, 2048, tokens // 2)
            if ids is None:
                continue
            ours, theirs = context_gain(self.student, ids), context_gain(self.teacher, ids)
            share, low, high = gain_kept(ours, theirs, seed=self.seed)
            goal = self.bar.gain if self.bar and theirs.gain > 0 else None
            yield {
                "measure": f"gain from context {name}", "student": ours.gain, "teacher": theirs.gain,
                "ratio": share, "low": low, "high": high, "goal": goal, "verdict": verdict(share, goal, at_most=False),
            }  # fmt: skip

    def bytes_and_speed(self, speed: bool) -> Iterator[Row]:
        for context in CACHE_CONTEXTS:
            ours, theirs = (cache_bytes(model, context) for model in (self.student, self.teacher))
            goal = self.bar.cache if self.bar and context == CACHE_CONTEXT else None
            yield {
                "measure": f"cache bytes {context}", "student": ours, "teacher": theirs, "ratio": ours / theirs,
                "goal": goal, "verdict": verdict(ours / theirs, goal),
            }  # fmt: skip
        if not speed:
            return
        pair = {"student": self.student, "teacher": self.teacher}
        for context in SPEED_CONTEXTS["decode"]:
            yield _speed_row(f"decode tokens/s {context}", decode_speed(pair, context))
        for length in SPEED_CONTEXTS["prefill"]:
            yield _speed_row(f"prefill tokens/s {length}", prefill_speed(pair, length))


def _joined(some: Sequence[Retrieval]) -> Retrieval:
    """Put the scores of several kinds one behind another."""
    return Retrieval(
        *(torch.cat([getattr(one, name) for one in some]) for name in ("right", "total", "nll", "distance"))
    )


def _speed_row(name: str, speeds: Mapping[str, Speed]) -> Row:
    ours, theirs = speeds["student"].tokens_per_second, speeds["teacher"].tokens_per_second
    return {"measure": name, "student": ours, "teacher": theirs, "ratio": ours / theirs}


def _say(bar: Bar) -> str:
    parts = [f"cache at {CACHE_CONTEXT} <= {bar.cache}x"]
    parts += [f"perplexity at {n} <= {x}x" for n, x in bar.perplexity.items()]
    parts += [f"retrieval at {n} within {x} points" for n, x in bar.points.items()]
    if bar.above_off is not None:
        parts.append(f"retrieval >= {bar.above_off} points above the state switched off")
    return "; ".join([*parts, f"gain from context >= {bar.gain} of the teacher's"])


def _notes(rows: Sequence[Row]) -> str:
    """Say whether the linear part earns its keep."""
    said = []
    pairs = [r for r in rows if r.get("state_off") is not None and r.get("student") is not None]
    texts = [r for r in pairs if r["measure"].startswith("perplexity")]
    found = [r for r in pairs if r["measure"].startswith("retrieval") and "lost" in r]
    if texts:
        better = sum(r["student"] < r["state_off"] for r in texts)
        said.append(f"perplexity is better than with the linear state off in {better} of {len(texts)} rows")
        gained = sum(1 - r["student"] / r["state_off"] for r in texts) / len(texts)
        little = ": the linear part does next to nothing here" if gained < LITTLE else ""
        said.append(f"switching it off costs {100 * gained:.2f} % of perplexity on average{little}")
    if found:
        better = sum(r["student"] > r["state_off"] for r in found)
        said.append(f"retrieval is better than with the linear state off at {better} of {len(found)} lengths")
    if pairs and not any(
        (r["student"] < r["state_off"]) if r in texts else (r["student"] > r["state_off"]) for r in texts + found
    ):
        said.append("the linear part does nothing here")
    return "; ".join(said)
