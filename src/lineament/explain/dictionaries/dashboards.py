"""Features to look at: texts they fire on, tokens they speak for, how often and how strongly they fire."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.data import pieces
from lineament.explain.dictionaries.activations import Activations, Said
from lineament.explain.dictionaries.hooks import Placed
from lineament.explain.dictionaries.weights import de_embedding, direct_tokens
from lineament.explain.places import values_at
from lineament.report import HeatText, Picture, Section, Tiles, bars, page, table

BINS = 20
AROUND = (20, 8)  # tokens shown before and after the one that a feature fires on most


@dataclass(frozen=True, kw_only=True)
class Feature:
    """What is known of a feature.

    Attributes:
        feature: its number. density: share of tokens it fires on. most: its largest activation.
        examples: (tokens, activations) around the tokens it fires on most, one per text.
        promotes, demotes: (token, logit) by its decoder through the last norm.
        driven_by: (token, drive) by its encoder from the embedding alone; empty where that isn't defined.
        histogram: (left edge, count) of its activations above 0.
    """

    feature: int
    density: float
    most: float
    examples: list[tuple[list[str], list[float]]]
    promotes: list[tuple[str, float]]
    demotes: list[tuple[str, float]]
    driven_by: list[tuple[str, float]]
    histogram: list[tuple[float, int]]


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """Features of one dictionary. `model`, `place`: whose. `tokens`: how many were read."""

    model: str
    place: str
    tokens: int
    features: list[Feature]

    def to_json(self) -> dict[str, Any]:
        """Return a value for `json.dumps`."""
        from dataclasses import asdict

        return asdict(self)

    def tables(self) -> list[Any]:
        """Return a rich table, a line per feature."""
        rows = [
            {"feature": f.feature, "fires on": f.density, "most": f.most, "on the token": repr(_peak(f)),
             "speaks for": ", ".join(repr(t) for t, _ in f.promotes[:4])}
            for f in self.features
        ]  # fmt: skip
        return [table(rows, title=f"{len(rows)} features of {self.place}, {self.tokens} tokens read")]

    def write_html(self, path: str | Path) -> Path:
        """Write a static page, a section per feature."""
        lead = f"{self.tokens} tokens were read. Blue: how strongly the feature fires on a token; hover for the number."
        sections = [Section(f"Feature {f.feature}", _shown(f)) for f in self.features]
        return page(f"Features of {self.place} in {self.model}", sections, path, lead=lead)


def _peak(f: Feature) -> str:
    return max(zip(f.examples[0][1], f.examples[0][0], strict=True))[1] if f.examples else ""


def _shown(f: Feature) -> list[Any]:
    parts: list[Any] = [Tiles({"fires on": f"{f.density:.2%}", "largest activation": f.most})]
    if not f.examples:
        return [*parts, "It fired on none of the tokens read."]
    parts += [HeatText(*example) for example in f.examples]
    columns = {"speaks for": f.promotes, "logit": f.promotes, "speaks against": f.demotes, "its logit": f.demotes}
    columns |= {"driven by": f.driven_by, "drive": f.driven_by} if f.driven_by else {}
    parts.append([
        {name: pairs[i][k % 2] if k % 2 else repr(pairs[i][0]) for k, (name, pairs) in enumerate(columns.items())}
        for i in range(len(f.promotes))
    ])  # fmt: skip
    groups = {f"{edge:.2g}": {"tokens": float(count)} for edge, count in f.histogram}
    options: dict[str, Any] = {"xlabel": "activation", "ylabel": "tokens", "log": True}
    pictures = [bars(groups, dark=dark, **options) for dark in (False, True)]
    alt = f"Histogram of the activations of feature {f.feature} above 0"
    return [*parts, Picture(pictures[0], alt, "Activations above 0, counts on a logarithmic axis.", pictures[1])]


def dashboard(
    model: nn.Module,
    tokenizer: Any,
    at: Placed,
    windows: Tensor,
    *,
    features: Sequence[int] | None = None,
    count: int = 20,
    examples: int = 5,
    tokens: int = 8,
    name: str = "",
    activations: Activations | None = None,
    rows: int = 8,
    said: Said | None = None,
) -> Dashboard:
    """Read texts, and say of features what they fire on and what they do.

    Args:
        model, tokenizer: as loaded. at: the dictionary in the model.
        windows: int64 [N, T]; the first position of each is left out.
        features: which ones; if None, `count` of those that fire, evenly from the rarest to the most frequent.
        examples: texts per feature. tokens: of the vocabulary, at either end. name: of the model.
        activations: what was cached on `windows`, its own first ones (`Activations.windows`): the model isn't run.
        rows: windows in a pass. said: called with progress.

    Raises:
        InputError: a feature outside the dictionary, or none that fires.
    """
    d, windows, device = at.dictionary, windows.cpu(), next(model.parameters()).device
    active: list[tuple[Tensor, Tensor]] = []
    batches = windows.split(rows)
    if activations is not None and not torch.equal(activations.windows(len(windows)), windows):
        raise InputError("the cached activations are of other windows; pass the first ones of `activations.windows`")
    for done, ids in enumerate(batches):
        with torch.no_grad():
            if activations is None:
                x = values_at(model, {"input_ids": ids.to(device)}, [at.reads], stop=True)[at.reads]
            else:
                x = _cached(activations, at.reads, done * rows, ids).to(device)
            z, index = d.active(x)
        z[:, 0] = 0
        active.append((z.flatten(0, 1).cpu(), index.flatten(0, 1).cpu()))
        if said:
            said("reading texts", done + 1, len(batches))
    widest = max(z.shape[1] for z, _ in active)
    z, index = (torch.cat([nn.functional.pad(x[i], (0, widest - x[i].shape[1])) for x in active]) for i in (0, 1))
    chosen = d.check(features) if features is not None else _some(z, index, d.config.features, count)
    promoted, driven = direct_tokens(model, at, chosen), _driven(model, at, chosen)
    found = []
    for row, feature in enumerate(chosen):
        values = (z * (index == feature)).sum(1).view_as(windows)
        fired = values[values > 0]
        found.append(Feature(
            feature=feature, density=len(fired) / (windows.shape[1] - 1) / len(windows),
            most=float(values.max()), examples=_examples(tokenizer, windows, values, examples),
            promotes=_words(tokenizer, promoted[row], tokens), demotes=_words(tokenizer, -promoted[row], tokens, -1.0),
            driven_by=[] if driven is None else _words(tokenizer, driven[row], tokens), histogram=_histogram(fired),
        ))  # fmt: skip
    return Dashboard(model=name, place=d.config.writes, tokens=windows[:, 1:].numel(), features=found)


def _cached(activations: Activations, place: str, first: int, ids: Tensor) -> Tensor:
    """Return what a place held on windows [N, T], from the cache, 0 at first positions."""
    count, length = ids.shape[0], ids.shape[1] - 1
    x = activations.rows(place, torch.arange(first * length, (first + count) * length))
    return nn.functional.pad(x.unflatten(0, (count, length)), (0, 0, 1, 0))


def _some(z: Tensor, index: Tensor, features: int, count: int) -> list[int]:
    often = torch.zeros(features, dtype=torch.long).index_add_(0, index[z > 0], torch.ones_like(index[z > 0]))
    alive = (often > 0).nonzero().flatten()
    if not len(alive):
        raise InputError("no feature fires on these texts; give more text, or another dictionary")
    ranked = alive[often[alive].argsort(stable=True)]
    return ranked[torch.linspace(0, len(ranked) - 1, min(count, len(ranked))).long()].tolist()


def _driven(model: nn.Module, at: Placed, features: Sequence[int]) -> Tensor | None:
    try:
        return de_embedding(model, at, features)
    except InputError:  # a place that doesn't read the residual stream has no such thing
        return None


def _examples(tokenizer: Any, windows: Tensor, values: Tensor, count: int) -> list[tuple[list[str], list[float]]]:
    best, where = values.max(1)
    found = []
    for row in best.topk(min(count, len(best))).indices.tolist():
        if best[row] <= 0:
            break
        start, stop = max(0, int(where[row]) - AROUND[0]), int(where[row]) + AROUND[1] + 1
        words = pieces(tokenizer, windows[row, :stop].tolist())[start:]
        found.append((words, values[row, start:stop].tolist()))
    return found


def _words(tokenizer: Any, scores: Tensor, count: int, sign: float = 1.0) -> list[tuple[str, float]]:
    best = scores.topk(min(count, len(scores)))
    return [(tokenizer.decode([i]), sign * v) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def _histogram(fired: Tensor) -> list[tuple[float, int]]:
    if not len(fired):
        return []
    counts, edges = torch.histogram(fired.float().cpu(), BINS, range=(0.0, float(fired.max()) + 1e-9))
    return [(float(e), int(c)) for e, c in zip(edges, counts, strict=False)]
