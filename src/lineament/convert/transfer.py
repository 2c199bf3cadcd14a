"""Attention transfer: each layer's mixer learns the teacher's attention from the teacher's own activations.

Layers are visited in order; a pool of token windows is carried through the teacher one layer at a time, so that one
layer's weights and one layer's queries, keys and values are needed at once.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from lineament import io
from lineament._base.errors import InputError
from lineament._base.seeds import generator
from lineament.convert.plan import Plan
from lineament.convert.precision import autocast
from lineament.convert.probe import Call, probing
from lineament.graph import stream
from lineament.graph.stream import Batch
from lineament.models.adapters import adapter_for
from lineament.train import FitConfig, fit
from lineament.train.loop import to_device

GATES = (
    "*log_scale", "*scale_query", "*gate_key", "*gate_bias", "*decay", "*decay_bias", "*decay_rate", "*temperature",
    "*window_logit", "*beta_bias", "*key_length",
)  # fmt: skip
UNNORMALISED = ("lightning", "gated-deltanet", "kda")


@dataclass(frozen=True)
class LayerPool:
    """What one layer's mixer is trained on: one entry per window of the pool.

    Args:
        q: [1, T, Hq', K] scaled. k, v: [1, T, Hk', K]. target: [1, T, Hq', V], the teacher's output of these heads.
        x: [1, T, D] the layer's input. Only the heads that don't stay softmax.
    """

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    target: list[Tensor]
    x: list[Tensor]


def pooled_layers(
    model: nn.Module,
    layers: Sequence[str],
    attentions: Sequence[nn.Module],
    windows: Sequence[Batch],
    *,
    full_heads: Mapping[int, Sequence[int]],
    precision: str,
    last: int | None = None,
) -> Iterator[tuple[int, LayerPool]]:
    """Carry a pool of windows through the teacher, yielding every layer's queries, keys and values.

    Args:
        windows: ids [1, T] each, or the model's arguments.
        full_heads: {layer: key-value heads left out because they stay softmax}.
        last: stop after this layer; None goes through all.
    """
    device = next(model.parameters()).device
    stop = len(layers) if last is None else last + 1
    keep_dtype = torch.bfloat16 if precision == "bf16" else None
    with autocast(precision, device):
        streams = [stream(model, layers[:stop], to_device(one, device)) for one in windows]
        calls = [next(one) for one in streams]
    for index in range(stop):
        pool = LayerPool([], [], [], [], [])
        for row, one in enumerate(streams):
            caught: list[tuple[Tensor, ...]] = []
            handler = _catcher(caught, full_heads.get(index, ()), keep_dtype)
            with torch.no_grad(), autocast(precision, device), probing(attentions[index : index + 1], handler):
                if index + 1 < stop:
                    calls[row] = next(one)  # runs layer `index` on the way to the next
                else:
                    _, layer, args, kwargs = calls[row]
                    layer(*args, **kwargs)
            for name, tensor in zip(("q", "k", "v", "target", "x"), caught[0], strict=True):
                getattr(pool, name).append(tensor)
        yield index, pool


def _catcher(caught: list[tuple[Tensor, ...]], full: Sequence[int], dtype: torch.dtype | None) -> Callable:
    def handle(call: Call) -> Tensor:
        ordinary = call.ordinary()
        key_heads = call.key.shape[2]
        rest = [head for head in range(key_heads) if head not in full]
        group = call.query.shape[2] // key_heads
        wide = [head * group + one for head in rest for one in range(group)]
        parts = (
            call.scaled_query()[:, :, wide], call.key[:, :, rest], call.value[:, :, rest], ordinary[:, :, wide],
            call.hidden,
        )  # fmt: skip
        caught.append(tuple(part.to(dtype or part.dtype).contiguous() for part in parts))
        return ordinary

    return handle


def relative_error(output: Tensor, target: Tensor, out: Tensor | None = None, first: int = 0) -> Tensor:
    """Return |(output - target) W|^2 / |target W|^2 from token `first` on: one number that layers of any scale share.

    Args:
        output, target: [B, T, Hq', V]. out: W [Hq' V, D], the layer's output projection; None measures the heads.
    """
    target, gap = target[:, first:].float(), (output[:, first:].float() - target[:, first:].float())
    if out is not None:
        out = out.to(gap.device)
        target, gap = target.flatten(2) @ out, gap.flatten(2) @ out
    return gap.square().sum() / target.square().sum().clamp_min(1e-12)


def output_weight(attention: nn.Module, full: Sequence[int], key_heads: int) -> Tensor | None:
    """Return the rows of an attention's output projection that its converted heads feed, [Hq' V, D], in float32."""
    name = adapter_for(attention).projections[-1]
    projection = getattr(attention, name, None)
    if projection is None:
        return None
    weight = projection.weight.detach().float()
    weight = weight.mT if isinstance(projection, nn.Linear) else weight
    per_head = weight.unflatten(0, (key_heads, -1))
    return per_head[[head for head in range(key_heads) if head not in full]].flatten(0, 1).contiguous()


def attention_kl(
    mixer: nn.Module,
    q: Tensor,
    k: Tensor,
    x: Tensor,
    rows: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    sinks: int | None = None,
) -> Tensor:
    """Return the mean KL from the teacher's attention rows to the mixer's, in nats.

    A mixer with `log_weights` is asked for the rows alone. Else its weights are read off by giving it the identity as
    values, which any normalised mixer allows.

    Args:
        rows: [R] positions of the queries that count; None for all. weight: [B, R] of each in the mean.
        sinks: see `HedgehogWindow.log_weights`, as are the other two of a mixer with `log_weights` only.
    """
    if hasattr(mixer, "log_weights"):
        rows = torch.arange(q.shape[1], device=q.device) if rows is None else rows
        return _row_kl(mixer, q[:, rows], k, rows, weight, sinks)
    T, group = q.shape[1], q.shape[2] // k.shape[2]
    identity = torch.eye(T, dtype=q.dtype, device=q.device)[None, :, None].expand(q.shape[0], T, k.shape[2], T)
    ours = mixer(q, k, identity, x=x)[0].float().transpose(1, 2)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    with torch.no_grad():
        logits = torch.einsum("bihk,bjhk->bhij", q.float(), k.repeat_interleave(group, dim=2).float())
        log_teacher = logits.masked_fill(future, -torch.inf).log_softmax(-1)
        teacher = log_teacher.exp()
        entropy = -(teacher * log_teacher.masked_fill(future, 0.0)).sum(-1)
    cross = -(teacher * ours.clamp_min(1e-9).log().masked_fill(future, 0.0)).sum(-1)
    return (cross - entropy).mean()


def _row_kl(mixer: nn.Module, q: Tensor, k: Tensor, rows: Tensor, weight: Tensor | None, sinks: int | None) -> Tensor:
    """Compare dense rows of log weights, [B, Hq, R, T]."""
    ours = mixer.log_weights(q, k, rows, sinks=sinks).log_softmax(-1)  # pyright: ignore[reportCallIssue]
    with torch.no_grad():
        future = torch.arange(k.shape[1], device=k.device) > rows[:, None]
        wide = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2).transpose(1, 2)
        logits = (q.transpose(1, 2) @ wide.mT).float().masked_fill(future, -torch.inf)
        teacher = logits.log_softmax(-1)
    gap = (teacher - ours).masked_fill(future, 0.0)
    per_row = (teacher.exp() * gap).sum(-1).mean(1)
    if weight is None:
        return per_row.mean()
    return (per_row * weight).sum() / weight.sum().clamp_min(1e-6)


def transfer_loss(
    kind: str, out: Tensor | None = None, first: int = 0
) -> Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, dict[str, float]]]:
    """Return the loss (mixer, batch) -> (scalar, named numbers) of a plan's `transfer_loss`.

    Args:
        out: output projection of the converted heads. first: tokens before it are exact and not scored.
    """

    def loss(mixer: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        total, numbers = batch["q"].new_zeros((), dtype=torch.float32), {}
        if kind in ("output-mse", "both"):
            output = mixer(batch["q"], batch["k"], batch["v"], x=batch["x"])[0]
            error = relative_error(output, batch["target"], out, min(first, batch["q"].shape[1] // 2))
            total, numbers["error"] = total + error, float(error.detach())
        if kind in ("attention-kl", "both"):
            sinks = int(batch["sinks"]) if "sinks" in batch else None
            rows, weight = batch.get("rows"), batch.get("weight")
            divergence = attention_kl(mixer, batch["q"], batch["k"], batch["x"], rows, weight, sinks=sinks)
            total, numbers["attention_kl"] = total + divergence, float(divergence.detach())
        return total, numbers

    return loss


ANSWER_WEIGHT = 16.0  # a query that looks for an answer counts as this many others


def scored_rows(plan: Plan, answers: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Draw the queries that attention-kl compares: all that look for an answer, others beyond the window at random.

    Args:
        answers: bool [B, T], tokens of answers; the query before each looks for it.

    Returns:
        rows [R] ascending, and their weights [B, R].
    """
    length = answers.shape[1]
    looks = torch.nn.functional.pad(answers[:, 1:], (0, 1))
    lots = torch.rand(length, generator=generator(plan.seed * 6007 + step)) + looks.any(0)
    lots[: min(plan.window, length // 2)] -= 2
    count = plan.transfer_positions or length
    rows = lots.topk(min(count, length - min(plan.window, length // 2))).indices.sort().values
    return rows, torch.where(looks[:, rows], ANSWER_WEIGHT, 1.0)


def pool_batches(
    pool: LayerPool, plan: Plan, answers: Sequence[Tensor] | None = None
) -> Callable[[int], dict[str, Tensor]]:
    """Return the batch of a step: rows of the pool in turn, cut to the step's length.

    Args:
        answers: bool [1, T] for each window of the pool, True on tokens of answers; None for none.
    """

    def batch(step: int) -> dict[str, Tensor]:
        longest = pool.q[0].shape[1]
        length = min(plan.transfer_lengths[step % len(plan.transfer_lengths)], longest)
        rows = max(1, plan.transfer_tokens // length)
        # every length visits all rows before it sees one twice
        turn = step // len(plan.transfer_lengths) * rows + step % len(plan.transfer_lengths)
        chosen = [(turn + one) % len(pool.q) for one in range(rows)]
        names = ("q", "k", "v", "target", "x")
        found = {name: torch.cat([getattr(pool, name)[row][:, :length] for row in chosen]) for name in names}
        if plan.transfer_loss == "output-mse":
            return found
        asked = [answers[row][:, :length] if answers else torch.zeros(1, length, dtype=torch.bool) for row in chosen]
        found["rows"], found["weight"] = scored_rows(plan, torch.cat(asked), step)
        if plan.far_sinks and (step // len(plan.transfer_lengths) + 1) % plan.far_sinks == 0:
            found["sinks"] = torch.tensor(0)  # another sink may stand anywhere in a text
        return found

    return batch


def side_by_side(draw: Callable[[int], Any], lengths: int, processes: int) -> Callable[[int], Any]:
    """Return a draw for processes that train together: each gets its own batch of a step, all of one length.

    Args:
        draw: index -> batch, in which `lengths` lengths take turns.

    Example:
        >>> [side_by_side(lambda index: index, 2, 3)(index) for index in range(9)]
        [0, 2, 4, 1, 3, 5, 6, 8, 10]
    """

    def batch(index: int) -> Any:
        step, process = divmod(index, processes)
        turn, length = divmod(step, lengths)
        return draw((turn * processes + process) * lengths + length)

    return batch


def fit_config(plan: Plan, steps: int, precision: str) -> FitConfig:
    """Return the training set-up of one layer's transfer."""
    rates = dict.fromkeys(GATES, plan.transfer_gate_lr) | {"*": plan.transfer_lr}
    return FitConfig(
        steps=steps,
        lr=rates,
        schedule="cosine",
        warmup=min(5, steps // 10),
        accumulate=PartialState().num_processes,
        clip=1.0,
        precision=precision,
        seed=plan.seed,
        checkpoint_every=max(steps, 1),
    )


def transfer(
    model: nn.Module,
    layers: Sequence[str],
    attentions: Sequence[nn.Module],
    mixers: dict[int, nn.Module],
    windows: Sequence[Batch],
    plan: Plan,
    folder: Path,
    *,
    full_heads: Mapping[int, Sequence[int]],
    precision: str,
    answers: Sequence[Tensor] | None = None,
    on_layer: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[int, dict[str, float]]:
    """Train every mixer on the teacher's activations, layer by layer; a layer that is done is not done again.

    Args:
        model, layers, attentions: the teacher. mixers: {layer: filling}, trained in place.
        windows: the pool, see `pooled_layers`. answers: where their answers stand, bool [1, T] each.
        folder: takes one file per finished layer.

    Returns:
        {layer: {"before": relative error, "after": relative error}}.
    """
    if plan.transfer_loss != "output-mse" and plan.mixer in UNNORMALISED:
        raise InputError(f"transfer_loss {plan.transfer_loss!r} needs normalised weights; {plan.mixer} has none")
    results = _finished(mixers, folder)
    todo = [layer for layer in mixers if layer not in results]
    steps = plan.transfer_steps
    if not todo or not steps:
        return results
    pools = pooled_layers(
        model, layers, attentions, windows, full_heads=full_heads, precision=precision, last=max(todo)
    )
    for layer, pool in pools:
        if layer not in todo:
            continue
        mixer, batches = mixers[layer], pool_batches(pool, plan, answers)
        _let_learn(mixer, plan.learns)
        full = full_heads.get(layer, ())
        out = output_weight(attentions[layer], full, len(full) + pool.k[0].shape[2])
        loss = transfer_loss(plan.transfer_loss, out, plan.window)
        before = _error(mixer, batches, plan, out)
        work = folder / f"layer-{layer:03d}.work"
        draw = side_by_side(batches, len(plan.transfer_lengths), PartialState().num_processes)
        fit(mixer, draw, loss, fit_config(plan, steps, precision), out=work, description=f"layer {layer}")
        results[layer] = {"before": before, "after": _error(mixer, batches, plan, out)}
        if PartialState().is_main_process:
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in mixer.state_dict().items()}
            numbers = {name: repr(value) for name, value in results[layer].items()}
            io.save_tensors(state, folder / f"layer-{layer:03d}.safetensors", metadata=numbers)
            shutil.rmtree(work, ignore_errors=True)
        if on_layer:
            on_layer(layer, results[layer])
    return results


def _let_learn(mixer: nn.Module, globs: Sequence[str]) -> None:
    from fnmatch import fnmatchcase

    for name, parameter in mixer.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, one) for one in globs))
    if not any(p.requires_grad for p in mixer.parameters()):
        names = ", ".join(name for name, _ in mixer.named_parameters())
        raise InputError(f"learns {list(globs)} matches no parameter of the mixer; it has {names or 'none'}")


@torch.no_grad()
def _error(mixer: nn.Module, batches: Callable[[int], dict[str, Tensor]], plan: Plan, out: Tensor | None) -> float:
    """Return the relative error on the first batches, one per length."""
    errors = []
    for step in range(len(plan.transfer_lengths)):
        batch = {name: one.to(next(mixer.parameters()).device) for name, one in batches(step).items()}
        output = mixer(batch["q"], batch["k"], batch["v"], x=batch["x"])[0]
        first = min(plan.window, batch["q"].shape[1] // 2)
        errors.append(float(relative_error(output, batch["target"], out, first)))
    return sum(errors) / len(errors)


def _finished(mixers: dict[int, nn.Module], folder: Path) -> dict[int, dict[str, float]]:
    """Load the layers that an earlier run finished."""
    results: dict[int, dict[str, float]] = {}
    for layer, mixer in mixers.items():
        path = folder / f"layer-{layer:03d}.safetensors"
        if not path.exists():
            continue
        weights = io.open_weights(path)
        mixer.load_state_dict({name: weights.load(name) for name in weights.names})
        results[layer] = {name: float(value) for name, value in weights.metadata.items() if name in ("before", "after")}
    return results
