"""A depth report to read: a model by name in, tables, a page and JSON out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lineament import data, io
from lineament._base.errors import InputError
from lineament.explain.depth import Depth, Progress, depth, layer_maps
from lineament.models import find_model, load_teacher
from lineament.report import Picture, Section, Text, Tiles, curve, heatmap, page, table

OURS = (
    "Effective depth (the sum over layers of min(1, mean future effect)) and the transition (the split of |c|/|h| with "
    "the largest variance between both sides) are this library's summaries, not the paper's."
)


@dataclass(frozen=True, kw_only=True)
class Read:
    """A model's depth report with its name."""

    model: str
    found: Depth

    def to_json(self) -> dict[str, Any]:
        """Return everything, for `json.dumps`."""
        return {"model": self.model, **asdict(self.found)}

    def numbers(self) -> dict[str, Any]:
        """Return what to see first."""
        d = self.found
        first = {"layers": d.layers, "tokens": d.tokens, "effective depth": d.effective_depth}
        return first | {"transition at layer": d.transition} | {f"depth score {k}": v for k, v in d.scores.items()}

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per layer."""
        d = self.found
        names = [n for n in ("|a|/|h|", "|m|/|h+a|", "|c|/|h|", "cos(c,h)") if n in d.written]
        later = [sum(row[s + 1 :]) / max(1, d.layers - s - 1) for s, row in enumerate(d.future["mean"])]
        return [
            {"layer": s, **{n: d.written[n]["mean"][s] for n in names}, "skipped: later layers": later[s],
             "skipped: output": d.future["output"][s], "lens KL": d.lens["KL"][s]}
            for s in range(d.layers)
        ]  # fmt: skip

    def tables(self) -> list[Any]:
        """Return rich tables."""
        first = [{"what": k, "value": v} for k, v in self.numbers().items()]
        found = [table(first, title=f"depth of {self.model}"), table(self.rows(), title="by layer, means over tokens")]
        if self.found.difficulty:
            rows = [{"level": level, **scores} for level, scores in self.found.difficulty.items()]
            found.append(table(rows, title="depth score by level, 90 % interval over texts"))
        if self.found.maps:
            found.append(table(self._map_rows(), title=f"linear maps to {self.found.maps['to']}"))
        return found

    def _map_rows(self) -> list[dict[str, Any]]:
        maps = self.found.maps
        same = len(maps["r2"]) == len(maps["best"])
        return [
            {"layer": j, "best from": best, "R2 of it": maps["r2"][best][j]}
            | ({"R2 from the same layer": maps["r2"][j][j]} if same else {})
            | ({"R2 of the identity": maps["identity"][j]} if maps["identity"] else {})
            for j, best in enumerate(maps["best"])
        ]

    def write_html(self, path: str | Path) -> Path:
        """Write one page with every measure."""
        d = self.found
        sections = [Section("How deep is it?", [Tiles(self.numbers()), Text(OURS), self.rows()])]
        over = "Means over tokens without position 0"
        kinds = (  # the first layer writes many times what it reads
            ("size of what is written", "|", f"{over}.", "y"),
            ("direction", "cos", f"{over}; cosines near 0 write new directions, below 0 they erase.", ""),
        )
        for title, prefix, note, log in kinds:
            chosen = {n: x for n, x in d.written.items() if n.startswith(prefix) and (prefix == "cos" or "/" in n)}
            series = {n: (list(range(d.layers)), x["mean"]) for n, x in chosen.items()}
            sections.append(Section(title.capitalize(), [_curve(series, title, note, log)]))
        for title, effects in (("Future tokens", d.future), ("Current tokens", d.current), ("Direct", d.direct)):
            alt = f"{title}: change of each layer's contribution when an earlier layer is skipped"
            sections.append(Section(f"Skipped layers: {title.lower()}", [_map(effects["mean"], alt, "|c - c'| / |c|")]))
        lens = {"KL to the output (nats)": (list(range(d.layers + 1)), d.lens["KL"])}
        sections.append(
            Section("Logit lens", [_curve(lens, "nats", "What each h_l predicts by the last norm and head.")])
        )
        if d.difficulty:
            rows = [{"level": level, **scores} for level, scores in d.difficulty.items()]
            sections.append(Section("By difficulty", [rows]))
        if d.maps:
            words = f"Correlation of relative depths {d.maps['diagonal']:.3g}; 95 % of permuted layers lie below "
            alt = "R2 of the linear map from each source layer to each target layer"
            parts = [Text(f"{words}{d.maps['chance']:.3g}."), _map(_clipped(d.maps["r2"]), alt, "R2"), self._map_rows()]
            sections.append(Section(f"Linear maps to {d.maps['to']}", parts))
        return page(f"What the depth of {self.model} is used for", sections, path)


def _clipped(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[max(0.0, x) for x in row] for row in rows]


def _curve(series: Mapping[str, Any], ylabel: str, caption: str, log: str = "") -> Picture:
    pictures = [curve(series, xlabel="layer", ylabel=ylabel, log=log, dark=dark) for dark in (False, True)]
    return Picture(pictures[0], f"{', '.join(series)} by layer", caption, pictures[1])


def _map(rows: Sequence[Sequence[float]], alt: str, unit: str) -> Picture:
    xlabel, ylabel = ("target layer", "source layer") if unit == "R2" else ("layer", "skipped layer")
    pictures = [heatmap(rows, xlabel=xlabel, ylabel=ylabel, unit=unit, dark=dark) for dark in (False, True)]
    return Picture(pictures[0], alt, "", pictures[1])


def read_depth(
    model: str,
    *,
    text: str = "python-topics",
    texts: int = 4,
    tokens: int = 128,
    cuts: int = 2,
    to: str | None = None,
    levels: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    work: str | Path | None = None,
) -> Read:
    """Report what a language model's depth is used for.

    Args:
        model: as for `models.load_teacher`; students too.
        text: a name of `data.NAMES`, a file or a folder. texts, tokens: how many windows of what length are read.
        cuts, progress: as for `depth`.
        to: another model with the same tokenizer, to map this one's layers onto.
        levels: level of difficulty -> texts.
        seed: of the cuts.
        work: a folder for what is finished, text by text, so that the same call goes on after a kill; it is gone in the
            end. None keeps nothing.

    Raises:
        InputError: no such model or text, another tokenizer, or a folder with other work.
    """
    net, tokenizer = load_teacher(model)
    docs = data.load_text(text)
    windows = data.windows(docs, tokenizer, tokens, max_tokens=texts * tokens)
    by_level = {k: [tokenizer(t, return_tensors="pt")["input_ids"] for t in v] for k, v in (levels or {}).items()}
    models = {"model": io.stamp(find_model(model)), "to": to and io.stamp(find_model(to))}
    read = io.digest_of(windows, *(x for several in by_level.values() for x in several))
    with io.kept_parts(work, models | {"texts": read, "levels": list(by_level), "cuts": cuts, "seed": seed}) as parts:
        found = depth(net, list(windows[:texts]), cuts=cuts, seed=seed, levels=by_level, progress=progress, parts=parts)
        if to is not None:
            if progress:
                progress("maps", 0, 1)
            found = replace(found, maps=parts.value("maps", lambda: _maps(net, tokenizer, to, docs, tokens)))
    return Read(model=model, found=found)


def _maps(net: Any, tokenizer: Any, to: str, docs: Sequence[str], tokens: int) -> dict[str, Any]:
    other, theirs = load_teacher(to)
    if tokenizer.get_vocab() != theirs.get_vocab():
        raise InputError(f"{to} has another tokenizer; linear maps need the same tokens")
    width = int(net.config.hidden_size)
    wanted = (4 * width // tokens + 2) + (width // tokens + 2)
    windows = data.windows(docs, tokenizer, tokens, max_tokens=wanted * tokens)
    fit = max(1, len(windows) * 4 // 5)
    maps, identity = layer_maps(net, other, list(windows[:fit]), list(windows[fit:]))
    return {
        "to": to, "r2": maps.r2.tolist(), "error": maps.error.tolist(), "best": maps.best.tolist(),
        "diagonal": maps.diagonal(), "chance": maps.chance(), "identity": [] if identity is None else identity.tolist(),
    }  # fmt: skip
