"""Seeing and changing what modules pass on, by forward hooks that are gone when the block ends."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lineament._base.errors import InputError, near_miss
from lineament.graph.where import Where, select

Patch = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
"""(module, args, kwargs, output) -> the output to pass on instead; None leaves it."""


class _Enough(BaseException):
    """Ends a forward pass when all that was wanted has been seen. No error, so `except Exception` must not stop it."""


class Captured(Mapping[str, list[Any]]):
    """What modules received and passed on, by name, one entry per call.

    `captured[name]` are the outputs, or the inputs if only these were asked for; an input is `(args, kwargs)`. Tensors,
    tuples, dicts and model outputs keep their structure.
    """

    def __init__(self, modules: Mapping[str, nn.Module], outputs: bool) -> None:
        self._keys = {name: id(module) for name, module in modules.items()}  # a shared module has several names
        self._seen: dict[str, dict[int, list[tuple[Any, list[int | None]]]]] = {"inputs": {}, "outputs": {}}
        self._main = "outputs" if outputs else "inputs"

    def inputs(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """`(args, kwargs)` of each call."""
        return self._get("inputs", name)

    def outputs(self, name: str) -> list[Any]:
        """The output of each call."""
        return self._get("outputs", name)

    def tensor(self, name: str) -> Tensor:
        """The first tensor of the only call: a layer's hidden states.

        Raises:
            InputError: the module was called not at all or several times, or passed no tensor.
        """
        calls = self[name]
        tensors = [leaf for leaf in pytree.tree_leaves(calls[0]) if isinstance(leaf, Tensor)] if calls else []
        if len(calls) != 1 or not tensors:
            raise InputError(f"{name!r} was called {len(calls)} times; expected once, with a tensor")
        return tensors[0]

    def __getitem__(self, name: str) -> list[Any]:
        return self._get(self._main, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def _get(self, kind: str, name: str) -> list[Any]:
        if name not in self._keys:
            raise KeyError(f"{name!r} was not captured.{near_miss(name, self._keys)}")
        calls = self._seen[kind].get(self._keys[name], [])
        for tree, versions in calls:
            if versions != _versions(tree):
                raise RuntimeError(
                    f"{name!r}: a tensor was changed in place after it was captured; capture with clone=True"
                )
        return [tree for tree, _ in calls]

    def _keep(self, kind: str, module: nn.Module, tree: Any) -> None:
        self._seen[kind].setdefault(id(module), []).append((tree, _versions(tree)))

    def _complete(self, calls: int) -> bool:
        seen = self._seen[self._main]
        return all(len(seen.get(key, ())) >= calls for key in self._keys.values())


@contextmanager
def capture(
    model: nn.Module,
    where: Where,
    *,
    inputs: bool = False,
    outputs: bool = True,
    detach: bool = True,
    clone: bool = False,
    keep: Callable[[Tensor], Tensor] | None = None,
    stop: int | bool = False,
) -> Iterator[Captured]:
    """Record what the chosen modules receive and pass on while the block runs.

    Args:
        model: any module; unchanged after the block.
        where: which modules, see `select`.
        inputs: record `(args, kwargs)` of each call, as they were before it.
        outputs: record the outputs.
        detach: cut the tensors from the autograd graph.
        clone: copy them. Without, a later change in place is noticed and raises when the record is read.
        keep: applied to each tensor that is recorded, `lambda x: x.cpu()` say.
        stop: True (or 1) leaves the block as soon as each chosen module has been called once, `n` for n times; the rest
            of the forward pass is not computed. Put nothing after the forward pass in such a block.

    Yields:
        The record, filled as the model runs; read it in the block or after.

    Raises:
        InputError: nothing matches, or neither inputs nor outputs are asked for.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> with capture(model, "1", stop=True) as captured:
        ...     _ = model(torch.ones(1, 2))
        >>> captured.tensor("1").shape
        torch.Size([1, 2])
    """
    if not (inputs or outputs):
        raise InputError("capture was asked for neither inputs nor outputs; set one of them")
    chosen = select(model, where)
    recorder = _Recorder(
        Captured(chosen, outputs), lambda x: _take(x, detach, clone, keep), stop_before=0 if outputs else int(stop),
        stop_after=int(stop),
    )  # fmt: skip
    with ExitStack() as hooks:
        for module in {id(module): module for module in chosen.values()}.values():
            if inputs:
                hooks.callback(module.register_forward_pre_hook(recorder.before, with_kwargs=True).remove)
            if outputs:
                hooks.callback(module.register_forward_hook(recorder.after, with_kwargs=True).remove)
        try:
            yield recorder.record
        except _Enough as signal:
            if signal is not recorder.enough:  # then it belongs to a capture around this one
                raise


class _Recorder:
    """The hooks of one capture."""

    def __init__(
        self, record: Captured, take: Callable[[Tensor], Tensor], *, stop_before: int, stop_after: int
    ) -> None:
        self.record, self.take, self.enough = record, take, _Enough()
        self.stop_before, self.stop_after = stop_before, stop_after

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.record._keep("inputs", module, (self._taken(args), self._taken(kwargs)))
        self._leave(self.stop_before)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.record._keep("outputs", module, self._taken(output))
        self._leave(self.stop_after)

    def _taken(self, tree: Any) -> Any:
        return pytree.tree_map(lambda x: self.take(x) if isinstance(x, Tensor) else x, tree)

    def _leave(self, calls: int) -> None:
        if calls and self.record._complete(calls):
            raise self.enough


@contextmanager
def patch(model: nn.Module, changes: Mapping[Any, Patch]) -> Iterator[nn.Module]:
    """Change what the chosen modules pass on while the block runs.

    Args:
        model: any module; unchanged after the block.
        changes: `Where` -> function (module, args, kwargs, output) -> the new output, or None to leave it. Where
            several fit one module, they run in this order, each on what the one before gave. A shared module is changed
            once per call, whatever its names.

    Yields:
        The model.

    Raises:
        InputError: a `Where` matches nothing.

    Example:
        >>> model = nn.Sequential(nn.Identity(), nn.Identity())
        >>> with patch(model, {"0": lambda module, args, kwargs, output: output + 1}):
        ...     model(torch.zeros(1))
        tensor([1.])
    """
    chosen = [(fn, {id(m): m for m in select(model, where).values()}) for where, fn in changes.items()]
    with ExitStack() as hooks:
        for fn, modules in chosen:
            for module in modules.values():
                hooks.callback(module.register_forward_hook(fn, with_kwargs=True).remove)
        yield model


def _take(x: Tensor, detach: bool, clone: bool, keep: Callable[[Tensor], Tensor] | None) -> Tensor:
    x = x.detach() if detach else x
    x = x.clone() if clone else x
    return keep(x) if keep else x


def _versions(tree: Any) -> list[int | None]:
    """The in-place counters of a tree's tensors; a detached tensor shares its counter with the original."""
    tensors = (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return [None if x.is_inference() else x._version for x in tensors]
