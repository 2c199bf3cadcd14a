"""One sweep that keeps what came by different ways apart: a flow for every way, the strongest going on.

A sweep is linear in its messages, so they can be split and sent down one by one. At a site, what a flow brings is cut
into cells, each the beginning of a flow of its own; what goes past the site stays in the flow it was in. Every route
through the graph is thus counted once, by the cells it passes in order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lineament._base.errors import InputError
from lineament.explain.places import Grid
from lineament.explain.sweep import Message, Step, Sweep

MOST = 100_000
"""Flows of a search without a beam; more would not end."""

Cell = tuple[str, int | None, int | None]
"""(site, position, part); None where a site isn't cut that way."""


@dataclass(frozen=True)
class Site:
    """A place that paths pass through.

    Attributes:
        name: for people. grid: how it is cut; places [B, D] are one position, pictures [B, C, Y, X] have channels as
            their parts.
    """

    name: str
    grid: Grid

    def cut(self, x: Tensor) -> Tensor:
        """Sum [1, ...] up by position and part, [S, U]."""
        return self.grid.parts(_tokens(x))[0].sum(-1)

    def cells(self, fine: Tensor) -> Tensor:
        """Sum what `cut` gave up by cell."""
        fine = fine if "position" in self.grid.by else fine.sum(0, keepdim=True)
        return fine if self.in_parts else fine.sum(1, keepdim=True)

    @property
    def in_parts(self) -> bool:
        """Whether cells are heads or neurons."""
        return bool({"head", "neuron"} & set(self.grid.by))

    def mask(self, x: Tensor, s: int, u: int) -> Tensor:
        """Return 1 in a cell of x and 0 elsewhere."""
        wide = _tokens(x)
        mask = torch.zeros_like(self.grid.parts(wide))
        at = slice(s, s + 1) if "position" in self.grid.by else slice(None)
        mask[:, at, u : u + 1 if self.in_parts else None] = 1
        mask = mask.reshape(wide.shape)
        return (mask.mT if x.dim() > 3 else mask).reshape(x.shape)

    def cell(self, x: Tensor, s: int, u: int) -> Cell:
        """Name a cell of x."""
        by_position = "position" in self.grid.by and x.dim() > 2
        return self.name, s if by_position else None, u if self.in_parts else None


def _tokens(x: Tensor) -> Tensor:
    """View a place as [1, S, D], S positions."""
    return x.unflatten(0, (1, -1)) if x.dim() < 3 else x if x.dim() == 3 else x.flatten(2).mT


@dataclass
class Flow:
    """What came by one way, from the target down, and is not yet delivered."""

    cells: tuple[Cell, ...]
    inbox: dict[int, dict[int, Message]]


@dataclass
class Descent:
    """A sweep of many flows.

    Attributes:
        sites: (node, output) -> the site there. ends: name of an input -> how it is cut.
        beam: flows that go on past a site, the largest by |relevance|, taken position by position; None: all.
        found: cells from the input up -> relevance.
        dropped: flows that were cut off. largest: the largest |relevance| among them.
    """

    sweep: Sweep
    sites: Mapping[tuple[int, int], Site]
    ends: Mapping[str, Site]
    beam: int | None
    tick: Callable[[int, int], None] | None = None
    found: dict[tuple[Cell, ...], float] = field(default_factory=dict)
    dropped: int = 0
    largest: float = 0.0

    @torch.no_grad()
    def run(self) -> None:
        """Send everything down."""
        sweep, total = self.sweep, len(self.sweep.tape.nodes)
        flows = [Flow((), sweep.inbox)]
        for index in range(total):
            for k in range(len(sweep.tape.shapes[index])):
                if (index, k) in self.sites:
                    flows = self._split(flows, index, k)
            for flow in flows:
                messages = flow.inbox.pop(index, None)
                if messages:
                    self._visit(flow, Step(sweep, index, messages))
            flows = [flow for flow in flows if flow.inbox]
            sweep.release(index)
            if self.tick:
                self.tick(index + 1, total)
        sweep.ledger.close()

    def _visit(self, flow: Flow, step: Step) -> None:
        if step.index not in step.tape.leaves:
            self.sweep.inbox = flow.inbox
            self.sweep.visit(step)
            return
        x, site = step.rel(0), self.ends[step.tape.leaves[step.index]]
        self.sweep.ledger.absorb("inputs", x)
        self.sweep.ledger.absorb("inputs_absolute", x.abs())
        sums = site.cells(site.cut(x))
        for s, u in sums.nonzero().tolist():
            way = (site.cell(x, s, u), *reversed(flow.cells))
            self.found[way] = self.found.get(way, 0.0) + float(sums[s, u])

    def _split(self, flows: list[Flow], index: int, k: int) -> list[Flow]:
        """Begin a flow for each cell of a site, and choose who goes on."""
        site, here = self.sites[index, k], []
        for flow in flows:
            message = flow.inbox.get(index, {}).pop(k, None)
            if message is not None:
                here.append((flow, message))
            if flow.inbox.get(index) == {}:
                del flow.inbox[index]
        left = [flow for flow in flows if flow.inbox]
        grids = [_alive(site, message) for _, message in here]
        cells = [(i, s, u) for i, grid in enumerate(grids) for s, u in grid.nonzero().tolist()]
        going, begun = range(len(left)), range(len(cells))
        if self.beam is None and len(left) + len(cells) > MOST:
            raise InputError(f"there are more than {MOST} paths; take a beam, fewer sites, or cut them less finely")
        if self.beam is not None and len(left) + len(cells) > self.beam:
            going, begun = self._largest(left, [m for _, m in here], cells, index, k)
        found = [left[i] for i in going]
        for i, s, u in (cells[j] for j in begun):
            flow, message = here[i]
            x = message.coef if message.rel is None else message.rel
            assert x is not None
            mask = site.mask(x, s, u)
            rel, coef = (None if part is None else part * mask for part in (message.rel, message.coef))
            found.append(Flow((*flow.cells, site.cell(x, s, u)), {index: {k: Message(rel, coef)}}))
        return found

    def _largest(
        self, left: list[Flow], messages: list[Message], cells: list[tuple[int, int, int]], index: int, k: int
    ) -> tuple[list[int], list[int]]:
        """Return which flows and which cells go on; the others end in the ledger."""
        site = self.sites[index, k]
        fine = [site.cut(Step(self.sweep, index, {k: message}).rel(k)) for message in messages]
        sums, sizes = ([site.cells(f(x)) for x in fine] for f in (torch.Tensor.clone, torch.abs))
        afloat = [self._afloat(flow) for flow in left]
        size = torch.tensor([x for _, x in afloat] + [float(sizes[i][s, u]) for i, s, u in cells])
        total = [x for x, _ in afloat] + [float(sums[i][s, u]) for i, s, u in cells]
        order = size.argsort(descending=True, stable=True).tolist()
        kept, off = sorted(order[: self.beam]), order[self.beam :]
        self.dropped += len(off)
        self.largest = max(self.largest, float(size[off[0]]))
        self.sweep.ledger.absorb("stopped", torch.tensor([total[i] for i in off], dtype=torch.float64))
        return [i for i in kept if i < len(left)], [i - len(left) for i in kept if i >= len(left)]

    def _afloat(self, flow: Flow) -> tuple[float, float]:
        """Return the relevance that a flow still carries, and the sum of its size by position."""
        rels = [Step(self.sweep, index, messages).rel(k) for index, messages in flow.inbox.items() for k in messages]
        by_position = [x.sum(-1) if x.dim() > 1 else x.sum() for x in rels]
        return sum(float(x.sum()) for x in by_position), sum(float(x.abs().sum()) for x in by_position)


def _alive(site: Site, message: Message) -> Tensor:
    """Say which cells anything arrived at; coefficients of a 0 count, as what is below may be more than 0."""
    parts = [site.cells(site.cut(x.abs())) for x in (message.rel, message.coef) if x is not None]
    return sum(parts[1:], parts[0]) > 0
