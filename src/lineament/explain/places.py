"""Places in a model that effects are of: their names, what they hold, and the cells they are cut into."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lineament._base.errors import InputError, unknown
from lineament.explain.recording import accepts, check_mode, module_of, tapped
from lineament.graph import Where, capture
from lineament.models import adapter_for, head_shape

ALIASES = {
    r"blocks\.(\d+)\.hook_resid_pre": "{layers}.{0}:input",
    r"blocks\.(\d+)\.hook_resid_mid": "{layers}.{0}.{mlp_reads}:stream",
    r"blocks\.(\d+)\.hook_resid_post": "{layers}.{0}",
    r"blocks\.(\d+)\.attn\.hook_([qkv])": "{layers}.{0}.{attention}.{1}_proj",
    r"blocks\.(\d+)\.attn\.hook_z": "{layers}.{0}.{attention}.{out}:input",
    r"blocks\.(\d+)\.hook_attn_out": "{layers}.{0}.{attention_writes}",
    r"blocks\.(\d+)\.mlp\.hook_in": "{layers}.{0}.{mlp}:input",
    r"blocks\.(\d+)\.mlp\.hook_post": "{layers}.{0}.{down}:input",
    r"blocks\.(\d+)\.mlp\.hook_out": "{layers}.{0}.{mlp}",
    r"blocks\.(\d+)\.hook_mlp_out": "{layers}.{0}.{mlp_writes}",
    r"hook_embed": "{embedding}",
}
"""TransformerLens's names of places -> ours. Its queries and keys are those before rotary positions."""

AXES = ("component", "position", "head", "neuron")


@dataclass(frozen=True)
class Grid:
    """How places [B, T, D] are cut into cells, each with an effect of its own.

    Attributes:
        by: of `AXES`; "component" is the whole place.
        heads: parts of the last axis, if by head; if None, as many as are `width` wide, so that keys and values which
            heads share are cut into their own.
        positions: the positions looked at; all if None. Negative ones count from the end.
        width: of a head.
    """

    by: tuple[str, ...]
    heads: int | None = None
    positions: tuple[int, ...] | None = None
    width: int | None = None

    def parts(self, x: Tensor) -> Tensor:
        """Return x as [B, T, U, W], U parts by head or neuron (one, if by neither)."""
        if not {"head", "neuron"} & set(self.by):
            return x.unflatten(-1, (1, -1))
        if "neuron" in self.by:
            return x.unflatten(-1, (-1, 1))
        if x.shape[-1] % (self.heads or self.width or 1):
            said = f"{self.heads} heads" if self.heads else f"heads of {self.width}"
            raise InputError(f"a place of width {x.shape[-1]} has no {said}; pass heads=, or another place")
        return x.unflatten(-1, (self.heads, -1) if self.heads else (-1, self.width or 1))

    def at(self, length: int) -> list[int]:
        """Return the positions looked at, counted from the start."""
        if self.positions is None:
            return list(range(length))
        if any(not -length <= t < length for t in self.positions):
            raise InputError(f"positions are 0 to {length - 1}; given {list(self.positions)}")
        return [t % length for t in self.positions]

    def cells(self, x: Tensor) -> list[tuple[list[int], int]]:
        """Return (positions, part) of every cell, in the order of the scores."""
        at = self.at(x.shape[1])
        return [(ts, u) for ts in self._groups(at) for u in range(self.parts(x).shape[2])]

    def shaped(self, found: Tensor, x: Tensor) -> Tensor:
        """Return what was found [cells, B] as scores [B], [B, T], [B, U] or [B, T, U]."""
        sizes = len(self._groups(self.at(x.shape[1]))), self.parts(x).shape[2]
        return self._squeezed(found.movedim(0, -1).unflatten(-1, sizes))

    def sums(self, x: Tensor) -> Tensor:
        """Sum [B, T, D] up by cell, to scores."""
        found = self.parts(x).sum(-1)[:, self.at(x.shape[1])]
        return self._squeezed(found if "position" in self.by else found.sum(1, keepdim=True))

    def _groups(self, at: list[int]) -> list[list[int]]:
        return [[t] for t in at] if "position" in self.by else [at]

    def _squeezed(self, found: Tensor) -> Tensor:
        found = found if {"head", "neuron"} & set(self.by) else found.squeeze(2)
        return found if "position" in self.by else found.squeeze(1)


def grid_of(
    model: nn.Module, by: str | Sequence[str] | None, heads: int | None, positions: Sequence[int] | None
) -> Grid:
    """Check how places shall be cut; by position unless said otherwise, and by head if heads are given.

    Raises:
        InputError: an unknown axis, heads together with neurons, or heads of a model that doesn't say how many it has.
    """
    named = ("position", "head")[: 1 + bool(heads)] if by is None else (by,) if isinstance(by, str) else tuple(by)
    for axis in named:
        if axis not in AXES:
            raise unknown("way to cut places", axis, AXES)
    if {"head", "neuron"} <= set(named):
        raise InputError("effects are by head or by neuron; a neuron of a head is just a neuron of the place")
    width = None
    if "head" in named and not heads:
        if not hasattr(model, "config"):
            raise InputError(f"{type(model).__name__} doesn't say how many heads it has; pass heads=")
        width = head_shape(model.config)["key_width"]
    return Grid(named, heads, None if positions is None else tuple(positions), width)


def aliased(model: nn.Module, site: Where) -> Where:
    """Return a place under our name where TransformerLens's is given.

    Raises:
        InputError: an unknown name of that kind, or a family whose places are not known.
    """
    if not isinstance(site, str) or not (site.startswith("blocks.") or site == "hook_embed"):
        return site
    for pattern, ours in ALIASES.items():
        found = re.fullmatch(pattern, site)
        if found:
            return ours.format(*found.groups(), **_names(model, site))
    known = ", ".join(pattern.replace(r"(\d+)", "N").replace("\\", "") for pattern in ALIASES)
    raise InputError(f"{site!r} is no place we know by TransformerLens's names; known: {known}")


def _names(model: nn.Module, site: str) -> dict[str, str]:
    adapter = adapter_for(model)
    found = {"layers": adapter.layers, "attention": adapter.attention, "out": adapter.projections[-1],
             "embedding": adapter.embedding, "down": adapter.down, "mlp": adapter.down.rpartition(".")[0]}  # fmt: skip
    found |= dict(zip(("attention_writes", "mlp_writes"), adapter.writes or (adapter.attention, "mlp"), strict=True))
    if adapter.reads:
        found["mlp_reads"] = adapter.reads[1]
    elif "resid_mid" in site:
        raise InputError(f"where {adapter.model_type} has {site!r} is not known; name a module")
    if "resid_mid" in site and getattr(model.config, "use_parallel_residual", False):
        raise InputError(f"attention and MLP of {adapter.model_type} read the same stream, so it has no {site!r}")
    if "mlp.hook" in site and not found["mlp"]:
        raise InputError(f"the MLP of {adapter.model_type} has no module of its own, so {site!r} is not known")
    return found


def check_aligned(clean: Mapping[str, Any], corrupt: Mapping[str, Any]) -> None:
    """Refuse inputs of unequal shapes."""
    for name, x in clean.items():
        other = corrupt.get(name)
        if isinstance(x, Tensor) and (not isinstance(other, Tensor) or x.shape != other.shape):
            shape = list(other.shape) if isinstance(other, Tensor) else "nothing"
            raise InputError(f"clean has {name} {list(x.shape)} and corrupt {shape}; pair prompts of equal length")


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run a model on inputs by name, without a cache."""
    given = dict(inputs)
    positional = (given.pop(""),) if "" in given else ()
    if "use_cache" not in given and accepts(model, "use_cache"):
        given["use_cache"] = False
    return model(*positional, **given)


def one_place(model: nn.Module, site: Where) -> str:
    """Return the name of the only place that is meant."""
    outs, ins = tapped(model, [aliased(model, site)])
    names = [*outs, *(place for places in ins.values() for place in places)]
    if len(names) != 1:
        raise InputError(f"{site!r} means {len(names)} places; name one")
    return names[0]


def values_at(
    model: nn.Module, inputs: Mapping[str, Any], places: Sequence[Where], *, stop: bool = False
) -> dict[str, Tensor]:
    """Return what each place holds. `stop`: leave the model after the last one.

    Raises:
        InputError: the model would drop out or normalise by the batch, or a place's module is called more than once.
    """
    check_mode(model)
    outs, ins = tapped(model, places)
    wanted = outs | set(ins)
    with torch.no_grad(), capture(model, lambda name, _: name in wanted, inputs=True, clone=True, stop=stop) as seen:
        run(model, inputs)
    for name in seen:
        if len(seen[name]) != 1:
            raise InputError(f"{name!r} was called {len(seen[name])} times; effects are of modules called once")
    found = {name: seen.tensor(name) for name in seen if name in outs}
    return found | {place: first_tensor(seen.inputs(name)[0]) for name in seen for place in ins.get(name, ())}


def first_tensor(tree: Any) -> Tensor:
    """Return the first tensor of a structure."""
    return next(leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


@contextmanager
def replaced(model: nn.Module, site: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what a place holds while the block runs.

    That is what a module passes on, or what it alone receives ("...:input"); of a layer's norm before the MLP also the
    residual stream as it is there ("...:stream"), which goes on beside the MLP too.
    """
    if site.endswith(":stream"):
        with _replaced_stream(model, site, change):
            yield
        return

    def changed(tree: Any) -> Any:
        leaves, spec = pytree.tree_flatten(tree)
        at = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        leaves[at] = change(leaves[at])
        return pytree.tree_unflatten(leaves, spec)

    module = model.get_submodule(site.removesuffix(":input"))
    with ExitStack() as hooks:
        if site.endswith(":input"):
            hook = module.register_forward_pre_hook(lambda m, args, kwargs: changed((args, kwargs)), with_kwargs=True)
        else:
            hook = module.register_forward_hook(lambda m, args, output: changed(output))
        hooks.callback(hook.remove)
        yield


@contextmanager
def apart(model: nn.Module, places: Sequence[Where]) -> Iterator[None]:
    """Give each module whose input is a place a copy of it while the block runs.

    A slope at the place is then through this module alone, as a change of it by `replaced` is, where others read the
    same tensor: the residual stream goes on beside a norm.
    """
    with ExitStack() as hooks:
        for place in places:
            if isinstance(place, str) and place.endswith(":input"):
                hooks.enter_context(replaced(model, place, lambda x: x.clone()))
        yield


@contextmanager
def _replaced_stream(model: nn.Module, site: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the stream between attention and MLP, through what attention adds to it: no module receives it alone."""
    adapter = adapter_for(model)
    layer, _, name = module_of(site).rpartition(".")
    parallel = getattr(model.config, "use_parallel_residual", False)
    if parallel or not adapter.reads or not layer.startswith(f"{adapter.layers}.") or name != adapter.reads[1]:
        raise InputError(f"{site!r} is no place of the residual stream; that is known of layers' norms before the MLP")
    before: list[Tensor] = []

    def added(y: Tensor) -> Tensor:
        x = before.pop() + y
        return y + (change(x) - x)  # (where nothing changes, not a digit does)

    with (
        replaced(model, f"{layer}.{adapter.reads[0]}:input", lambda x: before.append(x) or x),
        replaced(model, f"{layer}.{adapter.writes[0]}", added),
    ):
        yield
