"""Dictionaries by name: models, texts and folders in, dictionaries, tables and pages out. What the command calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineament import data
from lineament._base.errors import InputError, unknown
from lineament.explain.dictionaries.activations import Activations, Said, cache_activations, open_activations
from lineament.explain.dictionaries.dashboards import Dashboard, dashboard
from lineament.explain.dictionaries.feature_graph import attribute
from lineament.explain.dictionaries.files import load_dictionary, save_dictionary
from lineament.explain.dictionaries.graph_page import GraphReport
from lineament.explain.dictionaries.hooks import Placed, placed
from lineament.explain.dictionaries.module import DictionaryConfig
from lineament.explain.dictionaries.scores import DictionaryScore, best_affine, evaluate_dictionaries
from lineament.explain.dictionaries.training import DictionaryTraining, claim, train_dictionary
from lineament.explain.places import aliased
from lineament.explain.reading import text_of
from lineament.models import adapter_for, load_teacher
from lineament.report import Picture, Section, curve, page, table

KINDS = {"transcoder": "blocks.{}.mlp.hook_in", "autoencoder": "blocks.{}.hook_mlp_out"}
"""Kind -> what it reads; both write blocks.N.hook_mlp_out."""
HELD_OUT = "test"


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What was trained: a row per dictionary, the speed of capturing, and where it all is."""

    model: str
    rows: list[dict[str, Any]]
    tokens: int
    captured_per_second: float
    folder: str

    def to_json(self) -> dict[str, Any]:
        """Return a value for `json.dumps`."""
        return {"model": self.model, "dictionaries": self.rows, "cached tokens": self.tokens,
                "captured tokens/s": self.captured_per_second, "folder": self.folder}  # fmt: skip

    def tables(self) -> list[Any]:
        """Return rich tables."""
        speed = f"{self.captured_per_second:.0f} tokens/s captured" if self.captured_per_second else "from the cache"
        return [table(self.rows, title=f"{self.tokens} tokens of {self.model}, {speed}")]


@dataclass(frozen=True, kw_only=True)
class ScoreReport:
    """How dictionaries of one place did."""

    model: str
    place: str
    tokens: int
    scores: list[DictionaryScore]

    def to_json(self) -> dict[str, Any]:
        """Return a value for `json.dumps`."""
        return {"model": self.model, "place": self.place, "tokens": self.tokens, "scores": self.rows()}

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per thing put in the place."""
        return [score.row() for score in self.scores]

    def tables(self) -> list[Any]:
        """Return rich tables."""
        return [table(self.rows(), title=f"{self.place} of {self.model}, {self.tokens} tokens held out")]

    def write_html(self, path: str | Path) -> Path:
        """Write a page: the table, the curve, how often features fire."""
        parts: list[Any] = [self.rows()]
        curves: dict[str, list[tuple[float, float]]] = {}
        for score in self.scores:
            if score.l0 is not None:
                curves.setdefault(score.name.split(", k =")[0], []).append((score.l0, score.loss))
        series = {name: list(zip(*sorted(points), strict=True)) for name, points in curves.items() if len(points) > 1}
        if series:
            options: dict[str, Any] = {"xlabel": "features active per token", "ylabel": "loss (nats)", "log": "x",
                                       "levels": {"own": self.scores[0].loss, "mean": self.scores[1].loss}}  # fmt: skip
            pictures = [curve(series, dark=dark, **options) for dark in (False, True)]
            parts.append(Picture(pictures[0], "Loss by number of active features", "", pictures[1]))
        lead = "Shares recovered are of what ablating the place costs. First positions are left out everywhere."
        return page(f"Dictionaries of {self.place} in {self.model}", [Section("In the model", parts)], path, lead=lead)


def train_by_name(
    model: str,
    out: str | Path,
    *,
    layers: Sequence[int],
    kinds: Sequence[str] = ("transcoder",),
    texts: Sequence[str] = ("wiki-sample",),
    tokens: int = 1_000_000,
    length: int = 128,
    features: int | None = None,
    activation: str = "topk",
    k: int = 32,
    skip: bool = False,
    epochs: float = 2.0,
    training: dict[str, Any] | None = None,
    said: Said | None = None,
) -> TrainReport:
    """Train dictionaries of a language model's MLPs, one per layer and kind, on one cache of activations.

    Args:
        model: as for `models.load_teacher`. out: folder for the cache, the checkpoints and the dictionaries
            (`transcoder-10`, ...); the same call goes on where an interrupted one was, and skips what is finished.
        layers: whose MLPs. kinds: of `KINDS`.
        texts: names of `data.load_text`, their training split. tokens: at most. length: of a window.
        features: 8 times the width if None. activation, k, skip: of the dictionaries.
        epochs: passes over the cached tokens. training: other fields of `DictionaryTraining`.
        said: called with progress.

    Raises:
        InputError: an unknown model, layer, kind or text, or a folder of other settings.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("kind of dictionary", kind, KINDS)
    out = Path(out)
    net, tokenizer = load_teacher(model)
    _check_layers(net, layers)
    windows = _windows(tokenizer, texts, "train", tokens, length)
    names = {(layer, kind): KINDS[kind].format(layer) for layer in layers for kind in KINDS}
    places = [str(aliased(net, name)) for name in names.values()]
    about = {"model": model, "texts": list(texts)}
    kept = cache_activations(net, windows, places, out / "activations", about=about, said=said)
    given = training or {}
    batch = min(int(given.get("batch", 1024)), kept.count)
    how = DictionaryTraining(**{**given, "batch": batch, "steps": max(1, int(epochs * (kept.count // batch)))})
    width, rows = int(net.config.hidden_size), []  # pyright: ignore
    for layer, kind in ((layer, kind) for layer in layers for kind in kinds):
        config = DictionaryConfig(
            inputs=width, outputs=width, features=features or 8 * width, activation=activation, k=k,
            skip=skip and kind == "transcoder", input_bias="none" if kind == "transcoder" else "output",
            reads=names[layer, kind], writes=names[layer, "autoencoder"], model=model,
        )  # fmt: skip
        at = [str(aliased(net, name)) for name in (config.reads, config.writes)]
        rows.append(_trained(kept, config, how, (at[0], at[1]), out / f"{kind}-{layer}", said))
    return TrainReport(model=model, rows=rows, tokens=kept.count, captured_per_second=kept.tokens_per_second,
                       folder=str(out))  # fmt: skip


def _trained(
    kept: Activations, config: DictionaryConfig, how: DictionaryTraining, at: tuple[str, str], folder: Path,
    said: Said | None,
) -> dict[str, Any]:  # fmt: skip
    """Train and save one dictionary, unless it is there; return its row."""
    checkpoint = folder.with_name(f"{folder.name}.training")
    if folder.exists():
        if checkpoint.exists():  # otherwise nobody knows how it was trained
            claim(checkpoint, config, how, kept.digest)
        return {"dictionary": folder.name, "note": "finished before"}
    found = train_dictionary(kept, config, how, places=at, out=checkpoint, said=said)
    save_dictionary(found.dictionary, folder)
    return {
        "dictionary": folder.name, "features": config.features, "tokens": found.tokens, "L0": found.last.get("l0"),
        "unexplained": found.last.get("unexplained"), "dead": found.last.get("dead"),
        "tokens/s": found.tokens_per_second,
    }  # fmt: skip


def evaluate_by_name(
    model: str,
    folders: Sequence[str],
    *,
    texts: Sequence[str] = ("wiki-sample",),
    tokens: int = 4096,
    length: int = 128,
    ks: Sequence[int] = (),
    activations: str | None = None,
    said: Said | None = None,
) -> ScoreReport:
    """Put dictionaries of one place into a model and score it on held-out text.

    Args:
        folders: of dictionaries that write the same place. ks: as for `evaluate_dictionaries`.
        activations: folder of cached activations to fit the best affine map on; without, it is left out.
        texts, tokens, length: of the held-out split.
    """
    net, tokenizer, found = load_placed(model, folders)
    windows = _windows(tokenizer, texts, HELD_OUT, tokens, length)
    beside = {}
    if activations is not None:
        first = next(iter(found.values()))
        beside["best affine map"] = best_affine(open_activations(activations), first.reads, first.writes)
    scores = evaluate_dictionaries(net, found, windows, beside=beside, ks=ks, said=said)
    place = next(iter(found.values())).writes
    return ScoreReport(model=model, place=place, tokens=windows[:, 1:].numel(), scores=scores)


def dashboard_by_name(
    model: str,
    folder: str,
    *,
    features: Sequence[int] | None = None,
    count: int = 20,
    texts: Sequence[str] = ("wiki-sample",),
    tokens: int = 16384,
    length: int = 128,
    activations: str | None = None,
    said: Said | None = None,
) -> Dashboard:
    """Make a dashboard of a dictionary, on held-out text. Arguments as for `dashboard` and `evaluate_by_name`.

    Args:
        activations: folder of cached activations: their text is read instead, without running the model.
    """
    net, tokenizer, found = load_placed(model, [folder])
    at = next(iter(found.values()))
    if features is not None:
        at.dictionary.check(features)
    kept = None if activations is None else open_activations(activations)
    if kept is not None:
        windows = kept.windows(max(1, tokens // (kept.windows(1).shape[1])))
    else:
        windows = _windows(tokenizer, texts, HELD_OUT, tokens, length)
    return dashboard(
        net, tokenizer, at, windows, features=features, count=count, name=model, activations=kept, said=said
    )


def graph_by_name(
    model: str,
    folders: Sequence[str],
    text: str,
    *,
    target: str | None = None,
    said: Said | None = None,
    **options: Any,
) -> GraphReport:
    """Trace what a model says after a text through its transcoders. Options are those of `attribute`.

    Args:
        target: the word to explain (its first token); the likeliest ones if None.
    """
    net, tokenizer, ids, wanted = text_of(model, text, target)
    found = [placed(net, load_dictionary(folder, model=model)) for folder in folders]
    graph = attribute(net, ids, found, targets=None if wanted is None else [wanted], said=said, **options)
    answers = {node.index: tokenizer.decode([node.index]) for node in graph.nodes if node.kind == "logit"}
    return GraphReport(model=model, graph=graph, words=data.pieces(tokenizer, graph.ids), answers=answers)


def _check_layers(net: Any, layers: Sequence[int]) -> None:
    count = len(net.get_submodule(adapter_for(net).layers))
    for layer in layers:
        if not 0 <= layer < count:
            raise InputError(f"layer {layer} is outside the model's layers 0 to {count - 1}")
    if not layers:
        raise InputError("no layer was given; name at least one")


def load_placed(model: str, folders: Sequence[str]) -> tuple[Any, Any, dict[str, Placed]]:
    """Load a model, its tokenizer, and dictionaries at their places, by the names of their folders."""
    loaded = {Path(folder).name: load_dictionary(folder, model=model) for folder in folders}
    if len(loaded) != len(folders) or not loaded:
        raise InputError(f"dictionaries are named by their folders, which must differ; given {', '.join(folders)}")
    net, tokenizer = load_teacher(model)
    return net, tokenizer, {name: placed(net, each) for name, each in loaded.items()}


def _windows(tokenizer: Any, texts: Sequence[str], split: str, tokens: int, length: int) -> Tensor:
    """Return windows of texts by name, one text after the other, until there are enough tokens."""
    found: list[Tensor] = []
    for name in texts:
        left = tokens - sum(part.numel() for part in found)
        if not found or left >= length:
            found.append(data.windows(data.load_text(name, split=split), tokenizer, length, max_tokens=left))
    return torch.cat(found)
