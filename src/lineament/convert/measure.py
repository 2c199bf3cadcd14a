"""Measure the damage table of a model, head by head, on activations kept from one whole run."""

from collections.abc import Callable, Sequence
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
    about: dict[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> DamageTable:
    """Limit one key-value head at a time and score what is lost.

    Args:
        model: a causal language model; comes back bit-identical.
        layers: names of its decoder layers; attentions: their attention modules, in order.
        samples: what is scored. window, sinks: what a limited head still sees.
        teacher: the digest written into the table.
        on_progress: called with (done, all) after each head.
    """
    shape = (len(layers), key_heads)
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name in ("perplexity", "kl", "retrieval")}
    counts = {kind: sum(len(s.rows) for s in samples if s.kind == kind) for kind in ("text", "retrieval")}
    training, done = model.training, 0
    model.eval()
    for sample in samples:
        batch, place = _batch(sample)
        base, base_logs = _losses(model(**batch).logits, sample, place)
        for i, (_, _, args, kwargs) in enumerate(stream(model, layers, batch)):
            for head in range(key_heads):
                with probing(attentions[i:], limit_heads({i: (head,)}, window=window, sinks=sinks)):
                    logits = run_from(model, layers, i, hidden_of(args, kwargs), batch)
                losses, logs = _losses(logits, sample, place)
                rise = (losses - base).double().sum().cpu()
                if sample.kind == "text":
                    sums["perplexity"][i, head] += rise
                    sums["kl"][i, head] += (base_logs.exp() * (base_logs - logs)).sum().double().cpu()
                else:
                    sums["retrieval"][i, head] += rise
                done += 1
                if on_progress:
                    on_progress(done, len(samples) * shape[0] * shape[1])
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
    about: dict[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> DamageTable:
    """Estimate the same table by one backward per sample: the slope of the loss along a gate on each head.

    `o = o_full + g (o_limited - o_full)` with g = 0; damage is about dloss/dg. The KL has no slope at g = 0, so its
    column holds the squared slope summed over the scored tokens' losses (its leading term, up to a factor).
    """
    shape = (len(layers), key_heads)
    gates = torch.zeros(shape, requires_grad=True, device=next(model.parameters()).device)
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name in ("perplexity", "kl", "retrieval")}
    counts = {kind: sum(len(s.rows) for s in samples if s.kind == kind) for kind in ("text", "retrieval")}
    flags = [p.requires_grad for p in model.parameters()]
    training = model.training
    model.eval().requires_grad_(False)

    def handle(call: Call) -> Tensor:
        full, limited = call.ordinary(), call.limited(window, sinks)
        group = full.shape[2] // key_heads
        gate = gates[call.layer].repeat_interleave(group)[:, None]
        return full + gate * (limited - full)

    try:
        for done, sample in enumerate(samples):
            batch, place = _batch(sample)
            with torch.enable_grad(), probing(attentions, handle):
                losses, _ = _losses(model(**batch).logits, sample, place)
                (slope,) = torch.autograd.grad(losses.sum(), gates)
            text = sample.kind == "text"
            sums["perplexity" if text else "retrieval"] += slope.double().cpu()
            if text:
                sums["kl"] += slope.double().cpu().square() / len(sample.rows)
            if on_progress:
                on_progress(done + 1, len(samples))
    finally:
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
        model.train(training)
    means = {n: s / max(1, counts["retrieval" if n == "retrieval" else "text"]) for n, s in sums.items()}
    return _table(means, window, sinks, teacher, {"method": "gates", **counts, **(about or {})})


def _table(means: dict[str, Tensor], window: int, sinks: int, teacher: str, about: dict[str, Any]) -> DamageTable:
    rows = {name: [[float(f"{x:.6g}") for x in row] for row in mean.tolist()] for name, mean in means.items()}
    return DamageTable(teacher=teacher, window=window, sinks=sinks, about=about, **rows)

