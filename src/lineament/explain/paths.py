"""`paths`: the chains of nodes through which most relevance flows from the inputs to an output."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.explain.descent import Cell, Descent, Site
from lineament.explain.ledger import Ledger
from lineament.explain.methods import method_of
from lineament.explain.places import Grid, aliased, grid_of
from lineament.explain.recording import tapped
from lineament.explain.relevance import named, seeded
from lineament.explain.rules import rules_of
from lineament.explain.sweep import Sweep
from lineament.explain.targets import Target
from lineament.explain.wiring import wiring
from lineament.graph import Where


@dataclass(frozen=True)
class PathNode:
    """A cell of a site.

    Attributes:
        site: "a5" or "m5" for attention and MLP of a decoder's layer, else the place; the name of an input at the end.
        position: of the token (or place of a picture), if the site is cut by position.
        part: head, neuron or channel, if it is cut so.
    """

    site: str
    position: int | None = None
    part: int | None = None
    head: bool = False

    @property
    def name(self) -> str:
        """A name such as "a5.h2@3": head 2 of layer 5 at position 3; "layer1[7]" is channel 7."""
        part = "" if self.part is None else f".h{self.part}" if self.head else f"[{self.part}]"
        return f"{self.site}{part}" + ("" if self.position is None else f"@{self.position}")


@dataclass(frozen=True)
class RelevancePath:
    """A chain of nodes, the input first, with the relevance that reaches the input through exactly these.

    Attributes:
        share: of the target's value.
    """

    nodes: tuple[PathNode, ...]
    relevance: float
    share: float

    @property
    def name(self) -> str:
        """The nodes' names with arrows between them."""
        return " -> ".join(node.name for node in self.nodes)


@dataclass(frozen=True, kw_only=True)
class Paths:
    """The paths of the largest |relevance|, largest first.

    Attributes:
        rows: the paths. value: the score that is explained. target: it in words. rules: the rule set's name.
        sites: names of what paths can pass, in the order of the model, inputs first.
        complete: how many paths were followed to an input, and `reached`, what they carry together.
        beam: how many ways were followed at a time, None for all. dropped: ways that were given up for others.
        largest_dropped: the largest |relevance| among these, as the beam measures it.
        ledger: where relevance ended; what was given up stands under "stopped".
    """

    rows: tuple[RelevancePath, ...]
    value: float
    target: str
    rules: str
    sites: tuple[str, ...]
    complete: int
    reached: float
    beam: int | None
    dropped: int
    largest_dropped: float
    ledger: Ledger

    @property
    def exact(self) -> bool:
        """Whether nothing was given up, so that no path is larger than these."""
        return self.dropped == 0

    def to_json(self) -> dict[str, Any]:
        """Return a value for `json.dumps`."""
        rows = [
            {"relevance": row.relevance, "share": row.share, "path": row.name,
             "nodes": [{"name": n.name, "site": n.site, "position": n.position, "part": n.part} for n in row.nodes]}
            for row in self.rows
        ]  # fmt: skip
        return {"target": self.target, "value": self.value, "rules": self.rules, "paths": rows,
                "complete": self.complete, "reached": self.reached, "exact": self.exact,
                "beam": self.beam, "dropped": self.dropped, "largest dropped": self.largest_dropped,
                "sites": list(self.sites)}  # fmt: skip


def paths(
    model: nn.Module,
    inputs: Mapping[str, Any] | Tensor,
    *,
    target: Target = None,
    rules: Any = "auto",
    sites: Where | Sequence[Where] | None = None,
    by: str | Sequence[str] | None = None,
    heads: int | None = None,
    top: int = 10,
    beam: int | None = 64,
    tick: Callable[[int, int], None] | None = None,
) -> Paths:
    """Find the chains of nodes through which most relevance flows from the inputs to an output.

    Relevance flows down every route through the model's graph; the relevance of a path is what comes by the routes that
    pass its nodes in order and no other cell of any site. So paths add up: all of them to what the inputs receive,
    those through a cell to what goes through it. What is said of a path is exact, whatever the beam; that there is no
    larger one is certain if `Paths.exact`. Else the beam is a heuristic, but for rules without negative relevance: then
    paths above `largest_dropped` are the largest.

    Args:
        model: any module in eval mode; it comes back as it was.
        inputs: one example (a batch of one), as for `relevance`.
        target, rules: as for `relevance`; a rule set, as other methods send no messages.
        sites: what paths can pass: modules by `graph.Where`, "...:input" for what they receive, TransformerLens's
            names. If None, the heads and MLPs of a decoder, or the blocks of a model that is a list of blocks.
        by: how each site (and input) is cut into cells: "position", "head", "neuron" (the channels of a picture),
            several, or "component" for not at all. If None, attention by position and head, other places [B, T, D] by
            position, [B, D] by neuron and [B, C, Y, X] by channel; inputs that are pictures or vectors not at all.
        heads: into how many parts "head" cuts; the model's own width of a head if None. top: how many paths are wanted.
        beam: ways followed at a time, chosen after each site; None for all, for small models with few cells.
        tick: called with (done, all) operators.

    Raises:
        InputError: a batch, sites that the output does not depend on, top or beam below 1, a method that is no rule
            set, too many paths for no beam, and all that `relevance` refuses.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
        >>> found = paths(model, torch.ones(1, 2), sites="1", beam=None)
        >>> found.exact, found.rows[0].nodes[0].site
        (True, 'input')
    """
    if top < 1 or (beam is not None and beam < 1):
        raise InputError(f"top is {top} and beam {beam}; expected 1 or more")
    if method_of(rules) is not None:
        raise InputError(f"{rules!r} sends no messages, so it has no paths; take a rule set, such as 'attnlrp'")
    chosen, cut = rules_of(rules, model), _Cut(model, by, heads, sites is None)
    listed = cut.default() if sites is None else [sites] if isinstance(sites, str | type) or callable(sites) else sites
    places = [aliased(model, site) for site in listed]
    with seeded(model, named(model, inputs), target=target, rules=chosen, at=places) as run:
        if run.value.numel() != 1:
            raise InputError(f"{run.value.numel()} outputs are explained; paths are of one, so give a batch of one row")
        found = Descent(run.sweep, cut.sites(run.sweep, places), cut.ends(run.sweep), beam, tick)
        run.sweep.tapped.clear()
        found.run()
    return _gathered(found, float(run.value), run.target, chosen.name, top)


def _gathered(found: Descent, value: float, target: str, rules: str, top: int) -> Paths:
    order = sorted(found.found.items(), key=lambda pair: -abs(pair[1]))[:top]
    heads_at = {site.name for site in found.sites.values() if "head" in site.grid.by}
    ledger = found.sweep.ledger
    ledger.inputs_absolute = ledger.columns.pop("inputs_absolute", 0.0)
    return Paths(
        rows=tuple(_path(cells, x, value, heads_at) for cells, x in order), value=value, target=target, rules=rules,
        sites=(*found.ends, *[site.name for _, site in sorted(found.sites.items(), reverse=True)]),
        complete=len(found.found), reached=sum(found.found.values()), beam=found.beam, dropped=found.dropped,
        largest_dropped=found.largest, ledger=ledger,
    )  # fmt: skip


def _path(cells: tuple[Cell, ...], relevance: float, value: float, heads_at: set[str]) -> RelevancePath:
    nodes = tuple(PathNode(site, position, part, site in heads_at) for site, position, part in cells)
    return RelevancePath(nodes, relevance, relevance / value if value else float("nan"))


class _Cut:
    """Names of places, and how each is cut."""

    def __init__(
        self, model: nn.Module, by: str | Sequence[str] | None, heads: int | None, default_sites: bool
    ) -> None:
        self.model, self.by, self.default_sites = model, by, default_sites
        asked = grid_of(model, by, heads, None) if by is not None or heads is not None else None
        self.grid = asked if by is not None else None
        self.heads = asked
        try:
            self.wiring = wiring(model)
        except InputError:
            self.wiring = None
        found = self.wiring
        self.named = {} if found is None else {site: group for group, site in found.sites.items() if group != "embed"}

    def default(self) -> list[str]:
        """Return the sites of a model that nobody named."""
        if self.named:
            return list(self.named)
        lists = [(name, m) for name, m in self.model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
        name, longest = max(lists, key=lambda pair: len(pair[1]), default=("", nn.ModuleList()))
        if len(longest) < 2:
            raise InputError(
                f"{type(self.model).__name__} is no decoder we know and has no list of blocks; name sites, "
                "such as '*.layer.*' or a class of modules"
            )
        return [f"{name}.{child}".lstrip(".") for child, _ in longest.named_children()]

    def sites(self, sweep: Sweep, places: Sequence[Where]) -> dict[tuple[int, int], Site]:
        """Return the sites by where they are in the graph."""
        outs, ins = tapped(self.model, places)
        names = [*outs, *(place for some in ins.values() for place in some)]
        found: dict[tuple[int, int], Site] = {}
        for name in sorted(names):
            calls = sweep.tape.places.get(name, ())
            for number, (index, k) in enumerate(calls, 1):
                if index not in sweep.tape.leaves and (index, k) not in found and sweep.tape.live[index]:
                    label = self.named.get(name, name) + (f"#{number}" if len(calls) > 1 else "")
                    found[index, k] = Site(label, self._grid(name, sweep.tape.shapes[index][k]))
        if not found:
            raise InputError(f"the output depends on an input through none of {', '.join(sorted(names))}; name others")
        return found

    def ends(self, sweep: Sweep) -> dict[str, Site]:
        """Return the inputs."""
        found = {}
        for index, name in sweep.tape.leaves.items():
            shape = sweep.tape.shapes[index][0]
            by = ("position",) if len(shape) == 3 else ("component",)
            if self.grid is not None:
                by = tuple(axis for axis in self.grid.by if axis != "head") or ("component",)
            found[name] = Site(name or "input", Grid(by))
        return found

    def _grid(self, name: str, shape: Sequence[int]) -> Grid:
        if not shape or shape[0] != 1:
            raise InputError(f"{name!r} passes {list(shape)}; paths are of one example, so [1, ...] is expected")
        at_heads = self.wiring is not None and self.named.get(name) in self.wiring.maps
        if self.grid is None:
            if at_heads:
                return Grid(("position", "head"), self.heads.heads if self.heads else self.wiring.heads)  # pyright: ignore
            return Grid(("position",) if len(shape) == 3 else ("neuron",))
        if self.default_sites and "head" in self.grid.by and not at_heads:
            return Grid(tuple(axis for axis in self.grid.by if axis != "head") or ("component",))
        return self.grid
