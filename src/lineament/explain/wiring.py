"""Who writes to the residual stream of a decoder, and who reads it: the nodes and edges of its circuits.

Writers are what layer 0 receives ("embed"), attention heads ("a3.h7", or "a3" as a whole where heads don't write
linearly) and MLPs ("m3"); readers are attention layers ("a5", with their queries, keys and values), MLPs ("m5") and the
last norm with the head ("logits"). What a reader gets is the sum of what all earlier writers wrote, so an edge
"a3.h7->m5" carries one summand to one reader.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError, near_miss
from lineament.explain.places import replaced, values_at
from lineament.models import adapter_for, head_shape


@dataclass(frozen=True)
class Writer:
    """A node that adds to the residual stream: its name, its module's ("a3"), its number there, the first stage that
    reads it."""

    name: str
    group: str
    part: int
    since: int


@dataclass(frozen=True)
class Reader:
    """A node that reads the residual stream, through a norm, at a stage."""

    name: str
    norm: str
    stage: int


@dataclass(frozen=True, eq=False)
class Wiring:
    """Writers, readers, and where in the model each is.

    Attributes:
        sites: group of writers -> the place where what they write is seen.
        maps: group of heads -> the linear map from them to the stream.
        heads: how many such a group has.
    """

    writers: tuple[Writer, ...]
    readers: tuple[Reader, ...]
    sites: dict[str, str]
    maps: dict[str, nn.Module]
    heads: int

    @cached_property
    def groups(self) -> dict[str, list[int]]:
        """Group -> its writers' numbers."""
        found: dict[str, list[int]] = {}
        for index, writer in enumerate(self.writers):
            found.setdefault(writer.group, []).append(index)
        return found

    @cached_property
    def allowed(self) -> Tensor:
        """[R, W], whether a writer comes before a reader."""
        stages = torch.tensor([reader.stage for reader in self.readers])
        return torch.tensor([writer.since for writer in self.writers]) <= stages[:, None]

    def edges(self) -> list[tuple[int, int]]:
        """Return (reader, writer) of every edge."""
        return [(r, w) for r, w in self.allowed.nonzero().tolist()]

    def edge(self, reader: int, writer: int) -> str:
        """Return an edge's name."""
        return f"{self.writers[writer].name}->{self.readers[reader].name}"

    def matching(self, pattern: str) -> list[tuple[int, int]]:
        """Return the edges that a name or glob means.

        Raises:
            InputError: none.
        """
        found = [edge for edge in self.edges() if fnmatchcase(self.edge(*edge), pattern)]
        if not found:
            names = [self.edge(*edge) for edge in self.edges()]
            raise InputError(
                f"no edge is called {pattern!r}.{near_miss(pattern, names)} Writers are "
                f"{self.writers[0].name}, {self.writers[1].name}, ..., {self.writers[-1].name}; readers "
                f"{self.readers[0].name}, {self.readers[1].name}, ..., {self.readers[-1].name}"
            )
        return found

    def values(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return group -> what is at its place, [B, T, D]; heads lie side by side there."""
        found = values_at(model, inputs, list(self.sites.values()))
        return {group: found[site] for group, site in self.sites.items()}

    def written(self, group: str, x: Tensor) -> Tensor:
        """Return what each writer of a group adds to the stream [U, B, T, D], from what is at its place."""
        module: Any = self.maps.get(group)
        if module is None:
            return x[None]
        weight = module.weight.mT if isinstance(module, nn.Linear) else module.weight
        weight = weight.detach().unflatten(0, (self.heads, -1))
        return torch.einsum("bthk,hkd->hbtd", x.unflatten(-1, (self.heads, -1)), weight.to(x))


def wiring(model: nn.Module) -> Wiring:
    """Find the writers and readers of a decoder in `models.ADAPTERS`.

    Raises:
        InputError: a family whose residual stream isn't known.
    """
    adapter = adapter_for(model)
    if not adapter.reads:
        raise InputError(
            f"who reads and writes the residual stream of {adapter.model_type} is not known; circuits and edges need "
            "`reads` and `writes` in its row of models.ADAPTERS"
        )
    config: Any = model.config
    heads, parallel = head_shape(config)["heads"], bool(getattr(config, "use_parallel_residual", False))
    writers, readers = [Writer("embed", "embed", 0, 0)], []
    sites, maps = {"embed": f"{adapter.layers}.0:input"}, {}
    layers: Any = model.get_submodule(adapter.layers)
    for index, layer in enumerate(layers):
        at, (attention, mlp) = f"{adapter.layers}.{index}", adapter.writes
        readers += [
            Reader(f"{kind}{index}", f"{at}.{norm}", 2 * index + offset)
            for kind, norm, offset in zip("am", adapter.reads, (0, 1), strict=True)
        ]
        output = (
            _output_map(layer, adapter.attention, adapter.projections[-1]) if attention == adapter.attention else None
        )
        names = [f"a{index}.h{head}" for head in range(heads)] if output is not None else [f"a{index}"]
        writers += [Writer(name, f"a{index}", i, 2 * index + 1 + parallel) for i, name in enumerate(names)]
        writers.append(Writer(f"m{index}", f"m{index}", 0, 2 * index + 2))
        sites[f"a{index}"] = f"{at}.{attention}"
        if output is not None:
            maps[f"a{index}"] = output
            sites[f"a{index}"] = f"{at}.{attention}.{adapter.projections[-1]}:input"
        sites[f"m{index}"] = f"{at}.{mlp}"
    readers.append(Reader("logits", adapter.norm, 2 * len(layers)))
    return Wiring(tuple(writers), tuple(readers), sites, maps, heads)


def _output_map(layer: nn.Module, attention: str, name: str) -> nn.Module | None:
    """Return the linear map from heads to the stream, if attention has one."""
    module = getattr(layer.get_submodule(attention), name, None)
    return module if getattr(module, "weight", None) is not None and module.weight.dim() == 2 else None


@contextmanager
def rewired(model: nn.Module, at: Wiring, ablated: Mapping[str, Tensor], cut: Tensor) -> Iterator[None]:
    """Let edges carry what their writer wrote in another run, while the block runs.

    Args:
        ablated: group -> what to take for it, as `Wiring.values` gives it.
        cut: [R, W], the edges that carry it. The others carry what the writer writes in this run.
    """
    off: dict[int, Tensor] = {}

    def heard(group: str) -> Any:
        writers = at.groups[group]

        def hear(x: Tensor) -> Tensor:
            if group == "embed":
                off.clear()
            readers = cut[:, writers].any(1).nonzero().flatten().tolist()
            if readers:
                change = at.written(group, x.detach() - ablated[group].to(x))
                for reader, part in zip(
                    readers, torch.einsum("rw,wbtd->rbtd", cut[readers][:, writers].to(change), change), strict=True
                ):
                    off[reader] = off[reader] + part if reader in off else part
            return x

        return hear

    with ExitStack() as hooks:
        for group, site in at.sites.items():
            hooks.enter_context(replaced(model, site, heard(group)))
        for index, reader in enumerate(at.readers):
            hooks.enter_context(
                replaced(model, f"{reader.norm}:input", lambda x, i=index: x - off.pop(i) if i in off else x)
            )
        yield


@contextmanager
def without(model: nn.Module, at: Wiring, ablated: Mapping[str, Tensor], off: Tensor) -> Iterator[None]:
    """Let writers write what they wrote in another run, while the block runs. `off`: [W], which ones."""

    def changed(group: str) -> Any:
        writers = off[at.groups[group]]

        def change(x: Tensor) -> Tensor:
            new = ablated[group].to(x)
            if group not in at.maps:
                return new
            gone = writers.to(x.device)[:, None]
            return torch.where(gone, *(y.unflatten(-1, (at.heads, -1)) for y in (new, x))).flatten(-2)

        return change

    with ExitStack() as hooks:
        for group, site in at.sites.items():
            if bool(off[at.groups[group]].any()):
                hooks.enter_context(replaced(model, site, changed(group)))
        yield
