"""`depth`: what the layers of a decoder are used for (Csordás, Manning, Potts 2025, arXiv:2505.13898).

The measures are those of `graph.residual`, called per text and summed up.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament._base.seeds import generator
from lineament.explain.recording import check_mode
from lineament.graph import (
    LinearMaps,
    SkipEffects,
    contributions,
    depth_score,
    direct_effects,
    effective_depth,
    linear_maps,
    logit_lens,
    residual_stream,
    skip_effects,
    transition_layer,
)
from lineament.io import Parts
from lineament.models import ADAPTERS, adapter_for

Progress = Callable[[str, int, int], None]
"""(what, done, of how many)."""
Lists = Sequence[Sequence[float]]
FIRST, BACK = 8, 5  # where a cut between past and future may lie: 8, 16, ... up to 5 tokens before the end


@dataclass(frozen=True, kw_only=True)
class Depth:
    """A depth report.

    Attributes:
        layers, tokens: how many, tokens without position 0.
        written: measure -> {"mean", "q95", "max"} -> a number per layer, see `graph.contributions`; "first" is the mean
            at position 0.
        future, current, direct: mean, q95, max by skipped layer and layer of |c - c'| / |c|: on tokens after the
            skipped ones, on the skipped ones themselves, and without layers seeing each other's changes. "output": per
            skipped layer.
        lens: "KL" in nats and "overlap" of the five likeliest, per h_l.
        scores: where the effects lie in depth, by later layers and by the output, also without the first two layers.
        effective_depth: sum over layers of min(1, mean future effect). transition: where |c|/|h| changes; both ours.
        difficulty: level -> scores with a 90 % interval over texts.
        maps: of `layer_maps`, if there is another model.
    """

    layers: int
    tokens: int
    written: Mapping[str, Mapping[str, Sequence[float]]]
    future: Mapping[str, Any]
    current: Mapping[str, Any]
    direct: Mapping[str, Any]
    lens: Mapping[str, Sequence[float]]
    scores: Mapping[str, float]
    effective_depth: float
    transition: int | None
    difficulty: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    maps: Mapping[str, Any] = field(default_factory=dict)


def depth(
    model: nn.Module,
    texts: Sequence[Tensor],
    *,
    layers: Sequence[str] | None = None,
    attention: Sequence[str] | None = None,
    cuts: int = 2,
    seed: int = 0,
    levels: Mapping[str, Sequence[Tensor]] | None = None,
    progress: Progress | None = None,
    parts: Parts | None = None,
) -> Depth:
    """Measure what each layer writes, what its absence changes for later layers and tokens, and what each layer knows.

    A text costs a forward pass, L for the logit lens, and L / 2 for each cut, for the current effects and for the
    direct ones.

    Args:
        model: a decoder in eval mode; students with linear mixers as well as softmax models.
        texts: token numbers [T] or [1, T], T >= 14.
        layers, attention: names of the layers and of their attention modules; found for the families of
            `models.ADAPTERS`, else the longest list of modules of one class is taken.
        cuts: places per text, drawn by `seed`, at which past and future are parted.
        levels: level of difficulty -> texts, for scores by level.
        progress: called with (what, done, of how many).
        parts: where what is found of each text is kept.

    Raises:
        InputError: no texts, one too short, no layers to be found, or a model that would drop out.

    Example:
        >>> from lineament import models
        >>> found = depth(models.tiny_teacher("llama"), [torch.arange(3, 23)], cuts=1)
        >>> found.layers, len(found.lens["KL"])
        (3, 4)
    """
    check_mode(model)
    names, added = (list(layers), attention) if layers is not None else layer_names(model)
    batches = [_row(text) for text in texts]
    if not batches:
        raise InputError("there is no text to read; give at least one")
    read, parts = [], parts or Parts()
    for at, batch in enumerate(batches):
        read.append(parts.tensors(f"text-{at}", lambda b=batch, at=at: _read(model, names, added, b, cuts, seed + at)))
        if progress:
            progress("texts", at + 1, len(batches))
    joined, first = (_joined(read, f"{kind} ") for kind in ("written", "first"))
    future, current, direct = (_summed(_joined(read, f"{kind} ")) for kind in ("future", "current", "direct"))
    lens = {k: torch.stack([each[k] for each in read]).mean(0).tolist() for k in ("KL", "overlap")}
    return Depth(
        layers=len(names), tokens=joined["|c|"].shape[1],
        written={n: _spread(x) | {"first": first[n].mean(1).tolist()} for n, x in joined.items()},
        future=_lists(future), current=_lists(current), direct=_lists(direct), lens=lens, scores=_scores(future),
        effective_depth=effective_depth(future["mean"]),
        transition=transition_layer(joined["|c|/|h|"].mean(1)) if "|c|/|h|" in joined else None,
        difficulty=_difficulty(model, names, added, levels or {}, cuts, seed, progress, parts),
    )  # fmt: skip


def _read(
    model: nn.Module, names: Sequence[str], added: Sequence[str] | None, batch: Tensor, cuts: int, seed: int
) -> dict[str, Tensor]:
    """Return everything of one text: "written |c|" and the like [L, tokens], "future relative" [S, L, tokens], ..."""
    stream = residual_stream(model, names, batch, attention=added)
    at = _places(batch.shape[1], cuts, seed)
    effects = {
        "future": [skip_effects(model, names, batch, stream, until=t) for t in at],
        "current": [skip_effects(model, names, batch, stream)],
        "direct": [direct_effects(model, names, batch, stream, until=at[0])],
    }
    found = dict(logit_lens(model, names, batch, stream))
    for name, x in contributions(stream).items():
        found |= {f"written {name}": x[:, stream.counted], f"first {name}": x[..., 0]}
    for kind, several in effects.items():
        found |= {f"{kind} {name}": x for name, x in _together(several).items()}
    return found


def _together(effects: Sequence[SkipEffects]) -> dict[str, Tensor]:
    """Return effects side by side along their tokens."""
    several = [{n: x for n, x in vars(each).items() if x is not None} for each in effects]
    return {name: torch.cat([each[name] for each in several], -1) for name in several[0]}


def _joined(read: Sequence[Mapping[str, Tensor]], prefix: str) -> dict[str, Tensor]:
    """Return what all texts have under names of a prefix, side by side along their tokens."""
    names = [name for name in read[0] if name.startswith(prefix)]
    return {name.removeprefix(prefix): torch.cat([each[name] for each in read], -1) for name in names}


def _places(T: int, cuts: int, seed: int) -> list[int]:
    """Draw cuts among 8, 16, ..., T - 5."""
    known = list(range(FIRST, T - BACK + 1, FIRST))
    if not known:
        raise InputError(f"a text has {T} tokens; depth needs {FIRST + BACK} or more, for a past and a future")
    return [known[i] for i in torch.randperm(len(known), generator=generator(seed))[: max(1, cuts)].tolist()]


def _row(text: Tensor) -> Tensor:
    return text if text.dim() == 2 else text[None]


def _summed(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return mean, q95 and max of relative effects over tokens [S, L], the mean of absolute ones and of the output."""
    whole = SkipEffects(found["relative"], found["absolute"], found.get("output"))
    output = {} if whole.output is None else {"output": whole.output.mean(-1)}
    return whole.summary() | {"absolute": whole.absolute.mean(-1)} | output


def _lists(found: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: x.tolist() for name, x in found.items()}


def _spread(x: Tensor) -> dict[str, list[float]]:
    return {"mean": x.mean(1).tolist(), "q95": x.quantile(0.95, dim=1).tolist(), "max": x.amax(1).tolist()}


def _later(mean: Tensor) -> Tensor:
    """Return e_s: the mean effect of skipping s on the layers after it [S]."""
    later = torch.ones_like(mean).triu(1)
    return (mean * later).sum(1) / later.sum(1).clamp_min(1)


def _scores(found: Mapping[str, Tensor]) -> dict[str, float]:
    by_layers, by_output = _later(found["max"]), found["output"]
    names = {"by layers": by_layers, "by output": by_output}
    return {f"{name}{words}": depth_score(e, leave=leave)
            for name, e in names.items() for leave, words in ((0, ""), (2, ", without the first two"))}  # fmt: skip


def _difficulty(
    model: nn.Module, names: Sequence[str], added: Sequence[str] | None, levels: Mapping[str, Sequence[Tensor]],
    cuts: int, seed: int, progress: Progress | None, parts: Parts,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Score each level's texts, and draw texts again for an interval."""

    def scored(batch: Tensor, at: int) -> dict[str, float]:
        stream = residual_stream(model, names, batch, attention=added)
        places = _places(batch.shape[1], cuts, seed + at)
        return _scores(_summed(_together([skip_effects(model, names, batch, stream, until=t) for t in places])))

    found = {}
    for done, (level, texts) in enumerate(levels.items()):
        scores = [
            parts.value(f"level-{done}-{at}", lambda text=text, at=at: scored(_row(text), at))
            for at, text in enumerate(texts)
        ]
        if not scores:
            raise InputError(f"level {level!r} has no text")
        table = torch.tensor([list(each.values()) for each in scores], dtype=torch.float64)
        drawn = table[torch.randint(len(table), (1000, len(table)), generator=generator(seed))].mean(1)
        low, high = drawn.quantile(0.05, dim=0).tolist(), drawn.quantile(0.95, dim=0).tolist()
        found[level] = {
            name: (mean, a, b) for name, mean, a, b in zip(scores[0], table.mean(0).tolist(), low, high, strict=True)
        }
        if progress:
            progress("levels", done + 1, len(levels))
    return found


def layer_names(model: nn.Module) -> tuple[list[str], list[str] | None]:
    """Return the names of a decoder's layers, and of the modules whose outputs are added as their attention's.

    Where a family norms what its attention gives before adding it (Gemma 2 and 3), that is the norm.

    Raises:
        InputError: no list of layers is found.
    """
    kind = str(getattr(getattr(model, "config", None), "model_type", "")).removeprefix("lineament-")
    if kind in ADAPTERS:
        adapter = adapter_for(model)
        stack: Any = model.get_submodule(adapter.layers)
        after = hasattr(stack[0], "post_feedforward_layernorm")
        added = "post_attention_layernorm" if after else adapter.attention
        names = [f"{adapter.layers}.{i}" for i in range(len(stack))]
        return names, [f"{name}.{added}" for name in names]
    lists = {
        name: module for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(each) for each in module}) == 1
    }  # fmt: skip
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of layers of one class; name them by layers=")
    name = max(lists, key=lambda each: len(lists[each]))
    return [f"{name}.{i}" for i in range(len(lists[name]))], None


def layer_maps(
    source: nn.Module,
    target: nn.Module,
    fit: Sequence[Tensor],
    test: Sequence[Tensor],
    *,
    ridge: float = 1e-4,
    names: tuple[Sequence[str] | None, Sequence[str] | None] = (None, None),
) -> tuple[LinearMaps, Tensor | None]:
    """Map every layer of one model linearly onto every layer of another that reads the same tokens.

    Args:
        source, target: decoders of one vocabulary, a teacher and its student say.
        fit, test: token numbers [B, T]; many more tokens than the source is wide to learn from.
        ridge: see `graph.linear_maps`.
        names: the layers of both, as for `depth`.

    Returns:
        The maps, and R^2 of the identity at equal layers [L] where both have the same shape.

    Raises:
        InputError: unequal vocabularies, fewer tokens to fit than the source is wide, or a model that would drop out.
    """
    check_mode(source)
    check_mode(target)
    sizes = [int(getattr(each.config, "vocab_size", -1)) for each in (source, target)]
    if sizes[0] != sizes[1]:
        raise InputError(f"the models have {sizes[0]} and {sizes[1]} tokens; maps need one tokenizer")
    streams = [
        [torch.cat(list(_hidden(model, given or layer_names(model)[0], batches)), 1) for batches in (fit, test)]
        for model, given in zip((source, target), names, strict=True)
    ]
    (X, unseen), (Y, truth) = streams
    if X.shape[1] <= X.shape[2]:
        raise InputError(f"{X.shape[1]} tokens are too few to fit maps from {X.shape[2]} dimensions; give more text")
    found = linear_maps((X, Y), (unseen, truth), ridge=ridge)
    same = unseen.shape == truth.shape
    return found, _identity(unseen.double(), truth.double()) if same else None


def _identity(x: Tensor, y: Tensor) -> Tensor:
    spread = (y - y.mean(1, keepdim=True)).square().sum((1, 2)).clamp_min(1e-30)
    return 1 - (y - x).square().sum((1, 2)) / spread


def _hidden(model: nn.Module, names: Sequence[str], batches: Sequence[Tensor]) -> Iterator[Tensor]:
    for batch in batches:
        found = residual_stream(model, names, _row(batch))
        yield found.hidden[:, found.counted]
