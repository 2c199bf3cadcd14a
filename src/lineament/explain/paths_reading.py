"""Paths to read: a table and a picture, with words for tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lineament.explain.paths import PathNode, Paths
from lineament.report import Drawing, Section, Tiles, routes, table


@dataclass(frozen=True)
class PathsReading:
    """Paths with words.

    Attributes:
        found: the paths. target: a word for what they lead to. tokens: input -> its words, for texts.
    """

    found: Paths
    target: str
    tokens: Mapping[str, Sequence[str]]

    def label(self, node: PathNode) -> str:
        """Name a node: tokens by their word, others with the word at their position."""
        words = self._words(node)
        if words is None or node.position is None:
            return node.name
        word = repr(words[node.position])
        return f"{word}@{node.position}" if node.site in self.tokens else f"{node.name} {word}"

    def rows(self) -> list[dict[str, Any]]:
        """Return the paths for a table."""
        return [
            {"relevance": row.relevance, "share": f"{row.share:+.1%}",
             "path": " -> ".join([*(self.label(node) for node in row.nodes), self.target])}
            for row in self.found.rows
        ]  # fmt: skip

    def table(self) -> Any:
        """Return a rich table."""
        return table(self.rows(), title=f"paths to {self.target}; {self.sure}")

    @property
    def sure(self) -> str:
        """What is known of paths that are not here."""
        if self.found.exact:
            return f"{self.found.complete} were followed to the input, none given up"
        return f"{self.found.complete} were followed to the input, {self.found.dropped} ways given up"

    def svg(self) -> str:
        """Draw the paths from below: inputs, then sites in the order of the model, then the target."""
        columns = next((list(words) for words in self.tokens.values()), [])
        chains = [([*map(self._stop, row.nodes), self._end(columns)], row.relevance) for row in self.found.rows]
        words = "; ".join(f"{row['share']}: {row['path']}" for row in self.rows())
        sites = [*self.found.sites, "output"]
        return routes(chains, sites, columns, title=f"Paths to {self.target}", words=words)

    def section(self) -> Section:
        """Return a part of a page: numbers, the picture, the table."""
        found, shares = self.found, [row.share for row in self.found.rows]
        tiles = {"paths": (len(found.rows), f"of {found.complete} followed"),
                 "for the output": (f"{sum(x for x in shares if x > 0):+.1%}", f"of {found.value:.4g}"),
                 "against it": f"{sum(x for x in shares if x < 0):+.1%}",
                 "ways given up": (found.dropped, f"beam {found.beam or 'none'}")}  # fmt: skip
        caption = (
            "From below: the input, heads (a5.h2: head 2 of layer 5), MLPs (m5) or other sites, and the output. A line "
            "is a path, as wide as the relevance that comes by its nodes and no others; blue speaks for the output, "
            "vermilion against it. What lies between two nodes of a path is the residual stream. Signs cancel, so "
            "shares of single paths need not add up to anything near 1."
        )
        alt = "; ".join(f"{row['share']}: {row['path']}" for row in self.rows())
        sure = "No path is larger: all were followed." if found.exact else (
            f"{found.dropped} ways were given up for {found.beam} larger ones, the largest of them with "
            f"{found.largest_dropped:.3g}; what is said of a path is exact, that there is no larger one is not."
        )  # fmt: skip
        return Section(
            "The paths most of it takes", [Tiles(tiles), Drawing(self.svg(), alt, caption), self.rows(), sure]
        )

    def _words(self, node: PathNode) -> Sequence[str] | None:
        words = self.tokens.get(node.site) or next(iter(self.tokens.values()), None)
        return None if words is None or node.position is None or node.position >= len(words) else words

    def _stop(self, node: PathNode) -> tuple[str, int | None, str]:
        words = self._words(node)
        if words is None:
            return node.site, None, node.name.removeprefix(node.site) or node.site
        label = words[node.position or 0].strip() if node.site in self.tokens else node.name.partition("@")[0]
        return node.site, node.position, label or "␣"

    def _end(self, columns: Sequence[str]) -> tuple[str, int | None, str]:
        return "output", len(columns) - 1 if columns else None, self.target
