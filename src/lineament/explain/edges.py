"""Effects of edges and paths of a decoder: what a writer hands to one reader of the residual stream, and no other.

Path patching (Wang et al. 2022; Goldowsky-Dill et al. 2023) is the truth: the reader receives the writer's new value,
everyone else the old one, and from there on the change goes freely. Estimated (Syed et al. 2023; Hanna et al. 2024) it
is <new - old, slope of the metric at what the reader receives>, all edges from one backward sweep.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.explain.moved import ABLATIONS, RELP, SLOPES, How, Metric, ablated, patched, swept
from lineament.explain.places import Grid, apart, first_tensor, replaced, run
from lineament.explain.recording import prepared
from lineament.explain.restart import Restart
from lineament.explain.wiring import Wiring, wiring
from lineament.graph import capture
from lineament.models import adapter_for


def moved_edges(
    model: nn.Module, clean: Mapping[str, Any], corrupt: Mapping[str, Any], metric: Metric, names: list[str],
    method: str, how: How,
) -> dict[str, Tensor]:  # fmt: skip
    """Return edge or path -> scores [B], or [B, T] by the position where the writer writes."""
    if {"head", "neuron"} & set(how.grid.by):
        raise InputError("edges are by component or position; their writers are heads already")
    at = wiring(model)
    values = [at.values(model, inputs) for inputs in (clean, corrupt)]
    if method in ABLATIONS:
        base, old, new = clean, values[0], ablated(values[0], values[1], method)
    else:
        base, old, new = corrupt, values[1], values[0]
    long = [name for name in names if name.count("->") > 1]
    wanted = list(dict.fromkeys(edge for name in names if name not in long for edge in at.matching(name)))
    found = {}
    if how.method == "patch":
        found |= _patched_edges(model, base, old, new, metric, at, wanted, how)
        found |= {name: _patched_path(model, base, old, new, metric, at, name, how) for name in long}
    elif long:
        raise InputError(f"{long[0]!r} has several steps; estimates know single edges, method='patch' knows paths")
    else:
        slopes = reader_slopes(model, base, metric, at, how, other=corrupt if base is clean else clean)
        found |= edge_scores(at, old, new, slopes, wanted, how.grid)
    return found


def edge_scores(
    at: Wiring, old: Mapping[str, Tensor], new: Mapping[str, Tensor], slopes: Tensor, wanted: list[tuple[int, int]],
    grid: Grid,
) -> dict[str, Tensor]:  # fmt: skip
    """Return edge -> <new - old of the writer, slope [R, B, T, D] at the reader>."""
    by_group: dict[str, list[tuple[int, int]]] = {}
    for reader, writer in wanted:
        by_group.setdefault(at.writers[writer].group, []).append((reader, writer))
    found = {}
    for group, edges in by_group.items():
        change = at.written(group, new[group] - old[group]).to(slopes)
        products = torch.einsum("wbtd,rbtd->rwbt", change, slopes)
        for reader, writer in edges:
            found[at.edge(reader, writer)] = grid.sums(products[reader, at.writers[writer].part][..., None])
    return {at.edge(*edge): found[at.edge(*edge)] for edge in wanted}


def reader_slopes(
    model: nn.Module, base: Mapping[str, Any], metric: Metric, at: Wiring, how: How, *, other: Mapping[str, Any]
) -> Tensor:
    """Return the slope of the metric at what each reader receives, [R, B, T, D].

    "integrated-gradients" is the mean gradient over the line between the embeddings of the base run and of `other`;
    "direct" is that of the last reader alone.
    """
    places = [f"{reader.norm}:input" for reader in at.readers]
    if how.method == "integrated-gradients":
        with apart(model, places):
            return _mean_slopes(model, base, other, metric, at, how)
    rules = RELP if how.method == "direct" else SLOPES[how.method]
    found = swept(model, base, metric, places[-1 if how.method == "direct" else 0 :], rules)
    some = next(iter(found.values()))
    return torch.stack([found.get(place, torch.zeros_like(some)) for place in places])


def _mean_slopes(
    model: nn.Module, base: Mapping[str, Any], other: Mapping[str, Any], metric: Metric, at: Wiring, how: How
) -> Tensor:
    embedding, norms = adapter_for(model).embedding, [reader.norm for reader in at.readers]
    ends = []
    for inputs in (base, other):
        with torch.no_grad(), capture(model, embedding, stop=True) as seen:
            run(model, inputs)
        ends.append(seen.tensor(embedding).clone())
    total: Any = 0
    with prepared(model):
        for step in range(how.steps):
            x = (ends[0] + (step + 0.5) / how.steps * (ends[1] - ends[0])).requires_grad_()
            with (
                replaced(model, embedding, lambda _, x=x: x),
                capture(model, lambda name, _: name in norms, inputs=True, outputs=False, detach=False) as seen,
            ):
                value = metric(run(model, base)).sum()
            held = [first_tensor(seen.inputs(norm)[0]) for norm in norms]
            total = total + torch.stack(torch.autograd.grad(value, held)) / how.steps
            how.counted(step + 1, how.steps)
    return total


def _patched_edges(
    model: nn.Module, base: Mapping[str, Any], old: Mapping[str, Tensor], new: Mapping[str, Tensor], metric: Metric,
    at: Wiring, wanted: list[tuple[int, int]], how: How,
) -> dict[str, Tensor]:  # fmt: skip
    """Run the model for every edge (and position), those into one reader sharing forward passes."""
    by_reader: dict[int, list[int]] = {}
    for reader, writer in wanted:
        by_reader.setdefault(reader, []).append(writer)
    groups = {at.writers[writer].group for _, writer in wanted}
    found, done = {}, 0
    with torch.no_grad():
        changes = {group: at.written(group, new[group] - old[group]) for group in groups}
        before = metric(run(model, base))
        restart = Restart(model, base, [f"{at.readers[reader].norm}:input" for reader in by_reader])
        for reader, writers in by_reader.items():
            sent = [changes[at.writers[w].group][at.writers[w].part] for w in writers]
            after = _received(restart, f"{at.readers[reader].norm}:input", metric, sent, how)
            for writer, scores in zip(writers, after, strict=True):
                found[at.edge(reader, writer)] = how.grid.shaped(scores - before, sent[0][..., :1])
            done += len(writers)
            how.counted(done, len(wanted))
    return {at.edge(*edge): found[at.edge(*edge)] for edge in wanted}


def _received(restart: Restart, site: str, metric: Metric, sent: list[Tensor], how: How) -> Tensor:
    """Return the metric [changes, cells, B] when a reader gets one change more, by position or all at once."""
    groups = [ts for ts, _ in how.grid.cells(sent[0][..., :1])]
    cells = [(change, ts) for change in sent for ts in groups]
    size, parts = max(1, how.rows // len(sent[0])), []
    for i in range(0, len(cells), size):
        more = torch.zeros(len(cells[i : i + size]), *sent[0].shape).to(sent[0])
        for copy, (change, ts) in enumerate(cells[i : i + size]):
            more[copy][:, ts] = change[:, ts]
        flat = more.flatten(0, 1)
        parts.append(patched(restart, site, metric, lambda x, flat=flat: x + flat, len(more)))
    return torch.cat(parts).unflatten(0, (len(sent), len(groups)))


def _patched_path(
    model: nn.Module, base: Mapping[str, Any], old: Mapping[str, Tensor], new: Mapping[str, Tensor], metric: Metric,
    at: Wiring, name: str, how: How,
) -> Tensor:  # fmt: skip
    """Follow a change from node to node: each inner node hears it from the one before it alone."""
    if how.grid.by != ("component",):
        raise InputError(f"{name!r} has several steps; paths are by component")
    first, *inner, last = name.split("->")
    change = _sent(at, first, old, new)
    names = [reader.name for reader in at.readers]
    with torch.no_grad():
        sender = first
        for node in [*inner, last]:
            heard_by = node.partition(".")[0]
            for part in _parts(at, sender):
                if heard_by not in names or not at.allowed[names.index(heard_by), part]:
                    raise InputError(f"{sender!r} does not reach {node!r} in {name!r}")
            site = f"{at.readers[names.index(heard_by)].norm}:input"
            if node == last:
                restart = Restart(model, base, [site])
                return patched(restart, site, metric, lambda x, more=change: x + more, 1)[0] - metric(run(model, base))
            with replaced(model, site, lambda x, more=change: x + more):
                change = _sent(at, node, old, at.values(model, base))
            sender = node
    raise AssertionError(name)


def _parts(at: Wiring, node: str) -> list[int]:
    """Return the writers that a node's name means: one head, or all of a layer."""
    found = [index for index, writer in enumerate(at.writers) if node in (writer.name, writer.group)]
    if not found:
        raise InputError(f"no writer is called {node!r}; writers are named like {at.writers[0].name!r}, "
                         f"{at.writers[1].name!r} and {at.writers[-1].name!r}")  # fmt: skip
    return found


def _sent(at: Wiring, node: str, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Tensor:
    """Return what a node writes more than before, [B, T, D]."""
    parts = _parts(at, node)
    group = at.writers[parts[0]].group
    return at.written(group, new[group] - old[group])[[at.writers[part].part for part in parts]].sum(0)
