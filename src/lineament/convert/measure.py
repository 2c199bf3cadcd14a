"""Measure the damage table of a model, head by head, on activations kept from one whole run."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lineament.convert.probe import Call, limit_heads, probing
from lineament.convert.select import DamageTable, Sample
from lineament.graph import hidden_of, run_from, stream

Progress = Callable[[int, int], None]


def _batch(sample: Sample) -> tuple[dict[str, Any], Tensor]:
    """Return what the model is called with, and where each scored token's logits will be."""
    wanted, place = torch.unique(sample.positions - 1, return_inverse=True)
    return {"input_ids": sample.ids, "use_cache": False, "logits_to_keep": wanted}, place


def _losses(logits: Tensor, sample: Sample, place: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scored tokens' losses [N] and log probabilities [N, vocabulary]."""
    picked = logits[sample.rows, place].float().log_softmax(-1)
    targets = sample.ids[sample.rows, sample.positions]
    return -picked.gather(-1, targets[:, None])[:, 0], picked


@torch.no_grad()
def measure_damage(
    model: nn.Module,
    layers: Sequence[str],
    attentions: Sequence[nn.Module],
    samples: Sequence[Sample],
    *,
    key_heads: int,
    window: int,
    sinks: int,
    teacher: str,
    free: Collection[int] | None = None,
    about: dict[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> DamageTable:
    """Limit one key-value head at a time and score what is lost.

    Args:
        model: a causal language model; comes back bit-identical.
        layers: names of its decoder layers; attentions: their attention modules, in order.
        samples: what is scored. window, sinks: what a limited head still sees.
        teacher: the digest written into the table.
        free: layers that a conversion may touch, None for all. The others (sliding windows) are never limited, here as
            in the student, and stand in the table with 0.
        on_progress: called with (done, all) after each head.
    """
    shape, free = (len(layers), key_heads), range(len(layers)) if free is None else free
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name in ("perplexity", "kl", "retrieval")}
    counts = {kind: sum(len(s.rows) for s in samples if s.kind == kind) for kind in ("text", "retrieval")}
    training, done = model.training, 0
    model.eval()
    for sample in samples:
        batch, place = _batch(sample)
        base, base_logs = _losses(model(**batch).logits, sample, place)
        for i, (_, _, args, kwargs) in enumerate(stream(model, layers, batch)):
            for head in range(key_heads if i in free else 0):
                with probing(attentions[i:], limit_heads({i: (head,)}, window=window, sinks=sinks)):
                    logits = run_from(model, layers, i, hidden_of(args, kwargs), batch)
                losses, logs = _losses(logits, sample, place)
                rise = (losses - base).cpu().double().sum()
                if sample.kind == "text":
                    sums["perplexity"][i, head] += rise
                    sums["kl"][i, head] += (base_logs.exp() * (base_logs - logs)).sum().cpu().double()
                else:
                    sums["retrieval"][i, head] += rise
                done += 1
                if on_progress:
                    on_progress(done, len(samples) * len(free) * key_heads)
    model.train(training)
    means = {n: s / max(1, counts["retrieval" if n == "retrieval" else "text"]) for n, s in sums.items()}
    return _table(means, window, sinks, teacher, {"method": "measured", **counts, **(about or {})})


def estimate_damage(
    model: nn.Module,
    layers: Sequence[str],
    attentions: Sequence[nn.Module],
    samples: Sequence[Sample],
    *,
    key_heads: int,
    window: int,
    sinks: int,
    teacher: str,
    free: Collection[int] | None = None,
    about: dict[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> DamageTable:
    """Estimate the same table by one backward per sample: the slope along a gate on each head.

    `o = o_full + g (o_limited - o_full)`. Text is scored by the slope of the KL to the whole model at g = 1/2 (at
    g = 0 the KL has none), answers by the slope of their loss at g = 0. About a tenth of the cost of measuring.
    """
    points = {"text": (0.5,), "retrieval": (0.0,)}
    exact = (window, sinks)
    found = gate_slopes(
        model, layers, attentions, samples, points, key_heads, exact, free=free, on_progress=on_progress
    )
    half, zero = found[0.5], found[0.0]
    means = {"perplexity": half["perplexity"], "kl": half["kl"], "retrieval": zero["retrieval"]}
    counts = {kind: sum(len(s.rows) for s in samples if s.kind == kind) for kind in ("text", "retrieval")}
    return _table(means, window, sinks, teacher, {"method": "gates", **counts, **(about or {})})


def with_slopes(
    table: DamageTable,
    model: nn.Module,
    layers: Sequence[str],
    attentions: Sequence[nn.Module],
    samples: Sequence[Sample],
    *,
    key_heads: int,
    free: Collection[int] | None = None,
    on_progress: Progress | None = None,
) -> DamageTable:
    """Add what each head is worth where all (of the `free` layers) are half and wholly limited to a measured table."""
    both = (0.5, 1.0)
    found = gate_slopes(
        model, layers, attentions, samples, {"text": both, "retrieval": both}, key_heads, (table.window, table.sinks),
        free=free, on_progress=on_progress,
    )  # fmt: skip
    slopes = {str(g): {name: _rounded(found[g][name]) for name in ("kl", "retrieval")} for g in both}
    return replace(table, slopes=slopes)


def gate_slopes(
    model: nn.Module,
    layers: Sequence[str],
    attentions: Sequence[nn.Module],
    samples: Sequence[Sample],
    points: dict[str, tuple[float, ...]],
    key_heads: int,
    exact: tuple[int, int],
    *,
    free: Collection[int] | None = None,
    on_progress: Progress | None = None,
) -> dict[float, dict[str, Tensor]]:
    """Return {g: {"perplexity", "kl", "retrieval": [L, Hk] slopes per scored token}} at the gates asked for.

    Args:
        points: {"text": gates, "retrieval": gates}. exact: window and sinks of a limited head.
        free: layers with gates, None for all; the slopes of others are 0.
    """
    free = range(len(layers)) if free is None else free
    shape, device = (len(layers), key_heads), next(model.parameters()).device
    wanted = sorted({g for gates in points.values() for g in gates})
    sums = {g: {n: torch.zeros(shape, dtype=torch.float64) for n in ("perplexity", "kl", "retrieval")} for g in wanted}
    counts = {kind: max(1, sum(len(s.rows) for s in samples if s.kind == kind)) for kind in points}
    flags, training = [p.requires_grad for p in model.parameters()], model.training
    model.eval().requires_grad_(False)
    try:
        for done, sample in enumerate(samples):
            for g in points[sample.kind]:
                gates = torch.full(shape, g, device=device, requires_grad=True)
                slopes = _slopes(model, attentions, sample, gates, key_heads, exact, free)
                names = ("perplexity", "kl") if sample.kind == "text" else ("retrieval",)
                for name, slope in zip(names, slopes, strict=True):
                    sums[g][name] += slope.cpu().double() / counts[sample.kind]
            if on_progress:
                on_progress(done + 1, len(samples))
    finally:
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
        model.train(training)
    return sums


def _slopes(
    model: nn.Module, attentions: Sequence[nn.Module], sample: Sample, gates: Tensor, key_heads: int,
    exact: tuple[int, int], free: Collection[int],
) -> list[Tensor]:  # fmt: skip
    """Return the slopes along the gates of the summed loss and, for text, of the summed KL to the whole model."""

    def handle(call: Call) -> Tensor:
        full = call.ordinary()
        if call.layer not in free:
            return full
        limited = call.limited(*exact)
        gate = gates[call.layer].repeat_interleave(full.shape[2] // key_heads)[:, None]
        return full + gate * (limited - full)

    batch, place = _batch(sample)
    with torch.no_grad():
        _, whole = _losses(model(**batch).logits, sample, place)
    with torch.enable_grad(), probing(attentions, handle):
        losses, logs = _losses(model(**batch).logits, sample, place)
        wanted = [losses.sum()]
        if sample.kind == "text":
            wanted.append((whole.exp() * (whole - logs)).sum())
        return [torch.autograd.grad(one, gates, retain_graph=True)[0] for one in wanted]


def _table(means: dict[str, Tensor], window: int, sinks: int, teacher: str, about: dict[str, Any]) -> DamageTable:
    rows: Any = {name: _rounded(mean) for name, mean in means.items()}
    return DamageTable(teacher=teacher, window=window, sinks=sinks, about=about, **rows)


def _rounded(values: Tensor) -> list[list[float]]:
    return [[float(f"{x:.6g}") for x in row] for row in values.tolist()]
