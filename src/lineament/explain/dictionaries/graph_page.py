"""An attribution graph to read: words for its nodes, a picture, a page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lineament.explain.dictionaries.attribution import Node
from lineament.explain.dictionaries.feature_graph import AttributionGraph
from lineament.io import write_bytes
from lineament.report import Picture, Section, Tiles, network, page, table

DRAWN = 40
"""Nodes a picture shows, those of the largest influence; more would hide each other."""


@dataclass(frozen=True, kw_only=True)
class GraphReport:
    """A graph with words.

    Attributes:
        model: its name. graph: what was found. words: of the text, one per token. answers: token of the vocabulary ->
            its word, for the logits. scores: rows about the dictionaries, if they were evaluated.
    """

    model: str
    graph: AttributionGraph
    words: list[str]
    answers: dict[int, str]

    def label(self, node: Node) -> str:
        """Name a node for people."""
        if node.kind == "logit":
            return f"{self.answers[node.index]!r} {node.value:.0%}"
        if node.kind == "token":
            return f"{self.words[node.position]!r}@{node.position}"
        return node.name

    def to_json(self) -> dict[str, Any]:
        """Return a value for `json.dumps`."""
        return {"model": self.model, "words": self.words, **self.graph.to_json(),
                "labels": {node.name: self.label(node) for node in self.graph.nodes}}  # fmt: skip

    def rows(self, count: int = 20) -> list[dict[str, Any]]:
        """Return the inner nodes of the largest influence, with what adds most to each and what it adds most to."""
        g, rows = self.graph, []
        order = sorted(range(len(g.nodes)), key=lambda i: -g.influence[i])
        for i in [i for i in order if g.nodes[i].kind not in ("token", "logit")][:count]:
            into = max((e for e in g.edges if e[1] == i), key=lambda e: abs(e[2]), default=None)
            out = max((e for e in g.edges if e[0] == i), key=lambda e: abs(e[2]), default=None)
            rows.append({
                "node": self.label(g.nodes[i]), "on": repr(self.words[g.nodes[i].position]),
                "influence": g.influence[i], "most from": self.label(g.nodes[into[0]]) if into else "-",
                "most to": self.label(g.nodes[out[1]]) if out else "-",
            })  # fmt: skip
        return rows

    def numbers(self) -> dict[str, Any]:
        """Return what to see first."""
        g = self.graph
        first = {"nodes kept": (len(g.nodes), f"{g.active} features active"), "edges kept": len(g.edges)}
        return first | {f"ends in {_ENDS[kind]}": f"{share:.0%}" for kind, share in g.ends.items()}

    def tables(self) -> list[Any]:
        """Return rich tables."""
        first = [{"what": k, "value": v[0] if isinstance(v, tuple) else v} for k, v in self.numbers().items()]
        said = ", ".join(self.label(node) for node in self.graph.nodes if node.kind == "logit")
        return [table(first, title=f"{''.join(self.words)!r} -> {said}"),
                table(self.rows(), title="nodes of the largest influence")]  # fmt: skip

    def png(self, *, dark: bool = False) -> bytes:
        """Draw the graph, tokens at the bottom."""
        g = self.graph
        order = sorted(range(len(g.nodes)), key=lambda i: -g.influence[i])
        shown = set([i for i in order if g.nodes[i].kind not in ("token", "logit")][:DRAWN])
        shown |= {i for i in order if g.nodes[i].kind in ("token", "logit")}
        ranks: dict[int, list[int]] = {}
        for i in sorted(shown, key=lambda i: (g.nodes[i].layer, g.nodes[i].position)):
            ranks.setdefault(g.nodes[i].layer, []).append(i)
        edges = {(self.label(g.nodes[s]), self.label(g.nodes[t])): w for s, t, w in g.edges if {s, t} <= shown}
        strongest = dict(sorted(edges.items(), key=lambda pair: -abs(pair[1]))[: 3 * DRAWN])
        names = [[self.label(g.nodes[i]) for i in part] for rank in ranks.values() for part in _rows(rank)]
        return network(names, strongest, dark=dark)

    def write_png(self, path: str | Path) -> Path:
        """Write the picture."""
        return write_bytes(path, self.png())

    def write_html(self, path: str | Path) -> Path:
        """Write a page: numbers, the picture, the nodes."""
        caption = (
            "From below: tokens, then layer by layer features (t10.57@3: feature 57 of layer 10 on token 3), what "
            "dictionaries leave unexplained (e10@3), MLPs without one (m5@3), and the next tokens. Blue adds, "
            f"vermilion takes away. At most {DRAWN} inner nodes and {3 * DRAWN} edges are drawn."
        )
        alt = f"Attribution graph of {''.join(self.words)!r}: {', '.join(row['node'] for row in self.rows(12))}"
        ends = "Attention patterns and norm scales are constants here: why a head attends is not part of the graph."
        sections = [
            Section("What the answer comes from", [Tiles(self.numbers()), ends]),
            Section("The graph", [Picture(self.png(), alt, caption, self.png(dark=True))]),
            Section("Nodes of the largest influence", [self.rows(40)]),
        ]
        return page(f"Why {self.model} goes on as it does after {''.join(self.words)!r}", sections, path)


_ENDS = {"token": "tokens", "error": "errors", "mlp": "other MLPs", "feature": "features not expanded"}


def _rows(rank: list[int], width: int = 12) -> list[list[int]]:
    return [rank[i : i + width] for i in range(0, len(rank), width)]
