"""Reading a decoder's residual stream: what each layer writes, what it changes further up, and what it already knows.

With h_l the input of layer l, a_l what its attention adds and m_l the rest, c_l = a_l + m_l = h_{l+1} - h_l. Positions
count from a row's first real token; position 0 is an attention sink in most models and left out of all numbers.
Source of the measures: Csordás, Manning, Potts 2025 (arXiv:2505.13898).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError, unknown
from lineament.graph.capture import capture, patch
from lineament.graph.stream import Batch, hidden_of, run, run_from, stream

TINY = 1e-6
SKIPS = ("layer", "attention", "mlp")


@dataclass(frozen=True)
class Stream:
    """A residual stream.

    Attributes:
        hidden: h_0 to h_L, what enters each layer and what leaves the last one [L + 1, B, T, D].
        attention: a_l [L, B, T, D]; None where the attention modules weren't named.
        position: of each token from the row's first real one; -1 for padding [B, T].
        logits: [B, T, vocabulary].
    """

    hidden: Tensor
    attention: Tensor | None
    position: Tensor
    logits: Tensor

    @property
    def written(self) -> Tensor:
        """c_l [L, B, T, D]."""
        return self.hidden[1:] - self.hidden[:-1]

    @property
    def counted(self) -> Tensor:
        """Which tokens count: all but padding and position 0 [B, T]."""
        return self.position >= 1


def residual_stream(
    model: nn.Module, layers: Sequence[str], batch: Batch, *, attention: Sequence[str] | None = None
) -> Stream:
    """Run a decoder once and keep its residual stream.

    Args:
        model: a decoder in eval mode.
        layers: names of its layers, in the order of their calls.
        batch: keyword arguments for the model, or token numbers [B, T].
        attention: per layer, the name of the module whose output is added as the attention's: the norm after it where
            a family has one.

    Raises:
        InputError: as many names as layers are needed; an unknown name; a layer that passes no [B, T, D].
    """
    if attention is not None and len(attention) != len(layers):
        raise InputError(f"{len(attention)} attention modules were named for {len(layers)} layers; expected one each")
    names, added = list(layers), list(attention or ())
    with torch.no_grad(), ExitStack() as stack:
        inputs = stack.enter_context(capture(model, _any(names), inputs=True, outputs=True, clone=True))
        adds = stack.enter_context(capture(model, _any(added), clone=True)) if added else None
        logits = run(model, batch)
    hidden = [hidden_of(*inputs.inputs(name)[0]) for name in names] + [inputs.tensor(names[-1])]
    if hidden[0].dim() != 3:
        raise InputError(f"{names[0]!r} passes {list(hidden[0].shape)}; a residual stream is [B, T, D]")
    a = None if adds is None else torch.stack([adds.tensor(name) for name in added])
    return Stream(torch.stack(hidden), a, positions(batch, hidden[0]), logits)


def _any(names: Sequence[str]) -> Any:
    wanted = set(names)
    return lambda name, module: name in wanted


def positions(batch: Batch, like: Tensor) -> Tensor:
    """Return the position of each token from the first real one, -1 for padding [B, T]."""
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return torch.arange(like.shape[1], device=like.device).expand(like.shape[:2])
    return torch.where(mask.bool(), mask.long().cumsum(1) - 1, -1)


def contributions(found: Stream) -> dict[str, Tensor]:
    """Return norms, ratios and cosines of every layer and token, each [L, B, T] in float32.

    Returns:
        "|h|", "|a|", "|m|", "|c|"; "|a|/|h|", "|m|/|h+a|", "|c|/|h|" (denominators at least 1e-6); "cos(a,h)",
        "cos(m,h+a)", "cos(c,h)", "cos(h',h)": near 0 writes new directions, below erases, above amplifies. Those of a
        and m only where the attention is known.
    """
    h, c = found.hidden[:-1].float(), found.written.float()
    pairs = {"c": (c, h)}
    if found.attention is not None:
        a = found.attention.float()
        pairs |= {"a": (a, h), "m": (c - a, h + a)}
    result = {"|h|": h.norm(dim=-1), "cos(h',h)": _cosine(found.hidden[1:].float(), h)}
    for name, (part, base) in pairs.items():
        to = "h+a" if name == "m" else "h"
        result[f"|{name}|"] = part.norm(dim=-1)
        result[f"|{name}|/|{to}|"] = part.norm(dim=-1) / base.norm(dim=-1).clamp_min(TINY)
        result[f"cos({name},{to})"] = _cosine(part, base)
    return result


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1)).clamp_min(TINY)


@dataclass(frozen=True)
class SkipEffects:
    """What skipping a layer changes further up.

    Attributes:
        relative: |c_l - c'_l| / |c_l|, [skipped s, l, tokens that count], 0 for l <= s.
        absolute: |c_l - c'_l|, as `relative`.
        output: |p - p'|_2 of the output distributions [skipped s, tokens]; None for direct effects.
    """

    relative: Tensor
    absolute: Tensor
    output: Tensor | None

    def summary(self) -> dict[str, Tensor]:
        """Return the mean, 95 % quantile and maximum over tokens of `relative` [S, L]."""
        x = self.relative
        quantile = torch.quantile(x, 0.95, dim=-1) if x.numel() else x.sum(-1)
        return {"mean": x.mean(-1), "q95": quantile, "max": x.amax(-1)}


def skip_effects(
    model: nn.Module,
    layers: Sequence[str],
    batch: Batch,
    found: Stream,
    *,
    until: int | None = None,
    part: str = "layer",
    attention: Sequence[str] | None = None,
) -> SkipEffects:
    """Skip each layer in turn and measure what the layers after it, and the output, then do.

    Runs go on from the skipped layer, so that L skips cost half of L forward passes.

    Args:
        model, layers, batch: as for `residual_stream`, whose result is `found`.
        until: skip at positions 1 to until - 1 and measure from `until` on: the effect on future tokens. None: skip at
            all positions from 1 and measure there, the effect on the current ones. 1 skips nothing.
        part: what is left out: the "layer", its "attention" or its "mlp" (these two need `attention`).
        attention: as for `residual_stream`.

    Raises:
        InputError: an unknown part, attention not named, or no token to measure at.
    """
    if part not in SKIPS:
        raise unknown("part", part, SKIPS)
    if part != "layer" and (found.attention is None or attention is None):
        raise InputError(f"leaving out the {part} needs the names of the attention modules")
    skipped, measured = _cut(found, until)
    clean, p = found.written, found.logits[measured].float().softmax(-1)
    size = [clean[:, measured].float().norm(dim=-1), torch.zeros(len(layers), len(layers), len(p))]
    relative, absolute, output = size[1], size[1].clone(), torch.zeros(len(layers), len(p))
    for s in range(len(layers)):
        with torch.no_grad(), capture(model, _any(layers[s + 1 :] or layers[-1:]), inputs=True, clone=True) as seen:
            logits = _without(model, layers, batch, found, s, skipped, part, attention)
        output[s] = (logits[measured].float().softmax(-1) - p).norm(dim=-1)
        for at in range(s + 1, len(layers)):
            (args, kwargs), after = seen.inputs(layers[at])[-1], _tensor(seen.outputs(layers[at])[-1])
            change = (after - hidden_of(args, kwargs) - clean[at])[measured].float().norm(dim=-1)
            absolute[s, at], relative[s, at] = change, change / size[0][at].clamp_min(TINY)
    return SkipEffects(relative, absolute, output)


def _cut(found: Stream, until: int | None) -> tuple[Tensor, Tensor]:
    """Return where a layer is skipped and where the effect is measured [B, T]."""
    if until is not None and until < 1:
        raise InputError(f"until is {until}; position 0 is never skipped, so 1 is the least")
    skipped = found.counted if until is None else found.counted & (found.position < until)
    measured = found.counted if until is None else found.position >= until
    if not bool(measured.any()):
        raise InputError(f"no token lies at position {until} or after it; give longer texts or a smaller cut")
    return skipped, measured


def _without(
    model: nn.Module, layers: Sequence[str], batch: Batch, found: Stream, s: int, skipped: Tensor, part: str,
    attention: Sequence[str] | None,
) -> Tensor:  # fmt: skip
    """Run on with layer s, or a part of it, left out where it is skipped; return the logits."""
    where, h = skipped[..., None], found.hidden
    if part == "attention":
        assert attention is not None

        def silent(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            first = first.masked_fill(where, 0.0)
            return (first, *output[1:]) if isinstance(output, tuple) else first

        with patch(model, {attention[s]: silent}):
            return run_from(model, layers, s, h[s], batch)
    kept = h[s] if part == "layer" or found.attention is None else h[s] + found.attention[s]
    return run_from(model, layers, s + 1, torch.where(where, kept, h[s + 1]), batch)


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def direct_effects(model: nn.Module, layers: Sequence[str], batch: Batch, found: Stream, *, until: int) -> SkipEffects:
    """Measure what later layers read of a layer directly: each gets h_l - c_s at skipped positions, else the clean h_l.

    Layers don't see each other's changes, unlike in `skip_effects`; arguments and positions as there.
    """
    skipped, measured = _cut(found, until)
    clean, tokens = found.written, int(measured.sum())
    relative = torch.zeros(len(layers), len(layers), tokens)
    absolute = torch.zeros_like(relative)
    for at, (_, layer, args, kwargs) in enumerate(stream(model, layers, batch)):
        size, h = clean[at][measured].float().norm(dim=-1).clamp_min(TINY), hidden_of(args, kwargs)
        for s in range(at):
            less = torch.where(skipped[..., None], h - clean[s], h)
            given = ((less, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": less})
            with torch.no_grad():
                change = (_tensor(layer(*given[0], **given[1])) - less - clean[at])[measured].float().norm(dim=-1)
            absolute[s, at], relative[s, at] = change, change / size
    return SkipEffects(relative, absolute, None)


def logit_lens(
    model: nn.Module, layers: Sequence[str], batch: Batch, found: Stream, *, top: int = 5
) -> dict[str, Tensor]:
    """Read the output distribution off every h_l by the model's own last norm and head.

    Returns:
        "KL", KL(p_l | p) in nats, and "overlap", the share of the `top` tokens in common: [L + 1] each, means over the
        tokens that count; the last is the model itself.
    """
    last = found.logits[found.counted].float().log_softmax(-1)
    best = last.topk(top, -1).indices
    KL, overlap = [], []
    for h in found.hidden:
        with torch.no_grad():
            log_p = run_from(model, layers, len(layers), h, batch)[found.counted].float().log_softmax(-1)
        KL.append(float((log_p.exp() * (log_p - last)).sum(-1).mean()))
        both = (log_p.topk(top, -1).indices[..., None] == best[..., None, :]).any(-1)
        overlap.append(float(both.float().mean()))
    return {"KL": torch.tensor(KL), "overlap": torch.tensor(overlap)}


def depth_score(effect: Tensor, *, leave: int = 0) -> float:
    """Return where effects lie in depth: sum_s s e_s / sum_s e_s.

    Args:
        effect: e_s [L], of skipping layer s. leave: the first layers to leave out; the very first one's is huge.

    Example:
        >>> depth_score(torch.tensor([9.0, 1.0, 0.0, 1.0]), leave=1)
        2.0
    """
    e = effect.double()[leave:]
    at = torch.arange(leave, leave + len(e), dtype=torch.float64)
    return float((at * e).sum() / e.sum().clamp_min(1e-30))


def effective_depth(mean_effects: Tensor) -> float:
    """Return how many layers later ones would miss: sum_s min(1, mean effect of skipping s). Our summary.

    Args:
        mean_effects: [S, L], the mean relative effect on each layer; layers l <= s don't count.
    """
    L = mean_effects.shape[1]
    later = torch.ones_like(mean_effects).triu(1)
    each = (mean_effects * later).sum(1) / later.sum(1).clamp_min(1)
    return float(each[: L - 1].clamp_max(1).sum())


def transition_layer(ratios: Tensor) -> int | None:
    """Return where a model changes phase: the split of |c|/|h| with the largest variance between both sides.

    Args:
        ratios: [L]; the first and the last two layers are left out.

    Returns:
        The first layer of the second phase; None below 6 layers. Our summary.
    """
    inner = ratios.double()[2:-2]
    if len(inner) < 2:
        return None
    sides = [(inner[:k].mean() - inner[k:].mean()) ** 2 * k * (len(inner) - k) for k in range(1, len(inner))]
    return int(torch.stack(sides).argmax()) + 3


@dataclass(frozen=True)
class LinearMaps:
    """How well a linear map takes one stream to another.

    Attributes:
        r2: of centred targets, source layer by target layer [S, G]. error: mean |difference| / |target|, as `r2`.
    """

    r2: Tensor
    error: Tensor

    @property
    def best(self) -> Tensor:
        """The source layer that gives each target layer the largest R^2 [G]."""
        return self.r2.argmax(0)

    def diagonal(self) -> float:
        """Correlate the best source's relative depth with the target's: 1 means equal relative depth."""
        S, G = self.r2.shape
        places = torch.stack([self.best.double() / max(1, S - 1), torch.arange(G).double() / max(1, G - 1)])
        return float(torch.corrcoef(places)[0, 1].nan_to_num())

    def chance(self, *, draws: int = 2000, quantile: float = 0.95, seed: int = 0) -> float:
        """Return the quantile of `diagonal` where the target layers are permuted."""
        S, G = self.r2.shape
        generator = torch.Generator().manual_seed(seed)
        best, depth = self.best.double() / max(1, S - 1), torch.arange(G).double()
        found = [
            torch.corrcoef(torch.stack([best[torch.randperm(G, generator=generator)], depth]))[0, 1].nan_to_num()
            for _ in range(draws)
        ]
        return float(torch.quantile(torch.stack(found), quantile))


def linear_maps(fit: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, ridge: float = 1e-4) -> LinearMaps:
    """Fit a linear map from every layer of one stream to every layer of another, in closed form.

    (X^T X + lambda I) W = X^T Y on centred data, lambda = ridge tr(X^T X) / d, all in float64.

    Args:
        fit, test: (source [S, N, D], target [G, N, D']) of the same tokens; learnt from the first, judged by the other.
        ridge: relative to the mean eigenvalue.

    Raises:
        InputError: unequal numbers of tokens, or too few.
    """
    for what, (source, target) in {"fit": fit, "test": test}.items():
        if source.shape[1] != target.shape[1] or source.shape[1] < 2:
            raise InputError(
                f"{what} has {source.shape[1]} tokens of the source and {target.shape[1]} of the target; maps need as "
                "many of both, the same ones"
            )
    Y = fit[1].transpose(0, 1).flatten(1).double()  # all targets at once [N, G D']
    truth = test[1].transpose(0, 1).flatten(1).double()
    middle, widths = Y.mean(0), (len(fit[1]), -1)
    Y = Y - middle
    spread = (truth - truth.mean(0)).square().sum(0).view(widths).sum(1)
    r2, errors = [], []
    for known, unseen in zip(fit[0], test[0].double(), strict=True):
        mean = known.double().mean(0)
        X = known.double() - mean
        gram = X.T @ X
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        W = torch.linalg.solve(gram, X.T @ Y)
        gap = truth - ((unseen - mean) @ W + middle)
        r2.append(1 - gap.square().sum(0).view(widths).sum(1) / spread.clamp_min(1e-30))
        lengths = [y.unflatten(1, widths).norm(dim=-1) for y in (gap, truth)]
        errors.append((lengths[0] / lengths[1].clamp_min(TINY)).mean(0))
    return LinearMaps(torch.stack(r2), torch.stack(errors))
