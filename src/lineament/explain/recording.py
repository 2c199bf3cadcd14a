"""One forward pass, recorded: which operator made which node of the autograd graph, with what constants, and where.

Autograd numbers its nodes in the order they are made. Beneath autograd a dispatch mode sees every operator, also those
that C++ calls, right after its node got a number; so a node and the call behind it are matched by that number. Tensors
that autograd tracks are not kept, only their places; constants (masks, buffers, scalars) are, and a value that nobody
saved can be computed again (`tape.Values`).
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lineament._base.backends import plain_autograd
from lineament._base.errors import InputError
from lineament.graph import Where, select

SIDES = (":input", ":stream")
"""What a name of a module may end in, if not its output is meant: what it receives; the residual stream there."""

FUNCTIONAL = ("attention_dropout", "activation_dropout", "dropout")
"""Where modules that drop out by a function, as transformers' attention does, keep the rate."""

_AS_RESHAPE = ("aten::view", "aten::_unsafe_view", "aten::_reshape_alias")  # strides may differ when computed again


@dataclass(frozen=True)
class Slot:
    """The place of a tracked tensor among a call's arguments."""

    index: int


@dataclass(frozen=True)
class Call:
    """An operator with its arguments; tracked tensors are `Slot`s, in the order of the node's edges."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, tracked: Sequence[Any]) -> tuple[Any, ...]:
        """Compute the operator's outputs, without side effects, on given values of the tracked tensors."""
        with torch.no_grad():
            return self.apply(tracked)

    def apply(self, tracked: Sequence[Any]) -> tuple[Any, ...]:
        """As `run`, differentiably."""
        args, kwargs = pytree.tree_map_only(Slot, lambda slot: tracked[slot.index], (self.args, self.kwargs))
        found = _functional(self.func)(*args, **kwargs)
        return tuple(found) if isinstance(found, tuple | list) else (found,)

    def argument(self, name: str, default: Any = None) -> Any:
        """Return an argument by the name in the operator's schema."""
        if name in self.kwargs:
            return self.kwargs[name]
        schema = self.func._schema.arguments
        for position, argument in enumerate(schema):
            if argument.name == name:
                return self.args[position] if position < len(self.args) else argument.default_value
        return default

    def constant(self) -> bool:
        """Say whether a tensor that autograd doesn't track is among the arguments."""
        return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((self.args, self.kwargs)))


@dataclass
class Recording:
    """What one forward pass left behind."""

    output: Any = None
    scored: Any = None
    """What the target function made of the output, if the target is one."""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """Floating-point inputs as the leaves they were made, token numbers as given."""
    calls: dict[tuple[int, str], Call] = field(default_factory=dict)
    spans: list[tuple[int, int, str]] = field(default_factory=list)
    """(first node, end, module) by node numbers; an inner module's span lies inside the outer's."""
    taps: dict[str, list[tuple[Any, int]]] = field(default_factory=dict)
    """Name of a tap -> (node, output) of each call."""

    def owner(self) -> Callable[[int], str]:
        """Return a function from a node's number to the innermost module whose forward made it."""
        end = max((stop for _, stop, _ in self.spans), default=0)
        names = [""] * end
        # the longest first; of two equal ones the outer, which ended last
        for i in sorted(range(len(self.spans)), key=lambda i: (self.spans[i][0] - self.spans[i][1], -i)):
            start, stop, name = self.spans[i]
            names[start:stop] = [name] * (stop - start)
        return lambda number: names[number] if number < end else ""


def plain_name(name: str) -> str:
    """Reduce a node's or an operator's name to what both share: `ReluBackward0` and `aten::relu_` to `relu`."""
    name = name.rsplit("::", 1)[-1].rsplit("Backward", 1)[0].removesuffix("_forward")
    return name.replace("_", "").lower()


class _Recorder(TorchDispatchMode):
    """Keeps every operator that makes an autograd node."""

    def __init__(self, calls: dict[tuple[int, str], Call]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            self._note(func, args, kwargs)
        return func(*args, **kwargs)

    def _note(self, func: Any, args: tuple, kwargs: dict) -> None:
        slots: list[Slot] = []
        mutable, name = _facts(func)

        def keep(x: Any) -> Any:
            if isinstance(x, Tensor):
                if x.requires_grad:
                    slots.append(Slot(len(slots)))
                    return slots[-1]
                return x.clone() if mutable else x
            return type(x)(map(keep, x)) if type(x) in (list, tuple) else x

        call = Call(func, tuple(map(keep, args)), {name: keep(x) for name, x in kwargs.items()})
        if slots:
            # before an operator in place, autograd may copy what it overwrites, which takes numbers too
            for back in (1, 2, 3) if mutable else (1,):
                self.calls.setdefault((_number() - back, name), call)


@cache
def _facts(func: Any) -> tuple[bool, str]:
    """Return whether an operator writes into its arguments, and the name that it shares with its node."""
    return func._schema.is_mutable, plain_name(func._schema.name)


def _number() -> int:
    return torch._C._autograd._get_sequence_nr()


def _functional(func: Any) -> Any:
    """Return the operator without writing into its arguments or asking for strides."""
    name = func._schema.name
    if name in _AS_RESHAPE and func._overloadname in ("", "default"):
        return torch.ops.aten.reshape.default
    if not func._schema.is_mutable or not name.endswith("_"):
        return func
    packet = getattr(torch.ops.aten, name.rsplit("::", 1)[-1][:-1])
    return getattr(packet, func._overloadname, packet)


@contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Have every parameter tracked and own operators in plain autograd while the block runs; nothing stays changed.

    Raises:
        InputError: the model would drop out or normalise by the batch.
    """
    check_mode(model)
    flags = {p: p.requires_grad for p in model.parameters()}
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(plain_autograd())
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):  # the fused layer is one opaque node
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        try:
            for p in flags:
                if p.is_floating_point():
                    p.requires_grad_(True)
            yield
        finally:
            for p, flag in flags.items():
                p.requires_grad_(flag)


def check_mode(model: nn.Module) -> None:
    """Refuse a model whose passes would differ: it drops out, or normalises by the batch."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        rates = [module.p if isinstance(module, nn.modules.dropout._DropoutNd) else 0.0]
        rates += [getattr(module, name, 0.0) for name in FUNCTIONAL]  # (a module of that name counts by itself)
        if any(isinstance(rate, float | int) and rate > 0 for rate in rates):
            raise InputError(f"{name!r} drops out in training mode, so no two passes agree; call model.eval() first")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            raise InputError(f"{name!r} normalises by the batch in training mode; call model.eval() first")


def record(model: nn.Module, inputs: Mapping[str, Any], at: Sequence[Where] = (), *, target: Any = None) -> Recording:
    """Run the model on its inputs inside `prepared` and keep what explaining needs.

    Args:
        model: any module. Hooks are gone afterwards.
        inputs: keyword arguments; the name "" is the one positional argument.
        at: modules whose output shall be tapped; the glob `"*.o_proj:input"` taps what they receive.
        target: if it is a function of the output, it is recorded too.
    """
    found = Recording(inputs=_leaves(inputs))
    given = dict(found.inputs)
    positional = (given.pop(""),) if "" in given else ()
    if "use_cache" not in given and accepts(model, "use_cache"):
        given["use_cache"] = False  # pyright: ignore[reportArgumentType]
    with ExitStack() as hooks:
        try:
            _watch(model, found, at, hooks)
            with _Recorder(found.calls):
                found.output = model(*positional, **given)
                found.scored = target(found.output) if callable(target) else None
        except RuntimeError as error:
            if "inference tensor" in str(error).lower():
                raise InputError("the model's weights were made in inference mode; load them outside of it") from error
            if "channels" in str(error):
                raise InputError(f"the input doesn't fit the model: {str(error).splitlines()[0]}") from error
            raise
    return found


def scored(recording: Recording, target: Any) -> Any:
    """Return the target, a function's value being the recorded one."""
    return (lambda output: recording.scored) if callable(target) else target


def accepts(model: nn.Module, name: str) -> bool:
    """Say whether a model's forward names this argument."""
    return name in inspect.signature(model.forward).parameters


def _leaves(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Make leaves of the inputs that relevance can flow to; masks and numbers stay as they are."""
    return {
        name: x.detach().clone().requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point() and "mask" not in name
        else x
        for name, x in inputs.items()
    }


def _watch(model: nn.Module, found: Recording, at: Sequence[Where], hooks: ExitStack) -> None:
    """Hook every module for its span of node numbers, and the tapped ones for their tensors."""
    outs, ins = tapped(model, at)
    starts: list[int] = []

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            starts.append(_number())
            for place in ins.get(name, ()):
                _tap(found, place, (args, kwargs))

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            found.spans.append((starts.pop(), _number(), name))
            if name in outs:
                _tap(found, name, output)

        return hook

    for name, module in model.named_modules():
        hooks.callback(module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
        hooks.callback(module.register_forward_hook(after(name), with_kwargs=True).remove)


def module_of(place: str) -> str:
    """Return the name of the module that a place is named after."""
    return next((place.removesuffix(side) for side in SIDES if place.endswith(side)), place)


def tapped(model: nn.Module, at: Sequence[Where]) -> tuple[set[str], dict[str, list[str]]]:
    """Return the names of the modules whose outputs are tapped, and of those whose inputs are, with their places."""
    outs: set[str] = set()
    ins: dict[str, list[str]] = {}
    first = {id(module): name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    for where in at:
        side = next((side for side in SIDES if isinstance(where, str) and where.endswith(side)), "")
        wanted = where.removesuffix(side) if isinstance(where, str) else where
        for name in dict.fromkeys(first[id(module)] for module in select(model, wanted).values()):
            if not side:
                outs.add(name)
            elif f"{name}{side}" not in ins.setdefault(name, []):
                ins[name].append(f"{name}{side}")
    return outs, ins


def _tap(found: Recording, name: str, tree: Any) -> None:
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            edge = get_gradient_edge(leaf)
            found.taps.setdefault(name, []).append((edge.node, edge.output_nr))
            return
