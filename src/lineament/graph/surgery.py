"""Putting modules in place of others, for good or for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from lineament._base.errors import InputError
from lineament.graph.where import select


def swap(model: nn.Module, new: Mapping[str, nn.Module], *, untie: bool = False) -> dict[str, nn.Module]:
    """Replace modules for good.

    A new module takes over the train/eval mode of the one it replaces. Two traps are refused rather than fallen into: a
    module that stands in several places of which only some are named, and a weight tied to another place that would
    come loose (pass the very same Parameter on to the new module, or `untie=True`).

    Args:
        model: changed in place.
        new: dotted name -> its new module.
        untie: let tied weights come loose.

    Returns:
        The modules that were replaced, by name; `swap(model, them)` puts them back.

    Raises:
        InputError: an unknown name, a name inside another one, or one of the two traps. The model is then unchanged.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> old = swap(model, {"1": nn.GELU()})
        >>> model[1], old["1"]
        (GELU(approximate='none'), ReLU())
    """
    slots = _slots(model, new)
    if not untie:
        _check_ties(model, new)
    return _put(slots, new)


@contextmanager
def swapped(model: nn.Module, new: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Run a block with some modules replaced; the very same originals are back after it, also after an error.

    Args:
        model: changed during the block only.
        new: dotted name -> module that stands there in the block. It takes over the train/eval mode.

    Yields:
        The model.

    Raises:
        InputError: as `swap`, but tied weights may come loose for the while.
    """
    slots = _slots(model, new)
    old = _put(slots, new)
    try:
        yield model
    finally:
        for name, (parent, leaf) in slots.items():
            parent._modules[leaf] = old[name]


def tied(model: nn.Module) -> list[list[str]]:
    """List the groups of parameter names that are one and the same tensor.

    Example:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "head": nn.Linear(2, 4, bias=False)})
        >>> model["head"].weight = model["embed"].weight
        >>> tied(model)
        [['embed.weight', 'head.weight']]
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _slots(model: nn.Module, new: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, str]]:
    """Resolve every name to its parent and key before anything is changed, and check that the swap means one thing."""
    slots: dict[str, tuple[nn.Module, str]] = {}
    for name, module in new.items():
        if not name:
            raise InputError("the model itself (the empty name) can't be replaced; use the new module in its place")
        if not isinstance(module, nn.Module):
            raise InputError(f"{name!r} should become a {type(module).__name__}; expected an nn.Module")
        select(model, lambda found, _, name=name: found == name) if _has(model, name) else select(model, name)
        outer = next((other for other in new if name.startswith(other + ".")), None)
        if outer is not None:
            raise InputError(f"{name!r} lies inside {outer!r}, which is replaced as well; name one of them")
        parent, _, leaf = name.rpartition(".")
        slots[name] = (model.get_submodule(parent), leaf)
    _check_shared(model, new, slots)
    return slots


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _check_shared(model: nn.Module, new: Mapping[str, nn.Module], slots: Mapping[str, tuple[nn.Module, str]]) -> None:
    taken: dict[tuple[int, str], str] = {}
    for name, (parent, leaf) in slots.items():
        other = taken.setdefault((id(parent), leaf), name)
        if new[other] is not new[name]:
            raise InputError(
                f"{other!r} and {name!r} are one place (their parent is shared); give both the same module"
            )
    replaced = {id(parent._modules[leaf]): name for name, (parent, leaf) in slots.items()}
    for parent in model.modules():
        for leaf, child in parent._modules.items():
            if id(child) in replaced and (id(parent), leaf) not in taken:
                names = [name for name, module in model.named_modules(remove_duplicate=False) if module is child]
                raise InputError(
                    f"{' and '.join(names)} are one shared module; give a new module for each of these names"
                )


def _check_ties(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    kept = {id(parameter) for module in new.values() for parameter in module.parameters()}
    for names in tied(model):
        gone = [name for name in names if any(name.startswith(place + ".") for place in new)]
        if gone and len(gone) < len(names) and id(model.get_parameter(gone[0])) not in kept:
            stays = next(name for name in names if name not in gone)
            raise InputError(
                f"{gone[0]} is tied to {stays} and would come loose; give the new module that Parameter, or untie=True"
            )


def _put(slots: Mapping[str, tuple[nn.Module, str]], new: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    old: dict[str, nn.Module] = {}
    for name, (parent, leaf) in slots.items():
        child = parent._modules[leaf]
        assert child is not None
        old[name] = child
    for name, (parent, leaf) in slots.items():
        new[name].train(old[name].training)
        parent._modules[leaf] = new[name]
    return old
