"""Measure a student beside its teacher, and beside the baselines that it must beat."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.convert.parts import converted
from lineament.convert.precision import autocast, resolve
from lineament.convert.scores import Numbers, Scores, model_digest
from lineament.convert.thresholds import CACHE_CONTEXT, Bar, undecided, verdict
from lineament.data import windows
from lineament.graph import swapped
from lineament.models.adapters import learned_positions
from lineament.models.student import build_student
from lineament.nn import build
from lineament.report import Evidence
from lineament.report.tables import table
from lineament.tasks.agreement import agreement
from lineament.tasks.cost import Speed, cache_bytes, decode_speed, prefill_speed
from lineament.tasks.haystack import Haystack
from lineament.tasks.perplexity import ContextGain, Perplexity, bootstrap_ratio, gain_kept, window_nll
from lineament.tasks.retrieval import Retrieval, paired_points, token_ids
from lineament.tasks.shared_haystack import make_bodies, score_bodies
from lineament.tasks.templates import KINDS

Row = dict[str, Any]
RETRIEVAL_LENGTHS = (512, 1024, 4096)
SPEED_CONTEXTS = {"decode": (128, 2048, 8192, 32768), "prefill": (2048, 4096, 8192)}
DECODED = 64  # positions that timing one token takes at most, after the context
AGREEMENT_LENGTH = 1024
GAIN_LENGTH, GAIN_TAIL = 2048, 512  # of a whole window, and of its end: scored, and read before that for comparison
FEW_WINDOWS = 4  # fewer make no interval worth the name
ABLE = 70.0  # percent of answer tokens that a teacher must get right for a comparison to say much
PAIR = ("student", "teacher")
LITTLE = 0.005  # a mean gain in perplexity below this is called next to nothing
SHOWN = ("measure", "teacher", "student", "ratio", "lost", "state_off", "goal", "verdict")
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


def untrained_window(teacher: nn.Module, student: nn.Module) -> nn.Module | None:
    """Return window + sinks with a student's softmax heads and its teacher's own weights, the second baseline.

    None when the student has no window and no sinks, or is that baseline itself.
    """
    configs = {mixer.layer: mixer.config for mixer in converted(student).values()}
    kinds = {config.kind for config in configs.values()}
    if kinds <= {"softmax-window"} or not all(one.window or one.sinks for one in configs.values()):
        return None
    bare = {layer: replace(one, kind="softmax-window", options={}) for layer, one in configs.items()}
    return build_student(teacher, bare, share=True)


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
    folder: Path | None = None,
) -> Evidence:
    """Compare a student with its teacher on the same text and prompts.

    Args:
        texts: {name: test documents}, never trained on.
        lengths: contexts of the perplexity; each document gives windows of that many tokens. Nothing is measured on
            contexts longer than the teacher was made for.
        tokens: about how many tokens per text and length. prompts: retrieval questions per length, several of them on
            one text (`tasks.make_bodies`); 0 = none.
        untrained: window + sinks with the same softmax heads and the teacher's weights, the second baseline.
        bar: the goals; None reports without a verdict.
        speed: time decode and prefill too. precision: "fp32", or "bf16" autocast for all models alike; "auto" is bf16
            where that is fast.
        on_row: called with each row as it is measured.
        folder: keep what each model scored here as soon as it is known, and take from here what is known already of
            this very model on these texts, tokens, prompts, seed and precision: students that share a folder have
            their teacher measured once. Speed is timed anew.

    Returns:
        Evidence whose rows have one measure each: student, teacher, ratio, interval, baselines, goal, verdict.
    """
    if not any(any(text.strip() for text in one) for one in texts.values()):
        raise InputError("there is no test text; give --data with more text")
    start = time.perf_counter()
    rows: list[Row] = []
    device = next(student.parameters()).device
    precision = resolve(precision, device)
    sample = next(text for one in texts.values() for text in one if text.strip())
    about = {
        "texts": dict(texts), "sample": token_ids(tokenizer, sample), "tokens": tokens, "prompts": prompts,
        "seed": seed, "precision": precision,
    }  # fmt: skip
    scores = Scores(folder, about)
    measure = _Measure(student.eval(), teacher.eval(), tokenizer, untrained, bar=bar, seed=seed, scores=scores)
    hay = Haystack([text for one in texts.values() for text in one], tokenizer)
    lengths, retrieval_lengths = ([n for n in some if measure.fits(n)] for some in (lengths, retrieval_lengths))
    with torch.no_grad(), autocast(precision, device):
        rows += _said(_quality_rows(measure, texts, lengths, tokens, prompts, retrieval_lengths, hay), on_row)
    with torch.no_grad():
        rows += _said(measure.bytes_and_speed(speed), on_row)
    return concluded(rows, bar=bar, seed=seed, seconds=time.perf_counter() - start, precision=precision)


def _said(rows: Iterable[Row], on_row: Callable[[Row], None] | None) -> Iterator[Row]:
    """Pass rows on and tell of each."""
    for row in rows:
        if on_row:
            on_row(row)
        yield row


def cost_rows(
    student: nn.Module,
    teacher: nn.Module,
    *,
    bar: Bar | None = None,
    speed: bool = True,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Return the rows on bytes of cache and, if asked, on speed: nothing here depends on text or training."""
    with torch.no_grad():
        measure = _Measure(student.eval(), teacher.eval(), None, None, bar=bar, seed=0, scores=Scores(None, {}))
        return list(_said(measure.bytes_and_speed(speed), on_row))


def shown(evidence: Evidence) -> Table:
    """Lay a measurement out for a terminal of 80 columns: the page and the JSON have all that was measured."""
    rows = in_megabytes(evidence.rows)
    columns = [name for name in SHOWN if any(name in row for row in rows)]
    return table(rows, title=f"{evidence.name}: {evidence.verdict}", columns=columns)


def in_megabytes(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return rows for people to read: caches in megabytes."""
    found = []
    for row in map(dict, rows):
        if row["measure"].startswith("cache bytes"):
            size = {name: round(row[name] / 1e6) for name in PAIR if row.get(name) is not None}
            row = {**row, **size, "measure": row["measure"].replace("bytes", "MB")}
        found.append(row)
    return found


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
    yield from measure.gains(texts, lengths, tokens)


class _Measure:
    """One comparison: the models and how each measure is taken of all of them."""

    def __init__(self, student, teacher, tokenizer, untrained, *, bar: Bar | None, seed: int, scores: Scores) -> None:
        self.student, self.teacher, self.tokenizer = student, teacher, tokenizer
        self.untrained, self.bar, self.seed, self.scores = untrained, bar, seed, scores
        self.limit = getattr(teacher.config.get_text_config(), "max_position_embeddings", None) or math.inf
        self.last = learned_positions(teacher.config) or math.inf
        kept = {} if scores.folder is None else {"student": student, "teacher": teacher, "untrained": untrained}
        self.digests = {name: model_digest(model) for name, model in kept.items()}

    def fits(self, length: int) -> bool:
        """Say whether the teacher was made for contexts of that length."""
        return length <= self.limit

    def _once(self, measure: str, take: Callable[[], Numbers], *names: str) -> Numbers:
        """Take a measure that depends on the models of these names."""
        return self.scores.once(measure, take, of=[self.digests.get(name) for name in names])

    def _models(self) -> dict[str, AbstractContextManager[Any]]:
        """Return every model, as a context manager that gives it or None."""
        return {
            "student": nullcontext(self.student), "teacher": nullcontext(self.teacher),
            "state_off": state_off(self.student), "untrained": nullcontext(self.untrained),
        }  # fmt: skip

    def _each(
        self, measure: str, take: Callable[[nn.Module], Numbers], only: Sequence[str] | None = None
    ) -> dict[str, Numbers]:
        """Take a measure of every model that is there (or of some), each once."""
        found = {}
        models = {name: one for name, one in self._models().items() if only is None or name in only}
        for name, context in models.items():
            with context as model:
                if model is not None:
                    weights = "student" if name == "state_off" else name
                    found[name] = self._once(f"{name} {measure}", partial(take, model), weights)
        return found

    def _nll(self, name: str, ids: Tensor, *, last: int | None = None, only: Sequence[str] | None = None):
        """Return {model: negative log likelihood of every scored token, [N, scored]}."""
        measure = f"nll {name} {len(ids)} x {ids.shape[1]}" + (f" last {last}" if last else "")
        found = self._each(measure, lambda model: {"nll": window_nll(model, ids, last=last)}, only)
        return {model: one["nll"] for model, one in found.items()}

    def _windows(self, documents: Sequence[str], length: int, tokens: int) -> Tensor | None:
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
                found = {model: Perplexity.of(nll) for model, nll in self._nll(name, ids).items()}
                ratio, low, high = bootstrap_ratio(found["student"], found["teacher"], seed=self.seed)
                goal = self.bar.perplexity.get(length) if self.bar else None
                values = {model: found[model].value if model in found else None for model in self._models()}
                yield {
                    "measure": f"perplexity {name} {length}", "student": values.pop("student"),
                    "teacher": values.pop("teacher"), "ratio": ratio, "low": low, "high": high, **values,
                    "goal": goal, "verdict": verdict(ratio, goal), "tokens": found["student"].tokens, **_few(ids),
                }  # fmt: skip

    def retrieval(self, length: int, count: int, hay: Haystack) -> Iterator[Row]:
        """Yield one row per kind and one over all kinds for a length."""
        try:
            bodies = make_bodies(self.tokenizer, length, count, filler=hay, seed=self.seed + 1)
        except InputError as error:
            yield {"measure": f"retrieval any kind {length}", "note": str(error)}
            return
        taken = self._each(f"retrieval {length}", lambda model: vars(score_bodies(model, bodies)))
        found = {name: Retrieval(**one) for name, one in taken.items()}
        asked = [prompt.kind for body in bodies for prompt in body.prompts]
        for kind in KINDS:
            chosen = torch.tensor([one == kind for one in asked])
            if chosen.any():
                shown = _right({name: one.take(chosen) for name, one in found.items()})
                prompts = {"prompts": int(chosen.sum())}
                yield {"measure": f"retrieval {kind} {length}", **shown, **prompts, **_weak(shown)}
        yield self._retrieval_total(length, found) | {"texts": len(bodies)}

    def _retrieval_total(self, length: int, found: dict[str, Retrieval]) -> Row:
        gap, low, high = paired_points(found["student"], found["teacher"], seed=self.seed)
        mean, prompts = _right(found), len(found["student"].total)
        row: Row = {
            "measure": f"retrieval {length}", **mean, "lost": -gap, "low": -high, "high": -low, "prompts": prompts,
            **_weak(mean),
        }  # fmt: skip
        if self.bar is None:
            return row
        if self.bar.above_off is not None:
            gained = mean["student"] - mean.get("state_off", 0.0)
            return row | {"goal": self.bar.above_off, "verdict": verdict(gained, self.bar.above_off, at_most=False)}
        goal = self.bar.points.get(length)
        return row | {"goal": goal, "verdict": verdict(-gap, goal)}

    def agreements(self, texts, tokens) -> Iterator[Row]:
        for name, documents in texts.items() if self.fits(AGREEMENT_LENGTH) else ():
            ids = self._windows(documents, AGREEMENT_LENGTH, tokens // 4)
            if ids is not None:
                found = self._once(f"agreement {name}", partial(self._agreement, ids), *PAIR)
                kl, top1 = float(found["kl"]), float(found["top1"])
                yield {"measure": f"KL to teacher {name} {AGREEMENT_LENGTH}", "student": kl, "teacher": 0.0}
                yield {"measure": f"same next token {name} {AGREEMENT_LENGTH}", "student": top1, "teacher": 1.0}

    def _agreement(self, ids: Tensor) -> Numbers:
        found = agreement(self.student, self.teacher, ids)
        return {name: torch.tensor(getattr(found, name), dtype=torch.float64) for name in ("kl", "top1")}

    def gains(self, texts, lengths, tokens) -> Iterator[Row]:
        """Yield what context is worth; its long reading is that of the perplexity where that length is measured."""
        for name, documents in texts.items() if self.fits(GAIN_LENGTH) else ():
            ids = self._windows(documents, GAIN_LENGTH, tokens if GAIN_LENGTH in lengths else tokens // 2)
            if ids is None:
                continue
            long = self._nll(name, ids, only=PAIR)
            short = self._nll(name, ids[:, -2 * GAIN_TAIL :], last=GAIN_TAIL, only=PAIR)
            ours, theirs = (
                ContextGain(Perplexity.of(short[one]), Perplexity.of(long[one][:, -GAIN_TAIL:])) for one in PAIR
            )
            share, low, high = gain_kept(ours, theirs, seed=self.seed)
            goal = self.bar.gain if self.bar and theirs.gain > 0 else None
            yield {
                "measure": f"gain from context {name}", "student": ours.gain, "teacher": theirs.gain,
                "ratio": share, "low": low, "high": high, "goal": goal, "verdict": verdict(share, goal, at_most=False),
                **_few(ids),
            }  # fmt: skip

    def bytes_and_speed(self, speed: bool) -> Iterator[Row]:
        for context in CACHE_CONTEXTS:
            found = self._each(f"cache {context}", partial(_cache, context=context), PAIR)
            ours, theirs = (int(found[name]["bytes"]) for name in PAIR)
            goal = self.bar.cache if self.bar and context == CACHE_CONTEXT else None
            yield {
                "measure": f"cache bytes {context}", "student": ours, "teacher": theirs, "ratio": ours / theirs,
                "goal": goal, "verdict": verdict(ours / theirs, goal),
            }  # fmt: skip
        if speed:
            pair = {"student": self.student, "teacher": self.teacher}
            for what, time_both in (("decode", decode_speed), ("prefill", prefill_speed)):
                room = DECODED if what == "decode" else 0
                for length in (n for n in SPEED_CONTEXTS[what] if n + room <= self.last):
                    yield _speed_row(f"{what} tokens/s {length}", time_both(pair, length))


def _cache(model: nn.Module, context: int) -> Numbers:
    return {"bytes": torch.tensor(cache_bytes(model, context))}


def _right(found: Mapping[str, Retrieval]) -> dict[str, float]:
    return {name: 100 * one.token_accuracy for name, one in found.items()}


def _few(ids: Tensor) -> Row:
    """Say so when an interval rests on next to nothing."""
    count = len(ids)
    return {"note": f"only {count} window{'s' * (count > 1)}"} if count < FEW_WINDOWS else {}


def _weak(right: Mapping[str, float]) -> Row:
    """Say so when the teacher can't do what its student is asked for."""
    found = right["teacher"]
    return {"note": f"the teacher itself gets only {found:.0f} % right"} if found < ABLE else {}


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
    """Say which goals were missed, and whether the linear part earns its keep."""
    missed = [r["measure"] + " (goal inside the interval)" * undecided(r) for r in rows if r.get("verdict") == "miss"]
    said = [f"missed: {', '.join(missed)}"] if missed else []
    pairs = [r for r in rows if r.get("state_off") is not None and r.get("student") is not None]
    texts = [r for r in pairs if r["measure"].startswith("perplexity")]
    found = [r for r in pairs if r["measure"].startswith("retrieval") and "lost" in r]
    if texts:
        better = sum(r["student"] < r["state_off"] for r in texts)
        said.append(f"perplexity is better than with the linear state off in {better} of {len(texts)} rows")
        gained = sum(1 - r["student"] / r["state_off"] for r in texts) / len(texts)
        little = ": the linear part does next to nothing here" if gained < LITTLE else ""
        said.append(f"switching it off costs {100 * gained:.2f} % of perplexity on average{little}")
    bare = [r for r in texts if r.get("untrained") is not None]
    if bare:
        better = sum(r["student"] < r["untrained"] for r in bare)
        said.append(f"perplexity is better than that of untrained window + sinks in {better} of {len(bare)} rows")
    if found:
        better = sum(r["student"] > r["state_off"] for r in found)
        said.append(f"retrieval is better than with the linear state off at {better} of {len(found)} lengths")
    if pairs and not any(
        (r["student"] < r["state_off"]) if r in texts else (r["student"] > r["state_off"]) for r in texts + found
    ):
        said.append("the linear part does nothing here")
    return "; ".join(said)
