"""One vocabulary for models with several: whose token gets which row, and where rows come from that a model lacks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineament import io
from lineament._base.errors import InputError
from lineament.weights.differences import listed
from lineament.weights.point import Point, Spec

ENDS = (
    "embed_tokens.weight", "wte.weight", "lm_head.weight", "lm_head.bias", "embed_in.weight", "embed_out.weight",
    "word_embeddings.weight", "shared.weight", "tok_embeddings.weight", "output.weight",
)  # fmt: skip
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Vocabulary:
    """The result's tokens, and for each model the row of each token, -1 where it has none."""

    tokenizer: Any
    tokens: Mapping[str, int]
    rows: Mapping[str, Tensor]
    original: Mapping[str, Mapping[str, int]]
    size: int
    folder: Path
    """Of the model whose tokens come first."""

    def special_ids(self, *files: str) -> dict[str, Any]:
        """Return the tokens that begin, end and pad by that model's configs, the later ones first; None where unsaid.

        They are numbers, which in another model mean other tokens.
        """
        told: dict[str, Any] = {}
        for path in (self.folder / file for file in ("config.json", *files)):
            found = io.read_json(path) if path.is_file() else {}
            told |= {key: found[key] for key in SPECIAL if found.get(key) is not None}
        return {key: told.get(key) for key in SPECIAL}


def vocabulary_names(point: Point) -> list[str]:
    """Return the tensors with one row per token: by name, and by the size that the config tells."""
    size = None
    if point.folder is not None:
        size = (io.read_json(point.folder / "config.json") | dict(point.config)).get("vocab_size")
    return [n for n, s in point.specs.items() if n.endswith(ENDS) and s.shape and size in (None, s.shape[0])]


def build_vocabulary(
    folders: Mapping[str, Path],
    sizes: Mapping[str, int],
    source: str,
    base: str,
    extra: Sequence[str],
    pad_to: int | None,
) -> Vocabulary:
    """Build the tokenizer of a merge.

    Args:
        folders: model -> folder with its tokenizer. sizes: model -> rows of its embedding.
        source: "union", "base", or a model. base: whose tokens come first. extra: tokens to add. pad_to: a multiple.

    Raises:
        InputError: a tokenizer can't be read; the union of vocabularies of unlike kinds.
    """
    tokenizers = {model: load_tokenizer(folder) for model, folder in folders.items()}
    vocabularies = {
        model: {token: i for token, i in tokenizer.get_vocab().items() if i < sizes[model]}
        for model, tokenizer in tokenizers.items()
    }
    start = base if source in ("union", "base") else source
    result = load_tokenizer(folders[start])
    if source == "union":
        kinds = {type(tokenizer._tokenizer.model).__name__ for tokenizer in tokenizers.values() if tokenizer.is_fast}
        if len(kinds) > 1:
            unlike = ", ".join(sorted(kinds))
            raise InputError(f"the tokenizers are of unlike kinds ({unlike}); choose one model's (tokenizer_source)")
        _add_missing(result, tokenizers, vocabularies)
    known = result.get_vocab()
    result.add_tokens([token for token in extra if token not in known])
    tokens = result.get_vocab()
    rows = {}
    for model, vocabulary in vocabularies.items():
        rows[model] = torch.full((max(tokens.values()) + 1,), -1)
        for token, i in tokens.items():
            rows[model][i] = vocabulary.get(token, -1)
    size = max(tokens.values()) + 1
    size = -(-size // pad_to) * pad_to if pad_to else size
    return Vocabulary(result, tokens, rows, vocabularies, size, folders[start])


def _add_missing(result: Any, tokenizers: Mapping[str, Any], vocabularies: Mapping[str, Mapping[str, int]]) -> None:
    """Add what other models know: ordinary tokens as added tokens, added tokens with their own settings."""
    known = set(result.get_vocab())
    for model, tokenizer in tokenizers.items():
        added = {str(token.content): token for token in tokenizer.added_tokens_decoder.values()}
        new = [t for t in sorted(vocabularies[model], key=vocabularies[model].__getitem__) if t not in known]
        result.add_tokens([added.get(token, token) for token in new])
        known |= set(new)


def load_tokenizer(folder: Path) -> Any:
    """Load a model's tokenizer.

    Raises:
        InputError: there is none, or it can't be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (ValueError, KeyError, OSError, TypeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder} has no tokenizer that can be read ({first}); save it there") from None


def with_vocabulary(
    points: Mapping[str, Point], vocabulary: Vocabulary, base: str | None, tokens: Mapping[str, Mapping[str, Any]]
) -> dict[str, Point]:
    """Return the models with their embeddings' rows in the order of a vocabulary.

    A row that a model lacks is taken from where `tokens` says, or from the only model that has the token, or from the
    base, or is the mean of those that have it; a token nobody knows is zero.

    Raises:
        InputError: a token's source has no such token or row.
    """
    plan = _Fill(points, vocabulary, base, tokens)
    return {model: _permuted(model, point, vocabulary, plan) for model, point in points.items()}


def _permuted(model: str, point: Point, vocabulary: Vocabulary, plan: "_Fill") -> Point:
    names = vocabulary_names(point)
    specs = {n: Spec(s.dtype, (vocabulary.size, *s.shape[1:])) if n in names else s for n, s in point.specs.items()}
    told = [sorted(vocabulary.tokens.items(), key=lambda item: item[1]), plan.told, vocabulary.size, model]
    inputs = list(plan.points.values())
    made = point.computed(
        point.label, specs, inputs, lambda n: plan.rows(model, n) if n in names else point.read(n), told=told
    )
    return replace(made, config={**point.config, **vocabulary.special_ids(), "vocab_size": vocabulary.size})


class _Fill:
    """Rows of embeddings in the new order."""

    def __init__(
        self,
        points: Mapping[str, Point],
        vocabulary: Vocabulary,
        base: str | None,
        tokens: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.points, self.vocabulary, self.base, self.tokens = points, vocabulary, base, tokens
        self.told = [{token: [str(how["source"]), how["force"]] for token, how in tokens.items()}, base]
        for token, how in tokens.items():
            if how["source"] is not None:
                self._check(token, how["source"])

    def _check(self, token: str, source: Any) -> None:
        model = source if isinstance(source, str) else source.get("model")
        if isinstance(source, Mapping) and source["kind"] == "zero":
            return
        if model not in self.points:
            raise InputError(
                f"the token {token!r} comes from {model}, which is not merged; models: {listed(self.points)}"
            )
        if isinstance(source, str):
            known = int(self.vocabulary.rows[model][self.vocabulary.tokens[token]]) >= 0
        elif "token" in source:
            known = source["token"] in self.vocabulary.original[model]
        else:
            known = 0 <= source["token_id"] < len(self.vocabulary.original[model])
        if not known:
            raise InputError(f"the token {token!r} comes from {source}, which is not in that model's vocabulary")

    def rows(self, model: str, name: str) -> Tensor:
        """Return one model's embedding in the new order."""
        old, rows = self.points[model].value(name), self.vocabulary.rows[model]
        new = torch.zeros((self.vocabulary.size, *old.shape[1:]), dtype=old.dtype)
        new[: len(rows)][rows >= 0] = old[rows[rows >= 0]]
        del old
        forced = {self.vocabulary.tokens[token] for token, how in self.tokens.items() if how["force"]}
        missing = sorted(forced | set((rows < 0).nonzero().flatten().tolist()))
        told = {self.vocabulary.tokens[token]: how["source"] for token, how in self.tokens.items()}
        takes: dict[str, list[tuple[int, int, float]]] = {}
        for i in missing:
            new[i] = 0
            for donor, row, share in self._donors(i, told.get(i)):
                takes.setdefault(donor, []).append((i, row, share))
        for donor, wanted in takes.items():
            given = self.points[donor].value(name)
            for i, row, share in wanted:
                new[i] += given[row] * share
            del given
        if self.vocabulary.size > len(rows):
            new[len(rows) :] = new[: len(rows)].mean(0)
        return new

    def _donors(self, i: int, source: Any) -> list[tuple[str, int, float]]:
        if isinstance(source, Mapping):
            if source["kind"] == "zero":
                return []
            model = source["model"]
            row = self.vocabulary.original[model][source["token"]] if "token" in source else source["token_id"]
            return [(model, row, 1.0)]
        if isinstance(source, str):
            return [(source, int(self.vocabulary.rows[source][i]), 1.0)]
        have = [(m, int(rows[i])) for m, rows in self.vocabulary.rows.items() if int(rows[i]) >= 0 and m in self.points]
        if len(have) > 1 and self.base in dict(have):
            have = [(self.base, dict(have)[self.base])]
        return [(m, row, 1 / len(have)) for m, row in have]
