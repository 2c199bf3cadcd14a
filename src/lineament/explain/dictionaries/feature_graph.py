"""`attribute`: the attribution graph of what a model says after a text, pruned to what counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.explain.dictionaries.activations import Said
from lineament.explain.dictionaries.attribution import Frozen, Node, Sources
from lineament.explain.dictionaries.hooks import Placed


@dataclass(frozen=True, kw_only=True)
class AttributionGraph:
    """What counts for the likeliest next tokens.

    Attributes:
        nodes: those kept, in the order of the model. influence: of each, the logits' probabilities adding up to 1.
        edges: (source, target, what the source adds to the target's number), the numbers being positions in `nodes`.
        ids: the text [T].
        active: how many features are active on the text; expanded: how many had their own sources looked up.
        ends: where influence comes from in the end, before pruning: shares of tokens, of errors of dictionaries, of
            MLPs without one, and of features that were not expanded.
    """

    nodes: list[Node]
    influence: list[float]
    edges: list[tuple[int, int, float]]
    ids: list[int]
    active: int
    expanded: int
    ends: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return a value for `json.dumps`."""
        nodes = [
            {"name": n.name, "kind": n.kind, "layer": n.layer, "position": n.position, "index": n.index,
             "value": n.value, "influence": i}
            for n, i in zip(self.nodes, self.influence, strict=True)
        ]  # fmt: skip
        edges = [{"from": self.nodes[s].name, "to": self.nodes[t].name, "weight": w} for s, t, w in self.edges]
        return {"tokens": self.ids, "nodes": nodes, "edges": edges, "active features": self.active,
                "expanded features": self.expanded, "influence ends in": self.ends}  # fmt: skip


def attribute(
    model: nn.Module,
    ids: Tensor,
    dictionaries: Sequence[Placed],
    *,
    targets: Sequence[int] | None = None,
    mass: float = 0.95,
    most_logits: int = 10,
    most_features: int = 512,
    keep_nodes: float = 0.8,
    keep_edges: float = 0.98,
    rows: int = 32,
    said: Said | None = None,
) -> AttributionGraph:
    """Trace what a model says after a text through the features of its transcoders.

    Attention patterns and norm scales are constants. MLPs without a dictionary, and what dictionaries leave
    unexplained, are nodes that nothing is traced through.

    Args:
        model: a decoder in eval mode; it comes back as it was.
        ids: [1, T].
        dictionaries: transcoders by `placed`, one per layer.
        targets: tokens of the vocabulary to explain; if None, the likeliest, until they have `mass` of the probability,
            `most_logits` at most.
        most_features: features whose own sources are looked up, those with the largest influence first.
        keep_nodes, keep_edges: shares of the influence that the nodes and edges kept have.
        rows: targets in a pass, each a copy of the text. said: called with progress.

    Raises:
        InputError: no dictionary, two for one layer, an autoencoder, or shares out of range.
    """
    if ids.dim() != 2 or len(ids) != 1 or not (0 < keep_nodes <= 1 and 0 < keep_edges <= 1):
        raise InputError(f"ids are {list(ids.shape)}, shares {keep_nodes} and {keep_edges}; expected [1, T] and 0 to 1")
    if targets is not None and not all(0 <= i < int(model.config.vocab_size) for i in targets):  # pyright: ignore
        raise InputError(f"targets are {list(targets)}; the vocabulary has 0 to {model.config.vocab_size - 1}")  # pyright: ignore
    frozen = Frozen(model, ids, dictionaries)
    sources = frozen.sources()
    logits = frozen.logits(mass=mass, most=most_logits, chosen=targets)
    count = len(sources.nodes)
    A = torch.zeros(count + len(logits.nodes), count)
    A[count:] = frozen.edges(logits, sources, rows=rows, said=said)[:, :-1].float()
    weights = torch.tensor([node.value for node in logits.nodes])
    weights = weights / weights.sum()
    expanded = _expand(frozen, sources, A, weights, most_features, rows, said)
    total = _influence(A, weights)
    return _pruned(sources, logits.nodes, A, total, weights, expanded, ids[0].tolist(), (keep_nodes, keep_edges))


def _expand(
    frozen: Frozen, sources: Sources, A: Tensor, weights: Tensor, most: int, rows: int, said: Said | None
) -> Tensor:
    """Look up the sources of features, those of the largest influence first; fill A, return which ones [S]."""
    features = torch.tensor([node.kind == "feature" for node in sources.nodes])
    expanded, wanted = torch.zeros_like(features), min(most, int(features.sum()))
    number = {node: i for i, node in enumerate(sources.nodes)}
    while (left := wanted - int(expanded.sum())) > 0:
        open_ = torch.where(features & ~expanded, _influence(A, weights), -1.0)
        size = left if wanted == int(features.sum()) else min(left, 4 * rows)
        chosen = open_.topk(size).indices.tolist()
        for part in frozen.features([sources.nodes[i] for i in sorted(chosen)]):
            at = [number[node] for node in part.nodes]
            A[at] = frozen.edges(part, sources, rows=rows)[:, :-1].float()
        expanded[chosen] = True
        if said:
            said("edges into features", int(expanded.sum()), wanted)
    return expanded


def _shares(A: Tensor) -> Tensor:
    """Return |A| with rows that add up to 1, or 0."""
    size = A.abs()
    return size / size.sum(1, keepdim=True).clamp_min(1e-12)


def _influence(A: Tensor, weights: Tensor) -> Tensor:
    """Return w (P + P^2 + ...) over the sources [S], P the shares of A; it ends, as nothing reads what comes later."""
    P, count = _shares(A), A.shape[1]
    now = weights @ P[count:]
    total = now.clone()
    for _ in range(count):
        now = now @ P[:count]
        if not bool(now.any()):
            break
        total += now
    return total


def _pruned(
    sources: Sources, logits: list[Node], A: Tensor, total: Tensor, weights: Tensor, expanded: Tensor, ids: list[int],
    keep: tuple[float, float],
) -> AttributionGraph:  # fmt: skip
    count, nodes = A.shape[1], [*sources.nodes, *logits]
    influence = torch.cat([total, weights])
    always = torch.tensor([node.kind in ("token", "logit") for node in nodes])
    kept = always | torch.cat([_largest(total, keep[0]), torch.ones(len(logits), dtype=torch.bool)])
    A = A * kept[:, None] * kept[:count]
    score = _shares(A) * influence[:, None]
    A = A * _largest(score.flatten(), keep[1]).view_as(score)
    features = torch.tensor([node.kind == "feature" for node in nodes])
    while True:  # drop what leads nowhere, and features that nothing leads to
        heard = torch.cat([(A != 0).any(0), torch.ones(len(logits), dtype=torch.bool)])
        told = (A != 0).any(1) | ~features | torch.cat([~expanded, torch.zeros(len(logits), dtype=torch.bool)])
        left = kept & (always | (heard & told))
        if bool((left == kept).all()):
            break
        kept = left
        A = A * kept[:, None] * kept[:count]
    at = kept.nonzero().flatten().tolist()
    place = {i: n for n, i in enumerate(at)}
    edges = [(place[s], place[t], float(A[t, s])) for t, s in A.nonzero().tolist()]
    return AttributionGraph(
        nodes=[nodes[i] for i in at], influence=influence[at].tolist(), edges=edges, ids=ids,
        active=int(features.sum()), expanded=int(expanded.sum()), ends=_ends(sources.nodes, total, expanded),
    )  # fmt: skip


def _largest(x: Tensor, share: float) -> Tensor:
    """Return which are the largest that together have a share of the sum."""
    order = x.argsort(descending=True)
    before = x[order].cumsum(0) - x[order]
    found = torch.zeros_like(x, dtype=torch.bool)
    found[order[before < share * x.sum()]] = True
    return found & (x > 0)


def _ends(nodes: list[Node], total: Tensor, expanded: Tensor) -> dict[str, float]:
    found: dict[str, float] = {}
    for i, node in enumerate(nodes):
        if node.kind != "feature" or not bool(expanded[i]):
            found[node.kind] = found.get(node.kind, 0.0) + float(total[i])
    whole = sum(found.values()) or 1.0
    return {kind: x / whole for kind, x in found.items()}
